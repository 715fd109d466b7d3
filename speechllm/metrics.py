"""Word error rate people can trust: counts, a confidence interval, and the normaliser's name beside the number."""

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jiwer
import numpy as np

BOOTSTRAP_SAMPLES = 1000


def librispeech_normalizer(text: str) -> str:
    """LibriSpeech's convention, lower case: letters, digits and apostrophes of the transcript, single spaces."""
    text = unicodedata.normalize("NFC", text.lower().replace("\u2019", "'"))
    kept = (c if c.isalnum() or c == "'" or unicodedata.category(c)[0] == "M" else " " for c in text)
    return " ".join("".join(kept).split())


NORMALIZERS: dict[str, Callable[[str], str]] = {"librispeech": librispeech_normalizer, "none": str}


@dataclass(frozen=True)
class WordErrorRate:
    """wer as a fraction; ci95 its 95 % bootstrap interval over utterances; counts; the normaliser's name."""

    wer: float
    ci95: tuple[float, float]
    substitutions: int
    deletions: int
    insertions: int
    words: int
    utterances: int
    normalizer: str

    def __str__(self) -> str:
        return (
            f"WER {self.wer:.2%} (95 % interval {self.ci95[0]:.2%} to {self.ci95[1]:.2%}; {self.substitutions} "
            f"substitutions, {self.deletions} deletions, {self.insertions} insertions in {self.words} words of "
            f"{self.utterances} utterances, normaliser {self.normalizer})"
        )


def word_error_rate(
    references: Sequence[str], hypotheses: Sequence[str], normalizer: str = "librispeech", seed: int = 0
) -> WordErrorRate:
    """Score hypotheses against references, both one text per utterance, in the same order.

    The interval resamples utterances with replacement (1,000 times, seeded) and scores each sample as a whole.
    Raises ValueError for lists of different lengths, an unknown normaliser, or references without a single word.
    """
    if len(references) != len(hypotheses):
        raise ValueError(f"{len(references)} references but {len(hypotheses)} hypotheses: they must match one to one")
    if normalizer not in NORMALIZERS:
        raise ValueError(f"unknown normalizer {normalizer!r}: choose one of {', '.join(NORMALIZERS)}")
    counts = np.array(
        [_count_errors(*map(NORMALIZERS[normalizer], pair)) for pair in zip(references, hypotheses, strict=True)]
    ).reshape(-1, 4)
    substitutions, deletions, insertions, words = map(int, counts.sum(0))
    if words == 0:
        raise ValueError("the references hold no words: there is nothing to score")
    errors = counts[:, :3].sum(1)
    draws = np.random.default_rng(seed).integers(0, len(counts), (BOOTSTRAP_SAMPLES, len(counts)))
    rates = errors[draws].sum(1) / np.maximum(counts[draws, 3].sum(1), 1)
    low, high = np.quantile(rates, [0.025, 0.975])
    return WordErrorRate(
        (substitutions + deletions + insertions) / words,
        (float(low), float(high)),
        substitutions,
        deletions,
        insertions,
        words,
        len(counts),
        normalizer,
    )


def _count_errors(reference: str, hypothesis: str) -> tuple[int, int, int, int]:
    """Substitutions, deletions, insertions, reference words of one utterance."""
    reference, hypothesis = " ".join(reference.split()), " ".join(hypothesis.split())
    if not reference.split():
        return 0, 0, len(hypothesis.split()), 0
    measured = jiwer.process_words(reference, hypothesis)
    return measured.substitutions, measured.deletions, measured.insertions, len(reference.split())
