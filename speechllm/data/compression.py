"""Encoded speech, compressed: what a compressor makes of the frames or codes that are on disk already."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import cast

import pyarrow as pa
import torch
from torch import Tensor

from speechllm.data.encoded import speech_of
from speechllm.data.shards import (
    REQUEST,
    SCHEMA,
    SPEECH,
    open_shard,
    request_of,
    shard_encoding,
    shard_files,
    stored,
    write_table,
)
from speechllm.encoding import DataError, Encoding
from tokenizer.errors import InputError
from tokenizer.files import read_json, write_json
from tokenizer.schemes.compressor import CtcCompressor


def compress_shards(
    source: str | Path, compressor: CtcCompressor, folder: str | Path, process: int = 0, processes: int = 1
) -> Iterator[int]:
    """Write the shards of `source`, encoded by the compressor's base, into `folder` as the compressor's vectors.

    They are what `encode_shards` makes of the same recordings with the compressor, but for the float16 of stored
    frames; no recording is read. Yields each shard's number of utterances. Each process writes every `processes`-th
    shard; whole ones by this compressor, of what the source holds now, are kept.
    """
    folder, encoding = Path(folder), Encoding.of(compressor)
    folder.mkdir(parents=True, exist_ok=True)
    if process == 0:
        write_json(folder / REQUEST, read_json(Path(source) / REQUEST) | request_of(encoding))
    for file in shard_files(source)[process::processes]:
        table, base = open_shard(file), shard_encoding(file)
        kept = table.select(SCHEMA.names)  # and what the shard says of itself, beside its encoding
        kept = kept.replace_schema_metadata(table.schema.metadata | {b"encoding": json.dumps(asdict(encoding))})
        if not _is_current(folder / file.name, kept):
            write_table(folder / file.name, kept.append_column(SPEECH["features"], _vectors(table, base, compressor)))
        yield len(table)


def _is_current(file: Path, kept: pa.Table) -> bool:
    """Whether a shard is there, whole, and what would be written now, but for its vectors."""
    try:
        return file.exists() and open_shard(file).select(SCHEMA.names).equals(kept, check_metadata=True)
    except DataError:
        return False


@torch.no_grad()
def _vectors(table: pa.Table, base: Encoding, compressor: CtcCompressor) -> pa.Array:
    column, vectors = SPEECH[base.kind].name, []
    for name, one in zip(table["id"], table[column], strict=True):
        speech = cast(Tensor, speech_of({column: one.values.to_numpy()}, base))
        try:
            vectors.append(stored(compressor.compress_speech(speech)))
        except InputError as error:
            raise InputError(f"utterance {name}, compressed: {error}") from error
    return pa.array(vectors, SPEECH["features"].type)
