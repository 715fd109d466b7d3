"""What a user installs: the two packages, typed, with the `speechllm` command, and nothing else."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("speechllm", "tokenizer")
FOLDERS = (*PACKAGES, "recipes", "configs", "tests")  # the last three must stay out of the wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built without network from a copy of the sources (building leaves files behind)."""
    pytest.importorskip("build", reason="needs the dev extra")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=out)
    assert run.returncode == 0, run.stdout + run.stderr
    return zipfile.ZipFile(next(out.glob("*.whl")))


def test_wheel_holds_the_two_packages_only(wheel: zipfile.ZipFile) -> None:
    top_level = {name.split("/")[0] for name in wheel.namelist()}
    dist_info = {name for name in top_level if name.startswith("speechllm-") and name.endswith(".dist-info")}
    assert len(dist_info) == 1
    assert top_level - dist_info == set(PACKAGES)
    assert not [name for name in wheel.namelist() if name.endswith((".yaml", ".yml"))]


def test_wheel_holds_every_module(wheel: zipfile.ZipFile) -> None:
    modules = {path.relative_to(ROOT).as_posix() for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    missing = modules - set(wheel.namelist())
    assert not missing, f"not in the wheel (a folder without __init__.py?): {sorted(missing)}"


@pytest.mark.parametrize("package", PACKAGES)
def test_wheel_is_typed(wheel: zipfile.ZipFile, package: str) -> None:
    assert f"{package}/py.typed" in wheel.namelist()


def test_wheel_has_the_command_and_the_licence(wheel: zipfile.ZipFile) -> None:
    by_name = {name.split("/", 1)[-1]: name for name in wheel.namelist() if ".dist-info/" in name}
    assert "speechllm = speechllm.cli:main" in wheel.read(by_name["entry_points.txt"]).decode()
    assert "License-Expression: Apache-2.0" in wheel.read(by_name["METADATA"]).decode()
    assert "licenses/LICENSE" in by_name
