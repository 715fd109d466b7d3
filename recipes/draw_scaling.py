"""Draw how the word error rate falls with more training speech, more steps, or anything else that was varied.

    python recipes/draw_scaling.py "curves=[{name: letters, at: [1, 3.3, 9.2], results: [A, B, C]}]" until=500 \\
        label="hours of training speech" output=scaling.svg

Each curve is a list of evaluations, folders of recipes/eval_asr.py, and the place of each on the axis. Both axes are
logarithmic, bars are 95 % intervals. A power law (Hestness et al. 2017) is a straight line there: dotted, the one that
fits a curve of three points or more best, up to `until`; how far it can be trusted beyond the points, nobody measured.
Prints the points and the lines as a Markdown table.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from speechllm.runs.config import parse_config
from tokenizer.settings import Names, Positive, Settings


@dataclass
class CurveConfig(Settings):
    name: str
    at: list[Positive]  # hours, steps, ..., one for each evaluation
    results: Names  # folders of eval_asr

    def contradictions(self) -> Iterator[str]:
        if len(self.at) != len(self.results):
            yield f"{self.name}: expected a place for each evaluation, got {len(self.at)} and {len(self.results)}"


@dataclass
class ScalingConfig(Settings):
    curves: list[CurveConfig]
    output: str  # picture, ending in .svg, .png or .pdf; an existing one is not overwritten
    label: str = "hours of training speech"  # of the axis
    until: Positive | None = None  # where the dotted lines end; the largest place of all when null


if __name__ == "__main__":  # help and mistakes are answered before torch is loaded
    CONFIG = parse_config(ScalingConfig)

import numpy as np

from speechllm import DataError
from speechllm.evaluation.tables import Table
from speechllm.reports.plots import figure_format, power_law, save_figure, scaling_figure
from speechllm.runs.recipe import run_recipe
from tokenizer.claims import claim_file
from tokenizer.files import read_json


def main(config: ScalingConfig) -> None:
    claim_file(config.output)
    figure_format(config.output)
    curves = {curve.name: np.array([*points(curve)]) for curve in config.curves}
    until = config.until or max(curve[:, 0].max() for curve in curves.values())
    save_figure(scaling_figure(curves, config.label, until), config.output)
    rows = []
    for name, curve in curves.items():
        rows += [[name, f"{at:g}", f"{wer:.1%} ({low:.1%} to {high:.1%})"] for at, wer, low, high in curve]
        if (line := power_law(curve)) and until > curve[:, 0].max():
            rows.append([name, f"{until:g}", f"{line(until):.1%} on the dotted line, if it goes on"])
    print(Table(f"Word errors against {config.label}", ["curve", config.label, "WER"], rows).markdown())
    print(f"{config.output} drawn")


def points(curve: CurveConfig) -> Iterator[tuple[float, float, float, float]]:
    """Place, word error rate and the bounds of its interval, of each evaluation."""
    for at, folder in sorted(zip(curve.at, curve.results, strict=True)):
        results = read_json(Path(folder) / "results.json")
        if "wer" not in results or "ci95" not in results:
            raise DataError(f"{folder} is no folder of eval_asr: it has no results.json with a word error rate")
        if results["wer"] <= 0:
            raise DataError(f"{folder}: a word error rate of 0 has no place on a logarithmic axis")
        yield at, results["wer"], *results["ci95"]


if __name__ == "__main__":
    run_recipe(main, CONFIG)
