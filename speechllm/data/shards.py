"""Writing encoded speech: shards in Arrow's stream format, which readers map into memory instead of loading them."""

import hashlib
import json
import logging
import math
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from torch import Tensor

from speechllm.encoding import DataError, Encoding, Speech
from tokenizer.audio import AudioError, hash_recording
from tokenizer.claims import claim_folder
from tokenizer.corpus import Utterance, load_each, skipped_row
from tokenizer.errors import InputError
from tokenizer.files import atomic_file, read_json, write_json
from tokenizer.interface import AudioTokenizer
from tokenizer.reading import reading

REQUEST = "request.json"  # what the shards of a folder are made of
SHARD_SIZE = 500  # utterances per file
NO_FEATURES = "no features"  # reason for which a recording is skipped: none that can be stored

logger = logging.getLogger(__name__)
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
    batch_s: float = 0.0,
) -> Iterator[int]:
    """Encode utterances into shards; yields how many more are encoded, batch by batch, or kept, shard by shard.

    batch_s: seconds of speech to encode at a time, of utterances with similar lengths, by a codec that can; a shard
    does not depend on it, except for rounding. 0: one by one.
    Each process writes every `processes`-th shard; existing shards are kept, so that a killed run loses at most one
    shard per process, but those are written again that are cut short or of whose recordings one has another content
    now. Unusable recordings are skipped and recorded in the shard with the reason. Texts are stored as they are;
    `transcribed` normalises them.
    Raises OutputError for a folder that is not of encoded speech, is in use or cannot be written, and DataError if it
    holds codes made with other settings.
    """
    folder = Path(folder)
    encoding = Encoding.of(codec, layers)
    ids = [utterance.id for utterance in utterances]
    if repeated := [name for name, count in Counter(ids).items() if count > 1]:
        raise DataError(f"utterance ids must be unique, but {repeated[0]} occurs more than once")
    settings = request_of(encoding) | {"max_duration_s": max_duration_s}
    settings |= {"utterances": len(utterances), "speech": identity(utterances)}
    if process == 0:
        claim_codes(folder)
    held = read_json(folder / REQUEST) or settings
    changed = [f"{name}: {held.get(name)} -> {settings[name]}" for name in settings if held.get(name) != settings[name]]
    if changed:
        raise DataError(
            f"{folder} holds codes of another codec, other speech or other settings ({'; '.join(changed)}): "
            "choose another folder or delete it"
        )
    folder.mkdir(parents=True, exist_ok=True)
    if process == 0:
        write_json(folder / REQUEST, settings)
    for shard in range(process, -(-len(utterances) // SHARD_SIZE), processes):
        part = utterances[shard * SHARD_SIZE : (shard + 1) * SHARD_SIZE]
        file = folder / f"codes_{shard:05d}.arrow"
        if _is_current(file, part):
            yield len(part)
        else:
            yield from _write_shard(file, part, codec, encoding, max_duration_s, batch_s)


def claim_codes(folder: str | Path) -> None:
    """Claim a folder for encoded speech, see `claim_folder`, which says what it raises."""

    def own(place: Path) -> bool:  # another process was faster, or cut_speech or train_compressor wrote it
        return (place / REQUEST).is_file() or any(map(_is_shard, place.glob("codes_*.arrow")))

    claim_folder(folder, "encode_speech", own)


def _is_shard(file: Path) -> bool:
    try:
        return bool(shard_notes(file))
    except DataError:
        return False


def request_of(encoding: Encoding) -> dict[str, Any]:
    """What a folder of shards says of its encoding; the fingerprint stands for the labels."""
    return {name: value for name, value in asdict(encoding).items() if name != "labels"}


def write_rows(file: Path, rows: list[dict[str, Any]], encoding: Encoding, notes: dict[str, str]) -> None:
    """Write a shard. rows: the columns of `SCHEMA` and that of the speech, `stored`; notes: what it says of itself."""
    schema = SCHEMA.append(SPEECH[encoding.kind])
    written = schema.with_metadata(notes | {"encoding": json.dumps(asdict(encoding))})
    write_table(file, pa.Table.from_pylist(rows, written))


def write_table(file: Path, table: pa.Table) -> None:
    """Write a shard, metadata included, atomically."""
    with atomic_file(file) as part, pa.ipc.new_stream(str(part), table.schema) as writer:
        writer.write_table(table.combine_chunks())


def _write_shard(
    file: Path,
    utterances: Sequence[Utterance],
    codec: AudioTokenizer,
    encoding: Encoding,
    max_duration_s: float,
    batch_s: float,
) -> Iterator[int]:
    """Yields the size of each batch, of the last one when the shard is written."""
    rows: dict[int, dict[str, Any]] = {}  # by the utterance's place
    skipped: dict[int, dict[str, str]] = {}
    # before they are read: what is changed meanwhile is encoded again
    recordings = {"stamp": _stamp(utterances), "content": _content(utterances)}
    # processor time on a CPU, which does not depend on other programs; wall-clock time on a GPU
    clock = time.process_time if codec.device.type == "cpu" else time.perf_counter
    started = clock()
    batches = _batches(utterances, batch_s)
    loaded = load_each((utterances[i] for batch in batches for i in batch), codec.sample_rate, max_duration_s)
    for number, batch in enumerate(batches):
        if number:
            yield len(batches[number - 1])
        waveforms: dict[int, Tensor] = {}
        for place, (utterance, found) in zip(batch, loaded, strict=False):  # as many of them as the batch has
            if isinstance(found, AudioError):
                skipped[place] = skipped_row(utterance, found)
            else:
                waveforms[place] = found
        encoded = encoding.encode_batch(codec, [*waveforms.values()]) if waveforms else []
        for (place, waveform), speech in zip(waveforms.items(), encoded, strict=True):
            utterance = utterances[place]
            try:
                rows[place] = {
                    "id": utterance.id,
                    "split": utterance.split,
                    "speaker": utterance.speaker,
                    "text": utterance.text,
                    "duration_s": len(waveform) / codec.sample_rate,
                    SPEECH[encoding.kind].name: stored(speech),
                }
            except InputError as error:
                skipped[place] = skipped_row(utterance, AudioError(utterance.path, NO_FEATURES, str(error)))
    without = [row["detail"] for row in skipped.values() if row["reason"] == NO_FEATURES]
    # better said now than behind the last recording of a corpus; a last shard may hold few
    if without and not rows and len(utterances) == SHARD_SIZE:
        raise InputError(f"{without[0]}; so it is with all recordings of {file.name}: use another encoder")
    notes = {
        "skipped": json.dumps([row for _, row in sorted(skipped.items())]),
        "seconds": json.dumps(clock() - started),
        "recordings": json.dumps(recordings),
    }
    write_rows(file, [row for _, row in sorted(rows.items())], encoding, notes)
    yield len(batches[-1])


def _batches(utterances: Sequence[Utterance], batch_s: float) -> list[list[int]]:
    """Places of utterances to encode together, of at most `batch_s` seconds with their padding, but at least one.

    In the order of their stated durations; one that is 0, which is not known, makes a batch of its own.
    """
    stated_s = [utterance.duration_s or math.inf for utterance in utterances]
    batches: list[list[int]] = []
    for place in sorted(range(len(utterances)), key=stated_s.__getitem__):
        if batches and (len(batches[-1]) + 1) * stated_s[place] <= batch_s:
            batches[-1].append(place)
        else:
            batches.append([place])
    return batches


def _is_current(file: Path, utterances: Sequence[Utterance]) -> bool:
    """Whether a shard is there, whole, and of these recordings as they are now."""
    if not file.exists():
        return False
    try:
        noted = shard_notes(file).get(b"recordings")
    except DataError as error:
        logger.info("%s", error)
        return False
    if noted is None:  # written before recordings were noted
        return True
    held = json.loads(noted)
    # a copied corpus has other modification times and the same content
    current = held["stamp"] == _stamp(utterances) or held["content"] == _content(utterances)
    if not current:
        logger.info("%s: recordings have changed and are encoded again", file)
    return current


def _stamp(utterances: Sequence[Utterance]) -> str:
    """Fingerprint of the sizes and modification times of recordings that can be read, and of stated durations."""

    def stamp(path: str) -> tuple[int, int] | None:
        try:
            status = os.stat(path)
        except OSError:
            return None
        return (status.st_size, status.st_mtime_ns) if os.access(path, os.R_OK) else None

    return _fingerprint((stamp(one.path), one.duration_s) for one in utterances)


def _content(utterances: Sequence[Utterance]) -> str:
    """Fingerprint of the bytes of recordings, which may be missing, and of their stated durations."""

    def digest(path: str) -> str | None:
        try:
            return hash_recording(path)
        except AudioError:
            return None

    return _fingerprint((digest(one.path), one.duration_s) for one in utterances)


def _fingerprint(parts: Iterable[object]) -> str:
    return hashlib.sha256(json.dumps(list(parts)).encode()).hexdigest()[:16]


def stored(speech: Speech) -> str | np.ndarray:
    """One utterance's speech as it is stored in its column. Raises InputError for features that float16 cannot hold."""
    if isinstance(speech, str):
        return speech
    if not speech.is_floating_point():
        return speech.flatten().numpy().astype(np.uint16)
    values = speech.flatten().half()
    if not values.isfinite().all():
        raise InputError("features are NaN or beyond float16, in which they are stored")
    return values.numpy()


def skipped_of_shards(folder: str | Path) -> list[dict[str, str]]:
    """The recordings that could not be encoded, one `skipped_row` each."""
    notes = map(shard_notes, shard_files(folder))
    return [row for note in notes for row in json.loads(note[b"skipped"])]


def summarize_shards(folder: str | Path) -> dict[str, object]:
    """Totals over all shards of a folder: utterances, hours, skipped recordings by reason.

    normalizer: by which the texts were normalised when they were stored, as those of pieces are, or "none".

    real_time_factor: seconds of reading and encoding per second of speech, in processor time or in time of one GPU.
    """
    files = shard_files(folder)
    notes = [*map(shard_notes, files)]
    durations = [open_shard(file)["duration_s"].to_numpy() for file in files]
    speech_s = float(sum(part.sum() for part in durations))
    return {
        "utterances": int(sum(map(len, durations))),
        "hours": speech_s / 3600,
        "real_time_factor": sum(json.loads(note[b"seconds"]) for note in notes) / max(speech_s, 1e-9),
        "encoding": json.loads(notes[0][b"encoding"]),
        "skipped": dict(Counter(row["reason"] for row in skipped_of_shards(folder))),
        "normalizer": ", ".join(stored_normalizers(files)),
    }


def stored_normalizers(files: Sequence[Path]) -> list[str]:
    """The normalisers of the stored texts, sorted."""
    return sorted({shard_notes(file).get(b"normalizer", b"none").decode() for file in files})


def shard_files(folder: str | Path) -> list[Path]:
    """The shards of a folder. Raises DataError if there are none."""
    if files := sorted(Path(folder).glob("codes_*.arrow")):
        return files
    raise DataError(f"{folder} holds no encoded speech (codes_*.arrow): run recipes/encode_speech.py first")


def open_shard(file: Path) -> pa.Table:
    """A shard, mapped into memory: what is not looked at stays on disk. Raises DataError for one that is not whole."""
    try:
        return pa.ipc.open_stream(pa.memory_map(str(file))).read_all()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file} is no whole Arrow file ({error}): run encode_speech again to replace it") from error


def shard_notes(file: Path) -> dict[bytes, bytes]:
    """What a shard says of itself. Raises DataError for a file that is no whole shard."""
    notes = open_shard(file).schema.metadata or {}
    if b"encoding" not in notes:
        raise DataError(f"{file} is no shard of encode_speech, it does not say how it was encoded: take it away")
    return notes


def shard_encoding(file: Path) -> Encoding:
    """How a shard was encoded. Raises DataError for a file that is no whole shard."""
    with reading(file, "a shard of encoded speech", "encode the speech again", DataError):
        return Encoding(**json.loads(shard_notes(file)[b"encoding"]))


def identity(utterances: Sequence[Utterance]) -> str:
    """Short fingerprint of a list of utterances: their ids, splits, speakers and texts."""
    return _fingerprint([one.id, one.split, one.speaker, one.text] for one in utterances)
