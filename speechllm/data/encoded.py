"""Reading encoded speech: what is known of the utterances is in memory, their speech stays on disk."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from speechllm.data.shards import (
    REQUEST,
    SCHEMA,
    SPEECH,
    open_shard,
    shard_encoding,
    shard_files,
    skipped_of_shards,
    stored_normalizers,
)
from speechllm.encoding import DataError, Encoding, Speech
from speechllm.evaluation.normalizers import find_normalizer
from tokenizer.corpus import spread
from tokenizer.files import read_json
from tokenizer.utterances import Corpora, MissingSplitError, corpus_folders, tell_apart


class EncodedSpeech(Sequence[dict[str, Any]]):
    """Encoded utterances in an order: `speech[3]` is a row, `speech["text"]` a column.

    A row has the columns id, split, speaker, text, duration_s and that with the speech (`SPEECH`), which is read from
    the memory-mapped shards when it is asked for: about 300 bytes per utterance are in memory, however long it is.
    """

    def __init__(self, known: pa.Table, stored: pa.ChunkedArray, places: np.ndarray, encoding: Encoding):
        """known: the columns without the speech; places: of its rows in `stored`, the speech of whole shards."""
        self.known, self.stored, self.places, self.encoding = known.combine_chunks(), stored, places, encoding

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, key: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, key: str) -> list[Any]: ...
    @overload
    def __getitem__(self, key: slice) -> "EncodedSpeech": ...

    def __getitem__(self, key: int | str | slice) -> Any:
        if isinstance(key, slice):
            return self.select(range(len(self))[key])
        if isinstance(key, str):
            return self.known[key].to_pylist() if key in self.known.column_names else [row[key] for row in self]
        place = range(len(self))[key]
        row = {name: self.known[name][place].as_py() for name in self.known.column_names}
        return row | {SPEECH[self.encoding.kind].name: self._stored(place)}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[place] for place in range(len(self)))

    def speech(self, place: int) -> Speech:
        """The speech of one row, see `speech_of`."""
        return speech_of({SPEECH[self.encoding.kind].name: self._stored(place)}, self.encoding)

    @property
    def frames(self) -> np.ndarray:
        """Number of frames of every utterance, long [N], for which no speech is read; not of texts, which have none."""
        values = self.encoding.layers if self.encoding.kind == "codes" else self.encoding.width
        return pa.compute.list_value_length(self.stored).to_numpy()[self.places] // values

    def select(self, places: Sequence[int] | np.ndarray) -> "EncodedSpeech":
        """Some of the utterances, in the order given."""
        chosen = np.asarray(places, dtype=np.int64)
        return EncodedSpeech(self.known.take(pa.array(chosen)), self.stored, self.places[chosen], self.encoding)

    def replaced(self, **columns: Sequence[str | None]) -> "EncodedSpeech":
        """The same utterances with other texts, ids or speakers."""
        known = self.known
        for name, values in columns.items():
            known = known.set_column(SCHEMA.names.index(name), name, pa.array(values, pa.string()))
        return EncodedSpeech(known, self.stored, self.places, self.encoding)

    def _stored(self, place: int) -> np.ndarray | str:
        value = self.stored[int(self.places[place])]
        return value.as_py() if self.encoding.kind == "text" else value.values.to_numpy()


def load_codes(data: Corpora, splits: Sequence[str] | None = None) -> tuple[EncodedSpeech, Encoding]:
    """Encoded utterances of the named splits (all when None) and their encoding; the speech itself stays on disk.

    data: a folder of `encode_shards`, or several, all of one codec. Of several, splits of one name are joined, and ids
    and speakers that two of them share are called FOLDER/NAME, as `read_corpus` does.
    Raises DataError if shards are missing or come from several codecs, or if no folder has a named split.
    """
    folders = corpus_folders(data)
    parts = [_load_folder(folder) for folder in folders]
    speech = parts[0] if len(parts) == 1 else _joined(folders, parts)
    if splits is not None:
        found = speech.known["split"].unique().to_pylist()
        if absent := [split for split in splits if split not in found]:
            raise DataError(str(MissingSplitError(data, absent, found)))
        chosen = pa.compute.is_in(speech.known["split"], pa.array(splits))
        speech = speech.select(np.flatnonzero(chosen.to_numpy()))
    return speech, speech.encoding


def _load_folder(folder: Path) -> EncodedSpeech:
    """All that `encode_shards` wrote into a folder."""
    files = shard_files(folder)
    encodings = {shard_encoding(file) for file in files}
    encoding = encodings.pop()
    if encodings:
        raise DataError(f"{folder} mixes codes of {len(encodings) + 1} codecs: encode into an empty folder")
    for file in files:  # each mapping ends here, so that looking at all codes takes no memory
        _check_shard(file, open_shard(file), encoding)
    shards = [open_shard(file) for file in files]
    if asked := read_json(folder / REQUEST).get("utterances"):
        there = sum(map(len, shards)) + len(skipped_of_shards(folder))
        if there < asked:
            raise DataError(f"{folder} holds {there} of {asked} utterances: run encode_speech again to finish it")
        if there > asked:
            raise DataError(
                f"{folder} holds {there} utterances, of which {asked} were to be encoded: take away the "
                "codes_*.arrow that encode_speech did not write there"
            )
    table = pa.concat_tables(shard.replace_schema_metadata(None) for shard in shards)
    known = table.select(SCHEMA.names)
    return EncodedSpeech(known, table[SPEECH[encoding.kind].name], np.arange(len(known)), encoding)


def _joined(folders: Sequence[Path], parts: Sequence[EncodedSpeech]) -> EncodedSpeech:
    """The utterances of whole folders, one after the other, with ids and speakers that no other one has."""
    ids, speakers = tell_apart(
        folders, [part["id"] for part in parts], [part["speaker"] for part in parts], "a folder", DataError
    )
    for folder, part in zip(folders[1:], parts[1:], strict=True):
        if part.encoding != parts[0].encoding:
            raise DataError(
                f"{folders[0]} and {folder} were encoded by different codecs or with different settings: encode the "
                "speech of one again, as that of the other was"
            )
    known = pa.concat_tables(part.known for part in parts)
    stored = pa.chunked_array(itertools.chain(*(part.stored.chunks for part in parts)), parts[0].stored.type)
    both = EncodedSpeech(known, stored, np.arange(len(known)), parts[0].encoding)
    return both.replaced(id=[*itertools.chain(*ids)], speaker=[*itertools.chain(*speakers)])


def _check_shard(file: Path, table: pa.Table, encoding: Encoding) -> None:
    """Raise DataError for codes beyond the codebooks, utterances cut within a frame, and columns that are missing."""
    names = [*SCHEMA.names, (column := SPEECH[encoding.kind].name)]
    if absent := [name for name in names if name not in table.column_names]:
        raise DataError(f"{file} lacks the columns {', '.join(absent)}: encode the speech again")
    if encoding.kind == "text" or not len(table):
        return
    values, step = table[column], encoding.layers if encoding.kind == "codes" else encoding.width
    if absent := values.null_count + sum(part.flatten().null_count for part in values.chunks):
        raise DataError(f"{file}: {absent} utterances or frames have no {column}: encode the speech again")
    sizes = pa.compute.list_value_length(values).to_numpy()
    if (without := np.flatnonzero(sizes == 0)).size:
        raise DataError(f"{file}: utterance {table['id'][int(without[0])]} has no {column}: encode the speech again")
    if (cut := np.flatnonzero(sizes % step)).size:
        raise DataError(
            f"{file}: utterance {table['id'][int(cut[0])]} has {sizes[cut[0]]} {column}, which is no multiple of "
            f"{step}: encode the speech again"
        )
    if encoding.kind == "codes":
        highest = max(pa.compute.max(part.flatten()).as_py() or 0 for part in values.chunks)
        if highest >= encoding.codebook_size:
            raise DataError(
                f"{file} holds the code {highest}, the codec's codebooks end at {encoding.codebook_size - 1}: "
                "encode the speech again"
            )


def require_texts(data: Corpora, normalizer: str) -> None:
    """Raise DataError if a folder's texts were stored normalised by another normaliser, as pieces of speech are."""
    for folder in corpus_folders(data):
        if other := [name for name in stored_normalizers(shard_files(folder)) if name not in ("none", normalizer)]:
            raise DataError(
                f"{folder} holds texts that were normalised by {other[0]} when they were written, of which "
                f"{normalizer} cannot be made: choose normalizer={other[0]}, or write them again into another folder"
            )


def transcribed(speech: EncodedSpeech, limit: int | None = None, normalizer: str = "none") -> EncodedSpeech:
    """The utterances with words in their normalised text, at most `limit` of them, evenly chosen; all when None."""
    normalize = find_normalizer(normalizer)
    texts = [normalize(text or "") for text in speech["text"]]
    kept = [place for place, text in enumerate(texts) if text.strip()]
    return speech.replaced(text=texts).select(spread(kept, limit))


def codes_of(row: dict[str, Any], encoding: Encoding) -> Tensor:
    """The codes of one row, long [layers, frames]. Raises DataError for speech that was not encoded as codes."""
    if encoding.kind != "codes":
        raise DataError(
            f"expected codes, but this speech was encoded as {encoding.kind}: use an audio tokenizer with codebooks"
        )
    return torch.from_numpy(np.array(row["codes"], dtype=np.int64)).view(encoding.layers, -1)


def speech_of(row: dict[str, Any], encoding: Encoding) -> Speech:
    """The speech of one row: codes long [layers, frames], features float16 [frames, width] as stored, or a text."""
    match encoding.kind:
        case "codes":
            return codes_of(row, encoding)
        case "features":
            return torch.from_numpy(np.array(row["features"], dtype=np.float16)).view(-1, encoding.width)
        case "text":
            return row["recognized"]
