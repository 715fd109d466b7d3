"""One hostile case: what is prepared, what is run, what is expected, and whether it came so.

A case has a folder of its own, in which its command runs. Whatever lies there before the command is the user's: it must
be there afterwards, unchanged, and nothing new may appear outside the places that the command was given to write to.
"""

import fnmatch
import hashlib
import os
import re
import shutil
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from start import TRACEBACK, Ended, Lane

Command = str | Sequence[str]
FEW = 6  # lines on stderr for one mistake
SOME = 40  # with warnings and a list of skipped recordings


@dataclass(frozen=True)
class Outcome:
    """kind: as it stands in the table; pattern: of what is printed, without regard to case; check: of the folder."""

    kind: str
    codes: tuple[int, ...]
    pattern: str = ""
    check: Callable[[Path, str], object] | None = None  # folder, what was printed -> anything true
    lines: int = SOME

    def problems(self, ended: Ended, folder: Path) -> list[str]:
        said = ended.output + ended.errors
        found = [ended.trouble] if ended.trouble else []
        if TRACEBACK in said:
            found.append("traceback")
        if ended.code not in self.codes:
            found.append(f"exit code {ended.code}")
        if len(ended.lines) > self.lines:
            found.append(f"{len(ended.lines)} lines on stderr")
        if not re.search(self.pattern, said, re.IGNORECASE | re.DOTALL):
            found.append(f"does not say {self.pattern!r}")
        if self.check and not found:
            try:
                if not self.check(folder, said):
                    found.append("another result")
            except Exception as error:
                found.append(f"another result ({error!r})")
        return found


def refused(pattern: str, check: Callable[[Path, str], object] | None = None, lines: int = FEW) -> Outcome:
    """An error of a few lines, of which one matches."""
    return Outcome("refused", (1, 2), pattern, check, lines)


def skipped(check: Callable[[Path, str], object], pattern: str = "", codes: tuple[int, ...] = (0,)) -> Outcome:
    """The rest is done, and what is left out is counted with a reason."""
    return Outcome("skipped", codes, pattern, check)


def accepted(check: Callable[[Path, str], object] | None = None, pattern: str = "") -> Outcome:
    """Done, with the result that is right."""
    return Outcome("accepted", (0,), pattern, check)


@dataclass(frozen=True)
class Killed:
    """A command that gets a signal as soon as it has written a file of this pattern."""

    command: Command
    at: str
    sent: signal.Signals = signal.SIGKILL


@dataclass(frozen=True)
class Case:
    """needs: parts that are copied into the folder; before: commands that must go well, and then, what is changed after
    them; beside: a command that runs, and must go well, while `command` does.

    writes: where something new may appear; changes: what may change, both as patterns.
    """

    name: str
    command: Command
    expected: Outcome | tuple[Outcome, ...]  # of several, any one
    needs: str = ""
    prepare: Callable[[Path], object] | None = None
    before: tuple[Command | Killed, ...] = ()
    then: Callable[[Path], object] | None = None
    beside: Killed | None = None
    writes: tuple[str, ...] = (
        "new",
        "new/*",
        "new.*",
        "features",
        "features/*",
    )  # the latter: where teachers' are kept
    changes: tuple[str, ...] = ()
    limit_s: float = 120
    memory: float = 4e9

    @property
    def outcomes(self) -> tuple[Outcome, ...]:
        return self.expected if isinstance(self.expected, tuple) else (self.expected,)


def recipe_after(lines: str, command: str) -> list[str]:
    """A command that runs lines of Python before a recipe, in the same process."""
    name, *words = command.split()
    run = f"sys.argv = {[name, *words]!a}; runpy.run_path(str(find_recipe({name!r})), run_name='__main__')"
    return ["python", f"import runpy, sys\nfrom speechllm.runs.launch import find_recipe\n{lines}\n{run}"]


def run_case(case: Case, lane: Lane, folder: Path, parts: Path) -> tuple[list[str], Ended | None]:
    """The problems, none if all is as expected, and how the command ended."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for part in case.needs.split():
        copy = shutil.copytree if (parts / part).is_dir() else shutil.copy
        copy(parts / part, folder / part)
    if case.prepare:
        case.prepare(folder)
    for command in case.before:
        if trouble := _go(command, lane, folder):
            return [f"before: {trouble}"], None
    if case.then:
        case.then(folder)
    held = digest(folder)
    beside = lane.start(case.beside.command, folder) if case.beside else None
    if beside and not beside.until(lambda: any(folder.glob(case.beside.at))):
        return [f"beside: no {case.beside.at}: {beside.wait().errors[-300:]}"], None
    ended = lane.run(case.command, folder, case.limit_s, case.memory)
    found = [one.problems(ended, folder) for one in case.outcomes]
    problems = [] if not all(found) else min(found, key=len)
    if beside and (other := beside.wait()).code:
        problems.append(f"beside: exit code {other.code}: {other.errors[-300:]}")
    problems += changed(held, digest(folder), case)
    problems += [f"left running: {command}" for command in lane.orphans()]
    return problems, ended


def _go(command: Command | Killed, lane: Lane, folder: Path) -> str:
    """Run a command that must go well, or end it as it says; what went wrong."""
    if not isinstance(command, Killed):
        ended = lane.run(command, folder)
        return f"exit code {ended.code}: {ended.errors[-500:]}" if ended.code else ""
    started = lane.start(command.command, folder)
    reached = started.until(lambda: any(folder.glob(command.at)))
    started.send(command.sent)
    ended = started.wait(30)
    return "" if reached else f"no {command.at}: {ended.errors[-500:]}"


def digest(folder: Path) -> dict[str, str]:
    """What lies in a folder: of files the hash, of links where they lead."""
    found = {}
    for place, folders, files in os.walk(folder):
        for name in folders + files:
            path = os.path.join(place, name)
            inside = os.path.relpath(path, folder)
            if os.path.islink(path):
                found[inside] = "-> " + os.readlink(path)
            elif os.path.isfile(path):
                with open(path, "rb") as file:
                    found[inside] = hashlib.file_digest(file, "sha1").hexdigest()
            else:
                found[inside] = "folder" if os.path.isdir(path) else "special"
    return found


def changed(before: dict[str, str], after: dict[str, str], case: Case) -> list[str]:
    """The user's files that are not as they were, and the new ones where nobody asked for them."""

    def among(name: str, patterns: tuple[str, ...]) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

    lost = [name for name in before if name not in after and not among(name, case.changes)]
    other = [name for name in before if after.get(name, before[name]) != before[name] and not among(name, case.changes)]
    new = [name for name in after.keys() - before.keys() if not among(name, case.writes + case.changes)]
    found = {"lost": lost, "changed": other, "wrote": new}
    return [f"{what} {', '.join(sorted(names)[:3])!a}" for what, names in found.items() if names]
