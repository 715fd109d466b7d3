"""Settings that say which values they take, checked when a configuration is made. Does not import torch."""

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from tokenizer.errors import InputError


@dataclass(frozen=True)
class Rule:
    """What holds for a value; as an annotation of a field it is checked by `Settings`, and help shows its text."""

    text: str  # completes "must be"
    holds: Callable[[Any], bool]


Count = Annotated[int, Rule("at least 1", lambda n: n >= 1)]
Several = Annotated[int, Rule("at least 2", lambda n: n >= 2)]
Natural = Annotated[int, Rule("at least 0", lambda n: n >= 0)]
Seed = Annotated[int, Rule("from 0 to 4294967295", lambda n: 0 <= n < 2**32)]  # as numpy takes it
Port = Annotated[int, Rule("from 0 to 65535", lambda n: 0 <= n < 2**16)]
Positive = Annotated[float, Rule("above 0", lambda x: x > 0)]
NonNegative = Annotated[float, Rule("at least 0", lambda x: x >= 0)]
Share = Annotated[float, Rule("at least 0 and below 1", lambda x: 0 <= x < 1)]
CodebookSize = Annotated[int, Rule("from 2 to 65536", lambda k: 2 <= k <= 65_536)]  # stored in 16 bits
CropLength = Annotated[float, Rule("at least 0.08", lambda s: s >= 0.08)]  # above half of the longest windows
Decay = Annotated[float, Rule("between 0 and 1", lambda x: 0 < x < 1)]
NOT_EMPTY = Rule("not empty", bool)
DISTINCT = Rule("without repetitions", lambda items: all(items.count(item) == 1 for item in items))
Counts = Annotated[list[Count], NOT_EMPTY]
Names = Annotated[list[str], NOT_EMPTY]
Corpus = str | Names  # a corpus folder, or several: see `read_corpus`
Betas = Annotated[list[Share], Rule("two numbers", lambda betas: len(betas) == 2)]  # of Adam


class SettingsError(InputError):
    """Settings that cannot work, each problem beginning with its key."""

    def __init__(self, problems: Iterable[str]):
        self.problems = list(problems)
        super().__init__("; ".join(self.problems))


class Settings:
    """Base of a configuration, which is a dataclass. Raises SettingsError with everything that is wrong with it."""

    def __post_init__(self) -> None:
        problems = [*broken_rules(type(self), vars(self)), *self.contradictions()]
        if getattr(self, "dev_splits", None) and getattr(self, "splits", ()) is None:
            problems.append("splits=null trains on all splits, dev_splits among them: set splits, or dev_splits=null")
        if problems:
            raise SettingsError(problems)

    def contradictions(self) -> Iterable[str]:
        """Settings that cannot work together, one problem each; values may break their rules here."""
        return ()


def broken_rules(cls: type, values: Mapping[str, Any]) -> Iterator[str]:
    """The rules of the fields of `cls` that these values break."""
    hints = get_type_hints(cls, include_extras=True)
    for key, value in values.items():
        yield from _broken(value, hints[key], key)


def argument(hint: Any) -> Callable[[str], Any]:
    """The type of an argument for argparse: a number that keeps the rule of `Count`, `Positive` or the like."""
    kind, rule = get_args(hint)

    def read(text: str) -> Any:
        try:
            if rule.holds(value := kind(text)):
                return value
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"must be {kind.__name__} {rule.text}, got {text!r}")

    return read


def layer_numbers(text: str) -> list[int]:
    """Layers as people write them, 1,2,4. Raises InputError."""
    try:
        return [int(word) for word in text.split(",")]
    except ValueError as error:
        raise InputError(f"expected layers like 1,2,4, got {text!r}") from error


def _broken(value: Any, hint: Any, key: str) -> Iterator[str]:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        yield from _broken(value, arguments[0], key)
        for rule in arguments[1:]:
            if not _holds(rule, value):
                yield f"{key} must be {rule.text}, got {value}"
    elif origin in (list, tuple) and isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _broken(item, arguments[0], f"{key}[{index}]")
    elif origin in (Union, UnionType) and not isinstance(value, str | None):  # words and null have no rules
        for option in arguments:
            yield from _broken(value, option, key)


def _holds(rule: Rule, value: Any) -> bool:
    try:
        return rule.holds(value)
    except TypeError:  # of a value that is not of the annotated type, such as one read from JSON
        return False
