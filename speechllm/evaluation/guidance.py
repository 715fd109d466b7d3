"""The best system for each purpose, as far as the measurements can tell."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from speechllm.evaluation.error_rates import paired_shares
from speechllm.evaluation.tables import DASH, Measure, Result, Results, Table, cell, primary_measure

FEW = {1: "a single training", 2: "two trainings"}  # by how many seeds of a recogniser or classifier


@dataclass(frozen=True)
class Need:
    """A purpose of a tokenizer, and the measure that decides."""

    name: str
    measure: str
    form: str  # format of its values
    lower: bool  # whether a lower value is better
    of: Callable[[Result], Iterator[Measure]]  # the measures of a system's settings


def _row(row: Mapping[str, Any], measure: str, at: str) -> Iterator[Measure]:
    if measure in row:
        yield {**row[measure], "at": at, "cost": row.get("kbps")}


def _codebooks(measure: str) -> Callable[[Result], Iterator[Measure]]:
    def of(result: Result) -> Iterator[Measure]:
        for count, row in result.get("quality", {}).get("codebooks", {}).items():
            steering = "cer" if measure == "wer" and "cer" in row else measure  # where it was measured, it leads
            yield from _row(row, steering, "1 codebook" if int(count) == 1 else f"{count} codebooks")

    return of


def _swaps(measure: str, lower: bool) -> Callable[[Result], Iterator[Measure]]:
    """Swaps of codes, "idle" unless they beat the unchanged codes: blurred speech is closer to any voice."""

    def of(result: Result) -> Iterator[Measure]:
        methods = result.get("conversion", {}).get("methods", {})
        for method, row in methods.items():
            if method.startswith("swap"):
                depth = int(re.findall(r"\d+", method)[-1]) + 1
                unchanged = methods.get(f"source, {depth} codebooks", {}).get(measure)
                for found in _row(row, measure, method):
                    better = unchanged is not None and (found["mean"] < unchanged["mean"]) == lower
                    yield {**found, "idle": not better or indistinct(found, unchanged)}

    return of


def _task(task: str) -> Callable[[Result], Iterator[Measure]]:
    def of(result: Result) -> Iterator[Measure]:
        if found := result.get(task):
            yield {**found, "cost": found.get("tokens_per_second")}

    return of


def _recognition(result: Result) -> Iterator[Measure]:
    yield from map(primary_measure, _task("asr")(result))


def _single(key: str) -> Callable[[Result], Iterator[Measure]]:
    def of(result: Result) -> Iterator[Measure]:
        if result.get(key) is not None and not result.get("like"):
            yield {"mean": result[key]}

    return of


NEEDS = (
    Need("speech recognition", "WER of the language model (CER without spaces)", ".1%", True, _recognition),
    Need("speech quality", "PESQ-WB", ".3f", False, _codebooks("pesq_wb")),
    Need("voice preservation", "speaker similarity after the codec", ".3f", False, _codebooks("speaker_similarity")),
    Need("intelligibility", "WER after the codec", ".1%", True, _codebooks("wer")),
    Need("voice conversion: timbre", "MCD (dB)", ".2f", True, _swaps("mcd", True)),
    Need("voice conversion: intonation", "pitch correlation", ".3f", False, _swaps("f0_correlation", False)),
    Need("voice conversion: speaker identity", "speaker similarity", ".3f", False, _swaps("speaker_similarity", False)),
    Need("emotion recognition", "accuracy", ".1%", False, _task("emotion")),
    Need("small tokenizer", "parameters", ",.0f", True, _single("parameters")),
    Need("fast encoding", "seconds per second of speech", ".4f", True, _single("rtf")),
)


def guidance(results: Results) -> Table:
    """The best measured system for each purpose, and whether it is distinguishable from the others.

    Each system counts with its best setting. Which systems are not distinguished: see `indistinct`.
    """
    rows = []
    for need in NEEDS:
        best = {name: found for name, result in results.items() if (found := _best(need.of(result), need.lower))}
        if len(best) < 2:
            continue
        best = {name: found for name, found in best.items() if not found.get("idle")}
        if not best:
            rows.append([need.name, need.measure, "none", "no swap beats the unchanged codes", DASH])
            continue
        winner = (min if need.lower else max)(best, key=lambda name: best[name]["mean"])
        equals = [name for name in best if name == winner or indistinct(best[name], best[winner])]
        values = "; ".join(_named(name, best[name], need.form) for name in equals)
        verdict = winner if len(equals) == 1 else "no clear winner"
        trainings = min(len(found.get("seeds", ())) for found in best.values())
        if len(equals) == 1 and trainings in FEW:
            verdict = f"{winner}, in {FEW[trainings]}"
        rows.append([need.name, need.measure, verdict, values, _cheapest(need, results, best[winner])])
    head = ["purpose", "measure", "best", "its value, and those not distinguishable from it", "cheapest of these"]
    note = (
        "Every system counts with its best setting; a swap of codes counts only if it is distinguishable from the "
        "unchanged codes and beats them. Two systems are distinguishable if the 95 % interval of their difference on "
        "the same utterances (of emotions: actors), and over the seeds of each, excludes 0; without the utterances, if "
        "their intervals do not overlap. What one or two trainings have shown, other seeds may turn. No clear winner "
        "does not mean that the systems are equal. Parameters and speed have no intervals and are taken as exact to "
        "5 %."
    )
    return Table("Best system by purpose", head, rows, note)


def indistinct(one: Measure, other: Measure) -> bool:
    """Whether two measures may be equal: by the paired bootstrap on what both were measured on, else by `overlap`."""
    paired = paired_shares(one.get("each", {}), other.get("each", {}))
    return paired.ci95[0] <= 0 <= paired.ci95[1] if paired else overlap(one, other)


def overlap(one: Measure, other: Measure) -> bool:
    """Whether the intervals of two measures overlap; a value without one, such as a time, counts as exact to 5 %."""
    (low, high), (from_, to) = (
        measure.get("ci95", [0.95 * measure["mean"], 1.05 * measure["mean"]]) for measure in (one, other)
    )
    return low <= to and from_ <= high


def _best(measures: Iterator[Measure], lower: bool) -> Measure | None:
    order = 1 if lower else -1
    return min(measures, key=lambda found: (found.get("idle", False), order * found["mean"]), default=None)


def _named(name: str, measure: Measure, form: str) -> str:
    return f"{name} {cell(measure, form)}" + (f", {measure['at']}" if "at" in measure else "")


def _cheapest(need: Need, results: Results, best: Measure) -> str:
    """Of all settings that are not distinguishable from the best one, the one with the lowest bitrate or token rate."""
    settings = [
        (found["cost"], name, found)
        for name, result in results.items()
        for found in need.of(result)
        if found.get("cost") is not None and not found.get("idle") and indistinct(found, best)
    ]
    if not settings:
        return DASH
    cost, name, found = min(settings, key=lambda setting: setting[0])
    return f"{name}, {found['at']}, {cost:g} kbps" if "at" in found else f"{name}, {cost:.4g} tokens/s"
