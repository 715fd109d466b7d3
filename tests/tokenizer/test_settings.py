"""Rules of settings: what they refuse, all at once, and what argparse makes of them."""

import argparse
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest

from tokenizer.settings import (
    DISTINCT,
    NOT_EMPTY,
    Betas,
    Count,
    CropLength,
    Decay,
    Names,
    Natural,
    NonNegative,
    Positive,
    Seed,
    Settings,
    SettingsError,
    Several,
    Share,
    argument,
)


@dataclass
class Some(Settings):
    steps: Count = 1
    most: Count | None = None
    layer: Natural | Literal["avg"] = "avg"
    rate: Positive = 1.0
    strides: tuple[Count, ...] = (2,)
    seeds: Annotated[list[list[Natural]], NOT_EMPTY, DISTINCT] | None = None
    splits: Names | None = None
    share: Share = field(default=0.0)

    def contradictions(self) -> Iterable[str]:
        if self.most is not None and self.most < self.steps:
            yield f"most must be at least steps = {self.steps}, got {self.most}"


def problems(**settings: Any) -> list[str]:
    with pytest.raises(SettingsError) as error:
        Some(**settings)
    assert str(error.value) == "; ".join(error.value.problems)
    return error.value.problems


def test_what_keeps_the_rules_is_taken() -> None:
    assert Some(steps=3, most=3, layer=0, rate=1e-9, strides=(1, 2), splits=["a"], seeds=None, share=0.5).steps == 3
    assert Some(layer="avg", splits=None).layer == "avg"


def test_everything_that_is_wrong_is_said_at_once() -> None:
    assert problems(steps=4, most=-1, layer=-1, rate=float("nan"), strides=(2, 0), seeds=[], splits=[], share=1) == [
        "most must be at least 1, got -1",
        "layer must be at least 0, got -1",
        "rate must be above 0, got nan",
        "strides[1] must be at least 1, got 0",
        "seeds must be not empty, got []",
        "splits must be not empty, got []",
        "share must be at least 0 and below 1, got 1",
        "most must be at least steps = 4, got -1",
    ]


def test_items_of_lists_in_lists_and_values_of_other_types_are_refused() -> None:
    assert problems(steps="3") == ["steps must be at least 1, got 3"]  # as read from JSON
    assert Some(seeds=[[1, 1], [2]]).seeds == [[1, 1], [2]]
    assert problems(seeds=[[0], [1, -1]])[0] == "seeds[1][1] must be at least 0, got -1"


@pytest.mark.parametrize(
    "hint, taken, refused",
    [
        (Count, "1 7", "0 -1 1.5 x"),
        (Several, "2", "1"),
        (Natural, "0", "-1"),
        (Seed, "0 4294967295", "-1 4294967296"),
        (Positive, "1e-9 2 inf", "0 -1 nan x"),
        (NonNegative, "0", "-1e-9 nan"),
        (Share, "0 0.99", "1 -0.1 nan"),
        (Decay, "0.5", "0 1 nan"),
        (CropLength, "0.08", "0.01 -1 nan"),
    ],
)
def test_arguments_of_the_command_keep_the_rules(hint: Any, taken: str, refused: str) -> None:
    read = argument(hint)
    assert all(read(word) == float(word) for word in taken.split())
    for word in refused.split():
        with pytest.raises(argparse.ArgumentTypeError, match=r"^must be (int|float) .*, got '"):
            read(word)


def test_betas_are_two_shares() -> None:
    @dataclass
    class Adam(Settings):
        betas: Betas

    assert Adam([0.9, 0.99]).betas == [0.9, 0.99]
    for betas, message in (
        ([0.9], "betas must be two numbers"),
        ([2, 0.9], r"betas\[0\] must be at least 0"),
    ):
        with pytest.raises(SettingsError, match=message):
            Adam(betas)
