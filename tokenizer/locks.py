"""Locks: one process at a time writes an output. A lock ends with its process, however that ends."""

import atexit
import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import IO

from tokenizer.errors import InputError

LOCK = ".lock"  # in a folder that is an output
TAKEN = (errno.EACCES, errno.EAGAIN)
_held: dict[Path, tuple[int, IO[str]]] = {}  # by lock file: process and open file; a fork inherits entries, not locks


class OutputError(InputError):
    """An output that may not or cannot be written."""


def lock(file: str | Path, output: str | Path) -> None:
    """Let no other process lock the same file before this one ends; `output` is what messages call it.

    The lock is one of the kernel (POSIX): nothing stale is left by a process that was killed, a number that is used
    again does no harm, and network disks that know locks keep it between machines. What the file holds only says whose
    it is, and decides where a disk knows no locks. Locking again in the same process changes nothing.
    Raises OutputError if another process holds the lock.
    """
    file = Path(file).parent.resolve() / Path(file).name
    while not _holds(file):  # again if the former owner has just deleted the file
        handle = file.open("a+", encoding="utf-8")
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner, sure = _owner(handle), error.errno in TAKEN
            if sure or _may_live(owner):
                handle.close()
                raise OutputError(_in_use(output, file, owner, sure)) from error
        _held[file] = os.getpid(), handle
        handle.truncate(0)
        json.dump({"host": socket.gethostname(), "process": os.getpid(), "since": time.strftime("%F %T")}, handle)
        handle.flush()


def locked(folder: str | Path) -> bool:
    """Whether this process holds the lock of a folder, or of one that it is in."""
    place = Path(folder).resolve()
    return any(_holds(parent / LOCK) for parent in (place, *place.parents))


def is_running(process: int) -> bool:
    """Whether a process of this machine exists."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # of another user; no number of a process
        return True
    return True


def _holds(file: Path) -> bool:
    process, handle = _held.get(file, (0, None))
    if handle is None or process != os.getpid() or not file.exists():
        return False
    return os.path.samestat(os.fstat(handle.fileno()), file.stat())


def _owner(handle: IO[str]) -> dict[str, str | int]:
    handle.seek(0)
    try:
        return dict(json.load(handle))
    except ValueError:  # being written
        return {}


def _may_live(owner: dict[str, str | int]) -> bool:
    return bool(owner) and (owner["host"] != socket.gethostname() or is_running(int(owner["process"])))


def _in_use(output: str | Path, file: Path, owner: dict[str, str | int], sure: bool) -> str:
    who = "process {process} on {host} since {since}".format_map(owner) if owner else "another process"
    mend = "" if sure else f"; if it has ended, delete {file}"  # the kernel knows; the content of a file may be old
    return f"{output} is being written by {who}: wait for it, stop it, or choose another output{mend}"


@atexit.register
def _release() -> None:
    for file, (process, handle) in _held.items():
        if process == os.getpid():
            if _holds(file):
                file.unlink(missing_ok=True)
            handle.close()
