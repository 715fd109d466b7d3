"""The labels in RAVDESS file names (Livingstone and Russo 2018, PLOS ONE 13(5)): emotion, statement, actor."""

import re
from dataclasses import dataclass

EMOTIONS = ("neutral", "calm", "happy", "sad", "angry", "fearful", "disgust", "surprised")
STATEMENTS = ("KIDS ARE TALKING BY THE DOOR", "DOGS ARE SITTING BY THE DOOR")
# modality 03 (audio alone), vocal channel 01 (spoken, not sung), emotion, intensity, statement, repetition, actor
NAME = re.compile(r"(?:^|\D)03-01-0([1-8])-0[12]-0([12])-0[12]-(\d\d)$")


@dataclass(frozen=True)
class RavdessName:
    """emotion: one of `EMOTIONS`; text: the statement; actor: 1 to 24, odd numbers are men."""

    emotion: str
    text: str
    actor: int


def parse_ravdess(name: str) -> RavdessName | None:
    """The labels in the name of a spoken RAVDESS recording, such as 03-01-05-01-02-02-16; None for any other name.

    The name may have a prefix, but no file extension.
    """
    match = NAME.search(name)
    if match is None:
        return None
    emotion, statement, actor = map(int, match.groups())
    return RavdessName(EMOTIONS[emotion - 1], STATEMENTS[statement - 1], actor)
