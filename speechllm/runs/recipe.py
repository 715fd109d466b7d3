"""The entry point of a recipe: one clear line instead of a traceback for expected errors.

A recipe parses its configuration (`parse_config`) before it imports anything heavy, and ends with `run_recipe`.
"""

import logging
import os
import sys
from collections.abc import Callable
from typing import TypeVar

from speechllm.runs.config import yield_to_first_process
from tokenizer.errors import InputError

T = TypeVar("T")
EXPECTED = (InputError, OSError, ImportError)  # their messages say how to fix the problem


def show_progress() -> None:
    """Print what the packages log, such as what a corpus holds; of several processes, only the first does."""
    if os.environ.get("RANK", "0") == "0":
        logging.basicConfig(format="%(message)s", stream=sys.stdout)
        for package in ("tokenizer", "speechllm"):
            logging.getLogger(package).setLevel(logging.INFO)


def run_recipe(main: Callable[[T], None], config: T) -> None:
    """Call `main` with the configuration; exit with the message of an expected error."""
    show_progress()
    try:
        main(config)
    except EXPECTED as error:
        yield_to_first_process()
        sys.exit(f"error: {error}")
    except SystemExit:
        yield_to_first_process()
        raise
