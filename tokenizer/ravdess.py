"""What the file names of RAVDESS say (Livingstone and Russo 2018, PLOS ONE 13(5)): emotion, statement, actor."""

import re
from dataclasses import dataclass

EMOTIONS = ("neutral", "calm", "happy", "sad", "angry", "fearful", "disgust", "surprised")
STATEMENTS = ("KIDS ARE TALKING BY THE DOOR", "DOGS ARE SITTING BY THE DOOR")
# modality 03 (audio alone), vocal channel 01 (spoken, not sung), emotion, intensity, statement, repetition, actor
NAME = re.compile(r"(?:^|\D)03-01-0([1-8])-0[12]-0([12])-0[12]-(\d\d)$")


@dataclass(frozen=True)
class RavdessName:
    """emotion: one of eight; text: the statement; actor: 1 to 24, men have odd numbers."""

    emotion: str
    text: str
    actor: int


def parse_ravdess(name: str) -> RavdessName | None:
    """What the name of a spoken RAVDESS recording says, such as 03-01-05-01-02-02-16; None for any other name.

    The name may have something before it, but no file ending.
    """
    match = NAME.search(name)
    if match is None:
        return None
    emotion, statement, actor = map(int, match.groups())
    return RavdessName(EMOTIONS[emotion - 1], STATEMENTS[statement - 1], actor)
