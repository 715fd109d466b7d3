"""The rules of the house that a reader of the syntax trees can check: who imports whom, names, sizes, paths."""

import ast
import functools
import re
import subprocess
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CODE = ("speechllm", "tokenizer", "recipes")
MAX_LINES = 400  # beyond which a file probably does two things
# From the ground up: a file imports what stands in its own layer or below. `python tests/test_layers.py` draws it.
LAYERS = {
    "tokenizer: interface, rates, files": tuple(
        "interface rates errors locks tables files claims reading frames settings progress prefetch".split()
    ),
    "tokenizer: audio, corpus, pretrained": ("audio", "headers", "corpus", "utterances", "pretrained", "ravdess"),
    "tokenizer.codec": ("codec",),
    "tokenizer.metrics": ("metrics",),
    "tokenizer.training": ("training",),
    "tokenizer.schemes": ("schemes",),
    "tokenizer: loading": ("loading", "custom"),
    "speechllm.evaluation": ("evaluation",),
    "speechllm: encoding, vocabulary, prompt": (
        *("encoding", "speech", "vocabulary", "projector", "extension", "messages", "prompt", "small_model"),
    ),
    "speechllm: model": ("model", "adapters", "pauses", "pieces"),
    "speechllm.data": ("data",),
    "speechllm: decoding, export": ("decoding", "transcription", "letters", "greedy", "confidence", "export"),
    "speechllm.training": ("training",),
    "speechllm.runs": ("runs",),
    "speechllm.reports": ("reports",),
    "speechllm.benchmarks": ("benchmarks",),
    "speechllm.serving": ("serving",),
    "speechllm.cli": ("cli",),
}
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


def bound_names(tree: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """Every name a file gives to a variable, parameter, function or import; attributes and fields are not meant."""
    fields, nodes = set(), list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.ClassDef):
            fields.update(id(child) for child in node.body)
            fields.update(id(child.target) for child in node.body if isinstance(child, ast.AnnAssign))
    for node in nodes:
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


@functools.cache
def names_of(path: Path) -> tuple[list[tuple[str, str, str | None]], list[tuple[str, str]]]:
    """What a file imports, as (place, module, imported name or None), and the names it gives, as (place, name)."""
    tree = parse(path)
    imported = [(place(path, node), module, name) for node, module, name in imports(tree)]
    return imported, [(place(path, node), name) for node, name in bound_names(tree)]


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


def layer(module: str) -> int:
    """The number of the layer that a module stands in; 0 is the lowest."""
    package, _, inside = module.partition(".")
    for number, (title, names) in enumerate(LAYERS.items()):
        if title.startswith(package) and inside.split(".")[0] in names:
            return number
    raise AssertionError(f"{module} stands in no layer: write it into LAYERS")


def modules() -> dict[str, Path]:
    """The files of both packages, by the name they are imported by."""
    files = [path for path in python_files("tokenizer", "speechllm") if path.name != "__init__.py"]
    return {path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path for path in files}


def arrows() -> list[tuple[str, str, str]]:
    """Who imports whom, at the top or inside a function: importer, imported, place."""
    known, found = modules(), []
    for module, path in known.items():
        for where, source, name in names_of(path)[0]:
            if source.split(".")[0] in ("tokenizer", "speechllm"):
                inside = f"{source}.{name}"
                found.append((module, inside if inside in known else source, where))
    return found


def test_every_file_imports_only_what_stands_below_it() -> None:
    problems = [
        f"{where}: {module} must not import {source}"
        for module, source, where in arrows()
        if source not in ("speechllm", "speechllm._guard") and layer(source) > layer(module)
    ]
    assert not problems, "\n".join(problems)
    assert not [where for module, source, where in arrows() if source == "speechllm" and ".cli." not in module]


def test_no_circle_of_imports() -> None:
    below: dict[str, set[str]] = {}
    for module, source, _ in arrows():
        below.setdefault(module, set()).add(source)
    TopologicalSorter(below).prepare()  # raises CycleError, which names the circle


def diagram() -> str:
    """Which layer imports which, as Mermaid; an arrow that others already imply is not drawn."""
    below: dict[int, set[int]] = {number: set() for number in range(len(LAYERS))}
    for module, source, _ in arrows():
        if source not in ("speechllm", "speechllm._guard"):
            below[layer(module)] |= {layer(source)} - {layer(module)}
    reached: dict[int, set[int]] = {}
    lines = ["flowchart BT"] + [f'    {number}["{title}"]' for number, title in enumerate(LAYERS)]
    for number, sources in below.items():
        reached[number] = sources.union(*(reached[source] for source in sources))
        implied = set[int]().union(*(reached[source] for source in sources))
        lines += [f"    {number} --> {source}" for source in sorted(sources - implied)]
    return "\n".join(lines)


def test_the_diagram_in_contributing_is_the_one_of_the_imports() -> None:
    document = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert diagram() in document, "replace the diagram by what `python tests/test_layers.py` prints"


def test_private_names_stay_in_their_file() -> None:
    problems = [
        f"{where}: {name} of {module} is private"
        for path in python_files("tokenizer", "speechllm", "recipes")
        for where, module, name in names_of(path)[0]
        if module.split(".")[0] in ("tokenizer", "speechllm") and name and name[0] == "_" and name != "_guard"
    ]
    assert not problems, "\n".join(problems)


def test_every_room_says_what_comes_in_and_what_goes_out() -> None:
    rooms = [path for path in python_files("tokenizer", "speechllm") if path.name == "__init__.py"]
    assert len(rooms) > 8
    for path in rooms:
        text = ast.get_docstring(parse(path)) or ""
        assert len(text) > 80, path


def test_nobody_imports_a_recipe() -> None:
    recipes = {path.stem for path in python_files("recipes")}
    problems = []
    for path in python_files(*CODE, "tests"):
        # A script finds its neighbours by their bare name.
        forbidden = {"recipes"} | (recipes if path.parent == ROOT / "recipes" else set())
        for where, module, _ in names_of(path)[0]:
            if module.split(".")[0] in forbidden:
                problems.append(f"{where}: imports the recipe {module}; put what is shared into speechllm")
    assert not problems, "\n".join(problems)


def test_no_variable_is_called_just_tokenizer() -> None:
    problems = [
        f"{where}: say text_tokenizer or codec"
        for path in python_files(*CODE, "tests")
        for where, name in names_of(path)[1]
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


if __name__ == "__main__":
    print(diagram())
