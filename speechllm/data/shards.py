"""Encoded speech on disk."""

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset
from torch import Tensor

from speechllm.encoding import DataError, Encoding, Speech
from speechllm.evaluation.normalizers import NORMALIZERS
from tokenizer.audio import AudioError, load_audio
from tokenizer.corpus import Utterance, skipped_row, spread
from tokenizer.files import read_json, write_json
from tokenizer.interface import AudioTokenizer
from tokenizer.reading import reading

SHARD_SIZE = 500  # utterances per Parquet file
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("split", pa.string()),
        ("speaker", pa.string()),
        ("text", pa.string()),
        ("duration_s", pa.float32()),
    ]
)
SPEECH = {  # the column with the speech, by kind of encoding
    "codes": pa.field("codes", pa.list_(pa.uint16())),  # [layers, frames], one layer after the other
    "features": pa.field("features", pa.list_(pa.float16())),  # [frames, width], one frame after the other
    "text": pa.field("recognized", pa.string()),
}


def encode_shards(
    utterances: Sequence[Utterance],
    codec: AudioTokenizer,
    folder: str | Path,
    layers: int | None = None,
    max_duration_s: float = 60.0,
    process: int = 0,
    processes: int = 1,
    normalizer: str = "none",
) -> Iterator[int]:
    """Encode utterances into Parquet shards; yields each shard's number of utterances when it is done.

    Each process writes every `processes`-th shard; existing shards are kept, so that a killed run loses at most one
    shard per process. Unusable recordings are skipped and recorded in the shard with the reason.
    normalizer: of the texts, a name that `word_error_rate` knows.
    Raises DataError if the folder holds codes made with other settings.
    """
    folder = Path(folder)
    encoding = Encoding.of(codec, layers)
    ids = [utterance.id for utterance in utterances]
    if repeated := [name for name, count in Counter(ids).items() if count > 1]:
        raise DataError(f"utterance ids must be unique, but {repeated[0]} occurs more than once")
    if normalizer not in NORMALIZERS:
        raise DataError(f"unknown normalizer {normalizer!r}: choose one of {', '.join(NORMALIZERS)}")
    settings = {**asdict(encoding), "max_duration_s": max_duration_s, "normalizer": normalizer}
    settings |= {"utterances": len(utterances), "speech": identity(utterances)}
    claim = folder / "request.json"
    held = read_json(claim) or settings
    changed = [f"{name}: {held.get(name)} -> {settings[name]}" for name in settings if held.get(name) != settings[name]]
    if changed:
        raise DataError(
            f"{folder} holds codes of another codec, other speech or other settings ({'; '.join(changed)}): "
            "choose another folder or delete it"
        )
    folder.mkdir(parents=True, exist_ok=True)
    if process == 0:
        write_json(claim, settings)
    for shard in range(process, -(-len(utterances) // SHARD_SIZE), processes):
        part = utterances[shard * SHARD_SIZE : (shard + 1) * SHARD_SIZE]
        file = folder / f"codes_{shard:05d}.parquet"
        if not file.exists():
            _write_shard(file, part, codec, encoding, max_duration_s, normalizer)
        yield len(part)


def _write_shard(
    file: Path,
    utterances: Sequence[Utterance],
    codec: AudioTokenizer,
    encoding: Encoding,
    max_duration_s: float,
    normalizer: str,
) -> None:
    rows, skipped, seconds = [], [], 0.0
    # processor time on a CPU, which does not depend on other programs; wall-clock time on a GPU
    clock = time.process_time if codec.device.type == "cpu" else time.perf_counter
    for utterance in utterances:
        try:
            waveform = load_audio(utterance.path, codec.sample_rate, max_duration_s=max_duration_s)
        except AudioError as error:
            skipped.append(skipped_row(utterance, error))
            continue
        started = clock()
        speech = encoding.encode(codec, waveform)
        seconds += clock() - started
        rows.append(
            {
                "id": utterance.id,
                "split": utterance.split,
                "speaker": utterance.speaker,
                "text": utterance.text and NORMALIZERS[normalizer](utterance.text),
                "duration_s": len(waveform) / codec.sample_rate,
                SPEECH[encoding.kind].name: _stored(speech),
            }
        )
    metadata = {
        "encoding": json.dumps(asdict(encoding)),
        "normalizer": normalizer,
        "skipped": json.dumps(skipped),
        "seconds": json.dumps(seconds),
    }
    table = pa.Table.from_pylist(rows, SCHEMA.append(SPEECH[encoding.kind]).with_metadata(metadata))
    part = file.with_suffix(".part")
    pq.write_table(table, part, compression="zstd")
    os.replace(part, file)


def _stored(speech: Speech) -> str | np.ndarray:
    """One utterance as stored in its column."""
    if isinstance(speech, str):
        return speech
    values = speech.flatten().numpy()
    return values.astype(np.float16 if speech.is_floating_point() else np.uint16)


def skipped_of_shards(folder: str | Path) -> list[dict[str, str]]:
    """The recordings that could not be encoded, one `skipped_row` each."""
    notes = (pq.read_schema(file).metadata for file in _shards(folder))
    return [row for note in notes for row in json.loads(note[b"skipped"])]


def summarize_shards(folder: str | Path) -> dict[str, object]:
    """Totals over all shards of a folder: utterances, hours, skipped recordings by reason, normaliser.

    real_time_factor: seconds of encoding per second of speech, in processor time or in time of one GPU.
    """
    files = _shards(folder)
    notes = [pq.read_schema(file).metadata for file in files]
    durations = [pq.read_table(file, columns=["duration_s"])["duration_s"].to_numpy() for file in files]
    speech_s = float(sum(part.sum() for part in durations))
    return {
        "utterances": int(sum(map(len, durations))),
        "hours": speech_s / 3600,
        "real_time_factor": sum(json.loads(note[b"seconds"]) for note in notes) / max(speech_s, 1e-9),
        "encoding": json.loads(notes[0][b"encoding"]),
        "skipped": dict(Counter(row["reason"] for row in skipped_of_shards(folder))),
        "normalizer": ", ".join(sorted({note.get(b"normalizer", b"none").decode() for note in notes})),
    }


def load_codes(folder: str | Path, splits: Sequence[str] | None = None) -> tuple[Dataset, Encoding]:
    """Encoded utterances of the named splits (all when None) and their encoding.

    Columns: id, split, speaker, text, duration_s, and the speech (`SPEECH`), which `speech_of` reads. Raises DataError
    if shards are missing or come from several codecs, or if a named split does not exist.
    """
    files = _shards(folder)
    if asked := read_json(Path(folder) / "request.json").get("utterances"):
        there = sum(pq.read_metadata(file).num_rows for file in files) + len(skipped_of_shards(folder))
        if there < asked:
            raise DataError(f"{folder} holds {there} of {asked} utterances: run encode_speech again to finish it")
    encodings = {pq.read_schema(file).metadata[b"encoding"] for file in files}
    if len(encodings) > 1:
        raise DataError(f"{folder} mixes codes of {len(encodings)} codecs: encode into an empty folder")
    table = pa.concat_tables([pq.read_table(file) for file in files]).replace_schema_metadata(None)
    if splits is not None:
        found = table["split"].unique().to_pylist()
        if absent := [split for split in splits if split not in found]:
            raise DataError(f"{folder} has no split {', '.join(absent)}; it has {', '.join(found)}")
        table = table.filter(pa.compute.is_in(table["split"], pa.array(splits)))
    with reading(files[0], "a shard of encoded speech", "encode the speech again", DataError):
        encoding = Encoding(**json.loads(encodings.pop()))
        _check_speech(table, encoding, folder)
    return Dataset(table), encoding


def _check_speech(table: pa.Table, encoding: Encoding, folder: str | Path) -> None:
    """Raise DataError for codes beyond the codebooks, utterances cut within a frame, and columns that are missing."""
    names = [*SCHEMA.names, (column := SPEECH[encoding.kind].name)]
    if absent := [name for name in names if name not in table.column_names]:
        raise DataError(f"{folder} lacks the columns {', '.join(absent)}: encode the speech again")
    if encoding.kind == "text" or not len(table):
        return
    values, step = table[column], encoding.layers if encoding.kind == "codes" else encoding.width
    if values.null_count:
        raise DataError(f"{folder}: {values.null_count} utterances have no {column}: encode the speech again")
    sizes = pa.compute.list_value_length(values).to_numpy()
    if (cut := np.flatnonzero(sizes % step)).size:
        raise DataError(
            f"{folder}: utterance {table['id'][int(cut[0])]} has {sizes[cut[0]]} {column}, which is no multiple of "
            f"{step}: encode the speech again"
        )
    if encoding.kind == "codes":
        highest = max(pa.compute.max(part.flatten()).as_py() or 0 for part in values.chunks)
        if highest >= encoding.codebook_size:
            raise DataError(
                f"{folder} holds the code {highest}, the codec's codebooks end at {encoding.codebook_size - 1}: "
                "encode the speech again"
            )


def transcribed(speech: Dataset, limit: int | None = None) -> Dataset:
    """The utterances with a transcript, at most `limit` of them, evenly chosen; all when None."""
    speech = speech.filter(bool, input_columns="text")
    return speech.select(spread(range(len(speech)), limit))


def codes_of(row: dict[str, Any], encoding: Encoding) -> Tensor:
    """The codes of one row, long [layers, frames]. Raises DataError for speech that was not encoded as codes."""
    if encoding.kind != "codes":
        raise DataError(
            f"expected codes, but this speech was encoded as {encoding.kind}: use an audio tokenizer with codebooks"
        )
    return torch.tensor(row["codes"], dtype=torch.long).view(encoding.layers, -1)


def speech_of(row: dict[str, Any], encoding: Encoding) -> Speech:
    """The speech of one row: codes long [layers, frames], features float [frames, width], or a text."""
    match encoding.kind:
        case "codes":
            return codes_of(row, encoding)
        case "features":
            return torch.tensor(row["features"], dtype=torch.float32).view(-1, encoding.width)
        case "text":
            return row["recognized"]


def _shards(folder: str | Path) -> list[Path]:
    files = sorted(Path(folder).glob("codes_*.parquet"))
    if not files:
        raise DataError(f"{folder} holds no encoded speech (codes_*.parquet): run recipes/encode_speech.py first")
    return files


def identity(utterances: Sequence[Utterance]) -> str:
    """Short fingerprint of a list of utterances: their ids, splits, speakers and texts."""
    rows = [[one.id, one.split, one.speaker, one.text] for one in utterances]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]
