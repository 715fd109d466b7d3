"""The entry point of a recipe: one clear line instead of a traceback for expected errors.

A recipe parses its configuration (`parse_config`) before it imports anything heavy, and ends with `run_recipe`.
"""

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import TypeVar

from speechllm.runs.config import yield_to_first_process
from tokenizer.errors import InputError

T = TypeVar("T")
EXPECTED = (InputError, OSError, ImportError)  # their messages say how to fix the problem


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
    """Call `main` with the configuration; exit with the message of an expected error."""
    try:
        with log_printed():
            main(config)
    except EXPECTED as error:
        yield_to_first_process()
        sys.exit(f"error: {error}")
    except SystemExit:
        yield_to_first_process()
        raise
