"""What README and CONTRIBUTING promise is there: targets, files, commands, names."""

import ast
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

import speechllm
from speechllm import load_config

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [path.name for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md") if path.is_file()]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
documents = pytest.mark.parametrize("document", DOCUMENTS)


def read(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def blocks(document: str, *languages: str) -> list[str]:
    return [text for language, text in BLOCK.findall(read(document)) if language in languages]


def commands(document: str) -> list[str]:
    """Lines of the shell blocks, continued ones joined, and what stands in `single quotes` in the text."""
    lines = "\n".join(blocks(document, "sh", "bash", "shell", "console")).replace("\\\n", " ").splitlines()
    return lines + re.findall(r"`([^`\n]+)`", BLOCK.sub("", read(document)))


def words(line: str) -> list[str]:
    return shlex.split(line, comments=True)


def recipe_commands() -> list[str]:
    starts = re.compile(r"^\$? ?(accelerate launch|python)\b.* ?recipes/\w+\.py\b")
    return [line for document in DOCUMENTS for line in commands(document) if starts.search(line)]


def speechllm_commands() -> list[str]:
    return [line for document in DOCUMENTS for line in commands(document) if re.match(r"\$? ?speechllm \w", line)]


def test_there_is_a_readme_with_commands() -> None:
    assert "README.md" in DOCUMENTS and len(commands("README.md")) > 5


@documents
def test_every_make_target_exists(document: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][\w-]*):", makefile, re.MULTILINE))
    named = {name for line in commands(document) for name in re.findall(r"(?:^|[;&] *|\s)make ([a-z][\w-]*)", line)}
    assert named and named <= targets


@documents
def test_every_file_of_the_project_that_is_named_exists(document: str) -> None:
    pattern = r"(?<![\w./-])((?:recipes|configs|tests|speechllm|tokenizer|\.ci)/[\w./-]*\w)"
    named = set(re.findall(pattern, read(document)))
    missing = {path for path in named if not (ROOT / path).exists()}
    assert named and not missing


@documents
def test_every_link_to_a_file_leads_somewhere(document: str) -> None:
    links = re.findall(r"\]\((?!https?://|#|mailto:)([^)#\s]+)", read(document))
    assert not [link for link in links if not (ROOT / link).exists()]


@pytest.mark.parametrize("line", recipe_commands())
def test_every_recipe_command_would_be_accepted(
    line: str, config_class: Callable[[str], type], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    parts = words(line.lstrip("$ "))
    position = next(i for i, word in enumerate(parts) if word.startswith("recipes/"))
    recipe, rest = parts[position].removeprefix("recipes/"), parts[position + 1 :]
    if not rest or recipe == "synthesize_speech.py":
        return  # only mentioned, or without a configuration
    config = rest[rest.index("--config") + 1] if "--config" in rest else None
    load_config(config_class(recipe), config, [word for word in rest if "=" in word])


@pytest.mark.parametrize("line", speechllm_commands())
def test_every_speechllm_command_exists_with_its_options(line: str, capsys: pytest.CaptureFixture) -> None:
    cli = pytest.importorskip("speechllm.cli")
    _, command, *rest = words(line.lstrip("$ "))
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    assert end.value.code == 0
    known = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    assert {word.partition("=")[0] for word in rest if word.startswith("--")} <= known


@documents
def test_python_blocks_compile_and_import_names_that_exist(document: str) -> None:
    for block in blocks(document, "python", "py"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "speechllm":
                assert node.module == "speechllm"
                assert {alias.name for alias in node.names} <= set(speechllm.__all__)
