"""The entry point of a recipe: one clear line instead of a traceback for expected errors.

A recipe parses its configuration (`parse_config`) before it imports anything heavy, and ends with `run_recipe`.
"""

import sys
from collections.abc import Callable
from typing import TypeVar

from speechllm.runs.config import yield_to_first_process
from tokenizer.errors import InputError

T = TypeVar("T")
EXPECTED = (InputError, OSError, ImportError)  # their messages say how to fix the problem


def run_recipe(main: Callable[[T], None], config: T) -> None:
    """Call `main` with the configuration; exit with the message of an expected error."""
    try:
        main(config)
    except EXPECTED as error:
        yield_to_first_process()
        sys.exit(f"error: {error}")
    except SystemExit:
        yield_to_first_process()
        raise
