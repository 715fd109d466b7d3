"""Whose an output is: a job writes only what is new, empty, or its own; nobody's files are replaced or deleted."""

import atexit
import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from tokenizer.files import is_free, is_part, remove_parts, write_json
from tokenizer.locks import LOCK, OutputError, lock, locked

CLAIM = "claim.json"  # holds no path, so that a folder stays claimed when it is moved
SHOWN = 3


def claim_folder(folder: str | Path, job: str, own: Callable[[Path], bool] | None = None) -> Path:
    """Make a folder the output of a kind of job, such as "train_asr", and lock it until this process ends.

    The folder may be new or empty, or one that a job of this kind claimed before: FOLDER/claim.json names it.
    own: whether a folder without a claim is the job's all the same. What killed processes left half written is deleted.
    A process that ends having written nothing gives its claim up.
    Raises OutputError for every other folder, one that cannot be written, and one in use.
    """
    folder = Path(folder)
    new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _check(folder, job, own)
        lock(folder / LOCK, folder)
        if _check(folder, job, own) != job:  # once more, as another job may have been faster
            write_json(folder / CLAIM, {"job": job})
            atexit.register(_give_up, folder.absolute(), new, os.getpid())
        remove_parts(folder)
    except OSError as error:
        raise OutputError(f"cannot write the folder {folder}: {error}") from error
    return folder


def new_folder(folder: str | Path, *sources: str | Path) -> Path:
    """Check the place of a folder that `atomic_folder` will write at once.

    sources: what is read. Raises OutputError unless it is new or empty, outside the sources, and can be written; also
    for the present folder, which a shell would lose.
    """
    folder = Path(folder)
    outside(folder, *sources)
    if folder.resolve() == Path.cwd():
        raise OutputError(f"{folder} is the present folder, which cannot be replaced: name a new one")
    if not is_free(folder):
        raise OutputError(f"{folder} already exists: choose another folder or delete it")
    above = next(parent for parent in folder.absolute().parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise OutputError(f"cannot write {folder}: {above} is no folder in which you may write")
    return folder


def claim_file(file: str | Path, own: Callable[[Path], bool] | None = None) -> Path:
    """Check and lock the place of a file that will be written.

    own: whether an existing file is an earlier result of the same job. Raises OutputError for any other existing file
    that is not empty, and for a place that cannot be written.
    """
    file = Path(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists() and not file.is_file():
            raise OutputError(f"{file} is no file: expected the name of a file to write")
        if file.exists() and file.stat().st_size and not (own and own(file)):
            raise OutputError(f"{file} already exists: choose another name or delete it")
        lock(_beside(file), file)
    except OSError as error:
        raise OutputError(f"cannot write {file}: {error}") from error
    return file


def outside(output: str | Path, *sources: str | Path) -> None:
    """Raise OutputError for an output that is one of the sources or inside one."""
    place = Path(output).resolve()
    for source in sources:
        if Path(source).is_dir() and place.is_relative_to(Path(source).resolve()):
            raise OutputError(f"{output} is inside {source}, which is read: choose a folder outside it")


def _beside(output: Path) -> Path:
    return output.with_name(f".{output.name}{LOCK}")


def _check(folder: Path, job: str, own: Callable[[Path], bool] | None) -> str | None:
    """The claim of a folder that the job may have; OutputError for another folder."""
    held = _claim_of(folder)
    rest = {CLAIM, LOCK} if held else {LOCK}
    others = sorted(name for name in os.listdir(folder) if name not in rest and not is_part(name))
    if not others or held == job or (held is None and own is not None and own(folder)):
        return held
    if held:
        raise OutputError(f"{folder} is the output of {held}, not of {job}: choose another or an empty folder")
    found = ", ".join(others[:SHOWN] + ["..."] * (len(others) > SHOWN))
    raise OutputError(f"{folder} holds what {job} did not write ({found}): choose another or an empty folder")


def _give_up(folder: Path, new: bool, process: int) -> None:
    if process != os.getpid() or not folder.is_dir():
        return
    with contextlib.suppress(OSError):  # on NFS a file that is open, as the lock is, stays by another name
        if locked(folder) and set(os.listdir(folder)) <= {CLAIM, LOCK}:
            for name in os.listdir(folder):
                (folder / name).unlink()
            if new:
                folder.rmdir()


def _claim_of(folder: Path) -> str | None:
    """The job that claimed a folder; None without a claim, also where a file of that name is something else."""
    try:
        match json.loads((folder / CLAIM).read_text(encoding="utf-8")):
            case {"job": str(job), **rest} if not rest:
                return job
    except (FileNotFoundError, IsADirectoryError, ValueError):
        pass
    return None
