"""Fail early if `tokenizer` is another package: an Icelandic text tokenizer has the same name."""

import importlib.util
from pathlib import Path

_spec = importlib.util.find_spec("tokenizer")
_found = Path(_spec.origin) if _spec and _spec.origin else None
if _found is None or not _found.with_name("rates.py").is_file():
    raise ImportError(
        f"speechllm needs its own package `tokenizer`, but found {_found or 'none'}: run "
        "`pip uninstall tokenizer` and then `pip install --force-reinstall --no-deps speechllm`"
    )
