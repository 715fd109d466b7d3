"""The reports, each one self-contained HTML page written atomically.

Of trainings, of evaluations, and of the demo.
"""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from speechllm.evaluation.alignment import Alignment, align
from speechllm.evaluation.error_rates import results_verdict
from speechllm.evaluation.normalizers import NORMALIZERS
from speechllm.evaluation.scripts import spelled
from speechllm.evaluation.tables import Table, number
from speechllm.reports.alignments import alignment_list, duration_figure, speaker_table
from speechllm.reports.html import (
    bar,
    duration,
    percent,
    provenance_sections,
    result_table,
    table,
    tables,
    text,
    tiles,
    write_page,
)
from speechllm.reports.plots import LAYER, code_usage, confusion_matrix, curves
from speechllm.reports.sounds import Reconstruction, spectrograms_and_players
from speechllm.runs.run import Run, read_log
from tokenizer.files import write_json
from tokenizer.metrics.code_usage import usage_of_counts

ALIGNMENTS_SHOWN = 10
PROVENANCE = set("config command seconds versions codec_fingerprint".split())
SHOWN_ELSEWHERE = PROVENANCE | set(
    "wer wer_ci95 ci95 cer cer_ci95 primary wer_shuffled_audio wer_shuffled_audio_ci95 cer_shuffled_audio "
    "cer_shuffled_audio_ci95 utterances tokens_per_second substitutions deletions insertions notes seconds_by_stage "
    "codebooks speakers splits empty_references".split()
)
INTERVALS = {"over actors": "ci95_actors", "over utterances": "ci95"}
CODEC_METRICS = {  # in the order in which they are shown
    "pesq_wb": ("PESQ, wide-band", "1 to 4.6, higher is better"),
    "stoi": ("STOI", "0 to 1, higher is better"),
    "mel": ("Mel distance", "multi-scale, lower is better"),
    "semantic_cosine": ("Semantic cosine", "layer 0 and its teacher, at most 1"),
    "semantic": ("Semantic loss", "layer 0, lower is better"),
    "acoustic": ("Acoustic loss", "layer 1, lower is better"),
}


def write_codec_report(
    path: str | Path,
    *,
    title: str,
    metrics: Mapping[str, float],
    log: list[dict[str, Any]],
    codebook_counts: Sequence[np.ndarray],
    reconstruction: Reconstruction,
    provenance: Mapping[str, Any],
) -> None:
    """Write the page of a tokenizer's training.

    metrics: of the last validation, named as in `validate_codec`; codebook_counts: int [K] per layer; provenance: how
    the run was made, see `provenance`.
    """
    sections = {
        "Training": curves(log),
        "Codebook usage": _codebooks(codebook_counts),
        "Reconstruction": spectrograms_and_players(reconstruction),
        **provenance_sections(provenance),
    }
    write_page(path, title, _codec_tiles(metrics), sections)


def write_training_report(run: Run, summary: Mapping[str, Any]) -> None:
    """Write RUN/report.html, the page of a training with its summary and curves."""
    sections = {"Training": curves(read_log(run.folder)), **provenance_sections(run.provenance)}
    write_page(run.folder / "report.html", str(run.folder), tables(summary), sections)


def finish_training(run: Run, summary: dict[str, Any]) -> None:
    """Write the page of a training and mark the run as finished."""
    write_training_report(run, summary)
    run.finish(summary)


def write_results_report(
    path: str | Path,
    title: str,
    results: Mapping[str, Any],
    result_tables: Sequence[Table] = (),
    codebook_counts: Sequence[np.ndarray] = (),
) -> None:
    """Write the page of an evaluation without a page of its own.

    results: as in its results file, with the keys of `provenance`; result_tables: shown first; codebook_counts: int [K]
    per layer.
    """
    sections = {found.title: result_table(found) for found in result_tables}
    if codebook_counts:
        sections["Codebook usage"] = _codebooks(codebook_counts)
    sections["Results"] = tables({name: value for name, value in results.items() if name not in PROVENANCE})
    write_page(path, title, "", sections | provenance_sections(results))


def write_results(
    folder: Path,
    title: str,
    results: Mapping[str, Any],
    result_tables: Sequence[Table] = (),
    codebook_counts: Sequence[np.ndarray] = (),
) -> None:
    """Write results.json and report.html into the folder: see `write_results_report`."""
    write_json(folder / "results.json", results)
    write_results_report(folder / "report.html", title, results, result_tables, codebook_counts)


def write_recognition_report(
    path: str | Path,
    *,
    title: str,
    results: Mapping[str, Any],
    predictions: list[dict[str, Any]],
    logs: Mapping[str, list[dict[str, Any]]] | None = None,
) -> None:
    """Write the page of a speech recogniser's evaluation.

    results, predictions: as written by eval_asr, error rates as fractions; logs: by the title of their section.
    """
    ranked, rate = _ranked(predictions, results), _primary(results).upper()
    sections = {
        **({"Error rates by split": found} if (found := _splits(results)) else {}),
        "Errors": _errors(results),
        f"{rate} by speaker": speaker_table(ranked, rate),
        f"{rate} by duration": duration_figure(ranked, rate),
        **_extremes(ranked),
        **{name: curves(log) for name, log in (logs or {}).items()},
        "Further results": tables(_rest(results)),
        **provenance_sections(results),
    }
    write_page(path, title, _recognition_tiles(results), sections)


def write_emotion_report(path: str | Path, title: str, results: Mapping[str, Any], log: list[dict[str, Any]]) -> None:
    """Write the page of train_emotion. results: as in its results.json, with `provenance`; log: mean loss by epoch."""
    over = ", ".join(f"{' to '.join(map(percent, results[key]))} {name}" for name, key in INTERVALS.items())
    figures = tiles(
        [
            (
                "Accuracy",
                percent(results["accuracy"]),
                f"95 % interval {over}",
            ),
            ("Mean recall", percent(results["unweighted_average_recall"]), "all classes have equal weight"),
            (
                "Shuffled-label control",
                percent(results["accuracy_shuffled_labels"]),
                f"trained on permuted labels; 95 % interval {_span(results['accuracy_shuffled_labels_ci95'])}",
            ),
            ("Chance", percent(results["chance"]), "always the most frequent class"),
            ("Utterances", text(results["utterances"]), f"of {results['actors']} actors"),
            ("Token rate", text(results["tokens_per_second"]), "tokens per second of speech"),
        ]
    )
    folds = [(f"{i}", text(fold["actors"]), percent(fold["accuracy"])) for i, fold in enumerate(results["folds"])]
    sections = {
        "Confusion": confusion_matrix(results["confusion"], results["classes"]),
        "Folds": table(folds, ["", "test actors", "accuracy"]),
        "Training": curves(log),
        **provenance_sections(results),
    }
    write_page(path, title, figures, sections)


def write_report(
    path: str | Path,
    *,
    title: str,
    results: dict[str, Any],
    tokenizer_log: list[dict[str, Any]],
    asr_log: list[dict[str, Any]],
    codebook_counts: Sequence[np.ndarray],
    reconstruction: Reconstruction,
    predictions: list[dict[str, Any]],
) -> None:
    """Write the demo's page. codebook_counts: int [K] per layer; error rates are fractions, times in seconds."""
    ranked, rate = _ranked(predictions, results), _primary(results).upper()
    sections = {
        "Notes": _notes(results.get("notes")),
        "Results": tables(_rest(results)),
        "Tokenizer training": curves(tokenizer_log),
        "Recogniser training": curves(asr_log),
        "Codebook usage": _codebooks(codebook_counts),
        "Reconstruction": spectrograms_and_players(reconstruction),
        f"{rate} by speaker": speaker_table(ranked, rate),
        **_extremes(ranked),
        "Time per stage": _stages(results.get("seconds_by_stage")),
        **provenance_sections(results),
    }
    write_page(path, title, _recognition_tiles(results), sections)


def _codec_tiles(metrics: Mapping[str, float]) -> str:
    """Tiles of all metrics except those of single layers, which are shown with the codebook usage."""
    found = {name.removeprefix("dev_"): value for name, value in metrics.items() if not LAYER.search(name)}
    names = [name for name in CODEC_METRICS if name in found] + [name for name in found if name not in CODEC_METRICS]
    labels = {name: CODEC_METRICS.get(name, (escape(name), "")) for name in names}
    return tiles((label, text(found[name]), note) for name, (label, note) in labels.items())


def _recognition_tiles(results: Mapping[str, Any]) -> str:
    """Tiles of the error rates, the one that steers first, with its control and what that shows."""
    steering = _primary(results)
    intervals = {"wer": results.get("ci95", results.get("wer_ci95")), "cer": results.get("cer_ci95")}
    notes = {rate: f"95 % interval {_span(interval)}" for rate, interval in intervals.items()}
    if speakers := results.get("ci95_speakers"):
        notes[steering] += f" over utterances, {_span(speakers)} over speakers"
    if steering == "cer":
        notes["cer"] += "; the rate to go by, because most of these texts are written without spaces"
    elif not intervals["cer"]:
        notes["cer"] = "on the same texts"
    pooled = len(results.get("splits") or ())
    notes[steering] += f"; {pooled} splits pooled, see below" if pooled > 1 else ""
    labels = {"wer": "Word error rate", "cer": "Character error rate"}
    order = sorted(("wer", "cer"), key=lambda rate: rate != steering)
    rows = [
        (labels[rate], percent(results.get(rate)), notes[rate]) for rate in order if rate == "wer" or rate in results
    ]
    control = results.get(f"{steering}_shuffled_audio_ci95")
    heard = results.get("utterances_shuffled_audio")
    note = (f", {heard} utterances" if heard else "") + (f", 95 % interval {_span(control)}" if control else "")
    empty = results.get("empty_references")
    rows += [
        (
            "Shuffled-audio control",
            percent(results.get(f"{steering}_shuffled_audio")),
            f"{steering.upper()} with another utterance's audio{note}",
        ),
        (
            "Utterances",
            text(results.get("utterances")),
            f"transcribed; {empty} with a reference without words" if empty else "transcribed",
        ),
        ("Token rate", text(results.get("tokens_per_second")), "tokens per second of speech"),
    ]
    return f"{tiles(rows)}<p>{escape(results_verdict(results))}</p>"


def _span(interval: Any) -> str:
    """An interval of rates in words."""
    low, high = interval if isinstance(interval, list | tuple) and len(interval) == 2 else (None, None)
    return f"{percent(low)} to {percent(high)}"


def _splits(results: Mapping[str, Any]) -> str:
    """The rates of each of several splits."""
    splits = results.get("splits") or {}
    rows = [
        (
            escape(name),
            text(found["utterances"]),
            text(found["words"]),
            *(f"{percent(found[rate])} ({_span(found[f'{rate}_ci95'])})" for rate in ("wer", "cer")),
        )
        for name, found in splits.items()
    ]
    return table(rows, ["split", "utterances", "words", "WER", "CER"]) if len(splits) > 1 else ""


def _errors(results: Mapping[str, Any]) -> str:
    """The errors by kind, with their shares of the reference words, which add up to the WER."""
    words = number(results.get("words"))
    counts = {kind: number(results.get(kind)) for kind in ("substitutions", "deletions", "insertions")}
    known = {kind: count for kind, count in counts.items() if count is not None}
    if not known or not words:
        return ""
    rows = [(kind, text(c), percent(c / words), bar(c, max(known.values()))) for kind, c in known.items()]
    return table(rows, ["", "number", "share of words", ""])


def _ranked(predictions: list[dict[str, Any]], results: Mapping[str, Any]) -> list[Alignment]:
    """Alignments of the normalised texts, worst first; of their characters, if the character error rate steers."""
    normalize = NORMALIZERS.get(str(results.get("normalizer")), str)
    units = (lambda text: spelled(normalize(text))) if _primary(results) == "cer" else normalize
    return sorted(align(predictions, units), key=lambda a: a.badness, reverse=True)


def _primary(results: Mapping[str, Any]) -> str:
    """The error rate that steers, `primary_rate`; the word error rate in results that do not say."""
    return "cer" if results.get("primary") == "cer" else "wer"


def _extremes(ranked: Sequence[Alignment]) -> dict[str, str]:
    """The sections with the worst and best utterances. None is shown twice: the worst come first."""
    worst, others = ranked[:ALIGNMENTS_SHOWN], ranked[ALIGNMENTS_SHOWN:]
    best = others[::-1][:ALIGNMENTS_SHOWN]
    return {"Worst alignments": alignment_list(worst), "Best alignments": alignment_list(best)}


def _notes(notes: Any) -> str:
    lines = [notes] if isinstance(notes, str) else notes or []
    return f"<ul>{''.join(f'<li>{escape(str(n))}</li>' for n in lines)}</ul>" if lines else ""


def _rest(results: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in results.items() if name not in SHOWN_ELSEWHERE}


def _codebooks(counts: Sequence[np.ndarray]) -> str:
    """A figure of the sorted code usage of all layers, counts int [K] each, and a table with perplexities."""
    layers = [np.asarray(layer).ravel().astype(int) for layer in counts]
    if not any(layer.sum() > 0 for layer in layers):
        return ""
    rows = []
    for index, layer in enumerate(layers):
        usage = usage_of_counts(layer)
        numbers = (usage["perplexity"], usage["dead"], layer.sum())
        used = f"{usage['used']:,}\u00a0/\u00a0{len(layer):,}"
        rows.append((f"layer\u00a0{index}", used, *map(text, numbers)))
    return code_usage(layers) + table(rows, ["", "used / K", "perplexity", "dead codes", "tokens"])


def _stages(seconds: object) -> str:
    pairs = {str(k): number(v) for k, v in seconds.items()} if isinstance(seconds, Mapping) else {}
    known = [v for v in pairs.values() if v is not None]
    rows = [(escape(k), duration(v), bar(v, max(known, default=1))) for k, v in pairs.items()]
    return table([*rows, ("total", duration(sum(known)), "")]) if known else ""
