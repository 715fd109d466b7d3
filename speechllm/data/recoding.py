"""Encoded speech, encoded again: what a tokenizer makes of the frames or codes that are on disk already."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

import pyarrow as pa
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
from tokenizer.files import atomic_folder, read_json, write_json
from tokenizer.progress import progress_bar
from tokenizer.schemes.recoder import Recoder
from tokenizer.utterances import corpus_folders, short_names

if TYPE_CHECKING:
    from accelerate import Accelerator

R = TypeVar("R", bound=Recoder)


def export_recoder(recoder: R, codes: str | Sequence[str], folder: Path, accelerator: "Accelerator") -> R:
    """Save a recoder in `folder`/model and the encoded speech, encoded by it, in `folder`/codes; the saved one.

    codes: a folder of shards, or several, for each of which there is one in `folder`/codes. The processes share the
    work, with one progress bar.
    """
    if accelerator.is_main_process:
        with atomic_folder(folder / "model") as model:
            recoder.save_pretrained(model)
    accelerator.wait_for_everyone()
    recoder = type(recoder).from_pretrained(folder / "model", recoder.base).to(accelerator.device)
    sources = corpus_folders(codes)
    names = short_names(sources) if len(sources) > 1 else [""]
    share = accelerator.process_index, accelerator.num_processes
    with progress_bar(None, "encode", unit="utt", disable=not accelerator.is_main_process) as bar:
        for source, name in zip(sources, names, strict=True):
            for count in recode_shards(source, recoder, folder / "codes" / name, *share):
                bar.update(count)
    accelerator.wait_for_everyone()
    return recoder


def recode_shards(
    source: str | Path, recoder: Recoder, folder: str | Path, process: int = 0, processes: int = 1
) -> Iterator[int]:
    """Write the shards of `source`, encoded by what the recoder reads, into `folder` as it encodes them.

    They are what `encode_shards` makes of the same recordings with it, but for the float16 of stored frames; no
    recording is read. Yields each shard's number of utterances. Each process writes every `processes`-th shard; whole
    ones by this recoder, of what the source holds now, are kept.
    """
    folder, encoding = Path(folder), Encoding.of(recoder)
    folder.mkdir(parents=True, exist_ok=True)
    if process == 0:
        write_json(folder / REQUEST, read_json(Path(source) / REQUEST) | request_of(encoding))
    for file in shard_files(source)[process::processes]:
        table, base = open_shard(file), shard_encoding(file)
        kept = table.select(SCHEMA.names)  # and what the shard says of itself, beside its encoding
        kept = kept.replace_schema_metadata(table.schema.metadata | {b"encoding": json.dumps(asdict(encoding))})
        if not _is_current(folder / file.name, kept):
            field = SPEECH[encoding.kind]
            write_table(folder / file.name, kept.append_column(field, _recoded(table, base, recoder, field)))
        yield len(table)


def _is_current(file: Path, kept: pa.Table) -> bool:
    """Whether a shard is there, whole, and what would be written now, but for its speech."""
    try:
        return file.exists() and open_shard(file).select(SCHEMA.names).equals(kept, check_metadata=True)
    except DataError:
        return False


def _recoded(table: pa.Table, base: Encoding, recoder: Recoder, field: pa.Field) -> pa.Array:
    column, found = SPEECH[base.kind].name, []
    for name, one in zip(table["id"], table[column], strict=True):
        speech = cast(Tensor, speech_of({column: one.values.to_numpy()}, base))
        try:
            found.append(stored(recoder.recode(speech)))
        except InputError as error:
            raise InputError(f"utterance {name}: {error}") from error
    return pa.array(found, field.type)
