"""Reading speech corpora: a folder with a manifest, or in LibriSpeech's or RAVDESS's layout, as utterances."""

import csv
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from tokenizer.audio import DENSEST, RATES, AudioError, audio_duration, load_audio, open_recording
from tokenizer.errors import InputError
from tokenizer.ravdess import parse_ravdess

READERS = 16  # threads that read the headers of audio files: on a network disk each read has to wait

T = TypeVar("T")


class CorpusError(InputError):
    """A corpus folder that cannot be used."""


@dataclass(frozen=True)
class Utterance:
    """One recording. `phones`: (symbol, end in s) in time order, if the corpus has an alignment."""

    id: str
    path: str
    duration_s: float
    split: str
    text: str | None = None
    speaker: str | None = None
    phones: tuple[tuple[str, float], ...] | None = None


def read_corpus(folder: str | Path, splits: Sequence[str] | None = None) -> list[Utterance]:
    """Utterances of a corpus folder in a fixed order, of the given splits only (all when None).

    A `manifest.jsonl` has one JSON object per line: path (relative to the folder) and duration_s, optionally id, text,
    speaker, split (default "train") and phones; a `manifest.csv` has columns of these names except phones. Without a
    manifest, the folder has LibriSpeech's layout,
    <split>/<speaker>/<chapter>/<speaker>-<chapter>-<n>.flac with <speaker>-<chapter>.trans.txt, or RAVDESS's, whose
    file names contain text and speaker (`parse_ravdess`), Actor_01/03-01-05-01-02-02-01.wav, all in split "train".
    Raises CorpusError for a missing folder, an unreadable row, or splits that the corpus does not have.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CorpusError(f"{folder}: no such corpus folder (recipes/import_speech.py makes one from a hub data set)")
    manifests = [folder / name for name in ("manifest.jsonl", "manifest.csv") if (folder / name).is_file()]
    utterances = _read_manifest(manifests[0]) if manifests else _read_librispeech(folder) or _read_ravdess(folder)
    if not utterances:
        raise CorpusError(
            f"{folder} holds neither a manifest.jsonl or manifest.csv with utterances nor LibriSpeech's *.trans.txt "
            "files nor RAVDESS's 03-01-*.wav; recipes/import_speech.py makes a corpus folder from Parquet files"
        )
    if splits is None:
        return utterances
    found = sorted({utterance.split for utterance in utterances})
    absent = [split for split in splits if split not in found]
    if absent:
        raise CorpusError(f"{folder} has no split {', '.join(absent)}; it has {', '.join(found)}")
    return [utterance for utterance in utterances if utterance.split in splits]


def _read_manifest(manifest: Path) -> list[Utterance]:
    utterances: list[Utterance] = []
    with manifest.open(encoding="utf-8-sig", newline="") as file:  # spreadsheets may write a byte order mark first
        rows = csv.DictReader(file) if manifest.suffix == ".csv" else map(json.loads, file)
        try:
            for row in rows:
                utterances.append(_read_row(row, manifest.parent))
        except (AttributeError, KeyError, TypeError, ValueError, csv.Error) as error:
            expected = '{"path": "a.flac", "duration_s": 1.5, "text": "..."}'
            if manifest.suffix == ".csv":
                expected = "a row below path,duration_s,text such as a.flac,1.5,..."
            message = f"{manifest}, row {len(utterances) + 1}: expected {expected} ({error!r})"
            raise CorpusError(message) from error
    return utterances


def _read_row(row: dict[str, Any], folder: Path) -> Utterance:
    return Utterance(
        id=str(row.get("id") or row["path"]),
        path=str(folder / row["path"]),
        duration_s=float(row["duration_s"]),
        split=row.get("split") or "train",
        text=row.get("text") or None,  # an empty cell
        speaker=row.get("speaker") or None,
        phones=tuple((phone, end) for phone, end in row["phones"]) if row.get("phones") else None,
    )


def _read_librispeech(folder: Path) -> list[Utterance]:
    with ThreadPoolExecutor(READERS) as pool:
        chapters = pool.map(_read_chapter, sorted(folder.rglob("*.trans.txt")))
        return [utterance for chapter in chapters for utterance in chapter]


def _read_chapter(transcript: Path) -> list[Utterance]:
    utterances = []
    speaker, split = transcript.parents[1].name, transcript.parents[2].name
    for line in transcript.read_text(encoding="utf-8").splitlines():
        name, _, text = line.partition(" ")
        path = transcript.parent / f"{name}.flac"
        try:
            duration_s = _flac_duration(path)
        except AudioError as error:
            if error.reason == "missing":
                raise CorpusError(f"{transcript} names {path.name}, which is not in the same folder") from error
            raise CorpusError(f"{error}: fetch it again") from error
        utterances.append(Utterance(name, str(path), duration_s, split, text, speaker))
    return utterances


def _read_ravdess(folder: Path) -> list[Utterance]:
    files = [(path, name) for path in sorted(folder.rglob("03-01-*.wav")) if (name := parse_ravdess(path.stem))]
    with ThreadPoolExecutor(READERS) as pool:
        durations = pool.map(_wav_duration, [path for path, _ in files])
        return [
            Utterance(path.stem, str(path), duration_s, "train", name.text, f"actor{name.actor:02}")
            for (path, name), duration_s in zip(files, durations, strict=True)
        ]


def _wav_duration(path: Path) -> float:
    try:
        return audio_duration(path)
    except AudioError as error:
        raise CorpusError(f"{error}: fetch it again") from error


def _flac_duration(path: Path) -> float:
    """Duration in s from the STREAMINFO block of a FLAC file (RFC 9639, 8.2), much faster than with libsndfile.

    Falls back to `audio_duration`, if the file starts with a tag, or if it does not state the number of samples or
    states one that cannot be true. Raises AudioError as `audio_duration` does.
    """
    with open_recording(path) as file:
        head, size = file.read(26), os.fstat(file.fileno()).st_size
    fields = int.from_bytes(head[18:], "big")  # 20 bits sample rate, 8 bits format, 36 bits number of samples
    rate, samples = fields >> 44, fields & (1 << 36) - 1
    if head[:5] == b"fLaC\0" and len(head) == 26 and rate in RATES and 0 < samples <= size * DENSEST:
        return samples / rate
    return audio_duration(path)


def frame_phones(utterance: Utterance, frames: int, frame_rate: float = 50.0) -> list[str]:
    """The phone at the centre of every frame, from the alignment of the corpus."""
    assert utterance.phones is not None, f"{utterance.id} has no alignment"
    ends = np.array([end for _, end in utterance.phones])
    centres = (np.arange(frames) + 0.5) / frame_rate
    return [utterance.phones[i][0] for i in np.minimum(np.searchsorted(ends, centres), len(ends) - 1)]


def spread(items: Sequence[T], most: int | None) -> list[T]:
    """At most `most` items at equal steps (all when None), because the first ones are often from few speakers."""
    if most is None or most >= len(items):
        return list(items)
    return [items[i * len(items) // most] for i in range(most)]


def load_usable(
    utterances: Iterable[Utterance], sample_rate: int = 16_000, skipped: str | Path | None = None
) -> Iterator[tuple[Utterance, Tensor]]:
    """Utterances with their waveforms float [N]; recordings that cannot be used are skipped with a warning."""
    for utterance in utterances:
        try:
            waveform = load_audio(utterance.path, sample_rate)
        except AudioError as error:
            record_skip(utterance, error, skipped)
        else:
            yield utterance, waveform


def record_skip(utterance: Utterance, error: AudioError, file: str | Path | None) -> None:
    """Warn that a recording is skipped, and append a `skipped_row` to the file, if one is given."""
    warnings.warn(f"skipped: {error}", stacklevel=3)
    if file is not None:  # appending a short line is atomic, so several processes can write to one file
        with Path(file).open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(skipped_row(utterance, error)) + "\n")


def skipped_row(utterance: Utterance, error: AudioError) -> dict[str, str]:
    """JSON object for a recording that cannot be used: which one and why."""
    return {"id": utterance.id, "path": str(utterance.path), "reason": error.reason, "detail": str(error)}
