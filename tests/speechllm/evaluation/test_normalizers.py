"""Spellings that nobody hears are one; what is normalised once stays as it is."""

import random
import unicodedata

import pytest

from speechllm import word_error_rate
from speechllm.evaluation.normalizers import APOSTROPHES, INVISIBLE, librispeech_normalizer, whisper_english_normalizer

SAME = [  # a spelling and what is heard
    ("he said 'yes' to her", "he said yes to her"),
    ("\u2018yes\u2019 and \u201cno\u201d and ''so''", "yes and no and so"),
    ("'tis the dogs' bone, 'em", "tis the dogs bone em"),
    ("rock 'n' roll", "rock n roll"),
    *((f"don{c}t o{c}clock", "don't o'clock") for c in APOSTROPHES),
    *((f"wo{c}rd s{c}", "word s") for c in ("\u00ad", "\u200b", "\u200c", "\u200d", "\u2060", "\ufeff", "\u200e")),
    *((f"wo{c}rd{c}", "word") for c in INVISIBLE[:12]),
    ("\ufb01ne o\ufb03ce", "fine office"),
    ("\uff28\uff25\uff2c\uff30\uff0c \uff13", "help 3"),
    ("a\u00a0b\u2003c\u202fd\u3000e", "a b c d e"),
    ("cafe\u0301 A\u030angstro\u0308m", "caf\u00e9 \u00e5ngstr\u00f6m"),
    *((f"well{dash}known", "well known") for dash in "-\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58\uff0d"),
    ("I \u2764\ufe0f it \U0001f600 1\ufe0f\u20e3", "i it 1"),
    ("the \u0301cat", "the cat"),
    ("3.5 percent, 5,000", "3 5 percent 5 000"),
    ("\u0144\u0303 \u0939\u093f\u0928\u094d\u0926\u0940", "\u0144\u0303 \u0939\u093f\u0928\u094d\u0926\u0940"),
    *((empty, "") for empty in ("", " ", "'", "...", "\u2014", "\u200b", "\ufeff", "\u0301", "\U0001f600")),
]


@pytest.mark.parametrize("text, heard", SAME)
def test_spellings_that_nobody_hears_are_one(text: str, heard: str) -> None:
    assert librispeech_normalizer(text) == heard
    if heard:
        assert word_error_rate([text], [heard]).wer == word_error_rate([heard], [text]).wer == 0


def test_normalising_again_changes_nothing() -> None:
    draw = random.Random(0)
    letters = [chr(i) for i in (*range(0x3200), *range(0xA600, 0xAC00), *range(0xF900, 0x10000))]
    letters += [*APOSTROPHES, *INVISIBLE[:12], "e", "\u0301", "\u03a3", "\u0130", " ", "'"] * 60
    for _ in range(4000):
        text = "".join(draw.choices(letters, k=8))
        normal = librispeech_normalizer(text)
        assert librispeech_normalizer(normal) == normal == " ".join(normal.split()), ascii(text)
        assert unicodedata.is_normalized("NFC", normal)


def test_every_character_alone_and_inside_a_word_is_normalised_for_good() -> None:
    for i in (*range(0x3100), *range(0xFB00, 0xFB50), *range(0xFE00, 0x10000)):
        for text in (chr(i), f"a{chr(i)}b"):
            normal = librispeech_normalizer(text)
            assert librispeech_normalizer(normal) == normal, hex(i)


@pytest.mark.parametrize(
    "text, heard",
    [
        ("don\u02bct \u2018stop\u2019", "don't stop"),
        ("he said 'yes' to her", "he said yes to her"),
        ("co\u00adop\u200berate", "cooperate"),
        ("\ufeff\ufb01ne", "fine"),
        ("3.5 percent", "three point five percent"),
    ],
)
def test_whispers_normalizer_sees_the_same_spellings(text: str, heard: str) -> None:
    pytest.importorskip("whisper_normalizer", reason="needs the eval extra")
    assert whisper_english_normalizer(text) == whisper_english_normalizer(heard) != ""


@pytest.mark.parametrize("text", ["...", " . ", "\u2026", "?!", "$", "(laughs)", "\u200b"])
def test_whispers_normalizer_leaves_no_word_of_punctuation(text: str) -> None:
    pytest.importorskip("whisper_normalizer", reason="needs the eval extra")
    assert whisper_english_normalizer(text) == ""
