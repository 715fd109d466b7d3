"""Recognised words in a report: error rates by speaker and duration, and alignments in colour."""

from collections.abc import Sequence
from html import escape
from itertools import groupby

import numpy as np

from speechllm.evaluation.alignment import Alignment
from speechllm.reports.html import bar, percent, table
from speechllm.reports.plots import error_rates

MARKS = {"equal": "", "substitute": "sub", "delete": "del", "insert": "ins"}
UNITS = {"WER": "words", "CER": "characters"}  # what an error rate counts


def speaker_table(alignments: Sequence[Alignment], rate: str = "WER") -> str:
    """HTML: error rate of each speaker, worst first; speakers without reference words have none. rate: its name."""
    rates = []
    for speaker, members in groupby(sorted(alignments, key=lambda a: a.speaker), key=lambda a: a.speaker):
        group = list(members)
        words = sum(a.words for a in group)
        rates.append((sum(a.errors for a in group) / words if words else None, speaker, len(group), words))
    rates.sort(key=lambda r: -1 if r[0] is None else r[0], reverse=True)
    largest = max((r[0] or 0 for r in rates), default=0)
    rows = [
        (escape(s), f"{n:,}", f"{w:,}", "no words" if r is None else percent(r), bar(r, largest))
        for r, s, n, w in rates
    ]
    return table(rows, ["speaker", "utterances", UNITS[rate], rate, ""])


def duration_figure(alignments: Sequence[Alignment], rate: str = "WER") -> str:
    """HTML: error rate by duration, of the utterances with a known duration. rate: its name."""
    rows = sorted((a.duration_s, a.errors, a.words) for a in alignments if a.duration_s is not None and a.words)
    durations, errors, words = np.array(rows, dtype=float).reshape(-1, 3).T
    return error_rates(durations, errors, words, rate) if rows else ""


def alignment_list(alignments: Sequence[Alignment]) -> str:
    """HTML: a list of aligned utterances."""
    legend = (
        '<p class="muted legend"><span class="word substitute">sub</span> substituted, <span class="word '
        'delete">del</span> deleted, <span class="word insert">ins</span> inserted word</p>'
    )
    return legend + "".join(map(_alignment, alignments)) if alignments else ""


def _alignment(alignment: Alignment) -> str:
    """The reference above the recognised words, column by column, with a label under every error."""
    words = "".join(
        f'<span class="word {kind}"><span>{escape(reference) or "—"}</span><span>{escape(hypothesis) or "—"}</span>'
        f"<small>{MARKS[kind]}</small></span>"
        for reference, hypothesis, kind in alignment.columns
    )
    label = '<span class="word label"><span>reference</span><span>recognised</span></span>'
    name = f"{escape(alignment.id)}, speaker {escape(alignment.speaker)}"
    head = f"{name}, words: {alignment.words}, errors: {alignment.errors}"
    body = f'<div class="said">{label}<div class="words">{words}</div></div>'
    return f'<div class="alignment"><div class="muted">{head}</div>{body}</div>'
