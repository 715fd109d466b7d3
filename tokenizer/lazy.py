"""A package's public names, imported when they are first used: who loads a codec never imports training code."""

import ast
import importlib
import inspect
import sys
from collections.abc import Callable
from typing import Any


def lazy_names(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The `__getattr__` and `__dir__` (PEP 562) of a package whose imports stand below `if TYPE_CHECKING:`.

    These imports are the table: type checkers read them, and this reads them too, so that a name is added as ever.
    """
    module = sys.modules[package]
    block = next(node for node in ast.parse(inspect.getsource(module)).body if isinstance(node, ast.If))
    sources = {
        alias.name: str(node.module) for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }

    def load(name: str) -> Any:
        if name not in sources:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(sources[name]), name)
        setattr(module, name, value)  # the next use finds it there
        return value

    return load, lambda: sorted({*vars(module), *sources})
