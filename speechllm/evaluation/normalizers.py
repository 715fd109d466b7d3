"""Text normalisers for word error rates, by the names that are reported with every error rate."""

import functools
import unicodedata
from collections.abc import Callable


def librispeech_normalizer(text: str) -> str:
    """LibriSpeech's convention in lower case: letters, digits and apostrophes only, separated by single spaces."""
    text = unicodedata.normalize("NFC", text.lower().replace("\u2019", "'"))
    kept = (c if c.isalnum() or c == "'" or unicodedata.category(c)[0] == "M" else " " for c in text)
    return " ".join("".join(kept).split())


def whisper_english_normalizer(text: str) -> str:
    """Whisper's English normaliser (Radford et al. 2022, appendix C): digits, American spelling, full contractions.

    Raises ImportError if whisper-normalizer is not installed.
    """
    return " ".join(_whisper_english()(text).split())


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
    if name not in NORMALIZERS:
        raise ValueError(f"unknown normalizer {name!r}: choose one of {', '.join(NORMALIZERS)}")
    return NORMALIZERS[name]
