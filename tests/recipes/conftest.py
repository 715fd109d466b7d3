"""Recipes as commands, in a folder of their own."""

import json
import runpy
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from speechllm.runs.run import read_log

ROOT = Path(__file__).resolve().parents[2]


class Work:
    """A folder in which recipes are run; every run is checked to end well."""

    def __init__(self, folder: Path, start: Callable):
        self.folder, self.start = folder, start

    def run(self, name: str, words: str, **options: object) -> None:
        process = self.start(name, words, self.folder, **options)
        _, errors = process.communicate()
        assert process.returncode == 0, errors[-3000:]

    def kill(self, name: str, words: str, run: str, checkpoints: int = 1) -> None:
        """Start it, and kill it as soon as there are so many checkpoints."""
        process = self.start(name, words, self.folder)
        while len(list((self.folder / run / "checkpoints").glob("step_*.pt"))) < checkpoints:
            assert process.poll() is None, process.communicate()[1][-3000:]
            time.sleep(0.005)
        process.kill()
        process.communicate()
        assert process.returncode == -9 and not (self.folder / run / "done.json").exists()

    def json(self, file: str) -> dict:
        return json.loads((self.folder / file).read_text(encoding="utf-8"))

    def done(self, run: str) -> dict:
        return self.json(f"{run}/done.json")

    def weights(self, run: str) -> dict[str, torch.Tensor]:
        (file,) = (self.folder / run / "model").glob("*model.safetensors")
        return load_file(file)

    def log(self, run: str, key: str) -> dict[int, float]:
        return {int(line["step"]): line[key] for line in read_log(self.folder / run) if key in line}

    def files(self, run: str) -> set[str]:
        return {path.relative_to(self.folder / run).as_posix() for path in (self.folder / run).rglob("*")}


@pytest.fixture(scope="session")
def make_work(tmp_path_factory: pytest.TempPathFactory, start_recipe: Callable) -> Callable[[], Work]:
    return lambda: Work(tmp_path_factory.mktemp("work"), start_recipe)


@pytest.fixture
def here(
    work: Work, new_accelerator: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., None]]:
    """Run a recipe as the command line does, in this process and without the seconds of importing."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.chdir(work.folder)

    def run(name: str, words: str, *more: str) -> None:
        monkeypatch.setattr(sys, "argv", [name, *words.split(), *more])
        runpy.run_path(str(ROOT / "recipes" / name), run_name="__main__")
        new_accelerator()

    with torch.set_grad_enabled(True):
        yield run
