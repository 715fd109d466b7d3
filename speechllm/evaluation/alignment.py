"""Word alignments of references and hypotheses."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import jiwer

from speechllm.evaluation.tables import number


@dataclass(frozen=True, eq=False)
class Alignment:
    """One utterance as columns (reference word, recognised word, kind of jiwer); a missing word is empty."""

    id: str
    speaker: str
    duration_s: float | None
    columns: list[tuple[str, str, str]]
    errors: int
    words: int  # in the reference

    @property
    def badness(self) -> tuple[float, int, int]:
        """Sort key, largest is worst: error rate, then errors, then shortness (a long correct text says more)."""
        return self.errors / max(self.words, 1), self.errors, -self.words


def align(predictions: Sequence[Mapping[str, Any]], normalize: Callable[[str], str] = str) -> list[Alignment]:
    """Align the reference and hypothesis words of every prediction, after `normalize`."""
    if not predictions:
        return []  # jiwer reads an empty list as one empty text
    references, hypotheses = (
        [" ".join(normalize(str(p.get(k) or "")).split()) for p in predictions] for k in ("reference", "hypothesis")
    )
    out = jiwer.process_words(references, hypotheses)
    alignments = []
    aligned = zip(predictions, out.references, out.hypotheses, out.alignments, strict=True)
    for p, reference, hypothesis, chunks in aligned:
        columns = []
        for c in chunks:
            pieces = reference[c.ref_start_idx : c.ref_end_idx], hypothesis[c.hyp_start_idx : c.hyp_end_idx]
            columns += [(*pair, c.type) for pair in zip_longest(*pieces, fillvalue="")]
        errors = sum(kind != "equal" for *_, kind in columns)
        name, speaker = str(p.get("id", "?")), str(p.get("speaker") or "?")
        alignments.append(Alignment(name, speaker, number(p.get("duration_s")), columns, errors, len(reference)))
    return alignments
