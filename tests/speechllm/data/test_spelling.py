"""Letters in encoded speech: what codes stand for, where words end, and pieces that put together are the whole."""

import math
import random
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor, nn

from speechllm import DataError, Encoding, SpeechCodec, load_codes
from speechllm.data import spelling
from speechllm.data.encoded import EncodedSpeech, codes_of, transcribed
from speechllm.data.shards import SCHEMA, SPEECH, skipped_of_shards, summarize_shards
from speechllm.data.spelling import cut_words, letters_of_codes, word_ends
from speechllm.model import load_letters
from tokenizer.corpus import spread
from tokenizer.schemes.compressor import CtcCompressor

LABELS = ["", " ", "a", "b", "c"]
TEXTS = ["ab a b", "a", "b ba c", "bb", "d"]  # the last one has a letter that the compressor lacks


@pytest.fixture(scope="module")
def compressor(small_codec: SpeechCodec) -> CtcCompressor:
    torch.manual_seed(0)
    made = CtcCompressor(small_codec, LABELS, width=16, depth=1).eval()
    nn.init.normal_(made.network.output.weight, std=2.0)
    return made


@pytest.fixture(scope="module")
def letters(compressor: CtcCompressor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("letters")
    compressor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def speech(small_codec: SpeechCodec) -> EncodedSpeech:
    """Utterances of 20, 25, ... frames of two layers."""
    draw = np.random.default_rng(0)
    rows = []
    for place, text in enumerate(TEXTS):
        codes = draw.integers(16 - 1, size=(2, 20 + 5 * place), dtype=np.uint16)  # the last code is in none
        known = {"id": f"u{place}", "split": "train", "speaker": "s", "text": text, "duration_s": codes.shape[1] / 50}
        rows.append(known | {"codes": codes.flatten()})
    table = pa.Table.from_pylist(rows, SCHEMA.append(SPEECH["codes"]))
    encoding = Encoding.of(small_codec, 2)
    return EncodedSpeech(table.select(SCHEMA.names), table["codes"], np.arange(len(rows)), encoding)


# ---- what codes stand for


def test_a_code_stands_for_the_mean_of_the_letters_where_it_occurs(
    compressor: CtcCompressor, speech: EncodedSpeech
) -> None:
    """Codes of layer 0; the blank is no letter."""
    found = letters_of_codes(compressor, speech)
    assert found.labels == (" ", "a", "b", "c") and found.shares.shape == (16, 4)
    heard = defaultdict(list)
    for row in speech:
        codes = codes_of(row, speech.encoding)
        for code, score in zip(codes[0].tolist(), compressor.label_speech(codes)[1], strict=True):
            heard[code].append(score.exp()[1:])
    assert {*heard} == {*range(15)} and not found.shares[15].any()
    for code, scores in heard.items():
        sums = torch.stack(scores).sum(0)
        torch.testing.assert_close(found.shares[code], sums / sums.sum(), rtol=0, atol=1e-5)


def test_some_utterances_are_enough(
    compressor: CtcCompressor, speech: EncodedSpeech, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spelling, "SAMPLE", 2)
    few = letters_of_codes(compressor, speech)
    monkeypatch.setattr(spelling, "SAMPLE", 5)
    some = speech.select(spread(range(len(speech)), 2))
    torch.testing.assert_close(few.shares, letters_of_codes(compressor, some).shares)


def test_letters_of_other_codes_or_of_no_codes_are_refused(
    letters: Path, compressor: CtcCompressor, other_codec: SpeechCodec, speech: EncodedSpeech, tmp_path: Path
) -> None:
    assert letters_of_codes(None, speech) is None
    assert load_letters(letters, speech.encoding).fingerprint == compressor.fingerprint
    features = EncodedSpeech(speech.known, speech.stored, speech.places, Encoding.of(compressor))
    with pytest.raises(DataError, match="only codes have rows that can begin as letters, not features"):
        letters_of_codes(compressor, features)
    foreign = EncodedSpeech(speech.known, speech.stored, speech.places, Encoding.of(other_codec))
    with pytest.raises(DataError, match="encode the speech with the same codec"):
        load_letters(letters, foreign.encoding)
    other_codec.save_pretrained(tmp_path / "codec")
    with pytest.raises(DataError, match=r"codec is no compressor: train one .*train_compressor\.py"):
        load_letters(tmp_path / "codec", speech.encoding)


# ---- where words end


def peaks(labels: str) -> Tensor:
    """Log probabilities of frames in each of which one label is likely; "-" is the blank."""
    scores = torch.full((len(labels), len(LABELS)), 0.02)
    for frame, label in enumerate(labels):
        scores[frame, 0 if label == "-" else LABELS.index(label)] = 1 - 0.02 * 4
    return scores.log()


@pytest.mark.parametrize(
    "frames, text, ends",
    [
        ("-aab-- -a--", "ab a", [6, 11]),  # between b, which ends with frame 3, and a, which begins with frame 8
        ("a b", "a b", [1, 3]),
        ("--a--", "a", [5]),
        ("a--   b-c- a", "a bc a", [3, 10, 12]),
        ("bb-b", "bb", [4]),
    ],
)
def test_a_word_ends_half_way_to_the_next_one(frames: str, text: str, ends: list[int]) -> None:
    assert word_ends(peaks(frames), text, tuple(LABELS)) == ends


@pytest.mark.parametrize("frames, text", [("aab", "ad"), ("ab", "abc"), ("bb", "bb"), ("aa", "")])
def test_what_cannot_be_aligned_has_no_ends(frames: str, text: str) -> None:
    """Other letters, more letters than frames, also with the blank between two equal ones, and none."""
    assert word_ends(peaks(frames), text, tuple(LABELS)) is None


# ---- pieces


def cut(speech: EncodedSpeech, compressor: CtcCompressor, most: int, folder: Path, seed: int = 0) -> EncodedSpeech:
    folder.mkdir()
    assert sum(cut_words(speech, compressor, most, folder, "librispeech", seed)) == len(speech)
    return load_codes(folder, ["train"])[0]


@pytest.mark.parametrize("most", [1, 2, 9])
def test_pieces_put_together_are_the_whole(
    compressor: CtcCompressor, speech: EncodedSpeech, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr(spelling, "SHARD_SIZE", 2)
    pieces = cut(transcribed(speech), compressor, most, tmp_path / "cut")
    assert pieces.encoding == speech.encoding and len({*pieces["id"]}) == len(pieces)
    assert [row["id"] for row in skipped_of_shards(tmp_path / "cut")] == ["u4"]
    summary = summarize_shards(tmp_path / "cut")
    assert (summary["normalizer"], summary["skipped"]) == ("librispeech", {"not aligned": 1})
    assert {*pieces["speaker"]} == {"s"}
    words = [len(text.split()) for text in pieces["text"]]
    assert max(words) == min(most, 3) and (most > 1 or set(words) == {1})
    for place, row in enumerate(speech[:4]):
        own = [piece for piece in pieces if piece["id"].startswith(f"u{place}/")]
        codes = torch.cat([codes_of(piece, speech.encoding) for piece in own], 1)
        assert torch.equal(codes, codes_of(row, speech.encoding))
        assert " ".join(piece["text"] for piece in own) == row["text"]
        assert math.isclose(sum(piece["duration_s"] for piece in own), row["duration_s"], rel_tol=1e-5)
        assert all(math.isclose(one["duration_s"], len(one["codes"]) / 100, rel_tol=1e-5) for one in own)


@pytest.mark.parametrize("text", [" a", "a ", "a  b", " "])
def test_spaces_around_words_are_no_words(
    compressor: CtcCompressor, speech: EncodedSpeech, tmp_path: Path, text: str
) -> None:
    """As a normaliser that leaves texts as they are leaves them."""
    pieces = cut(speech.select([0, 1]).replaced(text=["a", text]), compressor, 1, tmp_path / "cut")
    assert pieces["text"] == ["a", *text.split()]


def test_pieces_follow_the_seed(compressor: CtcCompressor, speech: EncodedSpeech, tmp_path: Path) -> None:
    some = speech.select([0, 2] * 10)
    texts = [cut(some, compressor, 2, tmp_path / name, seed)["text"] for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    assert texts[0] == texts[1] != texts[2]


def test_frames_are_cut_as_codes_are(speech: EncodedSpeech) -> None:
    whole, encoding = torch.arange(12.0).view(6, 2), Encoding("f", 16_000, 50.0, 1, 1, "features", 2)
    row = {"id": "u", "text": "a b", "duration_s": 3.0}
    first, second = spelling.word_pieces(row, whole, encoding, [2, 6], 1, random.Random(0))
    assert (first["text"], first["features"].tolist(), first["duration_s"]) == ("a", [0, 1, 2, 3], 1.0)
    assert (second["text"], second["features"].tolist(), second["duration_s"]) == ("b", [*range(4, 12)], 2.0)
