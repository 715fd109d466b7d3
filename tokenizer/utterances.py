"""What corpora consist of, and several of them as one."""

import itertools
import os
import sys
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tokenizer.errors import InputError

Corpora = str | Path | Sequence[str | Path]  # one folder, or several whose utterances are joined


class CorpusError(InputError):
    """A corpus folder that cannot be used."""


class MissingSplitError(CorpusError):
    """Splits that a corpus does not have."""

    def __init__(self, data: Corpora, absent: Sequence[str], found: Sequence[str]):
        self.absent, self.found = absent, found
        has, them = ("has", "it has") if len(corpus_folders(data)) == 1 else ("have", "they have")
        super().__init__(f"{spell_corpora(data)} {has} no split {', '.join(absent)}; {them} {', '.join(found)}")


class Phones(Sequence[tuple[str, float]]):
    """A phone alignment: (symbol, end in s) in time order, in an eighth of the memory of a tuple of them."""

    __slots__ = ("ends", "symbols")

    def __init__(self, symbols: Iterable[str], ends: Iterable[float]):
        self.symbols, self.ends = tuple(map(sys.intern, symbols)), array("d", ends)

    def __getitem__(self, place: Any) -> Any:
        pair = self.symbols[place], self.ends[place]
        return tuple(zip(*pair, strict=True)) if isinstance(place, slice) else pair

    def __len__(self) -> int:
        return len(self.symbols)

    def __eq__(self, other: object) -> bool:
        return tuple(self) == (tuple(other) if isinstance(other, Phones) else other)

    def __hash__(self) -> int:
        return hash(tuple(self))


@dataclass(frozen=True)
class Utterance:
    """One recording. `phones`: (symbol, end in s) in time order, if the corpus has an alignment."""

    id: str
    path: str
    duration_s: float
    split: str
    text: str | None = None
    speaker: str | None = None
    phones: Sequence[tuple[str, float]] | None = None

    def row(self) -> dict[str, Any]:
        """As a row of a manifest, for JSON."""
        return {**vars(self), "phones": self.phones and list(self.phones)}


def frame_phones(utterance: Utterance, frames: int, frame_rate: float = 50.0) -> list[str]:
    """The phone at the centre of every frame, from the alignment of the corpus."""
    assert utterance.phones is not None, f"{utterance.id} has no alignment"
    ends = np.array([end for _, end in utterance.phones])
    centres = (np.arange(frames) + 0.5) / frame_rate
    return [utterance.phones[i][0] for i in np.minimum(np.searchsorted(ends, centres), len(ends) - 1)]


def default_id(path: str) -> str:
    """The id of a recording that a manifest gives none, by its path there."""
    return readable(os.path.normpath(path))


def readable(name: str) -> str:
    """A name that UTF-8 can write, whatever the bytes of the file's name are."""
    return name if name.isascii() else os.fsencode(name).decode("utf-8", "backslashreplace")


def corpus_folders(data: Corpora) -> list[Path]:
    """The folders of one corpus or of several."""
    return [Path(data)] if isinstance(data, str | Path) else [*map(Path, data)]


def spell_corpora(data: Corpora) -> str:
    """The folders of a corpus as a message names them."""
    return ", ".join(map(str, corpus_folders(data)))


def short_names(folders: Sequence[Path]) -> list[str]:
    """The last part of every path, or as many parts as it takes to tell them apart. folders: no two are the same."""
    paths = [Path(os.path.realpath(folder)).parts for folder in folders]
    depth = next(n for n in itertools.count(1) if len({parts[-n:] for parts in paths}) == len(paths))
    return ["/".join(parts[-depth:]) for parts in paths]


def keep_apart(names: Sequence[Sequence[str | None]], corpora: Sequence[str]) -> list[list[str | None]]:
    """The names that each corpus gives, such as ids, as CORPUS/NAME where two corpora have the same one."""
    owners = Counter(name for own in names for name in {*own} - {None})
    return [
        [f"{corpus}/{name}" if owners[name] > 1 else name for name in own]
        for corpus, own in zip(corpora, names, strict=True)
    ]


def tell_apart(
    folders: Sequence[Path],
    ids: Sequence[Sequence[str | None]],
    speakers: Sequence[Sequence[str | None]],
    what: str = "a corpus",
    error: type[InputError] = CorpusError,
) -> tuple[list[list[str | None]], list[list[str | None]]]:
    """The ids and speakers that each folder gives, as FOLDER/NAME where two folders have the same one.

    Raises `error` for a folder, `what`, that is given twice, and for two ids that are the same even so.
    """
    if len({os.path.realpath(folder) for folder in folders}) < len(folders):
        raise error(f"{spell_corpora(folders)}: {what} is given twice, expected each once")
    names = short_names(folders)
    apart = keep_apart(ids, names), keep_apart(speakers, names)
    if repeated := [name for name, times in Counter(itertools.chain(*apart[0])).items() if times > 1]:
        raise error(f"{spell_corpora(folders)}: two utterances would be called {repeated[0]}: rename a folder")
    return apart


def join(folders: Sequence[Path], corpora: Sequence[Sequence[Utterance]]) -> list[list[Utterance]]:
    """The utterances of every corpus, with ids and speakers that no other one has.

    Raises CorpusError for a folder that is given twice and for a recording that two corpora have under one id.
    """
    ids, speakers = tell_apart(
        folders, [[one.id for one in own] for own in corpora], [[one.speaker for one in own] for own in corpora]
    )
    first: dict[str, Utterance] = {}
    for one in itertools.chain(*corpora):
        other = first.setdefault(one.id, one)
        if other is not one and os.path.realpath(other.path) == os.path.realpath(one.path):
            both = f"two of them hold the recording {one.path} as {one.id}"
            raise CorpusError(f"{spell_corpora(folders)}: {both}, expected each recording once: leave one of them out")
    return [
        [replace(one, id=str(id), speaker=speaker) for one, id, speaker in zip(*own, strict=True)]
        for own in zip(corpora, ids, speakers, strict=True)
    ]


def by_split(utterances: Iterable[Utterance]) -> dict[str, list[Utterance]]:
    """The utterances of each split, in their order."""
    splits: dict[str, list[Utterance]] = {}
    for utterance in utterances:
        splits.setdefault(utterance.split, []).append(utterance)
    return splits


def counts(members: Sequence[Utterance]) -> str:
    """How much speech of how many speakers, in words."""
    hours = sum(one.duration_s for one in members) / 3600
    speakers, texts = len({one.speaker for one in members} - {None}), sum(one.text is not None for one in members)
    return f"{len(members):,} utterances, {hours:.2f} h, {speakers:,} speakers, {texts:,} with text"
