"""What a compressor's letters tell about the speech that it reads: what each code stands for, and where words end."""

import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import torch
import torchaudio.functional as AF
from torch import Tensor

from speechllm.data.encoded import EncodedSpeech
from speechllm.data.shards import REQUEST, SCHEMA, SHARD_SIZE, SPEECH, stored, write_table
from speechllm.encoding import DataError, Encoding
from speechllm.extension import Spelling
from tokenizer.corpus import spread
from tokenizer.files import write_json
from tokenizer.loading import load_tokenizer
from tokenizer.schemes.compressor import BLANK, CtcCompressor, base_frames

HEARD = 2000  # utterances that tell what codes stand for
SPACE = " "


def load_letters(name: str | Path, speech: EncodedSpeech) -> CtcCompressor:
    """The compressor of a folder. Raises DataError unless it reads speech that was encoded like this."""
    compressor = load_tokenizer(name)
    if not isinstance(compressor, CtcCompressor):
        raise DataError(f"{name} is no compressor: train one on this speech with recipes/train_compressor.py")
    speech.encoding.require(compressor.base.fingerprint, str(name))
    return compressor


@torch.no_grad()
def spelling_of(name: str | Path | None, speech: EncodedSpeech, layers: int = 1) -> Spelling | None:
    """What each code of the first `layers` codebooks stands for: the letters that a compressor finds where it occurs.

    name: of the compressor; None gives None. Raises what `load_letters` raises, and DataError for speech without codes.
    """
    if name is None:
        return None
    if speech.encoding.kind != "codes":
        raise DataError(f"letters={name}: only codes have rows that can begin as letters, not {speech.encoding.kind}")
    compressor = load_letters(name, speech)
    size, labels = speech.encoding.codebook_size, compressor.labels
    found = torch.zeros(layers * size, len(labels))
    for place in spread(range(len(speech)), HEARD):
        codes = cast(Tensor, speech.speech(place))
        _, scores = compressor.label(base_frames(compressor.base, codes))
        for layer, ids in enumerate(codes[:layers]):
            found.index_add_(0, ids + layer * size, scores.exp().cpu())
    letters = found[:, BLANK + 1 :]
    return Spelling(labels[BLANK + 1 :], letters / letters.sum(1, keepdim=True).clamp(min=1e-9))


def word_ends(scores: Tensor, text: str, labels: tuple[str, ...]) -> list[int] | None:
    """The frame at which each word of a transcript ends, the last one with the speech, by CTC forced alignment.

    scores: log probabilities float [T, V]; between two words the cut is half way. None for a text that has other
    letters than the labels, or more of them than there is speech.
    """
    numbers = {label: number for number, label in enumerate(labels)}
    targets = [numbers[letter] for letter in text if letter in numbers]
    repeats = sum(a == b for a, b in itertools.pairwise(targets))  # between which CTC has a blank
    if not targets or len(targets) < len(text) or len(targets) + repeats > len(scores):
        return None
    frames, found = AF.forced_align(scores[None].cpu(), torch.tensor([targets], dtype=torch.int32), blank=BLANK)
    spans = AF.merge_tokens(frames[0], found[0].exp(), blank=BLANK)
    spaces = [place for place, letter in enumerate(text) if letter == SPACE]
    return [(spans[place - 1].end + spans[place + 1].start) // 2 for place in spaces] + [len(scores)]


@torch.no_grad()
def cut_words(
    speech: EncodedSpeech, compressor: CtcCompressor, most: int, folder: Path, seed: int = 0
) -> tuple[int, list[str]]:
    """Write speech, in pieces of 1 to `most` words, drawn evenly, into a folder; every frame is in one of them.

    The texts of `speech` are words with single spaces (`transcribed`). Returns the number of pieces, and the ids of the
    utterances that could not be aligned, which are left out.
    """
    encoding, draw = speech.encoding, random.Random(seed)
    left_out: list[str] = []

    def rows() -> Iterator[dict[str, Any]]:
        for place, row in enumerate(speech.known.to_pylist()):
            whole = cast(Tensor, speech.speech(place))
            _, scores = compressor.label(base_frames(compressor.base, whole))
            if ends := word_ends(scores, row["text"], compressor.labels):
                yield from word_pieces(row, whole, encoding, ends, most, draw)
            else:
                left_out.append(row["id"])

    notes = {"encoding": json.dumps(asdict(encoding)), "skipped": "[]", "seconds": "0"}
    schema = SCHEMA.append(SPEECH[encoding.kind]).with_metadata(notes)
    pieces, count = rows(), 0
    while part := [*itertools.islice(pieces, SHARD_SIZE)]:
        write_table(folder / f"codes_{count // SHARD_SIZE:05d}.arrow", pa.Table.from_pylist(part, schema))
        count += len(part)
    write_json(folder / REQUEST, asdict(encoding) | {"utterances": count})
    return count, left_out


def word_pieces(
    row: dict[str, Any], whole: Tensor, encoding: Encoding, ends: list[int], most: int, draw: random.Random
) -> Iterator[dict[str, Any]]:
    """The rows of one utterance's pieces. ends: of its words, in frames."""
    words, time = row["text"].split(SPACE), 1 if encoding.kind == "codes" else 0
    first = 0
    while first < len(words):
        last = min(len(words), first + draw.randint(1, most))
        start = ends[first - 1] if first else 0
        part = whole.narrow(time, start, ends[last - 1] - start)
        piece = {"id": f"{row['id']}/{first}", "text": SPACE.join(words[first:last])}
        piece |= {"duration_s": row["duration_s"] * part.shape[time] / ends[-1]}
        yield row | piece | {SPEECH[encoding.kind].name: stored(part)}
        first = last
