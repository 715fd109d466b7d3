"""Draw how the error rate falls with more training speech, more steps, or anything else that was varied.

    python recipes/draw_scaling.py "curves=[{name: letters, at: [1, 3.3, 9.2], results: [A, B, C]}]" until=500 \\
        label="hours of training speech" output=scaling.svg

Each curve is a list of evaluations, folders of recipes/eval_asr.py, and the place of each on the axis. Both axes are
logarithmic, bars are 95 % intervals. A power law (Hestness et al. 2017) is a straight line there: dotted, the one that
fits a curve of three points or more best, up to `until`, but for those with law: false (speech of another kind was
added, say); how far it can be trusted beyond the points, nobody measured.
Prints the points and the lines as a Markdown table.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from speechllm.runs.config import parse_config
from tokenizer.settings import NOT_EMPTY, Names, Positive, Settings


@dataclass
class CurveConfig(Settings):
    name: str
    at: list[Positive]  # hours, steps, ..., one for each evaluation
    results: Names  # folders of eval_asr
    law: bool = True  # whether a dotted line goes on from its points

    def contradictions(self) -> Iterator[str]:
        if len(self.at) != len(self.results):
            yield f"at must hold one place for each of the {len(self.results)} results, got {len(self.at)}"


@dataclass
class ScalingConfig(Settings):
    curves: Annotated[list[CurveConfig], NOT_EMPTY]
    output: str  # picture, ending in .svg, .png or .pdf; an existing one is not overwritten
    label: str = "hours of training speech"  # of the axis
    until: Positive | None = None  # where the dotted lines end; the largest place of all when null

    def contradictions(self) -> Iterator[str]:
        if len({curve.name for curve in self.curves}) < len(self.curves):
            yield "curves must have different names"


if __name__ == "__main__":  # help and mistakes are answered before torch is loaded
    CONFIG = parse_config(ScalingConfig)

import numpy as np

from speechllm import DataError
from speechllm.evaluation.tables import Measure, Table, cell, primary_measure
from speechllm.reports.plots import figure_format, power_law, save_figure, scaling_figure
from speechllm.runs.recipe import run_recipe
from tokenizer.claims import claim_file
from tokenizer.files import read_json


def main(config: ScalingConfig) -> None:
    claim_file(config.output)
    figure_format(config.output)
    found = {curve.name: [*measures(curve)] for curve in config.curves}
    rates = {measure["primary"].upper() for curve in found.values() for _, measure in curve}
    if len(rates) > 1:
        raise DataError("some texts have spaces and others none, so that WER and CER lead: draw them apart")
    (rate,) = rates
    normalizers = {measure["normalizer"] for curve in found.values() for _, measure in curve}
    if len(normalizers) > 1:
        raise DataError(f"some were scored with {' and others with '.join(sorted(normalizers))}: draw them apart")
    curves = {
        name: np.array([[at, measure["mean"], *measure["ci95"]] for at, measure in curve])
        for name, curve in found.items()
    }
    until = config.until or max(curve[:, 0].max() for curve in curves.values())
    laws = {curve.name for curve in config.curves if curve.law}
    save_figure(scaling_figure(curves, config.label, until, rate, laws), config.output)
    rows = []
    for name, curve in curves.items():
        rows += [[name, f"{at:g}", cell(measure, ".1%")] for at, measure in found[name]]
        if name in laws and (line := power_law(curve)) and until > curve[:, 0].max():
            rows.append([name, f"{until:g}", f"{line(until):.1%} on the dotted line, if it goes on"])
    print(Table(f"{rate} against {config.label}", ["curve", config.label, rate], rows).markdown())
    print(f"{config.output} drawn")


def measures(curve: CurveConfig) -> Iterator[tuple[float, Measure]]:
    """The place and the error rate of each evaluation, from left to right."""
    for at, folder in sorted(zip(curve.at, curve.results, strict=True)):
        results = read_json(Path(folder) / "results.json")
        if "primary" not in results:
            raise DataError(f"{folder} is no output of eval_asr.py: it has no results.json with an error rate")
        found = primary_measure({**results, "mean": results["wer"]})
        if found["mean"] <= 0:
            raise DataError(f"{folder}: a rate of 0 has no place on a logarithmic axis: leave it out of {curve.name}")
        yield at, found


if __name__ == "__main__":
    run_recipe(main, CONFIG)
