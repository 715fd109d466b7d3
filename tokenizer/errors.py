"""Errors caused by user input, which recipes and commands print as one line. Does not import torch."""

import reprlib
from collections.abc import Iterable, Mapping, Set


class InputError(ValueError):
    """User input that cannot be used; the message says what was found, what was expected and how to fix it."""


def text_list(texts: Iterable[str], name: str) -> list[str]:
    """The texts as a list. Raises InputError for a single text, which is a sequence of characters, or for other items.

    name: of the argument, for the message.
    """
    if isinstance(texts, str | bytes | Mapping | Set) or not isinstance(texts, Iterable):
        got = f"{type(texts).__name__} {reprlib.repr(texts)}"
        raise InputError(f"{name}: expected a list with one text each, got {got}: write [text] for a single one")
    found = list(texts)
    for place, text in enumerate(found):
        if not isinstance(text, str):
            what = f"{name}[{place}] is {reprlib.repr(text)}"
            raise InputError(f"{what}, which is no text: write '' where nothing was said, or leave the utterance out")
    return found
