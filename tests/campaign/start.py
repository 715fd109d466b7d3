"""Starting what the campaign tries, waiting for it, and finding what it left running.

A lane does one thing at a time. Most processes are forked from the tests' server (tests/fork_server.py), each in a
session of its own, so that they need no seconds of importing; real starts are what a user's shell does. All of them
carry the lane's mark in their environment, and so do their children: by it those are found that outlive their parent.
"""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
MARK = "SPEECHLLM_CAMPAIGN"
GONE_S = 10.0  # within which the children of an ended process must have ended
LOOK_S = 0.25  # between two looks at the memory
TRACEBACK = "Traceback (most recent call last)"


@dataclass(frozen=True)
class Ended:
    """code: negative for a signal; trouble: why the campaign itself ended it, if it did."""

    code: int
    output: str
    errors: str
    seconds: float
    trouble: str = ""

    @property
    def lines(self) -> list[str]:
        """What stands on stderr without progress bars."""
        shown = (line.rsplit("\r", 1)[-1].strip() for line in self.errors.splitlines())
        return [line for line in shown if line and not any(part in line for part in ("%|", "it/s", "utt/s", "?utt"))]


def words_of(command: str | Sequence[str]) -> list[str]:
    """The file to run and its arguments. A command begins with a recipe's file, `speechllm`, or `python` and code."""
    first, *rest = shlex.split(command) if isinstance(command, str) else command
    files = {"speechllm": ROOT / "speechllm" / "cli" / "main.py", "python": Path(__file__).with_name("call.py")}
    return [str(files.get(first, ROOT / "recipes" / first)), *rest]


class Lane:
    """A server to fork from and a mark of its own; work: the folder of caches and of what is printed."""

    def __init__(self, name: str, work: Path):
        self.mark, self.logs = f"{os.getpid()}-{name}", work / "logs" / name
        self.logs.mkdir(parents=True, exist_ok=True)
        self.environment = {
            **os.environ,
            MARK: self.mark,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",  # equal to the last bit is a promise for one kind of processor
            "ACCELERATE_USE_CPU": "true",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HOME": str(work / "cache"),
            "MPLCONFIGDIR": str(work / "cache"),
            "HOME": str(work / "home"),
        }
        (work / "home").mkdir(exist_ok=True)
        self.serve()

    def serve(self) -> None:
        command, pipe = [sys.executable, str(ROOT / "tests" / "fork_server.py")], subprocess.PIPE
        self.server = subprocess.Popen(command, env=self.environment, stdin=pipe, stdout=pipe, text=True)

    def ask(self, request: dict[str, object]) -> int | None:
        assert self.server.stdin and self.server.stdout
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def start(self, command: str | Sequence[str], folder: Path, real: bool = False) -> "Process":
        """In this folder, which is also where `~` leads."""
        words, own = words_of(command), {"HOME": str(folder)}
        output, errors = self.logs / f"{time.monotonic_ns()}.out", self.logs / f"{time.monotonic_ns()}.err"
        if real:
            environment, nothing = self.environment | own, subprocess.DEVNULL
            with output.open("w") as out, errors.open("w") as err:
                settings = {"cwd": folder, "env": environment, "start_new_session": True}
                started = subprocess.Popen([sys.executable, *words], stdin=nothing, stdout=out, stderr=err, **settings)
            return Process(started.pid, started.poll, output, errors)
        if self.server.poll() is not None:  # what it forked has ended it: the next ones need another
            self.serve()
        request = {"command": words, "folder": str(folder), "output": str(output), "errors": str(errors)}
        number = self.ask({**request, "environment": own})
        return Process(number, lambda: self.ask({"poll": number}), output, errors)

    def run(self, command: str | Sequence[str], folder: Path, limit_s: float = 120, memory: float = 4e9) -> Ended:
        return self.start(command, folder).wait(limit_s, memory)

    def left(self) -> list[psutil.Process]:
        """The processes of this lane that run, except its server."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.pid == self.server.pid or process.status() == psutil.STATUS_ZOMBIE:
                    continue
                if process.environ().get(MARK) == self.mark:
                    found.append(process)
            except psutil.Error:  # ended meanwhile, or another user's
                continue
        return found

    def orphans(self) -> list[str]:
        """The commands of those that outlive their parent by more than GONE_S; they are ended then."""
        until = time.monotonic() + GONE_S
        while (found := self.left()) and time.monotonic() < until:
            time.sleep(0.05)
        commands = []
        for process in found:
            with contextlib.suppress(psutil.Error):
                commands.append(shlex.join(process.cmdline())[-200:])
                process.kill()
        return commands

    def close(self) -> None:
        """End the server and whatever runs in this lane."""
        for process in self.left():
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.server.kill()
        self.server.wait()


class Process:
    """A started one, forked or real, that leads a session of its own."""

    def __init__(self, pid: int, poll: Callable[[], int | None], output: Path, errors: Path):
        self.pid, self._poll, self.output, self.errors = pid, poll, output, errors
        self.started, self.code = time.monotonic(), None
        self.ended: Ended | None = None

    def poll(self) -> int | None:
        if self.code is None:
            self.code = self._poll()
        return self.code

    def send(self, number: signal.Signals) -> None:
        """SIGINT to the whole group, as a terminal does; others to this one alone, as `kill` and schedulers do."""
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if number == signal.SIGINT else os.kill)(self.pid, number)

    def until(self, reached: Callable[[], bool], limit_s: float = 120) -> bool:
        """Wait for something, or for the end of the process; whether it was reached while the process ran."""
        while self.poll() is None and time.monotonic() - self.started < limit_s:
            if reached():
                return True
            time.sleep(0.001)
        return False

    def wait(self, limit_s: float = 120, memory: float = 4e9) -> Ended:
        """Wait for its end; it is killed after so many seconds or with so many bytes, its children included."""
        if self.ended:
            return self.ended
        until, look, trouble = time.monotonic() + limit_s, 0.0, ""
        while self.poll() is None:
            if not trouble and (now := time.monotonic()) > look:
                look, used = now + LOOK_S, self._memory()
                trouble = f"still running after {limit_s:g} s" if now > until else trouble
                trouble = f"takes {used / 1e9:.1f} GB" if used > memory else trouble
                if trouble:
                    os.kill(self.pid, signal.SIGKILL)
            time.sleep(0.002)
        texts = [file.read_text(errors="replace") for file in (self.output, self.errors)]
        for file in (self.output, self.errors):
            file.unlink()
        self.ended = Ended(self.code or 0, *texts, time.monotonic() - self.started, trouble)
        return self.ended

    def _memory(self) -> int:
        try:
            own = psutil.Process(self.pid)
            return sum(process.memory_info().rss for process in (own, *own.children(recursive=True)))
        except psutil.Error:
            return 0
