"""What a compressor's letters tell about the speech that it reads: what each code stands for, and where words end."""

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
import torchaudio.functional as AF
from torch import Tensor

from speechllm.data.encoded import EncodedSpeech
from speechllm.data.shards import REQUEST, SHARD_SIZE, SPEECH, request_of, stored, write_rows
from speechllm.encoding import DataError, Encoding
from speechllm.extension import CodeLetters
from tokenizer.corpus import spread
from tokenizer.files import write_json
from tokenizer.schemes.compressor import BLANK, CtcCompressor

SAMPLE = 2000  # utterances that tell what codes stand for
SPACE = " "
NOT_ALIGNED = "other letters than those of the compressor, or more than there are frames"


@torch.no_grad()
def letters_of_codes(compressor: CtcCompressor | None, speech: EncodedSpeech) -> CodeLetters | None:
    """What each code of layer 0 stands for: the letters that a compressor finds where it occurs, but for the blank.

    The share of letter l in code c is the sum of p(l) over all frames with c, divided by that of all letters. Codes of
    other layers tell of the voice. None without a compressor. Raises DataError for speech that is no codes.
    """
    if compressor is None:
        return None
    if speech.encoding.kind != "codes":
        raise DataError(
            f"only codes have rows that can begin as letters, not {speech.encoding.kind}: leave letters out"
        )
    found = torch.zeros(speech.encoding.codebook_size, len(compressor.labels))
    for place in spread(range(len(speech)), SAMPLE):
        codes = cast(Tensor, speech.speech(place))
        _, scores = compressor.label_speech(codes)
        found.index_add_(0, codes[0], scores.exp().cpu())
    letters = found[:, BLANK + 1 :]
    total = letters.sum(1, keepdim=True)
    return CodeLetters(compressor.labels[BLANK + 1 :], torch.where(total > 1e-6, letters / total, 0.0))


def word_ends(scores: Tensor, text: str, labels: tuple[str, ...]) -> list[int] | None:
    """The frame at which each word of a transcript ends, the last one with the speech, by CTC forced alignment.

    scores: log probabilities float [T, V]; between two words the cut is half way. text: words with single spaces. None
    for one that has other letters than the labels, or more of them than there is speech.
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
    speech: EncodedSpeech, compressor: CtcCompressor, most_words: int, folder: Path, normalizer: str, seed: int = 0
) -> Iterator[int]:
    """Write speech into shards, in pieces of 1 to `most_words` words, drawn evenly; every frame is in one of them.

    normalizer: of the texts of `speech` (`transcribed`). Yields the number of utterances of each shard when it is done.
    Those that cannot be aligned are left out, and recorded in the shard with the reason.
    """
    draw, count = random.Random(seed), 0
    for shard, first in enumerate(range(0, len(speech), SHARD_SIZE)):
        part = speech[first : first + SHARD_SIZE]
        rows: list[dict[str, Any]] = []
        skipped: list[dict[str, str]] = []
        for place, row in enumerate(part.known.to_pylist()):
            whole, text = cast(Tensor, part.speech(place)), SPACE.join(row["text"].split())
            _, scores = compressor.label_speech(whole)
            if ends := word_ends(scores, text, compressor.labels):
                rows += word_pieces(row | {"text": text}, whole, speech.encoding, ends, most_words, draw)
            else:
                skipped.append({"id": row["id"], "reason": "not aligned", "detail": f"{row['id']}: {NOT_ALIGNED}"})
        notes = {"skipped": json.dumps(skipped), "seconds": "0", "normalizer": normalizer}
        write_rows(folder / f"codes_{shard:05d}.arrow", rows, speech.encoding, notes)
        count += len(rows) + len(skipped)
        yield len(part)
    write_json(folder / REQUEST, request_of(speech.encoding) | {"utterances": count})


def word_pieces(
    row: dict[str, Any], whole: Tensor, encoding: Encoding, ends: list[int], most_words: int, draw: random.Random
) -> Iterator[dict[str, Any]]:
    """The rows of one utterance's pieces, for `write_rows`. ends: of its words, in frames."""
    words, time = row["text"].split(SPACE), 1 if encoding.kind == "codes" else 0
    first = 0
    while first < len(words):
        last = min(len(words), first + draw.randint(1, most_words))
        start = ends[first - 1] if first else 0
        part = whole.narrow(time, start, ends[last - 1] - start)
        piece = {"id": f"{row['id']}/{first}", "text": SPACE.join(words[first:last])}
        piece |= {"duration_s": row["duration_s"] * part.shape[time] / ends[-1]}
        yield row | piece | {SPEECH[encoding.kind].name: stored(part)}
        first = last
