"""The entry point of a recipe: one clear line instead of a traceback for expected errors.

A recipe parses its configuration (`parse_config`) before it imports anything heavy, and ends with `run_recipe`.
"""

import inspect
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import yaml

from speechllm.runs.config import yield_to_first_process
from tokenizer.claims import claim_folder
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


def claim_output(folder: str | Path, config: Any, mark: str | None = None) -> Path:
    """Claim a folder for the recipe that defines the configuration, see `claim_folder`, which says what it raises.

    Folders of earlier versions are known by the configuration that they hold, or by `mark`, a file that no other recipe
    wrote.
    """
    recipe = Path(inspect.getfile(type(config))).stem
    return claim_folder(folder, recipe, lambda own: holds_config(own, config) or bool(mark and (own / mark).is_file()))


def holds_config(folder: Path, config: Any) -> bool:
    """Whether a folder holds a configuration of this recipe, whose keys may have become more since."""
    found = (_held_config(folder / name) for name in ("config.yaml", "demo.json", "results.json"))
    return any(held and held.keys() <= asdict(config).keys() for held in found)


def _held_config(file: Path) -> dict[str, Any] | None:
    try:
        text = file.read_text(encoding="utf-8")
        held = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError):
        return None
    if file.name == "results.json" and isinstance(held, dict):
        held = held.get("config")
    return held if isinstance(held, dict) else None
