"""Every YAML under configs/ opens with the command that runs it, and that command would be accepted."""

import ast
import re
import shlex
from collections.abc import Callable
from dataclasses import is_dataclass
from pathlib import Path

import pytest
import yaml

from speechllm import ConfigError
from speechllm.runs.config import load_config

ROOT = Path(__file__).resolve().parents[2]
EVERY = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.yaml"))
CONFIGS = [config for config in EVERY if "/accelerate/" not in config]  # those are for Accelerate: test_train_asr.py
RECIPES = sorted(path.name for path in (ROOT / "recipes").glob("*.py"))
COMMAND = re.compile(r"python recipes/(\w+\.py) +([^()]+)")  # one process; several: speechllm run NAME --processes N


def header(config: str) -> str:
    """The comment lines at the beginning, without #; a line that ends with a backslash goes on in the next one."""
    lines = []
    for line in (ROOT / config).read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return "\n".join(lines).replace("\\\n", " ")


def command(config: str) -> tuple[str, list[str]]:
    """Recipe and words of the command in the header."""
    commands = [(recipe, shlex.split(words)) for recipe, words in COMMAND.findall(header(config))]
    assert commands, f"{config} does not open with the command that runs it"
    return commands[0]


def config_paths(text: str) -> set[str]:
    return set(re.findall(r"\bconfigs/[\w./-]+\.yaml\b", text))


def test_there_are_configs() -> None:
    assert len(CONFIGS) >= 5


@pytest.mark.parametrize("config", CONFIGS)
def test_the_command_in_the_header_would_be_accepted(
    config: str, config_class: Callable[[str], type], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, words = command(config)
    assert recipe in RECIPES
    assert words[:2] == ["--config", config]
    assert all("=" in word for word in words[2:])
    monkeypatch.chdir(ROOT)
    loaded = load_config(config_class(recipe), config, words[2:])
    assert is_dataclass(loaded)
    values = yaml.safe_load((ROOT / config).read_text(encoding="utf-8"))
    plain = {key: value for key, value in values.items() if type(value) in (int, list, bool) and key != "systems"}
    assert plain and {key: getattr(loaded, key) for key in plain} == plain


@pytest.mark.parametrize("config", CONFIGS)
def test_nothing_in_the_command_is_there_for_nothing(config: str, config_class: Callable[[str], type]) -> None:
    recipe, words = command(config)
    whole = load_config(config_class(recipe), ROOT / config, words[2:])
    for word in words[2:]:
        try:
            without = load_config(config_class(recipe), ROOT / config, [other for other in words[2:] if other != word])
        except ConfigError as error:  # a required key
            without = str(error)
        assert without != whole


@pytest.mark.parametrize("config", CONFIGS)
def test_the_header_says_first_what_it_is(config: str) -> None:
    first = header(config).split("\n")[0]
    assert len(first) > 20 and not COMMAND.search(first)


@pytest.mark.parametrize("config", CONFIGS)
def test_the_values_name_configs_that_exist(config: str) -> None:
    missing = {path for path in config_paths((ROOT / config).read_text(encoding="utf-8")) if path not in EVERY}
    assert not missing


@pytest.mark.parametrize("file", ["Makefile", *(f"recipes/{recipe}" for recipe in RECIPES)])
def test_recipes_and_makefile_name_configs_that_exist(file: str) -> None:
    assert config_paths((ROOT / file).read_text(encoding="utf-8")) <= set(EVERY)


def test_every_config_is_named_somewhere() -> None:
    files = [ROOT / "Makefile", *(ROOT / "configs").rglob("*.*"), *ROOT.glob("*.md"), *(ROOT / "recipes").glob("*")]
    named = {file: config_paths(file.read_text(encoding="utf-8")) for file in files if file.is_file()}
    for config in CONFIGS:
        assert any(config in paths for file, paths in named.items() if file != ROOT / config), f"who uses {config}?"


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_opens_with_the_command_that_starts_it(recipe: str) -> None:
    text = (ROOT / "recipes" / recipe).read_text(encoding="utf-8")
    document = ast.get_docstring(ast.parse(text))
    assert f"\n    python recipes/{recipe} " in document and "accelerate launch" not in document
    shares = "accelerator.num_processes" in text
    assert (f"\n    speechllm run {recipe.removesuffix('.py')} --processes " in document) is shares
