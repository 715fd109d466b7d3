"""Text normalisers for word error rates, by the names that are reported with every error rate."""

import functools
import re
import unicodedata
from collections.abc import Callable

from tokenizer.errors import InputError

APOSTROPHES = (  # quotes, primes, accents and letters that stand for one
    "\u2018\u2019\u201b\u02b9\u02bb\u02bc\u02bd`\u00b4\u1fbd\u1fbf\u2032\u055a\ua78b\ua78c\u05f3\uff07"
    "\x91\x92"  # those of Windows-1252 read as Latin-1
)
INVISIBLE = (  # beside the format characters (soft hyphens, zero-width spaces, marks of direction, ...)
    "\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u3164\uffa0"
    + "".join(map(chr, (*range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0))))  # variants of the character before
)
_SPELLINGS = str.maketrans(dict.fromkeys(APOSTROPHES, "'") | dict.fromkeys(INVISIBLE))
_OUTER_APOSTROPHE = re.compile(r"(?<!\S)'+|'+(?!\S)|''+")


def unify(text: str) -> str:
    """The text without its differences in spelling that nobody hears, still with its case and punctuation.

    Every kind of apostrophe is the one of ASCII, invisible characters are gone, and ligatures, full-width letters,
    composed accents and kinds of spaces are those of Unicode's NFKC.
    """
    text = text.translate(_SPELLINGS)
    if text.isascii():
        return text
    seen = (c for c in text if unicodedata.category(c) != "Cf")
    return unicodedata.normalize("NFKC", "".join(seen)).translate(_SPELLINGS)  # of which some are composed


def librispeech_normalizer(text: str) -> str:
    """LibriSpeech's convention in lower case: letters, digits and the apostrophes inside words, single spaces between.

    Other spellings that nobody hears are one (`unify`). Apostrophes at the ends of words are quotes more often than
    elisions and are removed: 'tis is tis, dogs' is dogs. Hyphens and dashes separate words, numbers stay digits.
    Idempotent; empty for a text without a letter or digit.
    """
    text = unicodedata.normalize("NFKC", unify(text).lower())
    kept = [" "]
    for c in text:
        accent = not c.isascii() and kept[-1] not in " '" and unicodedata.category(c) in ("Mn", "Mc")
        kept.append(c if accent or c.isalnum() or c == "'" else " ")
    return " ".join(_OUTER_APOSTROPHE.sub(" ", "".join(kept)).split())


@functools.lru_cache(maxsize=2**16)  # it takes a millisecond, and every measure of a text needs it
def whisper_english_normalizer(text: str) -> str:
    """Whisper's English normaliser (Radford et al. 2022, appendix C): digits, American spelling, full contractions.

    Applied after `unify`, because it knows contractions by the apostrophe of ASCII alone; what it leaves of "..." is no
    word. Raises ImportError if whisper-normalizer is not installed.
    """
    return " ".join(word for word in _whisper_english()(unify(text)).split() if any(map(str.isalnum, word)))


NORMALIZERS: dict[str, Callable[[str], str]] = {
    "librispeech": librispeech_normalizer,
    "whisper_english": whisper_english_normalizer,
    "none": str,
}


@functools.cache
def _whisper_english() -> Callable[[str], str]:
    try:
        from whisper_normalizer.english import EnglishTextNormalizer
    except ImportError as error:
        raise ImportError(f'{error.name} is required for whisper_english: pip install "speechllm[eval]"') from error
    return EnglishTextNormalizer()


def find_normalizer(name: str) -> Callable[[str], str]:
    """The normaliser of a name. Raises InputError for an unknown one."""
    if name not in NORMALIZERS:
        raise InputError(f"unknown normalizer {name!r}: choose one of {', '.join(NORMALIZERS)}")
    return NORMALIZERS[name]
