"""Error rates with counts, a confidence interval and the name of the normaliser."""

from collections.abc import Sequence
from dataclasses import dataclass

import jiwer
import numpy as np

from speechllm.evaluation.normalizers import find_normalizer

BOOTSTRAP_SAMPLES = 1000


@dataclass(frozen=True)
class WordErrorRate:
    """wer: as a fraction; ci95: its 95 % bootstrap interval over utterances; counts; the normaliser's name."""

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


@dataclass(frozen=True)
class PairedBootstrap:
    """difference: WER of b minus WER of a, as a fraction, negative if b is better; ci95: its 95 % interval.

    improvement: share of the samples in which b makes fewer errors; p_value: two-sided, for no difference.
    """

    difference: float
    ci95: tuple[float, float]
    improvement: float
    p_value: float
    utterances: int
    normalizer: str

    def __str__(self) -> str:
        low, high = self.ci95
        return (
            f"difference {self.difference:+.2%} (95 % interval {low:+.2%} to {high:+.2%}; p = {self.p_value:.3f}, "
            f"better in {self.improvement:.1%} of the samples; {self.utterances} utterances, "
            f"normaliser {self.normalizer})"
        )


def word_error_rate(
    references: Sequence[str], hypotheses: Sequence[str], normalizer: str = "librispeech", seed: int = 0
) -> WordErrorRate:
    """Score hypotheses against references, one text per utterance each, in the same order.

    The interval resamples utterances with replacement (1,000 times, seeded) and scores each sample as a whole.
    Raises ValueError for lists of different lengths, an unknown normaliser, or references without a single word.
    """
    counts = _error_counts(references, hypotheses, normalizer)
    substitutions, deletions, insertions, words = map(int, counts.sum(0))
    low, high = np.quantile(_resampled_rates(counts[:, :3].sum(1), counts[:, 3], seed), [0.025, 0.975])
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


def character_error_rate(
    references: Sequence[str], hypotheses: Sequence[str], normalizer: str = "librispeech"
) -> float:
    """Errors per character of the references, including the spaces between words; otherwise as `word_error_rate`."""
    normalize = find_normalizer(normalizer)

    def spell(text: str) -> str:
        return " ".join("\u2423".join(normalize(text).split()))

    return word_error_rate([*map(spell, references)], [*map(spell, hypotheses)], "none").wer


def speaker_error_rates(
    references: Sequence[str], hypotheses: Sequence[str], speakers: Sequence[str], normalizer: str = "librispeech"
) -> dict[str, dict[str, float | int | None]]:
    """By speaker: wer (None without reference words), words, utterances. Raises ValueError as `word_error_rate`."""
    counts = _error_counts(references, hypotheses, normalizer)
    rates: dict[str, dict[str, float | int | None]] = {}
    for speaker in sorted(set(speakers)):
        own = counts[[name == speaker for name in speakers]]
        words = int(own[:, 3].sum())
        wer = int(own[:, :3].sum()) / words if words else None
        rates[speaker] = {"wer": wer, "words": words, "utterances": len(own)}
    return rates


def paired_bootstrap(
    references: Sequence[str],
    hypotheses_a: Sequence[str],
    hypotheses_b: Sequence[str],
    normalizer: str = "librispeech",
    seed: int = 0,
) -> PairedBootstrap:
    """Whether b makes fewer errors than a on the same utterances beyond chance (Bisani & Ney 2004).

    Both are scored on the same 1,000 samples of utterances. Raises ValueError as `word_error_rate` does.
    """
    counts_a, counts_b = (_error_counts(references, texts, normalizer) for texts in (hypotheses_a, hypotheses_b))
    more, words = (counts_b - counts_a)[:, :3].sum(1), counts_a[:, 3]
    differences = _resampled_rates(more, words, seed)
    low, high = np.quantile(differences, [0.025, 0.975])
    rarer = min(int((differences <= 0).sum()), int((differences >= 0).sum()))
    return PairedBootstrap(
        float(more.sum() / words.sum()),
        (float(low), float(high)),
        float((differences < 0).mean()),
        min(1.0, 2 * (rarer + 1) / (BOOTSTRAP_SAMPLES + 1)),  # never 0, which a finite number of samples cannot show
        len(words),
        normalizer,
    )


def seeds_error_rate(
    references: Sequence[str], hypotheses: Sequence[Sequence[str]], normalizer: str = "librispeech", seed: int = 0
) -> dict[str, float | list[float]]:
    """ "mean": the mean WER of several trainings on the same utterances; "ci95": its 95 % bootstrap interval.

    hypotheses: one list of texts per training. Each of the 1,000 samples draws trainings and utterances with
    replacement; for one training this is the interval of `word_error_rate`, for few it is too narrow. Raises ValueError
    as `word_error_rate` does.
    """
    counts = np.stack([_error_counts(references, texts, normalizer) for texts in hypotheses])
    errors, words = counts[:, :, :3].sum(2), counts[0, :, 3]
    generator = np.random.default_rng(seed)
    utterances = generator.integers(0, len(words), (BOOTSTRAP_SAMPLES, len(words)))
    trainings = generator.integers(0, len(errors), (BOOTSTRAP_SAMPLES, len(errors)))
    rates = [
        errors[chosen].mean(0)[drawn].sum() / max(words[drawn].sum(), 1)
        for chosen, drawn in zip(trainings, utterances, strict=True)
    ]
    return {"mean": float(errors.mean(0).sum() / words.sum()), "ci95": np.quantile(rates, [0.025, 0.975]).tolist()}


def mean_and_interval(values: Sequence[float], seed: int = 0) -> dict[str, float | list[float]]:
    """ "mean" and its 95 % bootstrap interval "ci95", resampled as in `word_error_rate`."""
    array = np.array(values)
    means = _resampled_rates(array, np.ones(len(array)), seed)
    return {"mean": float(array.mean()), "ci95": np.quantile(means, [0.025, 0.975]).tolist()}


def shuffled_audio_verdict(ci95: Sequence[float] | None, control_ci95: Sequence[float] | None) -> str:
    """What the shuffled-audio control shows, in a sentence.

    ci95, control_ci95: 95 % intervals of the WER and of the control, the WER with another utterance's audio; None if
    not measured. Only a control whose whole interval lies above the WER's shows that the model uses the audio.
    """
    if not ci95 or not control_ci95:
        return (
            "Nothing here shows that the model uses the audio: the WER with another utterance's audio and its interval "
            "were not measured."
        )
    if control_ci95[0] > ci95[1]:
        return (
            "The model uses the audio: with another utterance's audio the WER is higher, and the 95 % intervals do not "
            "overlap."
        )
    return (
        "Nothing here shows that the model uses the audio: the 95 % interval of the WER with another utterance's audio "
        "does not lie above that of the WER."
    )


def _error_counts(references: Sequence[str], hypotheses: Sequence[str], normalizer: str) -> np.ndarray:
    """int [utterances, 4]: substitutions, deletions, insertions and reference words, after the normaliser."""
    if len(references) != len(hypotheses):
        raise ValueError(
            f"{len(references)} references but {len(hypotheses)} hypotheses: there must be one hypothesis per reference"
        )
    normalize = find_normalizer(normalizer)
    counts = [_count_errors(*map(normalize, pair)) for pair in zip(references, hypotheses, strict=True)]
    if not sum(words for *_, words in counts):
        raise ValueError("the references contain no words: there is nothing to score")
    return np.array(counts)


def _resampled_rates(errors: np.ndarray, words: np.ndarray, seed: int) -> np.ndarray:
    """Errors per word, float [1,000], in samples drawn with replacement; errors, words: int [utterances]."""
    draws = np.random.default_rng(seed).integers(0, len(words), (BOOTSTRAP_SAMPLES, len(words)))
    return errors[draws].sum(1) / np.maximum(words[draws].sum(1), 1)


def _count_errors(reference: str, hypothesis: str) -> tuple[int, int, int, int]:
    """Substitutions, deletions, insertions and reference words of one utterance."""
    reference, hypothesis = " ".join(reference.split()), " ".join(hypothesis.split())
    if not reference.split():
        return 0, 0, len(hypothesis.split()), 0
    measured = jiwer.process_words(reference, hypothesis)
    return measured.substitutions, measured.deletions, measured.insertions, len(reference.split())
