"""Import a data set of the hub, or any other that `datasets` reads, as a corpus folder with recordings and manifest.

    python recipes/import_speech.py data=openslr/librispeech_asr:clean output=CORPUS "splits=[train.100,validation]"

`data` is a name on the hub, with the configuration after a colon, a folder of Parquet files, or one that `save_to_disk`
wrote (for a folder of audio files, write a manifest.csv or install torchcodec). All other recipes read CORPUS.
Recordings are copied unchanged: CORPUS needs as much disk space as the data set, and streaming needs no more than that.
A killed import is resumed in the file of the data set where it stopped. Recordings are read through; those that cannot
be used, and rows in which text, id or speaker is neither text nor number, are skipped and counted by reason in
CORPUS/done.json. Texts are unchanged.
"""

import contextlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speechllm.runs.config import parse_config
from tokenizer.settings import Names, Settings

COLUMNS = {  # possible columns of a data set, by our names; the first existing one is used
    "id": ("id", "file"),
    "text": ("text", "sentence", "transcription", "normalized_text"),
    "speaker": ("speaker_id", "speaker", "client_id"),
}
Row = dict[str, Any]  # of the manifest, or the reason why it was skipped; with its file (shard) of the data set


@dataclass
class ImportConfig(Settings):
    data: str  # hub name, hub name:configuration, or folder
    output: str  # corpus folder
    splits: Names | None = None  # all when null
    text: str | None = None  # column of the transcripts; null: text, sentence, transcription or normalized_text
    streaming: bool = True  # false: download into the cache of `datasets` first


if __name__ == "__main__":  # help and mistakes are answered before torch is loaded
    CONFIG = parse_config(ImportConfig)

import fsspec
import pyarrow as pa
from datasets import Audio, Dataset, IterableDataset, load_dataset, load_from_disk
from huggingface_hub.errors import HTTPError
from tqdm import tqdm

from speechllm import AudioError, DataError
from speechllm.runs.recipe import run_recipe
from speechllm.runs.run import Run
from tokenizer.audio import NO_FILE, AudioInfo, inspect_audio
from tokenizer.claims import outside
from tokenizer.corpus import is_corpus
from tokenizer.files import read_journal, write_jsonl
from tokenizer.tables import optional_text, shown

UNREADABLE = (pa.ArrowException, ValueError, TypeError, OSError, ImportError)  # what `datasets` raises for a bad file


def main(config: ImportConfig) -> None:
    outside(config.output, config.data)
    parts = open_splits(config)
    columns = {split: find_columns(part, config) for split, part in parts.items()}
    for split, part in parts.items():  # before anything is written
        require_rows(part, columns[split], f"{config.data}, split {split}")
    run = Run(config.output, config)
    if run.summary:
        print(f"{config.output} is finished: {run.summary}")
        return
    journal = run.folder / "rows.jsonl"
    rows = read_journal(journal)
    with journal.open("a", buffering=1, encoding="utf-8") as file:  # each line is written right after its recording
        for split, part in parts.items():
            print(f"{split}: {columns[split]}")
            before = [row for row in rows if row["split"] == split]
            imported = import_split(part, columns[split], run.folder, split, before)
            for row in tqdm(imported, split, initial=len(before), unit="utt", mininterval=1):
                file.write(json.dumps(row) + "\n")
                rows.append(row)
    finish(run, rows)
    journal.unlink()


def open_splits(config: ImportConfig) -> dict[str, IterableDataset]:
    """The configured splits. Raises DataError for a data set, a configuration or a split that does not exist."""
    folder = Path(config.data)
    if folder.is_dir() and is_corpus(folder):
        raise DataError(f"{folder} is a corpus folder already: no import is needed, give it to the other recipes")
    with translated(config.data):
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            found = load_from_disk(config.data)
        else:
            name, _, configuration = (config.data, "", "") if folder.is_dir() else config.data.partition(":")
            found = load_dataset(name, configuration or None, streaming=config.streaming)
    parts = {str(found.split or "train"): found} if isinstance(found, Dataset) else dict(found)
    if absent := [split for split in config.splits or [] if split not in parts]:
        raise DataError(f"{config.data} has no split {', '.join(absent)}; it has {', '.join(parts)}")
    return {
        split: part.to_iterable_dataset() if isinstance(part, Dataset) else part
        for split, part in parts.items()
        if config.splits is None or split in config.splits
    }


@contextlib.contextmanager
def translated(what: str) -> Iterator[None]:
    """Raise DataError, in one line that says what was read, for whatever `datasets`, a disk or a server raises."""
    try:
        yield
    except (*UNREADABLE, HTTPError) as error:
        mend = ": correct the data set, or fetch it again"
        if isinstance(error, ImportError):
            mend = "; instead of importing a folder of audio files, write a manifest.csv for it (recipes/README.md)"
        elif isinstance(error, OSError | HTTPError) and not is_absent(error):
            mend = "; the same command goes on from there; if it ends there again, correct the data set"
        raise DataError(f"{what}: {' '.join(str(error).split())[:500]}{mend}") from error


def find_columns(part: IterableDataset, config: ImportConfig) -> dict[str, str]:
    """The data set's columns for audio, id, text and speaker, if it has them; DataError without audio."""
    features = part.features or {}
    sounds = [name for name, feature in features.items() if isinstance(feature, Audio)]
    wanted = {**COLUMNS, "audio": (*sounds, "audio"), "text": (config.text,) if config.text else COLUMNS["text"]}
    columns = {}
    for key, names in wanted.items():
        if found := [name for name in names if name in features]:
            columns[key] = found[0]
        elif key == "audio" or names == (config.text,):
            known = ", ".join(features) or "no columns that are known before reading: try streaming=false"
            raise DataError(f"{config.data} has no column {names[0]}; it has {known}")
    return columns


def recordings_of(part: IterableDataset, columns: dict[str, str]) -> IterableDataset:
    """The named columns, with the recordings as they are in their files."""
    return part.select_columns(list(columns.values())).cast_column(columns["audio"], Audio(decode=False))


def require_rows(part: IterableDataset, columns: dict[str, str], what: str) -> None:
    """Raise DataError unless the first row can be read."""
    with translated(what):
        for row in recordings_of(part, columns).take(1):
            texts_of({key: row[name] for key, name in columns.items()})


def texts_of(row: Row) -> dict[str, str | None]:
    """Id, text and speaker of a row; None for what it lacks. Raises ValueError for anything but texts and numbers."""
    texts = {}
    for key in COLUMNS:
        try:
            texts[key] = optional_text(row.get(key))
        except ValueError as error:
            raise ValueError(f"{key} is {shown(row[key])}, expected {error}") from error
    return texts


def import_split(
    part: IterableDataset, columns: dict[str, str], folder: Path, split: str, before: list[Row]
) -> Iterator[Row]:
    """Copy the recordings after those of the rows `before`. Finished files of the data set are not read again."""
    raw = recordings_of(part, columns)
    first, number = before[-1]["shard"] if before else 0, len(before)
    for shard in range(first, raw.num_shards):
        done = sum(row["shard"] == shard for row in before)
        found = iter(raw.shard(raw.num_shards, shard).skip(done))
        while True:
            with translated(f"split {split}, file {shard + 1} of {raw.num_shards}"):
                cells = next(found, None)
            if cells is None:
                break
            row = {key: cells[name] for key, name in columns.items()}
            place = f"audio/{split}/{number // 1000:04d}/{number:07d}"
            yield {"split": split, "shard": shard, **import_row(row, folder, place)}
            number += 1


def is_absent(error: Exception) -> bool:
    """Whether there is no such file, and no disk or server that fails. Not all file systems number their errors."""
    absent = isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError)
    return absent or getattr(error, "errno", None) in NO_FILE


def import_row(row: Row, folder: Path, place: str) -> Row:
    """Write one recording to `place`; returns its row of the manifest, or the reason why it was skipped."""
    sound = row["audio"] or {}
    try:
        names = texts_of(row)
    except ValueError as error:
        return {"skipped": "wrong type", "detail": f"{place}: {error}"}
    try:
        content, info = read_sound(sound, place)
    except AudioError as error:
        return {"skipped": error.reason, "detail": str(error)}
    path = f"{place}.{info.format.lower()}"
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    (folder / path).write_bytes(content)
    names["id"] = names["id"] or Path(sound.get("path") or path).stem
    return {"path": path, "duration_s": info.duration_s, **names}


def read_sound(sound: Row, name: str) -> tuple[bytes, AudioInfo]:
    """The content of a recording's file, which is read through, and what it is.

    Raises AudioError if it cannot be used, and DataError where a disk or server fails: a row is skipped for good.
    """
    content, source = sound.get("bytes"), sound.get("path")
    if content is None and source:
        try:
            with fsspec.open(source, "rb") as file:  # local, on the hub, or within an archive
                content = file.read()
        except (PermissionError, ValueError) as error:
            raise AudioError(name, "unreadable", f"{source} cannot be read ({error})") from error
        except (OSError, HTTPError) as error:
            if not is_absent(error):
                with translated(f"{name}, {source}"):
                    raise
    if content is None:
        raise AudioError(name, "missing", f"the data set holds no recording ({source})")
    return content, inspect_audio(content, name)


def finish(run: Run, rows: list[Row]) -> None:
    """Write the manifest and the summary."""
    skips = [row for row in rows if "skipped" in row]
    kept = [{key: value for key, value in row.items() if key != "shard"} for row in rows if "skipped" not in row]
    if not kept:
        reasons = dict(Counter(row["skipped"] for row in skips))
        first = skips[0]["detail"] if skips else "the data set has no rows"
        raise DataError(f"{run.folder}: none of the {len(rows)} recordings can be used ({reasons}); the first: {first}")
    times = Counter(row["id"] for row in kept)
    for row in kept:
        if times[row["id"]] > 1:  # the ids are of sentences, not of recordings
            row["id"] = f"{row['id']}-{row['split']}-{Path(row['path']).stem}"
    write_jsonl(run.folder / "manifest.jsonl", kept)
    summary = {
        "utterances": len(kept),
        "hours": sum(row["duration_s"] for row in kept) / 3600,
        "skipped": dict(Counter(row["skipped"] for row in skips)),
        "skipped_first": [row["detail"] for row in skips[:5]],
    }
    run.finish(summary)
    print(f"imported {len(kept)} utterances, {summary['hours']:.2f} h; skipped {summary['skipped']}")


if __name__ == "__main__":
    run_recipe(main, CONFIG)
