"""The rules of the house that a reader of the syntax trees can check: who imports whom, names, sizes, paths."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CODE = ("speechllm", "tokenizer", "recipes")
MAX_LINES = 320
# Put together from pieces, so that this file does not match itself.
MACHINE_PATH = re.compile(r"(^|[^.\w])/(" + "|".join(("home", "root", "mnt", "nfs", "data", "work", "Users")) + r")/\w")


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def place(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT).as_posix()}:{getattr(node, 'lineno', 0)}"


def imports(tree: ast.AST) -> Iterator[tuple[ast.AST, str, str | None]]:
    """Every absolute import as (node, module, imported name or None); relative ones stay inside their package."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from ((node, node.module or "", alias.name) for alias in node.names)


def public_names(package: str) -> set[str]:
    """What the package's `__init__.py` lists in `__all__`."""
    for node in parse(ROOT / package / "__init__.py").body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            return set(ast.literal_eval(node.value))
    return set()


def bound_names(tree: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """Every name a file gives to a variable, parameter, function or import; attributes and fields are not meant."""
    fields = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            fields.update(id(child) for child in node.body)
            fields.update(id(child.target) for child in node.body if isinstance(child, ast.AnnAssign))
    for node in ast.walk(tree):
        if id(node) in fields:
            continue
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name):
                yield node, name
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield node, name
            case ast.alias(asname=str(name)) | ast.ExceptHandler(name=str(name)):
                yield node, name
            case ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)) | ast.MatchMapping(rest=str(name)):
                yield node, name


def text_files() -> list[Path]:
    """The files git knows or would add; without git, the files of the folders of the house."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):
        names = []
    paths = [ROOT / name for name in names if name]
    if not paths:
        paths = [path for folder in (*CODE, "configs", "tests") for path in (ROOT / folder).rglob("*")]
        paths += ROOT.glob("*")
    return sorted(path for path in paths if path.is_file() and "__pycache__" not in path.parts)


def test_tokenizer_knows_nothing_of_language_models() -> None:
    files = python_files("tokenizer")
    assert files
    problems = [
        f"{place(path, node)}: tokenizer/ must not import {module}"
        for path in files
        for node, module, _ in imports(parse(path))
        if module.split(".")[0] in ("speechllm", "recipes")
    ]
    assert not problems, "\n".join(problems)


def test_speechllm_uses_public_names_of_tokenizer_only() -> None:
    files = python_files("speechllm")
    assert files
    private = {path.stem for path in (ROOT / "tokenizer").iterdir()} - public_names("tokenizer")
    problems = [
        f"{place(path, node)}: import {name or module} from tokenizer's public names, not from its inside"
        for path in files
        for node, module, name in imports(parse(path))
        if module.startswith("tokenizer.") or (module == "tokenizer" and name and (name[0] == "_" or name in private))
    ]
    assert not problems, "\n".join(problems)


def test_nobody_imports_a_recipe() -> None:
    recipes = {path.stem for path in python_files("recipes")}
    problems = []
    for path in python_files(*CODE, "tests"):
        # A script finds its neighbours by their bare name.
        forbidden = {"recipes"} | (recipes if path.parent == ROOT / "recipes" else set())
        for node, module, _ in imports(parse(path)):
            if module.split(".")[0] in forbidden:
                problems.append(f"{place(path, node)}: imports the recipe {module}; put what is shared into speechllm")
    assert not problems, "\n".join(problems)


def test_no_variable_is_called_just_tokenizer() -> None:
    problems = [
        f"{place(path, node)}: say text_tokenizer or codec"
        for path in python_files(*CODE, "tests")
        for node, name in bound_names(parse(path))
        if name == "tokenizer"
    ]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    "source, found",
    [
        ("tokenizer = 1", True),
        ("def f(tokenizer): ...", True),
        ("for tokenizer in x: ...", True),
        ("import x as tokenizer", True),
        ("import tokenizer", False),
        ("f(tokenizer=1)", False),
        ("self.tokenizer = 1", False),
        ("class Config:\n    tokenizer: str = 'ours'", False),
        ("class Config:\n    def f(self):\n        tokenizer = 1", True),
    ],
)
def test_the_name_rule_itself(source: str, found: bool) -> None:
    assert any(name == "tokenizer" for _, name in bound_names(ast.parse(source))) is found


def test_files_stay_short() -> None:
    files = [path for path in python_files(*CODE) if path.name != "__init__.py"]  # which are lists of names
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    problems = [
        f"{path.relative_to(ROOT)}: {n} lines, at most {MAX_LINES}" for path, n in lengths.items() if n > MAX_LINES
    ]
    assert not problems, "\n".join(problems)


def test_no_file_names_a_folder_of_one_machine() -> None:
    assert MACHINE_PATH.search("cd /" + "home/me")
    assert not MACHINE_PATH.search("runs/data/x https://example.org/data/x ../work/x")
    problems = []
    for path in text_files():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue  # not text
        problems += [
            f"{path.relative_to(ROOT).as_posix()}:{number}: {line.strip()[:100]}"
            for number, line in enumerate(lines, start=1)
            if MACHINE_PATH.search(line)
        ]
    assert not problems, "\n".join(problems)
