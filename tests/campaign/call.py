"""Python code as a user would write it, run as a command: `python call.py CODE`. Expected errors become one line."""

import sys

from tokenizer.errors import InputError

if __name__ == "__main__":
    try:
        exec(compile(sys.argv[1], "code of a user", "exec"), {"__name__": "code"})
    except (InputError, ValueError, TypeError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
