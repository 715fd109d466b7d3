"""Tables of results and the format of their cells."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

DASH = "–"  # not measured
Result = Mapping[str, Any]
Results = Mapping[str, Result]  # by system
# "mean", "ci95" if there is an interval, and "each", the shares of `paired_shares`, if it can be compared in pairs
Measure = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """Cells are text, the first one names its row; columns without any value are dropped."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def filled(self) -> tuple[list[str], list[list[str]]]:
        """Head and rows of the columns with at least one value."""
        kept = [i for i in range(len(self.head)) if i == 0 or any(row[i] != DASH for row in self.rows)]
        return [self.head[i] for i in kept], [[row[i] for i in kept] for row in self.rows]

    def markdown(self) -> str:
        head, rows = self.filled()
        lines = [f"## {self.title}", "", f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
        lines += [f"| {' | '.join(row)} |" for row in rows]
        return "\n".join([*lines, *(["", self.note] if self.note else [])]) + "\n"


def markdown(tables: Sequence[Table]) -> str:
    """Several tables as one Markdown page."""
    return "\n".join(table.markdown() for table in tables)


def primary_measure(found: Result) -> Measure:
    """The error rate that leads in pooled results of eval_asr: the WER, or the CER where texts have no spaces."""
    return {**found, "mean": found["cer"], "ci95": found["cer_ci95"]} if found.get("primary") == "cer" else found


def cell(measure: Measure | None, form: str = ".3f") -> str:
    """A value with its interval, or a dash."""
    if not measure:
        return DASH
    if "ci95" not in measure:
        return format(measure["mean"], form)
    low, high = (format(bound, form) for bound in measure["ci95"])
    return f"{measure['mean']:{form}} ({low} to {high})"


def plain(value: float | None, form: str = "g") -> str:
    """A number, or a dash."""
    return DASH if value is None else format(value, form)


def number(value: object) -> float | None:
    """The value as a finite float, or None."""
    return float(value) if isinstance(value, Real) and math.isfinite(value) else None
