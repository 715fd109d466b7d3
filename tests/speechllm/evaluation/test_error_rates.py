"""Error rates: counted by hand, by jiwer and by an own edit distance; intervals, comparisons, speakers, normalisers."""

import math
import random
import sys
from collections.abc import Callable, Sequence

import jiwer
import numpy as np
import pytest

from speechllm import (
    InputError,
    PairedBootstrap,
    WordErrorRate,
    character_error_rate,
    paired_bootstrap,
    word_error_rate,
)
from speechllm.evaluation import normalizers
from speechllm.evaluation.error_rates import (
    error_shares,
    group_error_rates,
    groups_interval,
    mean_and_interval,
    paired_shares,
    recognition_measures,
    results_verdict,
    seeds_error_rate,
    shuffled_audio_verdict,
    speakers_interval,
)
from speechllm.evaluation.normalizers import librispeech_normalizer, whisper_english_normalizer

WORDS = "a b c d e".split()


def edit_distance(reference: Sequence[str], hypothesis: Sequence[str]) -> int:
    """Fewest substitutions, deletions and insertions."""
    row = list(range(len(hypothesis) + 1))
    for i, word in enumerate(reference, 1):
        previous, row[0] = row[0], i
        for j, other in enumerate(hypothesis, 1):
            previous, row[j] = row[j], min(previous + (word != other), row[j] + 1, row[j - 1] + 1)
    return row[-1]


def random_pairs(count: int, seed: int) -> tuple[list[str], list[str]]:
    draw = random.Random(seed)
    references = [draw.choices(WORDS, k=draw.randint(1, 9)) for _ in range(count)]
    hypotheses = [[draw.choice(WORDS) if draw.random() < 0.3 else word for word in words] for words in references]
    for words in hypotheses:
        if draw.random() < 0.5:
            words.pop(draw.randrange(len(words)))
        if draw.random() < 0.5:
            words.insert(draw.randint(0, len(words)), draw.choice(WORDS))
    return [" ".join(words) for words in references], [" ".join(words) for words in hypotheses]


# ---- counts


@pytest.mark.parametrize(
    "reference, hypothesis, substitutions, deletions, insertions",
    [
        ("the red lamp", "the red lamp", 0, 0, 0),
        ("the red lamp", "the bed lamp", 1, 0, 0),
        ("the red lamp", "the lamp", 0, 1, 0),
        ("the red lamp", "the red hot lamp", 0, 0, 1),
        ("the red lamp", "", 0, 3, 0),
        ("a b c d e f", "x b d e y f z", 1, 1, 2),
    ],
)
def test_errors_match_manual_counts(
    reference: str, hypothesis: str, substitutions: int, deletions: int, insertions: int
) -> None:
    found = word_error_rate([reference], [hypothesis])
    assert (found.substitutions, found.deletions, found.insertions) == (substitutions, deletions, insertions)
    assert found.words == len(reference.split()) and found.utterances == 1
    assert found.wer == (substitutions + deletions + insertions) / found.words


def test_the_rate_is_of_all_words_not_a_mean_of_rates() -> None:
    found = word_error_rate(["a", "b c d e f g h i j"], ["x", "b c d e f g h i j"])
    assert found.wer == 0.1 and found.words == 10 and found.utterances == 2


def test_words_without_a_reference_are_insertions() -> None:
    found = word_error_rate(["a b", "", "  "], ["a b", "c d", "e"])
    assert (found.substitutions, found.deletions, found.insertions, found.words) == (0, 0, 3, 2)
    assert found.wer == 1.5 and found.empty_references == 2
    assert "in 2 words of 3 utterances, 2 of them with a reference without words, normaliser" in str(found)
    assert "reference" not in str(word_error_rate(["a"], ["a"]))


def test_samples_without_a_reference_word_have_no_rate() -> None:
    # a quarter of the samples hold the second utterance alone, where two errors in no words are no 200 %
    assert word_error_rate(["a b", "..."], ["a b", "c"]).ci95 == (0.0, 0.5)
    assert paired_bootstrap(["a b", "..."], ["a b", "c"], ["a b", ""]).ci95 == (-0.5, 0.0)
    assert seeds_error_rate(["a b", "..."], [["a b", "c"]])["ci95"] == [0.0, 0.5]


@pytest.mark.parametrize("seed", range(5))
def test_random_texts_are_scored_like_jiwer_and_an_own_edit_distance(seed: int) -> None:
    references, hypotheses = random_pairs(40, seed)
    found = word_error_rate(references, hypotheses, "none")
    theirs = jiwer.process_words(references, hypotheses)
    assert found.wer == pytest.approx(theirs.wer, abs=1e-12)
    counts = found.substitutions, found.deletions, found.insertions
    assert counts == (theirs.substitutions, theirs.deletions, theirs.insertions)
    pairs = zip(references, hypotheses, strict=True)
    assert sum(counts) == sum(edit_distance(a.split(), b.split()) for a, b in pairs) > 0


def test_white_space_between_words_does_not_matter() -> None:
    assert word_error_rate(["a\tb\nc"], ["a b c"], "none").wer == 0


@pytest.mark.parametrize(
    "reference, hypothesis, rate",
    [("abc d", "abc d", 0), ("abcd", "abxd", 1 / 4), ("ab cd", "abcd", 1 / 5), ("ab", "", 1), ("A-b!", "a b", 0)],
)
def test_characters_are_counted_with_the_spaces_between_words(reference: str, hypothesis: str, rate: float) -> None:
    assert character_error_rate([reference], [hypothesis]) == rate


def test_random_texts_have_the_character_errors_of_an_own_edit_distance() -> None:
    references, hypotheses = random_pairs(40, 0)
    errors = sum(edit_distance(a, b) for a, b in zip(references, hypotheses, strict=True))
    assert character_error_rate(references, hypotheses, "none") == errors / sum(map(len, references))
    assert character_error_rate(references, hypotheses) == jiwer.cer(references, hypotheses)


# ---- groups of utterances


def test_every_group_has_both_rates_with_intervals() -> None:
    references, hypotheses = random_pairs(20, 0)
    found = group_error_rates([*references, "..."], [*hypotheses, "a"], ["test", "dev"] * 10 + ["noise"])
    assert list(found) == ["dev", "noise", "test"]
    for split, own in {"test": slice(0, 20, 2), "dev": slice(1, 20, 2)}.items():
        score = word_error_rate(references[own], hypotheses[own])
        expected = {"wer": score.wer, "wer_ci95": score.ci95, "words": score.words, "utterances": 10}
        assert found[split].items() >= expected.items()
        assert found[split]["cer"] == character_error_rate(references[own], hypotheses[own])
    rates = dict.fromkeys(("wer", "cer", "wer_ci95", "cer_ci95"))
    assert found["noise"] == {"words": 0, "utterances": 1, **rates}


# ---- comparison


def test_the_difference_of_two_rates_changes_sign_with_their_order() -> None:
    references, a = random_pairs(60, 0)
    b = [right if i % 3 else wrong for i, (right, wrong) in enumerate(zip(references, a, strict=True))]
    found, turned = paired_bootstrap(references, a, b, seed=3), paired_bootstrap(references, b, a, seed=3)
    assert found.difference == pytest.approx(word_error_rate(references, b).wer - word_error_rate(references, a).wer)
    assert found.ci95[0] < found.difference < found.ci95[1] < 0
    assert found.improvement == 1 and found.p_value == pytest.approx(2 / 1001) and found.utterances == 60
    assert turned.difference == -found.difference and turned.ci95 == pytest.approx((-found.ci95[1], -found.ci95[0]))
    assert turned.improvement == 0 and turned.p_value == found.p_value


def test_two_equal_sets_of_texts_do_not_differ() -> None:
    references, hypotheses = random_pairs(30, 0)
    found = paired_bootstrap(references, hypotheses, hypotheses)
    assert (found.difference, found.ci95, found.improvement, found.p_value) == (0, (0, 0), 0, 1)


def test_the_certainty_of_a_difference_depends_on_the_changed_utterances() -> None:
    # of 400 utterances of one word, b mends 30 and breaks 10: mean -0.05, variance 40 / 400 - 0.05 ** 2
    references = ["a"] * 400
    a, b = ["x"] * 100 + ["a"] * 300, ["a"] * 30 + ["x"] * 80 + ["a"] * 290
    found = paired_bootstrap(references, a, b)
    deviation = math.sqrt((0.1 - 0.05**2) / 400)
    assert found.difference == -0.05
    assert found.ci95 == pytest.approx((-0.05 - 1.96 * deviation, -0.05 + 1.96 * deviation), abs=0.005)
    b = ["a"] * 22 + ["x"] * 92 + ["a"] * 286  # mends 22, breaks 14: 1.33 deviations
    found = paired_bootstrap(references, a, b)
    assert found.difference == pytest.approx(-0.02)
    assert found.p_value == pytest.approx(math.erfc(1.333 / math.sqrt(2)), abs=0.06)
    assert found.improvement == pytest.approx(1 - found.p_value / 2, abs=0.03)


def test_a_comparison_is_printed_in_one_line() -> None:
    text = str(PairedBootstrap(-0.0125, (-0.02, 0.005), 0.97, 0.0612, 9, "none"))
    assert text == (
        "difference -1.25% (95 % interval -2.00% to +0.50%; p = 0.061, better in 97.0% of the samples; 9 utterances, "
        "normaliser none)"
    )


# ---- interval


def test_the_interval_contains_the_estimate_and_is_reproducible() -> None:
    for seed in range(5):
        found = word_error_rate(*random_pairs(30, seed))
        assert 0 <= found.ci95[0] < found.wer < found.ci95[1]
        assert found == word_error_rate(*random_pairs(30, seed))


def test_another_seed_draws_other_samples_for_the_interval_only() -> None:
    pairs = random_pairs(30, 0)
    first, second = word_error_rate(*pairs), word_error_rate(*pairs, seed=1)
    assert first.wer == second.wer and first.ci95 != second.ci95
    assert first.ci95 == pytest.approx(second.ci95, abs=0.05)


def test_the_interval_narrows_with_the_root_of_the_data() -> None:
    references, hypotheses = random_pairs(40, 0)
    low, high = word_error_rate(references, hypotheses).ci95
    narrow_low, narrow_high = word_error_rate(references * 25, hypotheses * 25).ci95
    assert (high - low) / (narrow_high - narrow_low) == pytest.approx(5, rel=0.15)


def test_the_interval_is_a_point_if_all_utterances_have_the_same_rate() -> None:
    found = word_error_rate(["a b c d"] * 7, ["a b c x"] * 7)
    assert found.wer == 0.25 and found.ci95 == (0.25, 0.25)
    assert word_error_rate(["a b"], ["a x"]).ci95 == (0.5, 0.5)


def test_the_interval_of_a_right_and_a_wrong_utterance_is_0_to_1() -> None:
    # a sample of two is wholly right or wholly wrong in a quarter of the cases each, far more than 2.5 %
    assert word_error_rate(["a", "b"], ["a", "x"]).ci95 == (0.0, 1.0)


def test_the_interval_is_that_of_the_binomial_for_utterances_of_one_word() -> None:
    found = word_error_rate(["a"] * 400, ["a"] * 300 + ["b"] * 100)
    half = 1.96 * math.sqrt(0.25 * 0.75 / 400)
    assert found.ci95 == pytest.approx((0.25 - half, 0.25 + half), abs=0.006)


def test_the_control_is_read_by_the_rate_that_leads() -> None:
    words = {"ci95": [0.9, 1.0], "wer_shuffled_audio_ci95": [0.9, 1.0]}
    assert results_verdict(words) == shuffled_audio_verdict([0.9, 1.0], [0.9, 1.0]).replace("CER", "WER")
    characters = {"primary": "cer", "cer_ci95": [0.1, 0.2], "cer_shuffled_audio_ci95": [0.8, 0.9]}
    assert results_verdict(words | characters).startswith("The model uses the audio: with another utterance's audio")
    assert "the CER is higher" in results_verdict(words | characters)


# ---- what is refused


def test_lists_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="2 references but 1 hypotheses"):
        word_error_rate(["a", "b"], ["a"])


SCORES: dict[str, Callable] = {
    "words": word_error_rate,
    "characters": character_error_rate,
    "groups": lambda a, b: group_error_rates(a, b, ["s"] * 2),
    "pairs": lambda a, b: paired_bootstrap(a, b, b),
    "others": lambda a, b: paired_bootstrap(a, a, b),
    "seeds": lambda a, b: seeds_error_rate(a, [b]),
    "measures": recognition_measures,
}


@pytest.mark.parametrize("score", SCORES.values(), ids=SCORES)
@pytest.mark.parametrize(
    "wrong, message",
    [
        ("ab", "expected a list with one text each, got str 'ab': write .text. for a single one"),
        (b"ab", "expected a list with one text each, got bytes b'ab'"),
        ({"a", "b"}, "expected a list with one text each, got set"),
        ({"a": 1, "b": 2}, "expected a list with one text each, got dict"),
        (None, "expected a list with one text each, got NoneType None"),
        (["a", None], r"\[1\] is None, which is no text: write '' where nothing was said"),
        ([math.nan, "a"], r"\[0\] is nan, which is no text"),
        (["a", 3], r"\[1\] is 3, which is no text"),
        (["a", ["b"]], r"\[1\] is \['b'\], which is no text"),
    ],
)
def test_what_is_no_list_of_texts_is_refused(score: Callable, wrong: object, message: str) -> None:
    for pair in ((wrong, ["a", "b"]), (["a", "b"], wrong)):
        with pytest.raises(InputError, match=message):
            score(*pair)


def test_texts_may_come_in_any_ordered_collection() -> None:
    texts = ["a b", "c"]
    for collection in (tuple(texts), np.array(texts), dict.fromkeys(texts).keys().__iter__(), (t for t in texts)):
        assert word_error_rate(collection, texts).wer == 0


def test_the_interval_over_speakers_is_that_of_their_sums() -> None:
    """Two speakers, one of whom is never understood: any share of the three is possible."""
    references, speakers = ["a b"] * 6 + ["a"] * 3, ["anna"] * 6 + ["bert"] * 3
    hypotheses = ["a b"] * 6 + ["x"] * 3
    assert speakers_interval(references, hypotheses, speakers) == (0, 1)
    low, high = speakers_interval(references, hypotheses, list(map(str, range(9))))
    assert (low, high) == pytest.approx(word_error_rate(references, hypotheses).ci95)  # a speaker each
    assert speakers_interval(references, hypotheses, ["anna"] * 9) is None
    assert speakers_interval(["ab", "cd"], ["ab", "cx"], ["anna", "bert"], rate="cer") == (0, 0.5)


def test_an_interval_over_groups_weighs_each_by_its_size() -> None:
    """One large group that is all right and three small ones that are all wrong, resampled as a whole."""
    shares, groups = np.array([(1, 1)] * 94 + [(0, 1)] * 6), ["large"] * 94 + ["a", "b", "c"] * 2
    low, high = groups_interval(shares, groups)
    assert low == 0 and high > shares[:, 0].mean()  # 0.94; groups of the same weight would reach 0.75
    low, high = groups_interval(shares, [str(i) for i in range(100)])
    assert 0.88 < low < 0.94 < high < 1


def test_groups_belong_to_the_references() -> None:
    for score in (group_error_rates, speakers_interval):
        for wrong in (["s"], "ss", ["s", None]):
            with pytest.raises(InputError, match="groups"):
                score(["a", "b"], ["a", "b"], wrong)


def test_trainings_are_a_list_of_lists() -> None:
    for wrong in ([], "ab", None):
        with pytest.raises(InputError, match="one list of texts per training"):
            seeds_error_rate(["a"], wrong)


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
def test_a_mean_of_what_is_no_number_is_refused(values: list[float]) -> None:
    with pytest.raises(InputError, match="expected finite numbers"):
        mean_and_interval(values)


@pytest.mark.parametrize("score", [word_error_rate, character_error_rate])
def test_an_unknown_normalizer_is_refused_and_the_known_ones_named(score: Callable) -> None:
    with pytest.raises(ValueError, match="unknown normalizer 'w': choose one of librispeech, whisper_english, none"):
        score(["a"], ["a"], "w")


def test_a_missing_whisper_normalizer_is_reported_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    normalizers._whisper_english.cache_clear()
    monkeypatch.setitem(sys.modules, "whisper_normalizer.english", None)
    with pytest.raises(ImportError, match=r'pip install "speechllm\[eval\]"'):
        word_error_rate(["a"], ["a"], "whisper_english")


@pytest.mark.parametrize("references", [[], [""], [" ", "..."]])
def test_references_without_a_word_are_refused(references: list[str]) -> None:
    with pytest.raises(ValueError, match="no words"):
        word_error_rate(references, ["a"] * len(references))


# ---- normaliser


@pytest.mark.parametrize(
    "text, normal",
    [
        ("Turn ON the Lamp", "turn on the lamp"),
        ("LET\u2019S GO", "let's go"),
        ("let's go", "let's go"),
        ("Wait, what?! (No.) \u2014 \u201cyes\u201d;", "wait what no yes"),
        ("well-known snake_case", "well known snake case"),
        ("  a \t b\n c ", "a b c"),
        ("AT 5:30", "at 5 30"),
        ("Ärger in ÎLE", "ärger in île"),
        ("مرحبا", "مرحبا"),
        ("", ""),
        ("?!", ""),
    ],
)
def test_the_normalizer_keeps_letters_digits_and_apostrophes_in_lower_case(text: str, normal: str) -> None:
    assert librispeech_normalizer(text) == normal
    assert librispeech_normalizer(normal) == normal


def test_whispers_normalizer_unifies_numbers_contractions_and_spellings() -> None:
    pytest.importorskip("whisper_normalizer", reason="needs the eval extra")
    spoken = "Mr. Park won't repeat the COLOUR, um, it's twenty-five dollars (laughs)"
    assert whisper_english_normalizer(spoken) == "mister park will not repeat the color it is $25"
    assert whisper_english_normalizer(" uh ") == ""
    found = word_error_rate([spoken], ["mister park will not repeat the color it is 25 dollars"], "whisper_english")
    assert found.wer == 0 and found.normalizer == "whisper_english"


def test_case_and_punctuation_count_only_without_normalizer() -> None:
    assert word_error_rate(["TURN ON."], ["turn on"]).wer == 0
    found = word_error_rate(["TURN ON."], ["turn on"], "none")
    assert found.wer == 1 and found.normalizer == "none"


def test_composed_and_decomposed_letters_are_equal() -> None:
    assert word_error_rate(["caf\u00e9s"], ["cafe\u0301s"]).wer == 0


def test_a_result_is_printed_in_one_line() -> None:
    text = str(WordErrorRate(0.125, (0.1, 0.15), 3, 2, 5, 80, 9, "none"))
    assert text == (
        "WER 12.50% (95 % interval 10.00% to 15.00%; 3 substitutions, 2 deletions, 5 insertions in 80 words of "
        "9 utterances, normaliser none)"
    )


def test_shares_are_paired_as_the_texts_they_were_counted_in() -> None:
    references = ["a b c", "d e", "...", "f g h i"] * 5
    a = ["a b", "d x", "y", "f g h i"] * 5
    b = ["a b c", "d e f", "", "f g h"] * 4 + ["a b c", "d e", "", "f g h i"]
    shares = [dict(zip(map(str, range(20)), error_shares(references, [texts]), strict=True)) for texts in (a, b)]
    assert shares[0]["2"] == ([1], 0) and shares[0]["3"] == ([0], 4)
    found, expected = paired_shares(*shares, "librispeech"), paired_bootstrap(references, a, b)
    assert found.ci95 == pytest.approx(expected.ci95) and found.difference == pytest.approx(expected.difference)
    assert (found.utterances, found.p_value) == (20, expected.p_value)


def test_shares_of_other_sizes_are_paired_by_their_rates_on_what_both_have() -> None:
    a, b = {"x": (1, 2), "y": (2, 4), "z": (0, 9)}, {"y": (1, 1), "x": (3, 3), "w": (0, 9)}
    found = paired_shares(a, b)
    assert (found.difference, found.ci95, found.utterances) == (0.5, (0.5, 0.5), 2)
    assert paired_shares(a, {"x": (1, 2)}) is None and paired_shares({}, {}) is None
    assert paired_shares({"x": (1, 0), "y": (0, 0)}, {"x": (1, 0), "y": (0, 0)}) is None  # no words at all


def test_samples_draw_the_trainings_of_each_system_apart() -> None:
    """Of two trainings that fail or do not, a half is as likely as none and all together, in either system."""
    a, b = ({f"u{i}": (errors, 1) for i in range(9)} for errors in ([0, 1], [1, 1]))
    found = paired_shares(a, b)
    assert found.difference == 0.5 and found.ci95 == (0, 1) and found.improvement == 0
    assert paired_shares(a, a).ci95 == (-1, 1)  # each with its own draws
    assert 0.1 < paired_shares(a, a).improvement < 0.4


def test_errors_of_several_trainings_are_counted_by_utterance() -> None:
    assert error_shares(["a b", "c"], [["a", "c"], ["x", "c d"]]) == [([1, 2], 2), ([0, 1], 1)]
    assert error_shares(["ab c"], [["ab"]], rate="cer") == [([2], 4)]
