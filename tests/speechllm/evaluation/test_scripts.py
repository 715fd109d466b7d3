"""Languages without spaces: which rate leads, and what counts as a character."""

import pytest

from speechllm import InputError, character_error_rate, word_error_rate
from speechllm.evaluation.error_rates import character_errors, recognition_measures
from speechllm.evaluation.scripts import primary_rate, spell


@pytest.mark.parametrize(
    "references, rate",
    [
        (["the cat sat"], "wer"),
        (["今天天气很好。"], "cer"),
        (["今日はいい天気です", "カタカナ"], "cer"),
        (["วันนี้อากาศดี"], "cer"),
        (["오늘 날씨가 좋다"], "wer"),  # Korean has spaces
        (["मौसम अच्छा है", "الطقس جميل", "сегодня хорошо"], "wer"),
        (["我用 Python 和 PyTorch 写程序"], "wer"),  # most letters are Latin
        (["我今天用 AI 写程序"], "cer"),
        (["3 5", "", "..."], "wer"),
        ([], "wer"),
    ],
)
def test_the_rate_that_leads_follows_from_the_scripts_of_the_references(references: list[str], rate: str) -> None:
    assert primary_rate(references) == rate


@pytest.mark.parametrize(
    "reference, hypothesis, rate",
    [
        ("今天天气很好", "今天天气很好", 0),
        ("今天天气很好", "今天 天气 很 好", 0),  # segmented or not
        ("今天，天气很好。", "今天天气很好", 0),
        ("今天天气很好", "今天天汽很好", 1 / 6),
        ("我用 Python 写", "我用Python写", 0),
        ("red lamp", "redlamp", 1 / 8),  # here a space is a character
    ],
)
def test_spaces_count_where_they_are_written(reference: str, hypothesis: str, rate: float) -> None:
    assert character_error_rate([reference], [hypothesis]) == pytest.approx(rate)


def test_character_errors_have_an_interval_and_counts_of_characters() -> None:
    found = character_errors(["abcd", "ab"], ["abxd", "ab"])
    assert (found.wer, found.words, found.substitutions, found.normalizer) == (1 / 6, 6, 1, "librispeech")
    assert found.ci95[0] <= found.wer <= found.ci95[1]
    assert str(found.describe("CER", "characters")).startswith("CER 16.67% (95 % interval 0.00% to 25.00%; 1 subst")
    assert spell(["Red lamp!"]) == ["r e d \u2423 l a m p"]


def test_measures_of_recognised_speech_hold_the_cer_where_it_leads() -> None:
    assert recognition_measures(["...", "!"], ["a", "b"]) == {} == recognition_measures([], [])
    english = recognition_measures(["the cat", "..."], ["the hat", ""])
    assert english["wer"]["mean"] == 0.5 and english["wer"]["empty_references"] == 1 and set(english) == {"wer"}
    chinese = recognition_measures(["今天天气很好"], ["今天天汽很好"])
    assert chinese["wer"]["mean"] == word_error_rate(["a"], ["b"]).wer == 1
    assert chinese["cer"]["mean"] == pytest.approx(1 / 6)


def test_a_text_in_place_of_texts_is_refused() -> None:
    for score in (primary_rate, spell):
        with pytest.raises(InputError, match="expected a list with one text each, got str 'the cat sat'"):
            score("the cat sat")
