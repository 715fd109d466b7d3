"""Reading files that others wrote: what libraries say about a broken one becomes one line. Does not import torch."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizer.errors import InputError

AGAIN = "copy or download it again"
LFS_POINTER = b"version https://git-lfs"
CHECKED = (".safetensors", ".json", ".bin", ".pt", ".pth", ".ckpt", ".npy", ".parquet")
LONGEST = 300  # characters of another library's message


@contextlib.contextmanager
def reading(
    place: str | Path, expected: str, mend: str = AGAIN, error_class: type[InputError] = InputError
) -> Iterator:
    """Translate what goes wrong while a library reads a file or a folder into one line that names the file.

    place: the file, folder or hub name; expected: what it should be; mend: how to get it right. Errors that are clear
    already pass: this package's own, a missing package, too little memory, and the system's about a named file.
    """
    try:
        yield
    except (InputError, ImportError, MemoryError):
        raise
    except Exception as error:  # each library has its own, tokenizers not even a class for them
        if isinstance(error, OSError) and error.filename is not None:
            raise
        if not Path(place).exists():
            raise FileNotFoundError(unreachable(place, expected)) from error
        if found := find_damage(place):
            raise error_class(f"{found}: expected {expected}; {mend}") from error
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise error_class(f"{place} is not {expected}, or is damaged ({reason}): {mend}") from error


def unreachable(name: str | Path, expected: str) -> str:
    """The message about a hub name that cannot be had."""
    return (
        f"{name}: no such folder, and no hub model that can be reached: expected {expected}; if it is gated or "
        "private, log in with hf auth login; without a network, download it elsewhere and give its folder"
    )


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks, cut where it becomes a list."""
    text = " ".join(str(error).split())
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


def find_damage(place: str | Path) -> str | None:
    """What is wrong with a file, or with the first such file of a folder; None if nothing can be seen from outside."""
    path = Path(place)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in CHECKED and file.is_file())
        return next((found for file in files if (found := find_damage(file))), None)
    if not path.is_file():
        return None
    with path.open("rb") as file:
        start = file.read(len(LFS_POINTER))
    if not start:
        return f"{path} is empty"
    if start == LFS_POINTER:
        return f"{path} is the pointer of Git LFS and not the file itself (run `git lfs pull`)"
    if path.suffix == ".json":
        return _json_damage(path)
    return _safetensors_damage(path) if path.suffix == ".safetensors" else None


def _json_damage(path: Path) -> str | None:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also of bytes that are not UTF-8
        return f"{path} is no JSON ({one_line(error)})"
    return None


def _safetensors_damage(path: Path) -> str | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy"):
            return None
    except SafetensorError as error:
        return f"{path} is cut short or damaged ({one_line(error)})"


def read_json_object(file: str | Path, expected: str, mend: str = AGAIN) -> dict[str, Any]:
    """The object in a JSON file. Raises InputError, which names the file, for a broken one and for other JSON."""
    with reading(file, expected, mend):
        values = json.loads(Path(file).read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise InputError(f"{file} holds a {type(values).__name__} and not an object: expected {expected}; {mend}")
    return values
