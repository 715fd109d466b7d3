"""How a recipe starts: configuration from the command line, and one clear line instead of a traceback.

Its configuration stands first and is read (`parse_config`) before anything heavy is imported; `run_recipe` comes last.
"""

import sys
from collections.abc import Callable
from typing import TypeVar

from speechllm.runs.config import let_first_speak
from tokenizer.errors import InputError

T = TypeVar("T")
EXPECTED = (InputError, OSError, ImportError)  # their messages say how to mend what is wrong


def run_recipe(main: Callable[[T], None], config: T) -> None:
    """Call `main` with the configuration; exit with the message of an expected error."""
    try:
        main(config)
    except EXPECTED as error:
        let_first_speak()
        sys.exit(f"error: {error}")
    except SystemExit:
        let_first_speak()
        raise
