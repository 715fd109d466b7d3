"""Configuration of a recipe: a dataclass filled from a YAML file and `key=value` arguments, checked before it runs."""

import argparse
import difflib
import inspect
import io
import json
import math
import os
import re
import sys
import time
import types
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from speechllm.runs.signals import catch_early_interrupts, end_with_parent
from tokenizer.errors import InputError
from tokenizer.settings import SettingsError, broken_rules

T = TypeVar("T")
PATIENCE_S = 10.0  # time for the first process to print an error that the others found too
PYTHON_WORDS = {"None": "null", "True": "true", "False": "false"}
BOOLEANS = {"true": True, "false": False}
WORDS = """values: a key of type str takes its word as it is, # and : included, and ~ is your home folder; a list is
a,b or, as in YAML, [a, "b, c"], and only the latter where a str will do; null is no value"""


class ConfigError(InputError):
    """All problems of a configuration, one per line."""


class Plain(str):
    """A word as someone wrote it, without quotes: a text, a number or something else, as the key takes it."""


class _Loader(yaml.SafeLoader):
    """YAML whose unquoted words stay as they are written, except null; no key may be given twice."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        names = [str(key.value) for key, _ in node.value]
        for index, (key, _) in enumerate(node.value):
            if names[index] in names[:index]:
                raise yaml.MarkedYAMLError(None, None, f"{names[index]} is given twice", key.start_mark)
        return node

    def construct_word(self, node: yaml.ScalarNode) -> str:
        return str(node.value) if node.style else Plain(node.value)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":merge"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_constructor("tag:yaml.org,2002:str", _Loader.construct_word)


class _Dumper(yaml.SafeDumper):
    """YAML with every text in double quotes, where all characters can be escaped."""


_Dumper.add_multi_representer(
    str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", str(text), style='"')
)
_Dumper.yaml_representers = {kind: made for kind, made in yaml.SafeDumper.yaml_representers.items() if kind is not str}
# only what can mean one thing: 010 may be octal, 12:30 is a time, 1,5 a list; at most 18 digits fit into 64 bits
INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]{0,2}(_[0-9]{3}){0,5}|[1-9][0-9]{0,17})")
FLOAT = re.compile(rf"({INTEGER.pattern}(\.[0-9]*)?|[-+]?\.[0-9]+)([eE][-+]?[0-9]+)?")


def shipped(folder: str) -> Path:
    """The folder `recipes` or `configs`: inside the installed package, or next to it in a checkout."""
    package = Path(__file__).parents[1]
    return package / folder if (package / folder).is_dir() else package.parent / folder


def find_config(file: str | Path) -> Path:
    """A configuration file: as given, or else the shipped one of that name, with or without the prefix `configs/`.

    Raises ConfigError if neither exists.
    """
    file = Path(os.path.expanduser(file))
    if os.path.exists(file):
        return file
    name, configs = file.as_posix().removeprefix("configs/"), shipped("configs")
    if os.path.isfile(configs / name):
        return configs / name
    known = [path.relative_to(configs).as_posix() for path in configs.rglob("*.yaml")]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"the shipped ones are in {configs}"
    raise ConfigError(f"cannot read the configuration {file}: no such file, here or among the shipped ones; {hint}")


def parse_config(cls: type[T], argv: list[str] | None = None, shares_work: bool = False) -> T:
    """Read `--config FILE key=value ...` from the command line into `cls`; on a mistake print it and exit with 2.

    shares_work: whether several processes of the recipe share its work; otherwise they are refused. From here on,
    Ctrl-C ends the recipe with one line, and a parent that is a recipe ends it with itself.
    """
    catch_early_interrupts()
    end_with_parent()
    spell_unprintable()
    module = inspect.getmodule(cls)
    parser = argparse.ArgumentParser(
        description=module.__doc__ if module else cls.__doc__,
        epilog=f"keys:\n{describe(cls)}\n\n{WORDS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with the keys below, yours or a shipped one")
    parser.add_argument("--check", action="store_true", help="only check the configuration")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="set single keys, nested ones as a.b=1; --key is short for key=true",
    )
    if not shares_work and "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        yield_to_first_process()
        parser.exit(
            2, f"{parser.prog} does not share its work, several processes would all do it: leave out --processes\n"
        )
    arguments, rest = parser.parse_known_args(argv)  # the rest: flags, and arguments after one
    overrides = arguments.overrides + [word.removeprefix("--") if "=" in word else word for word in rest]
    try:
        config = load_config(cls, arguments.config, overrides)
    except ConfigError as error:
        yield_to_first_process()
        parser.exit(2, f"{error}\n")
    if arguments.check:
        parser.exit()
    return config


def spell_unprintable() -> None:
    """From now on print what the terminal's encoding lacks, such as file names that are not UTF-8, as escapes."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def yield_to_first_process() -> None:
    """Call before printing an error: of several processes that find the same one, only the first prints it.

    The launcher ends all processes when one ends. The others therefore wait; an error that only they found, they print
    after that.
    """
    if os.environ.get("RANK", "0") != "0":
        time.sleep(PATIENCE_S)


def load_config(cls: type[T], file: str | Path | None = None, overrides: list[str] | tuple[str, ...] = ()) -> T:
    """Build `cls` from a YAML file and overrides, of which the last one of a key wins.

    A key of type `str` takes what is written behind `=` as it is, with ~ for the home folder; so do the items of a list
    without brackets, a,b, unless the key takes a `str`, too. YAML is for lists in brackets, sections, and null. `--key`
    is short for key=true.
    Raises ConfigError with all problems, naming near misses.
    """
    values: dict[str, Any] = {}
    problems: list[str] = []
    if file is not None:
        file = find_config(file)
        try:
            values = _parse(file.read_text(encoding="utf-8")) or {}
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot read the configuration {file}: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(
                f"{file}: expected lines like `key: value`, got {'list' if isinstance(values, list) else 'str'}"
            )
    for word in overrides:
        try:
            _override(values, word, cls)
        except ValueError as error:
            problems.append(f"`{word}`: {error}")
    config = _build(cls, values, "", problems)
    if problems:
        where = f" in {file}" if file else ""
        raise ConfigError(f"{len(problems)} problem(s) in the configuration{where}:\n  " + "\n  ".join(problems))
    return config


def override(key: str, value: Any) -> str:
    """The word of a command line from which `load_config` reads this value of a key."""
    return f"{key}={value}" if isinstance(value, str | Path) else f"{key}={_spell(value)}"


def _parse(text: str) -> Any:
    """The value of a YAML text. Raises ValueError, in one line."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ValueError(f"{line}{error.problem}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())) from error


def _override(values: dict[str, Any], word: str, cls: type) -> None:
    """Set the key of one word of the command line. Raises ValueError for a word that sets none."""
    key, equals, text = word.partition("=")
    flag = word.startswith("--") and not equals
    if not key or not (equals or flag):
        raise ValueError("expected key=value")
    if equals and not text:
        raise ValueError("expected a value after =, or null for none")
    *sections, last = key.removeprefix("--").split(".")
    section: Any = values
    hint: Any = cls
    for name in sections:
        section, hint = section.setdefault(name, {}), _hints(hint).get(name)
        if not isinstance(section, dict):
            raise ValueError(f"{name} is not a section")
    section[last] = flag or _read(text, _hints(hint).get(last))


def _hints(cls: Any) -> dict[str, Any]:
    """The types of the keys of a section; none of anything else."""
    return get_type_hints(cls, include_extras=True) if is_dataclass(cls) else {}


def _read(text: str, hint: Any) -> Any:
    """What a word of the command line says to a key of this type: see `load_config`."""
    options = _options(hint)
    listed = any(get_origin(option) in (list, tuple) for option in options)
    if text in PYTHON_WORDS:  # refused later
        return Plain(text)
    if text == "null" and (type(None) in options or str not in options):
        return None
    brackets = text.startswith("[") and text.endswith("]")
    if listed and os.path.exists(os.path.expanduser(text)):  # a file is a file, whatever its name looks like
        return Plain(text) if str in options else [Plain(text)]
    if listed and not brackets:
        return Plain(text) if str in options else [Plain(item.strip()) for item in text.split(",")]
    return _parse(text) if listed or any(map(is_dataclass, options)) else Plain(text)


def _options(hint: Any) -> list[Any]:
    """The members of a union, without what is annotated."""
    if get_origin(hint) in (Union, types.UnionType):
        return [option for member in get_args(hint) for option in _options(member)]
    return _options(get_args(hint)[0]) if get_origin(hint) is Annotated else [hint]


def _build(cls: Any, values: dict[str, Any], prefix: str, problems: list[str]) -> Any:
    hints = _hints(cls)
    before = len(problems)
    for key in values.keys() - hints.keys():
        near = difflib.get_close_matches(str(key), hints, n=1)
        hint = f": did you mean {prefix}{near[0]}?" if near else f"; known keys: {', '.join(hints)}"
        problems.append(f"unknown key {prefix}{key}{hint}")
    arguments = {}
    for field in fields(cls):
        if field.name in values:
            known = len(problems)
            value = _convert(values[field.name], hints[field.name], prefix + field.name, problems)
            if len(problems) == known:
                arguments[field.name] = value
        elif field.default is MISSING and field.default_factory is MISSING:
            problems.append(f"missing key {prefix}{field.name} ({_type_name(hints[field.name])})")
    if len(problems) > before:  # what can be said without the whole
        problems += [prefix + problem for problem in broken_rules(cls, arguments)]
        return None
    try:
        return cls(**arguments)
    except SettingsError as error:
        problems += [prefix + problem for problem in error.problems]
        return None


def _convert(value: Any, hint: Any, key: str, problems: list[str]) -> Any:
    """`value` as type `hint`, or a problem."""
    if isinstance(value, Plain) and value in PYTHON_WORDS:
        problems.append(f"{key}: {value} is Python's word, write {PYTHON_WORDS[value]}")
        return None
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:  # with rules, which `Settings` checks
        return _convert(value, arguments[0], key, problems)
    if is_dataclass(hint) and isinstance(value, dict):
        return _build(hint, value, f"{key}.", problems)
    if origin in (Union, types.UnionType):
        for option in arguments:
            attempt: list[str] = []
            converted = _convert(value, option, key, attempt)
            if not attempt:
                return converted
    elif origin is Literal:
        if value in arguments:
            return arguments[arguments.index(value)]
    elif origin in (list, tuple) and isinstance(value, list | tuple):
        return origin(_convert(item, arguments[0], f"{key}[{i}]", problems) for i, item in enumerate(value))
    elif hint is type(None):
        if value is None:
            return None
    elif hint is str and isinstance(value, str) and value and "\0" not in value:
        return os.path.expanduser(str(value))
    elif isinstance(value, Plain):
        if hint is bool and value in BOOLEANS:
            return BOOLEANS[value]
        if hint is int and INTEGER.fullmatch(value):
            return int(value)
        if hint is float and FLOAT.fullmatch(value) and math.isfinite(float(value)):
            return float(value)
    elif hint is bool and isinstance(value, bool):  # a flag
        return value
    problems.append(f"{key} must be {_type_name(hint)}, got {_spell(value, repr)}")
    return None


def _spell(value: Any, text: Callable[[str], str] = str) -> str:
    """A value as YAML takes it; `text` spells one that is a word in quotes, or cannot be printed."""
    if isinstance(value, str):
        return str(value) if isinstance(value, Plain) and value.isprintable() else text(str(value))
    if isinstance(value, list | tuple | dict):
        return yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=math.inf).strip()
    return json.dumps(value, ensure_ascii=False, default=str)


def _type_name(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return f"{_type_name(arguments[0])} ({', '.join(rule.text for rule in arguments[1:])})"
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        return " or ".join("null" if option is type(None) else _type_name(option) for option in arguments)
    if origin in (list, tuple):
        return f"a list of {_type_name(arguments[0])}"
    return getattr(hint, "__name__", str(hint))


def describe(cls: type, prefix: str = "  ") -> str:
    """The keys of a configuration class, one a line: name, type, default and the comment behind it in the source."""
    source = "".join(inspect.getsource(base) for base in reversed(cls.__mro__) if is_dataclass(base))
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", source, re.MULTILINE))
    hints = _hints(cls)
    lines = []
    for field in fields(cls):
        if is_dataclass(hints[field.name]):
            lines.append(f"{prefix}{field.name}:")
            lines.append(describe(hints[field.name], prefix + "  "))
            continue
        default = "required"
        if field.default is not MISSING or field.default_factory is not MISSING:
            default = _spell(field.default_factory() if field.default_factory is not MISSING else field.default)
        comment = f"  {comments[field.name]}" if field.name in comments else ""
        lines.append(f"{prefix}{field.name}: {_type_name(hints[field.name])} [{default}]{comment}")
        items = [item for option in _options(hints[field.name]) for item in get_args(option)]
        lines += [describe(item, f"{prefix}    ") for item in items if isinstance(item, type) and is_dataclass(item)]
    return "\n".join(lines)
