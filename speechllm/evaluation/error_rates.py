"""Error rates with counts, a confidence interval and the name of the normaliser."""

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jiwer
import numpy as np

from speechllm.evaluation.normalizers import find_normalizer
from speechllm.evaluation.scripts import primary_rate, spell
from tokenizer.errors import InputError, text_list

BOOTSTRAP_SAMPLES = 1000
# by utterance: what is counted, of several trainings by each, and out of how much
Shares = Mapping[str, tuple[float | Sequence[float], float]]


@dataclass(frozen=True)
class WordErrorRate:
    """wer: as a fraction; ci95: its 95 % bootstrap interval over utterances; counts; the normaliser's name.

    empty_references: utterances in whose reference the normaliser leaves no words; what was recognised in them counts
    as insertions.
    """

    wer: float
    ci95: tuple[float, float]
    substitutions: int
    deletions: int
    insertions: int
    words: int
    utterances: int
    normalizer: str
    empty_references: int = 0

    def __str__(self) -> str:
        return self.describe()

    def describe(self, rate: str = "WER", unit: str = "words") -> str:
        """All of it in one line; with CER and characters for what `character_errors` returns."""
        empty = f", {self.empty_references} of them with a reference without words" if self.empty_references else ""
        return (
            f"{rate} {self.wer:.2%} (95 % interval {self.ci95[0]:.2%} to {self.ci95[1]:.2%}; {self.substitutions} "
            f"substitutions, {self.deletions} deletions, {self.insertions} insertions in {self.words} {unit} of "
            f"{self.utterances} utterances{empty}, normaliser {self.normalizer})"
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
    Raises InputError for anything but lists of texts, lists of different lengths, an unknown normaliser, or references
    without a single word.
    """
    counts = _error_counts(references, hypotheses, normalizer)
    substitutions, deletions, insertions, words = map(int, counts.sum(0))
    return WordErrorRate(
        (substitutions + deletions + insertions) / words,
        _interval(_resampled_rates(counts[:, :3].sum(1), counts[:, 3], seed)),
        substitutions,
        deletions,
        insertions,
        words,
        len(counts),
        normalizer,
        int((counts[:, 3] == 0).sum()),
    )


def character_error_rate(
    references: Sequence[str], hypotheses: Sequence[str], normalizer: str = "librispeech"
) -> float:
    """Errors per character of the references; otherwise as `word_error_rate`.

    The spaces between words count as characters, but not in scripts that are written without (`spell`).
    """
    return character_errors(references, hypotheses, normalizer).wer


def character_errors(
    references: Sequence[str], hypotheses: Sequence[str], normalizer: str = "librispeech", seed: int = 0
) -> WordErrorRate:
    """`character_error_rate` with its interval and counts: the error rate whose words are characters."""
    spelled = spell(references, normalizer, "references"), spell(hypotheses, normalizer, "hypotheses")
    return replace(word_error_rate(*spelled, "none", seed), normalizer=normalizer)


def speakers_interval(
    references: Sequence[str],
    hypotheses: Sequence[str],
    speakers: Sequence[str],
    normalizer: str = "librispeech",
    rate: str = "wer",
    seed: int = 0,
) -> tuple[float, float] | None:
    """95 % interval of the WER, or CER, if speakers are resampled in place of utterances: what others would change.

    Utterances of one speaker are not independent of each other, so it is often wider. None for a single speaker.
    Raises InputError as `word_error_rate`.
    """
    found = error_shares(references, [hypotheses], normalizer, rate)
    shares = np.array([(errors[0], words) for errors, words in found])
    return groups_interval(shares, speakers, seed)


def groups_interval(shares: np.ndarray, groups: Sequence[str], seed: int = 0) -> tuple[float, float] | None:
    """95 % interval of a sum over a sum, such as errors and words, int [M, 2], if groups of these are resampled.

    groups: the name of each one's, such as its speaker. None for a single group.
    """
    own = np.array([shares[chosen].sum(0) for chosen in _groups(groups, len(shares)).values()])
    return _interval(_resampled_rates(own[:, 0], own[:, 1], seed)) if len(own) > 1 else None


def group_error_rates(
    references: Sequence[str],
    hypotheses: Sequence[str],
    groups: Sequence[str],
    normalizer: str = "librispeech",
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """By split, speaker or other group: wer, cer, their intervals wer_ci95 and cer_ci95, words, utterances.

    Rates and intervals are None without reference words. Raises InputError as `word_error_rate`.
    """
    spelled = spell(references, normalizer, "references"), spell(hypotheses, normalizer, "hypotheses")
    words, characters = _error_counts(references, hypotheses, normalizer), _error_counts(*spelled, "none")
    rates: dict[str, dict[str, Any]] = {}
    for group, chosen in _groups(groups, len(words)).items():
        rates[group] = {"words": int(words[chosen, 3].sum()), "utterances": len(chosen)}
        for name, counts in {"wer": words[chosen], "cer": characters[chosen]}.items():
            measured = rates[group]["words"] > 0
            rates[group][name] = float(counts[:, :3].sum() / counts[:, 3].sum()) if measured else None
            rates[group][f"{name}_ci95"] = (
                _interval(_resampled_rates(counts[:, :3].sum(1), counts[:, 3], seed)) if measured else None
            )
    return rates


def _groups(names: Sequence[str], count: int) -> dict[str, list[int]]:
    """The places of every name, sorted by it. Raises InputError unless there are `count` names."""
    names = text_list(names, "groups")
    if len(names) != count:
        raise InputError(f"{count} references but {len(names)} groups: there must be one for each reference")
    places: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        places.setdefault(name, []).append(place)
    return dict(sorted(places.items()))


def paired_bootstrap(
    references: Sequence[str],
    hypotheses_a: Sequence[str],
    hypotheses_b: Sequence[str],
    normalizer: str = "librispeech",
    seed: int = 0,
) -> PairedBootstrap:
    """Whether b makes fewer errors than a on the same utterances beyond chance (Bisani & Ney 2004).

    Both are scored on the same 1,000 samples of utterances. Raises InputError as `word_error_rate` does.
    """
    counts_a, counts_b = (_error_counts(references, texts, normalizer) for texts in (hypotheses_a, hypotheses_b))
    more, words = (counts_b - counts_a)[:, :3].sum(1), counts_a[:, 3]
    return _paired(float(more.sum() / words.sum()), _resampled_rates(more, words, seed), len(words), normalizer)


def paired_shares(a: Shares, b: Shares, normalizer: str = "none", seed: int = 0) -> PairedBootstrap | None:
    """`paired_bootstrap` of any measure that is a sum over a sum, on what both were measured on.

    a, b: such as errors and words by utterance, or correct answers and all of them by speaker. Of several trainings,
    which count with their mean, each sample draws as many as there are, too, for a and b apart. normalizer: only a name
    for the result. None if fewer than two utterances, or whatever is resampled, are in both.
    """
    common = [name for name in a if name in b and bool(a[name][1]) == bool(b[name][1])]  # words in both or in neither
    if len(common) < 2 or not any(a[name][1] for name in common):
        return None
    rates, samples = [], []
    for system, shares in enumerate((a, b)):
        counts, of = (np.array(part, float) for part in zip(*(shares[name] for name in common), strict=True))
        rates.append(counts.sum() / of.sum() / (counts.size / len(of)))
        samples.append(_resampled_rates(counts, of, seed, system))
    return _paired(float(rates[1] - rates[0]), samples[1] - samples[0], len(common), normalizer)


def _paired(difference: float, differences: np.ndarray, utterances: int, normalizer: str) -> PairedBootstrap:
    """differences: float, those of the samples."""
    rarer = min(int((differences <= 0).sum()), int((differences >= 0).sum()))
    return PairedBootstrap(
        difference,
        _interval(differences),
        float((differences < 0).mean()),
        min(1.0, 2 * (rarer + 1) / (len(differences) + 1)),  # never 0, which a finite number of samples cannot show
        utterances,
        normalizer,
    )


def error_shares(
    references: Sequence[str],
    hypotheses: Sequence[Sequence[str]],
    normalizer: str = "librispeech",
    rate: str = "wer",
) -> list[tuple[list[float], float]]:
    """Errors by training and words (for the CER: characters) of every utterance.

    hypotheses: one list of texts per training; rate: "wer" or "cer". Raises InputError as `word_error_rate` does.
    """
    if rate == "cer":
        references, hypotheses = spell(references, normalizer), [spell(texts, normalizer) for texts in hypotheses]
        normalizer = "none"
    counts = np.stack([_error_counts(references, texts, normalizer) for texts in hypotheses], 1)
    return [(errors, words[0]) for errors, words in zip(counts[..., :3].sum(2).tolist(), counts[..., 3], strict=True)]


def seeds_error_rate(
    references: Sequence[str], hypotheses: Sequence[Sequence[str]], normalizer: str = "librispeech", seed: int = 0
) -> dict[str, float | list[float]]:
    """ "mean": the mean WER of several trainings on the same utterances; "ci95": its 95 % bootstrap interval.

    hypotheses: one list of texts per training. Each of the 1,000 samples draws trainings and utterances with
    replacement; for one training this is the interval of `word_error_rate`, for few it is too narrow. Raises ValueError
    as `word_error_rate` does, and for no training.
    """
    if isinstance(hypotheses, str) or not hypotheses:
        raise InputError("expected a list with one list of texts per training, got " + reprlib.repr(hypotheses))
    errors, words = map(np.array, zip(*error_shares(references, hypotheses, normalizer), strict=True))
    ci95 = _interval(_resampled_rates(errors, words, seed))
    return {"mean": float(errors.mean(1).sum() / words.sum()), "ci95": [*ci95]}


def mean_and_interval(values: Sequence[float], seed: int = 0) -> dict[str, float | list[float]]:
    """ "mean" and its 95 % bootstrap interval "ci95", resampled as in `word_error_rate`.

    Raises InputError without values, and for one that is no number.
    """
    array = np.array(values, dtype=float)
    if not array.size or not np.isfinite(array).all():
        raise InputError(f"expected finite numbers to take the mean of, got {reprlib.repr(list(values))}")
    means = _resampled_rates(array, np.ones(len(array)), seed)
    return {"mean": float(array.mean()), "ci95": [*_interval(means)]}


def recognition_measures(
    references: Sequence[str], hypotheses: Sequence[str], seed: int = 0, normalizer: str = "librispeech"
) -> dict[str, dict[str, Any]]:
    """The WER, and the CER where it steers (`primary_rate`), as measures of a table: "mean", "ci95" and counts.

    Empty if no reference has words. empty_references: how many have none, if any.
    """
    if not any(map(find_normalizer(normalizer), text_list(references, "references"))):
        return {}
    rates = {"wer": word_error_rate(references, hypotheses, normalizer, seed)}
    if primary_rate(references) == "cer":
        rates["cer"] = character_errors(references, hypotheses, normalizer, seed)
    empty = rates["wer"].empty_references
    counts = {"words": rates["wer"].words, "normalizer": normalizer} | ({"empty_references": empty} if empty else {})
    return {name: {"mean": rate.wer, "ci95": list(rate.ci95), **counts} for name, rate in rates.items()}


def shuffled_audio_verdict(
    ci95: Sequence[float] | None, control_ci95: Sequence[float] | None, rate: str = "WER"
) -> str:
    """What the shuffled-audio control shows, in a sentence.

    ci95, control_ci95: 95 % intervals of the error rate and of the control, the rate with another utterance's audio;
    None if not measured. Only a control whose whole interval lies above the rate's shows that the model uses the audio.
    rate: the name of the error rate that steers (`primary_rate`).
    """
    if not ci95 or not control_ci95:
        return (
            f"Nothing here shows that the model uses the audio: the {rate} with another utterance's audio and its "
            "interval were not measured."
        )
    if control_ci95[0] > ci95[1]:
        return (
            f"The model uses the audio: with another utterance's audio the {rate} is higher, and the 95 % intervals do "
            "not overlap."
        )
    return (
        f"Nothing here shows that the model uses the audio: the 95 % interval of the {rate} with another utterance's "
        f"audio does not lie above that of the {rate}."
    )


def results_verdict(results: Mapping[str, Any]) -> str:
    """`shuffled_audio_verdict` on results of eval_asr or of the demo, by the error rate that steers in them."""
    if results.get("primary") == "cer":
        return shuffled_audio_verdict(results.get("cer_ci95"), results.get("cer_shuffled_audio_ci95"), "CER")
    interval = results.get("ci95", results.get("wer_ci95"))
    return shuffled_audio_verdict(interval, results.get("wer_shuffled_audio_ci95"))


def _error_counts(references: Sequence[str], hypotheses: Sequence[str], normalizer: str) -> np.ndarray:
    """int [utterances, 4]: substitutions, deletions, insertions and reference words, after the normaliser."""
    references, hypotheses = text_list(references, "references"), text_list(hypotheses, "hypotheses")
    if len(references) != len(hypotheses):
        raise InputError(
            f"{len(references)} references but {len(hypotheses)} hypotheses: there must be one hypothesis per reference"
        )
    normalize = find_normalizer(normalizer)
    counts = [_count_errors(*map(normalize, pair)) for pair in zip(references, hypotheses, strict=True)]
    if not sum(words for *_, words in counts):
        raise InputError("the references contain no words: there is nothing to score")
    return np.array(counts)


def _resampled_rates(errors: np.ndarray, words: np.ndarray, seed: int, system: int = 0) -> np.ndarray:
    """Errors per word, float, in 1,000 samples drawn with replacement, without those that hold no words.

    errors: [utterances], or by training, which are drawn with replacement, too, [utterances, trainings]; words:
    [utterances]. system: the samples of several systems share the utterances, not the trainings.
    """
    draws = np.random.default_rng(seed).integers(0, len(words), (BOOTSTRAP_SAMPLES, len(words)))
    sums, found = words[draws].sum(1), errors[draws].sum(1)
    if errors.ndim == 2:
        trainings = np.random.default_rng([seed, system]).integers(0, errors.shape[1], found.shape)
        found = np.take_along_axis(found, trainings, 1).mean(1)
    return found[sums > 0] / sums[sums > 0]


def _interval(rates: np.ndarray) -> tuple[float, float]:
    """The quantiles between which 95 % of the samples lie."""
    low, high = np.quantile(rates, [0.025, 0.975])
    return float(low), float(high)


def _count_errors(reference: str, hypothesis: str) -> tuple[int, int, int, int]:
    """Substitutions, deletions, insertions and reference words of one utterance."""
    reference, hypothesis = " ".join(reference.split()), " ".join(hypothesis.split())
    if not reference.split():
        return 0, 0, len(hypothesis.split()), 0
    measured = jiwer.process_words(reference, hypothesis)
    return measured.substitutions, measured.deletions, measured.insertions, len(reference.split())
