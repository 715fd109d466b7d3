"""One self-contained HTML page with the results, curves, sounds and alignments of a run."""

import base64
import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from itertools import groupby, zip_longest
from numbers import Real
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import soundfile

from speechllm.plots import code_usage, curves, spectrograms

NOT_RECORDED = '<p class="muted">not recorded</p>'
SHOWN_ELSEWHERE = set(
    "wer wer_ci95 wer_shuffled_audio utterances tokens_per_second notes seconds_by_stage versions "
    "codec_fingerprint codebooks".split()
)
AUDIO_BUDGET_BYTES = 640_000  # raw 16-bit audio of all players together; base64 adds a third
MAX_RECONSTRUCTIONS = 4
ALIGNMENTS_SHOWN = 10
MARKS = {"equal": "", "substitute": "sub", "delete": "del", "insert": "ins"}

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
{style}</style></head><body><main><h1>{title}</h1>
{sections}
</main></body></html>
"""


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """One utterance before and after the codec: float [N] at `sample_rate` Hz, keyed by the number of codebooks."""

    name: str
    sample_rate: int
    original: np.ndarray
    reconstructions: dict[int, np.ndarray]


@dataclass(frozen=True, eq=False)
class Alignment:
    """One utterance as (reference word, recognised word, jiwer kind) columns; a missing word is empty."""

    id: str
    speaker: str
    columns: list[tuple[str, str, str]]
    errors: int
    words: int  # in the reference

    @property
    def badness(self) -> tuple[float, int, int]:
        """Sort key, largest is worst: error rate, then errors, then shortness (a long perfect line says more)."""
        return self.errors / max(self.words, 1), self.errors, -self.words


def write_report(
    path: Path,
    *,
    title: str,
    results: dict[str, object],
    tokenizer_log: list[dict[str, float]],
    asr_log: list[dict[str, float]],
    codebook_counts: Sequence[np.ndarray],
    reconstruction: Reconstruction,
    predictions: list[dict[str, str]],
) -> None:
    """Write the page to `path` in one step; counts are int [K] per layer, error rates are fractions, times seconds."""
    ranked = sorted(align(predictions), key=lambda a: a.badness, reverse=True)
    sections = {
        "Notes": _notes(results.get("notes")),
        "Results": _result_tables(results),
        "Tokenizer training": curves(tokenizer_log),
        "Recogniser training": curves(asr_log),
        "Codebook usage": _codebooks([np.asarray(counts, dtype=float).ravel() for counts in codebook_counts]),
        "Reconstruction": _reconstruction(reconstruction),
        "WER by speaker": _speakers(ranked),
        "Worst alignments": _alignments(ranked[:ALIGNMENTS_SHOWN]),
        # Nothing is shown twice: with few utterances all of them stand among the worst.
        "Best alignments": _alignments(ranked[ALIGNMENTS_SHOWN:][::-1][:ALIGNMENTS_SHOWN]),
        "Time per stage": _stages(results.get("seconds_by_stage")),
        "Versions": _versions(results),
    }
    body = _headline(results)
    for name, html in sections.items():
        body += f"<section><h2>{name}</h2>{html or NOT_RECORDED}</section>\n"
    style = resources.files("speechllm").joinpath("report.css").read_text(encoding="utf-8")
    _write_atomically(Path(path), PAGE.format(title=escape(title), style=style, sections=body))


def align(predictions: Sequence[Mapping[str, str]]) -> list[Alignment]:
    """Align reference and hypothesis words of every prediction, texts as given."""
    if not predictions:
        return []  # jiwer takes an empty list for one empty text
    references, hypotheses = (
        [" ".join(str(p.get(k) or "").split()) for p in predictions] for k in ("reference", "hypothesis")
    )
    out = jiwer.process_words(references, hypotheses)
    alignments = []
    for p, said, heard, chunks in zip(predictions, out.references, out.hypotheses, out.alignments, strict=True):
        columns = []
        for c in chunks:
            pieces = said[c.ref_start_idx : c.ref_end_idx], heard[c.hyp_start_idx : c.hyp_end_idx]
            columns += [(*pair, c.type) for pair in zip_longest(*pieces, fillvalue="")]
        errors = sum(kind != "equal" for *_, kind in columns)
        alignments.append(Alignment(str(p.get("id", "?")), str(p.get("speaker", "?")), columns, errors, len(said)))
    return alignments


def _write_atomically(path: Path, text: str) -> None:
    """Write beside the target and rename, so that a reader never sees half a page."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        # Lone surrogates from undecodable input must not cost the whole report.
        temporary.write_text(text, encoding="utf-8", errors="replace")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _number(value: object) -> float | None:
    """The value as a finite float, or None."""
    return float(value) if isinstance(value, Real) and math.isfinite(value) else None


def _format(value: object) -> str:
    """A value as escaped text: four significant digits, grouped thousands, lists joined."""
    if isinstance(value, list | tuple | np.ndarray):
        return ", ".join(_format(v) for v in value[:12]) + (f", … ({len(value)} values)" if len(value) > 12 else "")
    number = _number(value)
    if number is None or isinstance(value, bool):
        return "not recorded" if value is None or isinstance(value, Real) and number is None else escape(str(value))
    return f"{number:,.0f}" if abs(number) >= 1000 or number == int(number) else f"{number:.4g}"


def _percent(value: object) -> str:
    number = _number(value)
    return "not recorded" if number is None else f"{100 * number:.1f}\u00a0%"


def _table(rows: Iterable[Sequence[str]], head: Sequence[str] = ()) -> str:
    """A table of cells that are already HTML; the first cell of a row names it."""
    body = "".join(f'<tr><th scope="row">{r[0]}</th>{"".join(f"<td>{c}</td>" for c in r[1:])}</tr>' for r in rows)
    top = f"<thead><tr>{''.join(f'<th>{h}</th>' for h in head)}</tr></thead>" if head else ""
    return f'<div class="scroll"><table>{top}<tbody>{body}</tbody></table></div>' if body else ""


def _bar(value: float | None, largest: float) -> str:
    return f'<div class="bar" style="width:{100 * (value or 0) / (largest or 1):.1f}%"></div>'


def _headline(results: Mapping[str, Any]) -> str:
    interval = results.get("wer_ci95")
    low, high = interval if isinstance(interval, list | tuple) and len(interval) == 2 else (None, None)
    tiles = [
        ("Word error rate", _percent(results.get("wer")), f"95 % interval {_percent(low)} to {_percent(high)}"),
        ("Shuffled-audio control", _percent(results.get("wer_shuffled_audio")), "WER with another utterance's audio"),
        ("Utterances", _format(results.get("utterances")), "transcribed"),
        ("Speed", _format(results.get("tokens_per_second")), "tokens per second"),
    ]
    boxes = "".join(f'<div class="tile"><span>{n}</span><b>{v}</b><span>{d}</span></div>' for n, v, d in tiles)
    control = "With another utterance's audio the WER must be near 1 (100 %): the model listens."
    return f'<div class="grid" style="--min:180px">{boxes}</div><p>{control}</p>'


def _notes(notes: Any) -> str:
    lines = [notes] if isinstance(notes, str) else notes or []
    return f"<ul>{''.join(f'<li>{escape(str(n))}</li>' for n in lines)}</ul>" if lines else ""


def _result_tables(results: Mapping[str, Any]) -> str:
    tables = _nested_tables("", {k: v for k, v in results.items() if k not in SHOWN_ELSEWHERE})
    return f'<div class="grid" style="--min:400px">{tables}</div>' if tables else ""


def _nested_tables(name: str, values: Mapping[str, Any]) -> str:
    """One table for the scalars; dicts of scalars inside a named dict become its rows, other dicts their own tables."""
    inner = {str(k): v for k, v in values.items() if isinstance(v, Mapping) and v}
    scalars = [(escape(str(k)), _format(v)) for k, v in values.items() if not isinstance(v, Mapping)]
    heading = f"<h3>{escape(name or 'General')}</h3>"
    html = f"<div>{heading}{_table(scalars)}</div>" if scalars else ""
    if name and inner and not any(isinstance(w, Mapping) for v in inner.values() for w in v.values()):
        keys = list(dict.fromkeys(k for v in inner.values() for k in v))
        rows = [(escape(k), *(_format(v[c]) if c in v else "–" for c in keys)) for k, v in inner.items()]
        table = _table(rows, ["", *(escape(str(k)) for k in keys)])
        return f"{html}<div{' class=wide' if len(keys) > 3 else ''}>{'' if html else heading}{table}</div>"
    return html + "".join(_nested_tables(f"{name} / {k}" if name else k, v) for k, v in inner.items())


def _codebooks(layers: Sequence[np.ndarray]) -> str:
    """Sorted usage of all layers, counts [K] each, in one figure; a table of use, perplexity and dead codes."""
    if not any(counts.sum() > 0 for counts in layers):
        return ""
    shares = [np.sort(counts[counts > 0])[::-1] / max(counts.sum(), 1) for counts in layers]
    rows = []
    for index, (counts, used) in enumerate(zip(layers, shares, strict=True)):
        perplexity = np.exp(-(used * np.log(used)).sum()) if len(used) else None
        numbers = (perplexity, len(counts) - len(used), counts.sum())
        rows.append((f"layer {index}", f"{len(used):,} / {len(counts):,}", *map(_format, numbers)))
    head = ["", "used / K", "perplexity", "dead codes", "tokens"]
    return code_usage(shares, [len(counts) for counts in layers]) + _table(rows, head)


def _reconstruction(reconstruction: Reconstruction | None) -> str:
    """Spectrograms one above the other on one colour scale, and a player for each sound."""
    if reconstruction is None or np.size(reconstruction.original) == 0:
        return ""
    sounds, rate = _sounds(reconstruction), reconstruction.sample_rate
    shown, total = (np.size(wave) / rate for wave in (sounds["original"], reconstruction.original))
    caption = f"Utterance {escape(reconstruction.name)}, {shown:.2f} of {total:.2f} s, {rate:,} Hz."
    players = "".join(_player(name, wave, rate) for name, wave in sounds.items())
    return f'{spectrograms(sounds, rate, caption)}<div class="grid" style="--min:280px">{players}</div>'


def _sounds(reconstruction: Reconstruction) -> dict[str, np.ndarray]:
    """The original, then reconstructions from most to fewest codebooks, float [N], cut to keep the page small."""
    counts = sorted((c for c, wave in reconstruction.reconstructions.items() if np.size(wave)), reverse=True)
    if len(counts) > MAX_RECONSTRUCTIONS:
        counts = [counts[i] for i in np.linspace(0, len(counts) - 1, MAX_RECONSTRUCTIONS).round().astype(int)]
    named = {"original": reconstruction.original}
    named |= {f"{c} codebook{'s' * (c != 1)}": reconstruction.reconstructions[c] for c in counts}
    limit = min(AUDIO_BUDGET_BYTES // (2 * len(named)), np.size(reconstruction.original))
    return {name: np.nan_to_num(np.asarray(w, dtype=np.float32).ravel()[:limit]) for name, w in named.items()}


def _player(name: str, waveform: np.ndarray, sample_rate: int) -> str:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.clip(waveform, -1, 1), sample_rate, format="WAV", subtype="PCM_16")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<div>{escape(name)}<audio controls src="data:audio/wav;base64,{data}"></audio></div>'


def _speakers(alignments: Sequence[Alignment]) -> str:
    """Error rate of each speaker, worst first; None where a speaker has no reference words."""
    rates = []
    for speaker, members in groupby(sorted(alignments, key=lambda a: a.speaker), key=lambda a: a.speaker):
        group = list(members)
        words = sum(a.words for a in group)
        rates.append((sum(a.errors for a in group) / words if words else None, speaker, len(group), words))
    rates.sort(key=lambda r: -1 if r[0] is None else r[0], reverse=True)
    largest = max((r[0] or 0 for r in rates), default=0)
    rows = [
        (escape(s), f"{n:,}", f"{w:,}", "no words" if r is None else _percent(r), _bar(r, largest))
        for r, s, n, w in rates
    ]
    return _table(rows, ["speaker", "utterances", "words", "WER", ""])


def _alignments(alignments: Sequence[Alignment]) -> str:
    legend = (
        '<p class="muted legend"><span class="word substitute">sub</span> another word, <span class="word '
        'delete">del</span> word missed, <span class="word insert">ins</span> word added</p>'
    )
    return legend + "".join(map(_alignment, alignments)) if alignments else ""


def _alignment(alignment: Alignment) -> str:
    """The reference above the recognised words, column by column, with a text mark under every error."""
    words = "".join(
        f'<span class="word {kind}"><span>{escape(said) or "—"}</span><span>{escape(heard) or "—"}</span>'
        f"<small>{MARKS[kind]}</small></span>"
        for said, heard, kind in alignment.columns
    )
    label = '<span class="word label"><span>said</span><span>heard</span></span>'
    name = f"{escape(alignment.id)}, speaker {escape(alignment.speaker)}"
    head = f"{name}, words: {alignment.words}, errors: {alignment.errors}"
    body = f'<div class="said">{label}<div class="words">{words}</div></div>'
    return f'<div class="alignment"><div class="muted">{head}</div>{body}</div>'


def _stages(seconds: object) -> str:
    pairs = {str(k): _number(v) for k, v in seconds.items()} if isinstance(seconds, Mapping) else {}
    known = [v for v in pairs.values() if v is not None]
    rows = [(escape(k), _duration(v), _bar(v, max(known, default=1))) for k, v in pairs.items()]
    return _table([*rows, ("total", _duration(sum(known)), "")]) if known else ""


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "not recorded"
    return f"{seconds:.1f} s" if seconds < 60 else f"{seconds / 60:.1f} min"


def _versions(results: Mapping[str, Any]) -> str:
    named = {**(results.get("versions") or {}), "codec fingerprint": results.get("codec_fingerprint")}
    return _table((escape(str(k)), _format(v)) for k, v in named.items())
