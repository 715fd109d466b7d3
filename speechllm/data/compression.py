"""Encoded speech, compressed: what a compressor makes of the frames or codes that are on disk already."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
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
    write_table,
)
from speechllm.encoding import DataError, Encoding
from tokenizer.files import read_json, write_json
from tokenizer.schemes.compressor import CtcCompressor


def compress_shards(
    source: str | Path, compressor: CtcCompressor, folder: str | Path, process: int = 0, processes: int = 1
) -> Iterator[int]:
    """Write the shards of `source`, encoded by the compressor's base, into `folder` as the compressor's vectors.

    They are what `encode_shards` makes of the same recordings with the compressor, but for the float16 of stored
    frames; no recording is read. Yields each shard's number of utterances. Each process writes every `processes`-th
    shard; whole ones by this compressor are kept.
    """
    folder, encoding = Path(folder), Encoding.of(compressor)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / REQUEST, read_json(Path(source) / REQUEST) | request_of(encoding))
    for file in shard_files(source)[process::processes]:
        if not _is_current(folder / file.name, encoding):
            vectors = _compressed(open_shard(file), shard_encoding(file), compressor, encoding)
            write_table(folder / file.name, vectors)
        yield len(open_shard(folder / file.name))


def _is_current(file: Path, encoding: Encoding) -> bool:
    """Whether a shard is there, whole, and encoded so, and not by what a training was before its last steps."""
    try:
        return file.exists() and shard_encoding(file) == encoding
    except DataError:
        return False


@torch.no_grad()
def _compressed(table: pa.Table, base: Encoding, compressor: CtcCompressor, encoding: Encoding) -> pa.Table:
    notes, column = table.schema.metadata, SPEECH["features"]

    def vectors(row: dict[str, Any]) -> np.ndarray:
        return compressor.compress_speech(cast(Tensor, speech_of(row, base))).flatten().numpy().astype(np.float16)

    stored = SPEECH[base.kind].name
    speech = pa.array([vectors({stored: one.values.to_numpy()}) for one in table[stored]], column.type)
    kept = table.select(SCHEMA.names).append_column(column, speech)
    return kept.replace_schema_metadata(notes | {b"encoding": json.dumps(asdict(encoding))})
