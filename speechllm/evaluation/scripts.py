"""Languages that are written without spaces, in which characters are counted in place of words."""

import itertools
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Literal

from speechllm.evaluation.normalizers import find_normalizer
from tokenizer.errors import text_list

UNSPACED = (  # how the Unicode names of the letters of these scripts begin
    *("CJK ", "IDEOGRAPHIC ", "HIRAGANA ", "KATAKANA", "BOPOMOFO ", "YI SYLLABLE "),  # Chinese, Japanese, Yi
    *("THAI ", "LAO ", "KHMER ", "MYANMAR ", "TIBETAN ", "JAVANESE ", "BALINESE "),
)
SPACE = "\u2423"


def unspaced(character: str) -> bool:
    """Whether the character belongs to a script that is written without spaces between words."""
    return not character.isascii() and unicodedata.name(character, "").startswith(UNSPACED)


def primary_rate(references: Iterable[str]) -> Literal["wer", "cer"]:
    """The error rate that steers: "cer" if most letters belong to scripts without spaces between words, else "wer".

    Chinese, Japanese and Thai have no words that texts alone would tell apart; Korean has.
    """
    letters = [c for text in text_list(references, "references") for c in text if c.isalpha()]
    return "cer" if 2 * sum(map(unspaced, letters)) > len(letters) else "wer"


def spell(texts: Sequence[str], normalizer: str = "librispeech", name: str = "texts") -> list[str]:
    """Normalised texts, `spelled`, so that `word_error_rate` (normaliser "none") counts characters.

    name: of the argument, for the InputError if these are no texts.
    """
    normalize = find_normalizer(normalizer)
    return [spelled(normalize(text)) for text in text_list(texts, name)]


def spelled(text: str) -> str:
    """A text with its characters as words.

    The spaces between words are characters, too, but for those beside a script that is written without spaces.
    """
    words = text.split()
    parts = [*words[:1]]
    for before, word in itertools.pairwise(words):
        parts += ["" if unspaced(before[-1]) or unspaced(word[0]) else SPACE, word]
    return " ".join("".join(parts))
