"""Reading speech corpora: a folder with a manifest, or in LibriSpeech's or RAVDESS's layout, as utterances."""

import functools
import json
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from tokenizer.audio import DENSEST, RATES, AudioError, audio_duration, load_audio, open_recording
from tokenizer.errors import InputError
from tokenizer.prefetch import prefetch
from tokenizer.ravdess import parse_ravdess
from tokenizer.tables import (
    TableError,
    optional_name,
    optional_text,
    positive_seconds,
    read_lines,
    read_table,
    refuse_repeats,
    required_path,
)
from tokenizer.utterances import (
    Corpora,
    MissingSplitError,
    Phones,
    by_split,
    corpus_folders,
    counts,
    default_id,
    join,
    readable,
)
from tokenizer.utterances import CorpusError as CorpusError
from tokenizer.utterances import Utterance as Utterance

READERS = 16  # threads that read the headers of audio files: on a network disk each read has to wait
MOST_MISSING = 0.1  # share of the recordings of a split; one may always be missing
DURATION_SLACK = 0.05  # share by which a recording may differ from its duration in the corpus, or a second
PHONE_SLACK_S = 0.1  # by which the last phone may end after the recording: frames are rounded up
TRANSCRIPT = ".trans.txt"

logger = logging.getLogger(__name__)

T = TypeVar("T")


Row = tuple[str, Utterance]  # with its place, for messages


def read_corpus(data: Corpora, splits: Sequence[str] | None = None) -> list[Utterance]:
    """Utterances of a corpus folder, or of several, in a fixed order, of the given splits only (all when None).

    A `manifest.jsonl` has one JSON object per line: path (relative to the folder) and duration_s, optionally id, text,
    speaker, split (default "train") and phones; a `manifest.csv` has columns of these names except phones. Without a
    manifest, the folder has LibriSpeech's layout,
    <split>/<speaker>/<chapter>/<speaker>-<chapter>-<n>.flac with <speaker>-<chapter>.trans.txt, or RAVDESS's, whose
    file names contain text and speaker (`parse_ravdess`), Actor_01/03-01-05-01-02-02-01.wav, all in split "train".
    Utterances whose recording is missing stay in the list, for whoever loads it to skip and count; without a manifest
    they have the duration 0. Logs a line for each split. Of several corpora, splits of one name are joined, and ids and
    speakers that two of them share are called CORPUS/NAME, in whatever splits they are: no two are taken for one.
    Raises CorpusError for a missing folder, a bad row, ids that occur twice in a corpus, a recording that two corpora
    have under one id, and splits that lack more than one recording and more than `MOST_MISSING` of them, or all;
    MissingSplitError for splits that no corpus has.
    """
    folders = corpus_folders(data)
    corpora = [_read_folder(folder, splits) for folder in folders]
    if len(folders) > 1:
        corpora = join(folders, corpora)
    found = sorted({utterance.split for own in corpora for utterance in own})
    if absent := [split for split in splits or () if split not in found]:
        raise MissingSplitError(data, absent, found)
    joined: list[Utterance] = []
    for folder, own in zip(folders, corpora, strict=True):
        utterances = [utterance for utterance in own if splits is None or utterance.split in splits]
        manifest = find_manifest(folder)
        missing = _missing(utterances) if manifest else {one.path for one in utterances if not one.duration_s}
        _report(manifest or folder, utterances, missing)
        joined += utterances
    for split, members in by_split(joined).items() if len(folders) > 1 else ():
        logger.info("together, %s: %s", split, counts(members))
    return joined


def _read_folder(folder: Path, splits: Sequence[str] | None) -> list[Utterance]:
    """All utterances of one corpus; without a manifest, those of other splits than `splits` have the duration 0."""
    if not folder.is_dir():
        problem = "is a file, no corpus folder" if folder.exists() else "no such corpus folder"
        several = "; several are [A, B]" if "," in str(folder) else ""
        raise CorpusError(f"{folder}: {problem} (recipes/import_speech.py makes one from a hub data set){several}")
    try:
        rows = _read_manifest(manifest) if (manifest := find_manifest(folder)) else _read_layout(folder, splits)
        places = [place for place, _ in rows]
        refuse_repeats(places, [one.id for _, one in rows], "id", "give every utterance an id of its own")
    except TableError as error:
        raise CorpusError(str(error)) from error
    return [utterance for _, utterance in rows]


def is_corpus(folder: str | Path) -> bool:
    """Whether `read_corpus` finds a manifest, or a first file of one of the layouts, in a folder."""
    names = (name for _, names in _visible_files(str(folder)) for name in names)
    return bool(find_manifest(Path(folder))) or any(name.endswith(TRANSCRIPT) or _is_ravdess(name) for name in names)


def find_manifest(folder: Path) -> Path | None:
    """The manifest of a corpus folder, if it has one."""
    return next((folder / name for name in ("manifest.jsonl", "manifest.csv") if (folder / name).is_file()), None)


def _read_manifest(manifest: Path) -> list[Row]:
    folder, rows = str(manifest.parent), []
    for place, row in read_table(manifest, COLUMNS):
        path, phones = row["path"], row["phones"]
        row["id"] = row["id"] or default_id(path)
        row["path"] = os.path.join(folder, path)
        if "\\" in path and not os.path.exists(row["path"]):  # written on Windows
            row["path"] = os.path.join(folder, path.replace("\\", "/"))
        row["split"] = row["split"] or "train"
        if phones and phones[-1][1] > row["duration_s"] + PHONE_SLACK_S:
            end, duration_s = phones[-1][1], row["duration_s"]
            raise CorpusError(f"{place}: phones end at {end:g} s, expected at most the duration of {duration_s:g} s")
        rows.append((place, Utterance(**row)))
    if not rows:
        raise CorpusError(f"{manifest} holds no utterances, expected a row for each recording")
    return rows


def _phones(cell: Any) -> Phones | None:
    """The alignment in a cell. Raises ValueError for anything else."""
    if cell is None or cell == "" or cell == []:
        return None
    expected = 'pairs of a symbol and its end in s, in time order, such as [["HH", 0.1], ["AY", 0.25]], in JSON lines'
    try:
        symbols, ends = zip(*cell, strict=True)
    except (TypeError, ValueError) as error:
        raise ValueError(expected) from error
    if {*map(type, symbols)} != {str} or not {*map(type, ends)} <= {int, float} or not isinstance(cell, list):
        raise ValueError(expected)
    if not 0 <= ends[0] <= ends[-1] < math.inf or list(ends) != sorted(ends) or math.isnan(sum(ends)):
        raise ValueError(expected)
    return Phones(symbols, ends)


COLUMNS = {
    "id": optional_name,
    "path": required_path,
    "duration_s": positive_seconds,
    "split": optional_name,
    "text": optional_text,
    "speaker": optional_name,
    "phones": _phones,
}


def _read_layout(folder: Path, splits: Sequence[str] | None) -> list[Row]:
    """The utterances of a folder without a manifest."""
    files = [*_visible_files(str(folder))]
    chapters = [(place, name, names) for place, names in files for name in names if name.endswith(TRANSCRIPT)]
    if chapters:
        read = functools.partial(_read_chapter, splits=splits)
        with ThreadPoolExecutor(READERS) as pool:
            rows = [row for chapter in pool.map(read, *zip(*chapters, strict=True)) for row in chapter]
        recordings = {os.path.join(place, name) for place, names in files for name in names if name.endswith(".flac")}
        if more := recordings.difference(utterance.path for _, utterance in rows):
            logger.info("%s: %s recordings have no transcript and are left out", folder, f"{len(more):,}")
    else:
        rows = _read_ravdess(folder, [os.path.join(place, name) for place, names in files for name in names])
    if not rows:
        raise CorpusError(
            f"{folder} holds neither a manifest.jsonl or manifest.csv with utterances nor LibriSpeech's *.trans.txt "
            "files nor RAVDESS's 03-01-*.wav; recipes/import_speech.py makes a corpus folder from Parquet files"
            + ("; songs of RAVDESS (03-02-*.wav) are not read" if _holds_songs(files) else "")
        )
    return rows


def _visible_files(folder: str, above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[tuple[str, list[str]]]:
    """This folder and those below, each with the names of its files, in alphabetical order.

    Hidden ones, such as macOS's ._*, are left out. Symbolic links are followed, but not in circles.
    """
    status = os.stat(folder)
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    with os.scandir(folder) as found:
        entries = sorted((entry for entry in found if not entry.name.startswith(".")), key=lambda entry: entry.name)
    yield folder, [entry.name for entry in entries if entry.is_file()]
    for entry in entries:
        if entry.is_dir():
            yield from _visible_files(entry.path, above | {here})


def _read_chapter(folder: str, transcript: str, names: list[str], splits: Sequence[str] | None) -> list[Row]:
    above = Path(os.path.abspath(folder)).parent
    split, speaker = readable(above.parent.name), readable(above.name)
    rows, there = [], set(names if splits is None or split in splits else ())  # recordings to be opened
    for number, line in enumerate(read_lines(os.path.join(folder, transcript)), 1):
        name, _, text = line.strip().partition(" ")
        if not name:
            continue
        file = os.path.join(folder, f"{name}.flac")
        duration_s = _duration_or_zero(file, _flac_duration) if f"{name}.flac" in there else 0.0
        place = f"{os.path.join(folder, transcript)}, line {number}"
        rows.append((place, Utterance(name, file, duration_s, split, text.strip() or None, speaker)))
    return rows


def _read_ravdess(folder: Path, files: list[str]) -> list[Row]:
    first: dict[str, str] = {}  # by name: the published archive is often unpacked at two levels
    for file in files:
        name = os.path.basename(file)
        if _is_ravdess(name) and os.path.getsize(file) != os.path.getsize(first.setdefault(name, file)):
            raise CorpusError(f"{file} and {first[name]} have one name and other sizes: keep the one that is whole")
    copies = sum(map(_is_ravdess, map(os.path.basename, files))) - len(first)
    if copies:
        logger.info("%s: %s recordings are there twice and read once", folder, f"{copies:,}")
    with ThreadPoolExecutor(READERS) as pool:
        durations = pool.map(lambda file: _duration_or_zero(file, audio_duration), first.values())
        return [_ravdess_row(file, duration_s) for file, duration_s in zip(first.values(), durations, strict=True)]


def _ravdess_row(file: str, duration_s: float) -> Row:
    stem = Path(file).stem
    labels = parse_ravdess(stem)
    assert labels is not None, file
    return file, Utterance(readable(stem), file, duration_s, "train", labels.text, f"actor{labels.actor:02}")


def _is_ravdess(name: str) -> bool:
    return name.startswith("03-01-") and name.endswith(".wav") and parse_ravdess(name[:-4]) is not None


def _holds_songs(files: Iterable[tuple[str, list[str]]]) -> bool:
    return any(name.startswith("03-02-") for _, names in files for name in names)


def _duration_or_zero(file: str, duration: Callable[[Path], float]) -> float:
    """0 for a recording that cannot be read: whoever loads it finds out why, skips and counts it."""
    try:
        return duration(Path(file))
    except (OSError, InputError):
        return 0.0


def _report(source: Path, utterances: Sequence[Utterance], missing: set[str]) -> None:
    """Log a line for each split. Raises CorpusError where too many recordings, given by their paths, are missing."""
    if listed_twice := len(utterances) - len({os.path.normpath(one.path) for one in utterances}):
        logger.info("%s: %s rows name a recording that another row names, too", source, f"{listed_twice:,}")
    for split, members in by_split(utterances).items():
        gone = [one for one in members if one.path in missing]
        require_most(source, f"recordings of split {split}", [one.path for one in gone], len(members))
        lost = f"; {len(gone):,} recordings missing" if gone else ""
        logger.info("%s, %s: %s%s", source, split, counts(members), lost)


def require_most(source: str | Path, what: str, gone: Sequence[str], total: int) -> None:
    """Raise CorpusError if more than one and more than `MOST_MISSING` of `total` recordings are gone, or all.

    gone: their paths; what: "recordings", or which of them.
    """
    if len(gone) == total or len(gone) > max(1, MOST_MISSING * total):
        raise CorpusError(
            f"{source}: {len(gone)} of {total} {what} are missing or unreadable, the first is {gone[0]}, expected one "
            f"or {MOST_MISSING:.0%} at most: fetch them again or leave them out of the corpus"
        )


def _missing(utterances: Sequence[Utterance]) -> set[str]:
    """The paths of recordings that are not there.

    Folders are listed, which on a network disk is much faster than to ask for every file.
    """
    folders: dict[str, list[str]] = {}
    for utterance in utterances:
        folders.setdefault(os.path.dirname(utterance.path), []).append(os.path.basename(utterance.path))

    def absent(folder: str) -> list[str]:
        try:
            there = set(os.listdir(folder))
        except (OSError, ValueError):
            there = set()
        paths = [os.path.join(folder, name) for name in folders[folder] if name not in there]
        return [path for path in paths if not os.path.isfile(path)]  # asked for again, where case does not matter

    with ThreadPoolExecutor(READERS) as pool:
        return {path for paths in pool.map(absent, folders) for path in paths}


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


def spread(items: Sequence[T], most: int | None) -> list[T]:
    """At most `most` items at equal steps (all when None), because the first ones are often from few speakers."""
    if most is None or most >= len(items):
        return list(items)
    return [items[i * len(items) // most] for i in range(most)]


def load_utterance(utterance: Utterance, sample_rate: int = 16_000, max_duration_s: float | None = None) -> Tensor:
    """`load_audio` of a whole utterance. Raises AudioError also as `recorded_s` does."""
    waveform = load_audio(utterance.path, sample_rate, max_duration_s=max_duration_s)
    _require_duration(utterance, len(waveform) / sample_rate)
    return waveform


def recorded_s(utterance: Utterance) -> float:
    """Duration in s of the recording itself, by the header of its file; 0 if that cannot be read.

    Raises AudioError (reason: duration) where the corpus states another one, by more than a second and more than
    `DURATION_SLACK`: then it is not the recording that the corpus speaks of.
    """
    found_s = _duration_or_zero(utterance.path, audio_duration)
    _require_duration(utterance, found_s)
    return found_s


def _require_duration(utterance: Utterance, found_s: float) -> None:
    stated_s = utterance.duration_s
    if stated_s and found_s and abs(found_s - stated_s) > max(1.0, DURATION_SLACK * found_s):
        detail = f"{found_s:.2f} s long, but the corpus states {stated_s:.2f} s: correct its duration_s"
        raise AudioError(utterance.path, "duration", detail)


def try_load(
    utterance: Utterance, sample_rate: int = 16_000, max_duration_s: float | None = None
) -> tuple[Utterance, Tensor | AudioError]:
    """The utterance with its waveform float [N], or with what `load_utterance` raises."""
    try:
        return utterance, load_utterance(utterance, sample_rate, max_duration_s)
    except AudioError as error:
        return utterance, error


def as_skip(utterance: Utterance, error: AudioError | OSError) -> AudioError:
    """What the recording is skipped for: an error of the disk should not end a long training."""
    return error if isinstance(error, AudioError) else AudioError(utterance.path, "unreadable", str(error))


def load_each(
    utterances: Iterable[Utterance], sample_rate: int = 16_000, max_duration_s: float | None = None
) -> Iterator[tuple[Utterance, Tensor | AudioError]]:
    """`try_load` of every utterance, in order; the next ones are read while the caller works on one."""
    return prefetch(lambda utterance: try_load(utterance, sample_rate, max_duration_s), utterances)


def keep_usable(
    loaded: Iterable[tuple[Utterance, Tensor | AudioError]], skipped: str | Path | None = None
) -> Iterator[tuple[Utterance, Tensor]]:
    """What `try_load` found, without the recordings that cannot be used, which are skipped with a warning."""
    for utterance, found in loaded:
        if isinstance(found, AudioError):
            record_skip(utterance, found, skipped)
        else:
            yield utterance, found


def load_usable(
    utterances: Iterable[Utterance], sample_rate: int = 16_000, skipped: str | Path | None = None
) -> Iterator[tuple[Utterance, Tensor]]:
    """Utterances with their waveforms float [N]; recordings that cannot be used are skipped with a warning."""
    return keep_usable(load_each(utterances, sample_rate), skipped)


def record_skip(utterance: Utterance, error: AudioError, file: str | Path | None) -> None:
    """Warn that a recording is skipped, and append a `skipped_row` to the file, if one is given."""
    warnings.warn(f"skipped: {error}", stacklevel=3)
    if file is not None:  # appending a short line is atomic, so several processes can write to one file
        with Path(file).open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(skipped_row(utterance, error)) + "\n")


def skipped_row(utterance: Utterance, error: AudioError) -> dict[str, str]:
    """JSON object for a recording that cannot be used: which one and why."""
    return {"id": utterance.id, "path": str(utterance.path), "reason": error.reason, "detail": str(error)}
