"""Recipes that are asked to end: one line, an exit code, and nothing left behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from speechllm.runs.signals import PARENT, Interrupted, handled, interruptible

ROOT = Path(__file__).resolve().parents[3]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}

# A recipe that writes for ever.
WRITER = """
import os, time
from dataclasses import dataclass
from speechllm.runs.config import parse_config
from speechllm.runs.recipe import run_recipe

@dataclass
class Config:
    output: str

def main(config):
    while True:
        with open(config.output + os.environ.get("RANK", ""), "a") as file:
            file.write("x")
        time.sleep(0.01)

if __name__ == "__main__":
    CONFIG = parse_config(Config, shares_work=True)
    run_recipe(main, CONFIG)
"""
JOB = """
import sys
from pathlib import Path
from speechllm.runs import stages
from speechllm.runs.recipe import run_recipe

stages.available_cpus = lambda: 2

def main(words):
    job = stages.Stages(Path("."), Path("."))
    job.side_by_side({name: ["writer.py", f"output={name}"] for name in "abcd"})

run_recipe(main, sys.argv[1:])
"""


def wait_for(condition: object, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def grows(files: list[Path]) -> bool:
    sizes = [file.stat().st_size for file in files]
    time.sleep(0.2)
    return sizes != [file.stat().st_size for file in files]


@pytest.fixture
def start(start_recipe: Callable, tmp_path: Path) -> Iterator[Callable[[str, str], tuple[object, int]]]:
    """Start a file with the packages of recipes already imported; the process and its number."""
    (tmp_path / "writer.py").write_text(WRITER)
    (tmp_path / "job.py").write_text(JOB)
    started = []

    def start(file: str, words: str) -> tuple[object, int]:
        process = start_recipe(str(file), words, tmp_path, environment={"PYTHONPATH": str(ROOT)})
        started.append(process)
        return process, next(iter(process.codes))

    yield start
    for process in started:
        process.kill()


def end(process: object, number: int, files: list[Path], ended_by: int) -> str:
    """What a job says that is sent a signal as soon as its recipes have begun to write; none of them goes on."""
    wait_for(lambda: process.poll() is not None or all(file.exists() for file in files))
    os.kill(number, ended_by)
    _, errors = process.communicate(timeout=30)
    time.sleep(0.05)  # of a process that was killed, the system ends the children a little later
    assert not grows(files), "something goes on writing"
    assert process.returncode == (-ended_by if ended_by == signal.SIGKILL else 128 + ended_by), errors
    assert "Traceback" not in errors, errors
    return errors


@pytest.mark.parametrize("ended_by", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGKILL])
def test_recipes_end_with_the_job_that_started_them(tmp_path: Path, start: Callable, ended_by: int) -> None:
    files = [tmp_path / "a", tmp_path / "b"]
    errors = end(*start(tmp_path / "job.py", "."), files, ended_by)
    assert not (tmp_path / "c").exists(), "the next ones were started"
    if ended_by != signal.SIGKILL:
        name = signal.Signals(ended_by).name
        assert errors.splitlines()[-1] == f"ended by {name}: the same command goes on from what is finished"


@pytest.mark.parametrize("ended_by", [signal.SIGUSR1, signal.SIGKILL])
def test_several_processes_end_with_their_launcher(tmp_path: Path, start: Callable, ended_by: int) -> None:
    launcher = ROOT / "speechllm" / "runs" / "launch.py"
    errors = end(*start(launcher, "2 writer.py output=rank"), [tmp_path / "rank0", tmp_path / "rank1"], ended_by)
    assert errors.count("ended by") == (ended_by == signal.SIGUSR1)  # once, not by each


def test_ctrl_c_while_a_recipe_is_imported_is_one_line(tmp_path: Path) -> None:
    imports = "open('importing', 'w').close(); time.sleep(60)\n    run_recipe"
    (tmp_path / "slow.py").write_text(WRITER.replace("run_recipe(main", f"{imports}(main"))
    command = [sys.executable, "slow.py", "output=a"]
    process = subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    wait_for((tmp_path / "importing").exists)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (130, "\nended by SIGINT: the same command goes on from what is finished\n")


def test_a_recipe_whose_parent_has_ended_does_not_begin(tmp_path: Path) -> None:
    (tmp_path / "writer.py").write_text(WRITER)
    command = [sys.executable, "writer.py", "output=a"]
    ended = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT | {PARENT: "1"}, timeout=60, check=False)
    assert ended.returncode == 1 and not (tmp_path / "a").exists()


def test_the_second_signal_does_not_disturb_the_end() -> None:
    def receive(*numbers: int) -> None:
        with interruptible():
            try:
                os.kill(os.getpid(), numbers[0])
            finally:
                os.kill(os.getpid(), numbers[1])

    for first in (signal.SIGTERM, signal.SIGUSR1):
        with pytest.raises(Interrupted) as interrupt:
            receive(first, signal.SIGTERM)
        assert interrupt.value.exit_code == 128 + first


def test_ctrl_c_twice_ends_at_once() -> None:
    received = []
    with handled(received.append):
        os.kill(os.getpid(), signal.SIGINT)
        assert received == [signal.SIGINT] and signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_signals_that_are_ignored_stay_ignored() -> None:
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with interruptible():
            os.kill(os.getpid(), signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize(
    "words, works, hint",
    [
        ("wer a b", "score_files", "nothing is kept, the same command starts anew"),
        ("transcribe a.wav --model m", "_transcribe", "nothing is kept, the same command starts anew"),
        ("run demo", "find_recipe", "the same command goes on from what is finished"),
        ("rehearse", "find_recipe", "the same command goes on from what is finished"),
    ],
)
def test_the_command_says_one_line_and_130(
    words: str, works: str, hint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from speechllm.cli import main

    def interrupted(*_: object) -> int:
        os.kill(os.getpid(), signal.SIGINT)
        return 0

    monkeypatch.setattr(main, works, interrupted)
    assert main.main(words.split()) == 130
    assert capsys.readouterr().err == f"\nended by SIGINT: {hint}\n"
