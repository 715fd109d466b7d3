"""Configuration of a recipe: a dataclass filled from a YAML file and `key=value` arguments, checked before it runs."""

import argparse
import difflib
import inspect
import json
import os
import re
import time
import types
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from tokenizer.errors import InputError

T = TypeVar("T")
# Former names of keys, each with its new names: the first that the configuration has is suggested.
RENAMED = {
    "judge": ("evaluation_recognizer", "recognizer"),
    "speaker_judge": ("evaluation_speaker",),
    "judge_speaker": ("evaluation_speaker",),
}
# Keys that are another recipe's now, each with what to do.
MOVED = {"normalizer": "texts are encoded as they are; set normalizer in train_asr and in eval_asr"}
PATIENCE_S = 10.0  # time for the first process to print an error that the others found too
PYTHON_WORDS = {"None": "null", "True": "true", "False": "false"}


class ConfigError(InputError):
    """All problems of a configuration, one per line."""


class _Loader(yaml.SafeLoader):
    """YAML as people write it: 2e-4 is a number even without a dot; only true and false are booleans, not yes or no."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|false)$"), list("tf"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def shipped(folder: str) -> Path:
    """The folder `recipes` or `configs`: inside the installed package, or next to it in a checkout."""
    package = Path(__file__).parents[1]
    return package / folder if (package / folder).is_dir() else package.parent / folder


def find_config(file: str | Path) -> Path:
    """A configuration file: as given, or else the shipped one of that name, with or without the prefix `configs/`.

    Raises ConfigError if neither exists.
    """
    file = Path(file)
    if file.exists():
        return file
    name, configs = file.as_posix().removeprefix("configs/"), shipped("configs")
    if (configs / name).is_file():
        return configs / name
    known = [path.relative_to(configs).as_posix() for path in configs.rglob("*.yaml")]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"the shipped ones are in {configs}"
    raise ConfigError(f"cannot read the configuration {file}: no such file, here or among the shipped ones; {hint}")


def parse_config(cls: type[T], argv: list[str] | None = None) -> T:
    """Read `--config FILE key=value ...` from the command line into `cls`; on a mistake print it and exit with 2."""
    module = inspect.getmodule(cls)
    parser = argparse.ArgumentParser(
        description=module.__doc__ if module else cls.__doc__,
        epilog="keys:\n" + describe(cls),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with the keys below, yours or a shipped one")
    parser.add_argument("--check", action="store_true", help="only check the configuration")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="set single keys, nested ones as a.b=1; --key is short for key=true",
    )
    arguments, rest = parser.parse_known_args(argv)  # the rest: flags, and arguments after one
    overrides = arguments.overrides + [f"{word[2:]}=true" if word.startswith("--") else word for word in rest]
    try:
        config = load_config(cls, arguments.config, overrides)
    except ConfigError as error:
        yield_to_first_process()
        parser.exit(2, f"{error}\n")
    if arguments.check:
        parser.exit()
    return config


def yield_to_first_process() -> None:
    """Call before printing an error: of several processes that find the same one, only the first prints it.

    The launcher ends all processes when one ends. The others therefore wait; an error that only they found, they print
    after that.
    """
    if os.environ.get("RANK", "0") != "0":
        time.sleep(PATIENCE_S)


def load_config(cls: type[T], file: str | Path | None = None, overrides: list[str] | tuple[str, ...] = ()) -> T:
    """Build `cls` from a YAML file and overrides. Raises ConfigError with all problems, naming near misses."""
    values: dict[str, Any] = {}
    problems: list[str] = []
    if file is not None:
        file = find_config(file)
        try:
            values = yaml.load(file.read_text(encoding="utf-8"), _Loader) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"cannot read the configuration {file}: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{file}: expected lines like `key: value`, got {type(values).__name__}")
    for word in overrides:
        key, equals, text = word.partition("=")
        if not equals or not key:
            problems.append(f"`{word}`: expected key=value")
            continue
        *sections, last = key.split(".")
        section = values
        for name in sections:
            section = section.setdefault(name, {})
            if not isinstance(section, dict):
                problems.append(f"`{word}`: {name} is not a section")
                section = {}
        try:
            section[last] = yaml.load(text, _Loader)
        except yaml.YAMLError:
            section[last] = text
    config = _build(cls, values, "", problems)
    if problems:
        where = f" in {file}" if file else ""
        raise ConfigError(f"{len(problems)} problem(s) in the configuration{where}:\n  " + "\n  ".join(problems))
    return config


def _build(cls: Any, values: dict[str, Any], prefix: str, problems: list[str]) -> Any:
    hints = get_type_hints(cls)
    before = len(problems)
    for key in values.keys() - hints.keys():
        if new := [name for name in RENAMED.get(key, ()) if name in hints]:
            problems.append(f"{prefix}{key} is called {prefix}{new[0]} now")
            continue
        if key in MOVED:
            problems.append(f"{prefix}{key} is no key of this recipe: {MOVED[key]}")
            continue
        near = difflib.get_close_matches(str(key), hints, n=1)
        hint = f": did you mean {prefix}{near[0]}?" if near else f"; known keys: {', '.join(hints)}"
        problems.append(f"unknown key {prefix}{key}{hint}")
    arguments = {}
    for field in fields(cls):
        if field.name in values:
            arguments[field.name] = _convert(values[field.name], hints[field.name], prefix + field.name, problems)
        elif field.default is MISSING and field.default_factory is MISSING:
            problems.append(f"missing key {prefix}{field.name} ({_type_name(hints[field.name])})")
    if len(problems) > before:
        return None
    try:
        return cls(**arguments)
    except ValueError as error:
        problems.append(str(error))
        return None


def _convert(value: Any, hint: Any, key: str, problems: list[str]) -> Any:
    """`value` as type `hint`, or a problem."""
    if isinstance(value, str) and value in PYTHON_WORDS:
        problems.append(f"{key}: {value} is Python's word, write {PYTHON_WORDS[value]}")
        return None
    origin, arguments = get_origin(hint), get_args(hint)
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
            return value
    elif origin in (list, tuple) and isinstance(value, list | tuple):
        return origin(_convert(item, arguments[0], f"{key}[{i}]", problems) for i, item in enumerate(value))
    elif hint is type(None):
        if value is None:
            return None
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif hint in (int, str, bool) and type(value) is hint:
        return value
    problems.append(f"{key} must be {_type_name(hint)}, got {_spell(value, repr)}")
    return None


def _spell(value: Any, text: Callable[[str], str] = str) -> str:
    """A value as YAML takes it; `text` spells one that is a word."""
    return text(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _type_name(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        return " or ".join("null" if option is type(None) else _type_name(option) for option in arguments)
    if origin in (list, tuple):
        return f"a list of {_type_name(arguments[0])}"
    return getattr(hint, "__name__", str(hint))


def describe(cls: type, prefix: str = "  ") -> str:
    """The keys of a configuration class, one a line: name, type, default and the comment behind it in the source."""
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(cls), re.MULTILINE))
    hints = get_type_hints(cls)
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
    return "\n".join(lines)
