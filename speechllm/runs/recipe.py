"""How a recipe starts: configuration from the command line, and one clear line instead of a traceback."""

import sys
from collections.abc import Callable
from typing import TypeVar

from speechllm.runs.config import parse_config
from tokenizer.errors import InputError

T = TypeVar("T")
EXPECTED = (InputError, OSError, ImportError)  # their messages say how to mend what is wrong


def run_recipe(main: Callable[[T], None], config_class: type[T]) -> None:
    """Call `main` with the configuration the command line asks for; exit with the message of an expected error."""
    config = parse_config(config_class)
    try:
        main(config)
    except EXPECTED as error:
        sys.exit(f"error: {error}")
