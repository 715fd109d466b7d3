"""Atomic writing of files and folders, and reading them back."""

import contextlib
import functools
import json
import os
import re
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizer.locks import OutputError, is_running, locked
from tokenizer.reading import read_json_object
from tokenizer.tables import TableError, json_rows, read_text

WRITTEN = ".written"  # beside a folder that is replaced: what `atomic_folder` wrote into it
# What a process is writing: .NAME.HOST-PROCESS-RANDOM.part; `benchmark.py` writes .NAME.PROCESS.part
PART = re.compile(r"\..+\.(?:([^.]+)-(?=\d+-))?(\d+)(?:-([0-9a-f]{8}))?\.part")


@contextlib.contextmanager
def atomic_file(file: str | Path) -> Iterator[Path]:
    """A temporary path that replaces `file` when the block ends without an error; safe for concurrent processes."""
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = _part(file)
    try:
        yield part
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def write_text(file: str | Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_file(file) as part:
        # names that are not UTF-8 are spelt as JSON reads them back
        part.write_text(text, encoding="utf-8", errors="backslashreplace")


def json_text(value: Any, indent: int | None = None) -> str:
    """A value as JSON, which knows neither NaN nor infinities: they become null."""
    try:
        return json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    except ValueError:
        finite = json.loads(json.dumps(value), parse_constant=lambda _: None)
        return json.dumps(finite, indent=indent, ensure_ascii=False)


def write_json(file: str | Path, value: Any) -> None:
    """Write indented JSON atomically."""
    write_text(file, json_text(value, indent=2) + "\n")


def write_jsonl(file: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object per line, atomically."""
    write_text(file, "".join(json_text(row) + "\n" for row in rows))


def read_json(file: str | Path) -> dict[str, Any]:
    """The object in a JSON file, or an empty one if there is no such file. Raises InputError for anything else."""
    return read_json_object(file, "an object in JSON") if Path(file).exists() else {}


def read_jsonl(file: str | Path) -> list[dict[str, Any]]:
    """The objects in a file with one JSON object per line, or none if there is no such file.

    A last line without its end, which a killed process may leave, is left out unless it is whole. Raises TableError,
    which names the row, for any other that is no JSON object.
    """
    if not Path(file).exists():
        return []
    whole, _, last = read_text(file).rpartition("\n")
    rows = [cells for _, cells in json_rows(str(file), whole)]
    with contextlib.suppress(TableError):
        rows += [cells for _, cells in json_rows(str(file), last)]
    return rows


def read_journal(file: str | Path) -> list[dict[str, Any]]:
    """As `read_jsonl`, of what a killed job appended; a last line that is incomplete is removed from the file."""
    rows = read_jsonl(file)
    write_jsonl(file, rows)
    return rows


@contextlib.contextmanager
def atomic_folder(folder: str | Path) -> Iterator[Path]:
    """A temporary folder that replaces `folder` when the block ends without an error.

    What else somebody keeps in `folder` stays there. Raises OutputError if `folder` exists and is not empty, unless it
    is in a folder that this process has claimed.
    """
    folder = Path(folder)
    part, before = _part(folder), _part(folder.with_name(f"{folder.name}.before"))
    if not is_free(folder) and not locked(folder.parent):
        raise OutputError(f"{folder} already exists: choose another folder or delete it")
    shutil.rmtree(part, ignore_errors=True)  # what could not be deleted last time, as a file in use on NFS
    part.mkdir(parents=True)
    try:
        yield part
        if locked(folder.parent):
            _replace_own(folder, part, before)
        os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(before, ignore_errors=True)


def _replace_own(folder: Path, part: Path, before: Path) -> None:
    """Move `folder` to `before`, and what is in it beyond what was written there last time into `part`."""
    names, record = os.listdir(part), folder.parent / WRITTEN
    written = read_json(record)
    if folder.exists():
        held = set(os.listdir(folder))
        for name in held - set(written.get(folder.name, held)) - set(names):
            os.replace(folder / name, part / name)
        shutil.rmtree(before, ignore_errors=True)  # as `part` in `atomic_folder`
        os.replace(folder, before)
    write_json(record, written | {folder.name: sorted(names)})


def is_free(folder: Path) -> bool:
    """Whether there is nothing, or an empty folder."""
    return not any(folder.iterdir()) if folder.is_dir() else not folder.exists()


def is_part(name: str) -> bool:
    """Whether a name is one of those under which `atomic_file` and `atomic_folder` write."""
    return PART.fullmatch(name) is not None


def remove_parts(folder: Path) -> None:
    """Delete what processes of this machine that have ended left half written in a folder and its subfolders."""
    for path in (*folder.glob(".*.part"), *folder.glob("*/.*.part")):
        if (found := PART.fullmatch(path.name)) and _has_ended(*found.groups()):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _has_ended(host: str | None, process: str, random: str | None) -> bool:
    """Whether the process of a part's name has ended; False for one of another machine, of which nobody knows."""
    if host not in (None, _host()):
        return False
    if random and int(process) == os.getpid():  # a container's processes have the same numbers after every start
        return random != _random(os.getpid())
    return not is_running(int(process))


def _part(path: Path) -> Path:
    return path.with_name(f".{path.name}.{_host()}-{os.getpid()}-{_random(os.getpid())}.part")


def _host() -> str:
    return socket.gethostname().replace(".", "_")


@functools.cache
def _random(process: int) -> str:
    """What tells this process from others of its number, as in other containers; a fork draws its own."""
    return os.urandom(4).hex()
