"""The page of a comparison of tokenizers: tables and plots."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from speechllm.evaluation.comparison import kbps
from speechllm.evaluation.tables import Results, Table, primary_measure
from speechllm.reports import html
from speechllm.reports.plots import against_bitrate, by_system


def write_comparison(
    path: str | Path, *, title: str, results: Results, tables: Sequence[Table], provenance: Mapping[str, Any]
) -> None:
    """Write the page with plots and the tables of the results (`comparison_tables`); provenance: see `provenance`."""
    sections = {table.title: html.result_table(table) for table in tables}
    if curve := _quality_by_bitrate(results):
        sections["Table 1: speech quality"] += curve
    if curve := _errors(results):
        sections["Table 4: speech recognition"] += curve
    sections |= html.provenance_sections(provenance)
    said = "tested on the same speech. How each was trained: see Configuration."
    html.write_page(path, title, f"<p>{escape(', '.join(results))}, {said}</p>", sections)


def _quality_by_bitrate(results: Results) -> str:
    series = {}
    for name, result in results.items():
        rows = [row for row in result.get("quality", {}).get("codebooks", {}).values() if "pesq_wb" in row]
        if rows:
            series[name] = np.array([[row["kbps"], row["pesq_wb"]["mean"], *row["pesq_wb"]["ci95"]] for row in rows])
    return against_bitrate(series, {}, "PESQ-WB")


def _errors(results: Results) -> str:
    """Error rates by system, and by bitrate if systems differ in it."""
    measured = {
        name: [100 * rate for rate in (found["mean"], *found["ci95"])]
        for name, result in results.items()
        if (found := primary_measure(result.get("asr") or {}))
    }
    if not measured:
        return ""
    rates = {name: kbps(results[name]) for name in measured}
    series = {name: np.array([[rate, *measured[name]]]) for name, rate in rates.items() if rate is not None}
    without = {name: measured[name][0] for name, rate in rates.items() if rate is None}
    several = len({points[0, 0] for points in series.values()}) > 1
    leading = {result["asr"].get("primary", "wer").upper() for result in results.values() if result.get("asr")}
    label = f"{' or '.join(sorted(leading))} (%)"
    return by_system(measured, label) + (against_bitrate(series, without, label) if several else "")
