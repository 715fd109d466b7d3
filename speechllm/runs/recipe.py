"""The entry point of a recipe: one clear line instead of a traceback for expected errors.

A recipe parses its configuration (`parse_config`) before it imports anything heavy, and ends with `run_recipe`.
"""

import errno
import sys
from collections.abc import Callable
from typing import TypeVar

from speechllm.runs.config import yield_to_first_process
from speechllm.runs.signals import end_with_parent, interruptible, say_interrupted
from tokenizer.errors import InputError

T = TypeVar("T")
EXPECTED = (InputError, OSError, ImportError)  # their messages say how to fix the problem
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no room for a file, on the disk or by the user's limits
# what libraries that write in other languages make of these
FULL_WORDS = "No space left on device", "Disk quota exceeded", "File too large", "PytorchStreamWriter", "unexpected pos"


def run_recipe(main: Callable[[T], None], config: T) -> None:
    """Call `main` with the configuration; exit with the message of an expected error, or of a signal to end."""
    end_with_parent()
    try:
        with interruptible():
            main(config)
    except KeyboardInterrupt as interrupt:
        sys.exit(say_interrupted(interrupt))
    except SystemExit:
        yield_to_first_process()
        raise
    except Exception as error:
        full = out_of_space(error)
        if not full and not isinstance(error, EXPECTED):
            raise
        yield_to_first_process()
        advice = "; the disk is full: make room, and the same command goes on from what is finished" if full else ""
        sys.exit(f"error: {error}{advice}")


def out_of_space(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised from, says that a file cannot be written for want of space."""
    while error is not None:
        if getattr(error, "errno", None) in FULL or any(words in str(error) for words in FULL_WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False
