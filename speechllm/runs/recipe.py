"""The entry point of a recipe: one clear line instead of a traceback for expected errors.

A recipe parses its configuration (`parse_config`) before it imports anything heavy, and ends with `run_recipe`.
"""

import contextlib
import errno
import inspect
import json
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from speechllm.runs.config import yield_to_first_process
from speechllm.runs.signals import end_with_parent, interruptible, say_interrupted
from tokenizer.claims import claim_folder
from tokenizer.errors import InputError

T = TypeVar("T")
PAUSE_S = 0.2  # in which threads give back what they hold
EXPECTED = (InputError, OSError, ImportError)  # their messages say how to fix the problem
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no room for a file, on the disk or by the user's limits
# what libraries that write in other languages make of these
FULL_WORDS = "No space left on device", "Disk quota exceeded", "File too large", "PytorchStreamWriter", "unexpected pos"


@contextlib.contextmanager
def log_printed() -> Iterator[None]:
    """Print what the packages log, such as what a corpus holds; of several processes, only the first does."""
    handler = logging.StreamHandler(sys.stdout)
    loggers = [logging.getLogger(package) for package in ("tokenizer", "speechllm")]
    for logger in loggers if os.environ.get("RANK", "0") == "0" else ():
        logger.setLevel(logging.INFO)
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


def run_recipe(main: Callable[[T], None], config: T) -> None:
    """Call `main` with the configuration; exit with the message of an expected error, or of a signal to end."""
    end_with_parent()
    try:
        with interruptible(), log_printed():
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
    else:
        leave_group()
    finally:
        end_workers()


def end_workers() -> None:
    """End the workers of this process, such as data loaders: Python would ask them to, which they ignore, and wait."""
    workers = multiprocessing.active_children()
    if workers and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch takes their end for a failure
    for worker in workers:
        worker.kill()


def leave_group() -> None:
    """Leave the group of processes that torch.distributed made, if there is one.

    Here and not where `main` ends: with gloo, PyTorch waits for the group's threads without letting them have the
    interpreter, which one that still holds a tensor of the last exchange waits for, and so both would wait forever.
    After an error others may still be in the middle of an exchange: leaving would wait for them.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        time.sleep(PAUSE_S)
        distributed.destroy_process_group()


def out_of_space(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised from, says that a file cannot be written for want of space."""
    while error is not None:
        if getattr(error, "errno", None) in FULL or any(words in str(error) for words in FULL_WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False


def claim_output(folder: str | Path, config: Any) -> Path:
    """Claim a folder for the recipe that defines the configuration, see `claim_folder`, which says what it raises."""
    return claim_folder(folder, Path(inspect.getfile(type(config))).stem)


def holds_config(file: str | Path, config: Any) -> bool:
    """Whether a file holds results of this recipe, known by their configuration; its keys may be more by now."""
    try:
        held = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    held = held.get("config") if isinstance(held, dict) else None
    return isinstance(held, dict) and bool(held) and held.keys() <= asdict(config).keys()
