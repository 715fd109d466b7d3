"""Files that appear whole or not at all, and how they are read again."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def atomic_file(file: str | Path) -> Iterator[Path]:
    """A path to write to that becomes `file` when the block ends without an error, for several processes at once."""
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def write_text(file: str | Path, text: str) -> None:
    """Write a file so that it appears whole or not at all."""
    with atomic_file(file) as part:
        part.write_text(text, encoding="utf-8")


def write_json(file: str | Path, value: Any) -> None:
    """Write indented JSON so that it appears whole or not at all."""
    write_text(file, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(file: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line so that the file appears whole or not at all."""
    write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_json(file: str | Path) -> dict[str, Any]:
    """The object that a .json file holds, an empty one where there is no file."""
    return json.loads(Path(file).read_text(encoding="utf-8")) if Path(file).exists() else {}


def read_jsonl(file: str | Path) -> list[dict[str, Any]]:
    """The objects of a file with one a line, none where there is no file."""
    if not Path(file).exists():
        return []
    with open(file, encoding="utf-8") as lines:  # not splitlines, which also ends a line at what texts may hold
        return [json.loads(line) for line in lines]


@contextlib.contextmanager
def atomic_folder(folder: str | Path) -> Iterator[Path]:
    """A folder to write into that takes the place of `folder` when the block ends without an error."""
    folder = Path(folder)
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    yield part
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)
