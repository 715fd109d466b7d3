"""What a user installs: the two packages, typed, with recipes, configurations and the `speechllm` command."""

import importlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import soundfile

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("speechllm", "tokenizer")
FOLDERS = (*PACKAGES, "recipes", "configs", "tests")  # the last must stay out of the wheel


@pytest.fixture(scope="module")
def wheel_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built as pip does without isolation, from a copy of the sources (building leaves files behind)."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    hook = f"from setuptools import build_meta; build_meta.build_wheel({str(out)!r})"  # what pip and build call
    run = subprocess.run([sys.executable, "-c", hook], capture_output=True, text=True, cwd=source)
    assert run.returncode == 0, run.stdout + run.stderr
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def wheel(wheel_file: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(wheel_file)


def test_wheel_holds_the_two_packages_only(wheel: zipfile.ZipFile) -> None:
    top_level = {name.split("/")[0] for name in wheel.namelist()}
    dist_info = {name for name in top_level if name.startswith("speechllm-") and name.endswith(".dist-info")}
    assert len(dist_info) == 1
    assert top_level - dist_info == set(PACKAGES)


def test_wheel_holds_recipes_and_configurations_inside_the_package(wheel: zipfile.ZipFile) -> None:
    files = [*(ROOT / "recipes").glob("*.py"), *(ROOT / "configs").rglob("*.yaml"), ROOT / "recipes/COPYING.GPL-3.0"]
    expected = {f"speechllm/{path.relative_to(ROOT).as_posix()}" for path in files}
    assert len(expected) > 30
    assert {
        name for name in wheel.namelist() if name.startswith(("speechllm/recipes/", "speechllm/configs/"))
    } == expected


def test_wheel_holds_every_module(wheel: zipfile.ZipFile) -> None:
    modules = {path.relative_to(ROOT).as_posix() for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    missing = modules - set(wheel.namelist())
    assert not missing, f"not in the wheel (a folder without __init__.py?): {sorted(missing)}"


@pytest.mark.parametrize("package", PACKAGES)
def test_wheel_is_typed(wheel: zipfile.ZipFile, package: str) -> None:
    assert f"{package}/py.typed" in wheel.namelist()


def test_wheel_has_the_command_and_the_licence(wheel: zipfile.ZipFile) -> None:
    by_name = {name.split("/", 1)[-1]: name for name in wheel.namelist() if ".dist-info/" in name}
    assert "speechllm = speechllm.cli.main:main" in wheel.read(by_name["entry_points.txt"]).decode()
    assert callable(importlib.import_module("speechllm.cli.main").main)
    assert "License-Expression: Apache-2.0 AND GPL-3.0-or-later" in wheel.read(by_name["METADATA"]).decode()
    assert "licenses/LICENSE" in by_name


def test_an_installed_wheel_trains_from_another_folder(wheel_file: Path, tmp_path: Path) -> None:
    target, folder = tmp_path / "target", tmp_path / "elsewhere"
    folder.mkdir()
    options = ["--quiet", "--no-deps", "--no-index", "--no-compile", "--target", target]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, wheel_file], check=True, capture_output=True)
    for split in ("train", "dev"):
        noise = np.random.default_rng(0).normal(0, 0.1, 16_000)
        soundfile.write(folder / f"{split}.wav", noise, 16_000)
    rows = "".join(f'{{"path": "{s}.wav", "duration_s": 1.0, "split": "{s}"}}\n' for s in ("train", "dev"))
    (folder / "manifest.jsonl").write_text(rows)
    environment = {**os.environ, "PYTHONPATH": str(target), "CUDA_VISIBLE_DEVICES": ""}

    def start(*words: str) -> str:
        command = [sys.executable, *words]
        ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
        assert ended.returncode == 0, ended.stderr[-3000:]
        return ended.stdout

    found = start("-c", "import speechllm, tokenizer; print(speechllm.__file__); print(tokenizer.__file__)")
    assert found.splitlines() == [str(target / package / "__init__.py") for package in PACKAGES]
    # the wheel's recipe and configuration, by their short names
    tiny = "steps=1 batch_size=1 crop_s=0.5 num_workers=0 semantic.teacher=null acoustic.teacher=null codec.n_filters=4"
    tiny += " codec.codebook_size=16"  # whose start is found in 320 frames
    words = f"train_tokenizer --config tokenizer/demo.yaml {tiny} data=. output=run"
    start("-m", "speechllm.cli.main", "run", *words.split())
    assert (folder / "run" / "model" / "model.safetensors").is_file()
