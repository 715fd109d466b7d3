"""Encoded speech on disk: resumable, shared between processes, tied to one codec; and batches of similar lengths."""

import functools
import hashlib
import itertools
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import soundfile
import torch
from torch import Tensor

from speechllm import (
    AudioTokenizer,
    DataError,
    Encoding,
    SpeechCodec,
    Utterance,
    encode_shards,
    load_audio,
    load_codes,
    speech_of,
)
from speechllm.data.batches import grouped_batches, token_batches
from speechllm.data.encoded import require_texts, transcribed
from speechllm.data.shards import open_shard, skipped_of_shards, stored, summarize_shards, write_table
from tokenizer.errors import InputError
from tokenizer.files import read_jsonl
from tokenizer.interface import Codes
from tokenizer.schemes.features import FeatureEncoder
from tokenizer.schemes.units import UnitTokenizer
from tokenizer.training.small_teachers import small_hubert
from tokenizer.training.teachers import SemanticTeacher

RATE = 16_000
SHARDS = [f"codes_{shard:05d}.arrow" for shard in range(4)]


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("speechllm.data.shards.SHARD_SIZE", 3)


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory, noise: Callable[..., Tensor]) -> list[Utterance]:
    """Ten recordings, 0.1 to 0.25 s: four shards, the last one with a single utterance."""
    folder = tmp_path_factory.mktemp("speech")
    utterances = []
    for i in range(10):
        size = 1_600 + 267 * i
        soundfile.write(folder / f"{i}.flac", noise(size, seed=i)[0].numpy(), RATE)
        text = None if i == 4 else f"WORD {i} é"
        split = "test" if i >= 7 else "train"
        utterances.append(Utterance(f"u{i}", str(folder / f"{i}.flac"), size / RATE, split, text, f"s{i % 2}"))
    return utterances


def encode(speech: list[Utterance], codec: SpeechCodec, folder: Path, *arguments: object, **more: object) -> list[int]:
    return list(encode_shards(speech, codec, folder, *arguments, **more))


def content(folder: Path) -> dict[str, tuple[list[dict], dict]]:
    """Rows and metadata of every shard, but for the time it took."""
    tables = {file.name: open_shard(file) for file in folder.glob("*.arrow")}
    metadata = {name: {**table.schema.metadata, b"seconds": b""} for name, table in tables.items()}
    return {name: (table.to_pylist(), metadata[name]) for name, table in tables.items()}


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    return {file.name: (file.stat().st_mtime_ns, file.stat().st_ino) for file in folder.glob("*.arrow")}


# ---- encoding


def test_codes_are_those_of_the_codec_with_everything_known_about_the_utterance(
    tmp_path: Path, speech: list[Utterance], small_codec: SpeechCodec
) -> None:
    assert encode(speech, small_codec, tmp_path) == [1] * 10
    rows, encoding = load_codes(tmp_path)
    assert encoding == Encoding(small_codec.fingerprint, RATE, 50.0, 2, 16) == Encoding.of(small_codec)
    assert rows[0]["codes"].dtype == "uint16"
    assert len(rows) == 10
    for row, utterance in zip(rows, speech, strict=True):
        waveform = load_audio(utterance.path)
        expected = small_codec.encode(waveform[None]).ids[0]
        assert torch.equal(speech_of(row, encoding), expected) and expected.shape == (2, -(-len(waveform) // 320))
        known = {name: row[name] for name in ("id", "split", "speaker", "text")}
        assert known == {name: getattr(utterance, name) for name in known}
        assert row["duration_s"] == pytest.approx(len(waveform) / RATE)


def test_only_the_requested_layers_are_stored(
    tmp_path: Path, speech: list[Utterance], small_codec: SpeechCodec
) -> None:
    for layers in (1, 2):
        encode(speech, small_codec, tmp_path / str(layers), layers)
    one, encoding = load_codes(tmp_path / "1")
    two, both = load_codes(tmp_path / "2")
    assert (encoding.layers, both.layers) == (1, 2)
    for short, long in zip(one, two, strict=True):
        assert torch.equal(speech_of(short, encoding), speech_of(long, both)[:1])


def test_encoding_again_changes_nothing(tmp_path: Path, speech: list[Utterance], small_codec: SpeechCodec) -> None:
    encode(speech, small_codec, tmp_path)
    before = stamps(tmp_path)
    assert encode(speech, small_codec, tmp_path) == [3, 3, 3, 1]
    assert stamps(tmp_path) == before and sorted(before) == SHARDS
    assert {path.name for path in tmp_path.iterdir()} == {
        *SHARDS,
        "request.json",
        "claim.json",
        ".lock",
    }  # nothing half written


def test_a_missing_shard_is_made_again_and_the_others_are_kept(
    tmp_path: Path, speech: list[Utterance], small_codec: SpeechCodec
) -> None:
    encode(speech, small_codec, tmp_path)
    whole, before = content(tmp_path), stamps(tmp_path)
    (tmp_path / SHARDS[1]).unlink()
    (tmp_path / f".{SHARDS[1]}.{2**22 + 1}.part").write_bytes(b"PAR1")  # what a kill leaves: no process has this number
    encode(speech, small_codec, tmp_path)
    after = stamps(tmp_path)
    assert content(tmp_path) == whole
    assert {name for name in before if before[name] == after[name]} == set(SHARDS) - {SHARDS[1]}
    assert not list(tmp_path.rglob("*.part"))


@pytest.fixture
def own_speech(tmp_path: Path, speech: list[Utterance]) -> list[Utterance]:
    """The recordings in a folder that a test may change."""
    shutil.copytree(Path(speech[0].path).parent, tmp_path / "speech")
    return [replace(one, path=str(tmp_path / "speech" / Path(one.path).name)) for one in speech]


def test_only_the_shards_of_changed_recordings_are_made_again(
    tmp_path: Path, own_speech: list[Utterance], small_codec: SpeechCodec
) -> None:
    gone, cut, kept = (Path(own_speech[i].path) for i in (1, 4, 7))
    whole = gone.read_bytes()
    gone.unlink()
    folder = tmp_path / "codes"
    encode(own_speech, small_codec, folder)
    before = stamps(folder)
    gone.write_bytes(whole)  # repaired
    cut.write_bytes(kept.read_bytes())  # replaced
    replaced = [
        replace(one, duration_s=own_speech[7].duration_s) if i == 4 else one for i, one in enumerate(own_speech)
    ]
    os.utime(kept, ns=(1, 1))  # the same content
    encode(replaced, small_codec, folder)
    after = stamps(folder)
    assert [before[name] == after[name] for name in SHARDS] == [False, False, True, True]
    encode(replaced, small_codec, tmp_path / "anew")
    assert [rows for rows, _ in content(folder).values()] == [rows for rows, _ in content(tmp_path / "anew").values()]
    assert not skipped_of_shards(folder)


def test_a_recording_that_is_replaced_while_its_shard_is_encoded_is_encoded_again(
    tmp_path: Path, own_speech: list[Utterance], small_codec: SpeechCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, encode_waveform = Path(own_speech[0].path), small_codec.encode

    def replaced(*arguments: Any, **more: Any) -> Codes:
        first.write_bytes(Path(own_speech[7].path).read_bytes())  # it has been read by now
        return encode_waveform(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(small_codec, "encode", replaced)
        encode(own_speech, small_codec, tmp_path / "codes")
    before = stamps(tmp_path / "codes")
    encode(own_speech, small_codec, tmp_path / "codes")
    after = stamps(tmp_path / "codes")
    assert [before[name] == after[name] for name in SHARDS] == [False, True, True, True]
    row, other = (load_codes(tmp_path / "codes")[0][i] for i in (0, 7))
    assert row["codes"].tolist() == other["codes"].tolist()


def test_a_recording_that_has_become_readable_is_encoded(
    tmp_path: Path, speech: list[Utterance], small_codec: SpeechCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        closed, access, open_file = speech[4].path, os.access, os.open
        patch.setattr(os, "access", lambda path, mode: path != closed and access(path, mode))

        def opened(path: object, *arguments: int, **more: object) -> int:
            if path == closed:
                raise PermissionError(13, "Permission denied", path)
            return open_file(path, *arguments, **more)

        patch.setattr(os, "open", opened)
        for _ in range(2):  # the second time nothing is encoded
            encode(speech, small_codec, tmp_path)
        assert [row["reason"] for row in skipped_of_shards(tmp_path)] == ["unreadable"]
        before = stamps(tmp_path)
    encode(speech, small_codec, tmp_path)
    after = stamps(tmp_path)
    assert [before[name] == after[name] for name in SHARDS] == [True, False, True, True]
    assert not skipped_of_shards(tmp_path) and len(load_codes(tmp_path)[0]) == 10


def test_the_stamp_of_readable_recordings_is_that_of_earlier_versions(
    tmp_path: Path, speech: list[Utterance], small_codec: SpeechCodec
) -> None:
    encode(speech, small_codec, tmp_path)
    held = json.loads(open_shard(tmp_path / SHARDS[0]).schema.metadata[b"recordings"])
    status = [(os.stat(one.path), one.duration_s) for one in speech[:3]]
    facts = json.dumps([[[file.st_size, file.st_mtime_ns], duration_s] for file, duration_s in status])
    assert held["stamp"] == hashlib.sha256(facts.encode()).hexdigest()[:16]


def test_a_disk_that_fails_ends_the_encoding_which_goes_on(
    tmp_path: Path, speech: list[Utterance], small_codec: SpeechCodec, failing_disk: Callable
) -> None:
    with failing_disk(speech[4].path), pytest.raises(OSError, match=r"Input/output error: '.*4\.flac'"):
        encode(speech, small_codec, tmp_path)
    assert [*stamps(tmp_path)] == SHARDS[:1]
    encode(speech, small_codec, tmp_path)
    assert not skipped_of_shards(tmp_path) and len(load_codes(tmp_path)[0]) == 10


@pytest.mark.parametrize("content", [b"", b"ARROW1", b"no shard at all"])
def test_a_damaged_shard_is_named_and_made_again(
    tmp_path: Path, speech: list[Utterance], small_codec: SpeechCodec, content: bytes
) -> None:
    encode(speech, small_codec, tmp_path)
    (tmp_path / SHARDS[2]).write_bytes(content)
    for read in (load_codes, summarize_shards, skipped_of_shards):
        with pytest.raises(DataError, match=rf"{SHARDS[2]} is no whole Arrow file .*: run encode_speech again"):
            read(tmp_path)
    encode(speech, small_codec, tmp_path)
    assert len(load_codes(tmp_path)[0]) == 10


def test_a_foreign_file_is_named(tmp_path: Path, speech: list[Utterance], small_codec: SpeechCodec) -> None:
    encode(speech, small_codec, tmp_path)
    write_table(tmp_path / "codes_00009.arrow", pa.table({"text": ["a"]}))
    for read in (load_codes, summarize_shards, lambda folder: require_texts(folder, "none")):
        with pytest.raises(DataError, match=r"codes_00009\.arrow is no shard of encode_speech"):
            read(tmp_path)
    (tmp_path / "new").mkdir()
    write_table(tmp_path / "new" / "codes_00000.arrow", pa.table({"text": ["a"]}))
    with pytest.raises(InputError, match="holds what encode_speech did not write"):
        encode(speech, small_codec, tmp_path / "new")
    assert not (tmp_path / "new" / "claim.json").exists()


def test_a_shard_more_than_was_encoded_is_refused(
    tmp_path: Path, speech: list[Utterance], small_codec: SpeechCodec
) -> None:
    encode(speech, small_codec, tmp_path)
    shutil.copy(tmp_path / SHARDS[0], tmp_path / "codes_00009.arrow")
    with pytest.raises(DataError, match="utterances, of which 10 were to be encoded: take away the codes"):
        load_codes(tmp_path)


def test_a_pipe_among_the_recordings_is_skipped(tmp_path: Path, small_codec: SpeechCodec) -> None:
    os.mkfifo(tmp_path / "u.wav")
    encode([Utterance("u", str(tmp_path / "u.wav"), 1.0, "train", "A")], small_codec, tmp_path / "codes")
    assert [row["reason"] for row in skipped_of_shards(tmp_path / "codes")] == ["missing"]


def test_a_run_stopped_after_one_shard_continues_with_the_next(
    tmp_path: Path, speech: list[Utterance], small_codec: SpeechCodec
) -> None:
    encode(speech, small_codec, tmp_path / "whole")
    list(itertools.islice(encode_shards(speech, small_codec, tmp_path / "stopped"), 5))  # in the second shard
    first = stamps(tmp_path / "stopped")
    assert list(first) == SHARDS[:1]
    with pytest.raises(DataError, match="stopped holds 3 of 10 utterances: run encode_speech again"):
        load_codes(tmp_path / "stopped")
    encode(speech, small_codec, tmp_path / "stopped")
    assert stamps(tmp_path / "stopped").items() >= first.items()
    assert content(tmp_path / "stopped") == content(tmp_path / "whole")


def test_shards_of_a_version_that_said_less_of_a_codec_belong_to_the_same_codes(
    tmp_path: Path, speech: list[Utterance], small_codec: SpeechCodec
) -> None:
    encode(speech, small_codec, tmp_path)
    table = open_shard(tmp_path / SHARDS[0])
    encoding = json.loads(table.schema.metadata[b"encoding"])
    assert encoding.pop("labels") == []
    notes = {**table.schema.metadata, "encoding": json.dumps(encoding)}
    write_table(tmp_path / SHARDS[0], table.replace_schema_metadata(notes))
    rows, found = load_codes(tmp_path)
    assert len(rows) == 10 and found == Encoding.of(small_codec)


def test_several_folders_are_read_as_one(tmp_path: Path, speech: list[Utterance], small_codec: SpeechCodec) -> None:
    more = [replace(one, id=f"v{one.id}", speaker="t", split="dev") for one in speech[:4]]
    encode(speech, small_codec, tmp_path / "a")
    encode([*more, speech[0]], small_codec, tmp_path / "b")
    folders = [tmp_path / "a", tmp_path / "b"]
    (a, _), (b, _), (both, encoding) = map(load_codes, (*folders, folders))
    assert encoding == Encoding.of(small_codec)
    assert both["id"] == ["a/u0", *a["id"][1:], *b["id"][:4], "b/u0"]  # the ids and speakers that both have
    assert both["speaker"] == ["a/s0", "s1"] + ["a/s0", "s1"] * 4 + ["t"] * 4 + ["b/s0"]
    for row, part in zip(both, [*a, *b], strict=True):
        assert torch.equal(speech_of(row, encoding), speech_of(part, encoding)) and row["text"] == part["text"]
    assert list(both.frames) == [*a.frames, *b.frames]
    train, _ = load_codes(folders, ["train", "dev"])
    assert train["id"] == [id for id, split in zip(both["id"], both["split"], strict=True) if split != "test"]
    assert torch.equal(train.speech(7), both.speech(10))
    require_texts(folders, "none")

    with pytest.raises(DataError, match="a, .*b have no split eval; they have train, test, dev"):
        load_codes(folders, ["eval"])
    with pytest.raises(DataError, match="a folder is given twice"):
        load_codes([tmp_path / "a", f"{tmp_path}/b/../a"])
    encode([replace(speech[0], id="a/u0"), speech[0]], small_codec, tmp_path / "d")
    with pytest.raises(DataError, match="two utterances would be called a/u0: rename a folder"):
        load_codes([tmp_path / "a", tmp_path / "d"])
    encode(speech, small_codec, tmp_path / "c", 1)
    with pytest.raises(DataError, match="a and .*c were encoded by different codecs or with different settings"):
        load_codes([*folders, tmp_path / "c"])


@pytest.mark.parametrize("processes", [2, 3, 5])
def test_the_shards_of_several_processes_are_those_of_one(
    tmp_path: Path, speech: list[Utterance], small_codec: SpeechCodec, processes: int
) -> None:
    encode(speech, small_codec, tmp_path / "one")
    shares = [
        encode(speech, small_codec, tmp_path / "more", process=process, processes=processes)
        for process in range(processes)
    ]
    assert sum(map(sum, shares)) == 10
    assert content(tmp_path / "more") == content(tmp_path / "one")


@pytest.mark.parametrize("value", [1e5, float("nan"), -float("inf")])
def test_features_that_float16_cannot_hold_are_refused(value: float) -> None:
    assert stored(torch.tensor([[1.0, 65504.0]])).tolist() == [1.0, 65504.0]
    with pytest.raises(InputError, match="NaN or beyond float16"):
        stored(torch.tensor([[1.0, value]]))


def test_any_process_may_be_the_first_to_write(
    tmp_path: Path, speech: list[Utterance], small_codec: SpeechCodec
) -> None:
    encode(speech, small_codec, tmp_path / "codes", process=1, processes=2)
    encode(speech, small_codec, tmp_path / "codes", process=0, processes=2)
    assert len(load_codes(tmp_path / "codes")[0]) == 10


def test_texts_are_stored_as_they_are_and_normalised_when_they_are_used(
    tmp_path: Path, speech: list[Utterance], small_codec: SpeechCodec
) -> None:
    texts = [utterance.text and f"{utterance.text}, “Don’t!” 3.5 %" for utterance in speech]
    texts[5] = "…"
    encode([replace(one, text=text) for one, text in zip(speech, texts, strict=True)], small_codec, tmp_path)
    rows, _ = load_codes(tmp_path)
    assert rows["text"] == texts and "normalizer" not in json.loads((tmp_path / "request.json").read_text())
    assert transcribed(rows)["text"] == [text for text in texts if text]
    normal = transcribed(rows, normalizer="librispeech")
    assert normal["text"] == [f"word {i} é don't 3 5" for i in range(10) if i not in (4, 5)]  # without words: left out
    assert normal["id"] == [f"u{i}" for i in range(10) if i not in (4, 5)]
    assert transcribed(rows, 4, "librispeech")["id"] == normal["id"][::2]
    with pytest.raises(ValueError, match="unknown normalizer 'loud': choose one of librispeech, "):
        transcribed(rows, normalizer="loud")
    for name in ("none", "librispeech", "whisper_english"):
        require_texts(tmp_path, name)


def test_texts_that_were_stored_normalised_are_read_with_their_own_normalizer_only(
    tmp_path: Path, speech: list[Utterance], small_codec: SpeechCodec
) -> None:
    encode(speech, small_codec, tmp_path)
    for file in tmp_path.glob("*.arrow"):  # as cut_speech writes pieces
        table = open_shard(file)
        write_table(file, table.replace_schema_metadata({**table.schema.metadata, "normalizer": "librispeech"}))
    assert len(load_codes(tmp_path)[0]) == 10 and summarize_shards(tmp_path)["normalizer"] == "librispeech"
    require_texts(tmp_path, "librispeech")
    for other in ("none", "whisper_english"):
        with pytest.raises(
            DataError, match=f"by librispeech .*, of which {other} cannot be made: choose normalizer=libri"
        ):
            require_texts(tmp_path, other)


# ---- several at a time


@pytest.fixture(scope="module")
def features() -> FeatureEncoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return FeatureEncoder(SemanticTeacher(small_hubert(hidden_size=16, layers=1)))


def batches(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The numbers of samples of every batch that is encoded from now on."""
    found, encode_batch = [], Encoding.encode_batch

    def spy(self: Encoding, codec: AudioTokenizer, waveforms: list[Tensor]) -> list:
        found.append([len(waveform) for waveform in waveforms])
        return encode_batch(self, codec, waveforms)

    monkeypatch.setattr(Encoding, "encode_batch", spy)
    return found


def test_shards_do_not_depend_on_how_many_utterances_are_encoded_at_a_time(
    tmp_path: Path, speech: list[Utterance], bad_speech: list[Utterance], features: FeatureEncoder
) -> None:
    mixed = [*bad_speech[1:4], *speech[::-1], *bad_speech[4:-1]]
    for batch_s in (0.0, 0.5):
        encode(mixed, features, tmp_path / str(batch_s), batch_s=batch_s)
    single, together = (content(tmp_path / str(batch_s)) for batch_s in (0.0, 0.5))
    assert single.keys() == together.keys()
    for shard, (rows, metadata) in single.items():
        others, same = together[shard]
        assert same == metadata and len(rows) == len(others)
        for row, other in zip(rows, others, strict=True):
            expected, found = (torch.tensor(one.pop("features"), dtype=torch.float32) for one in (row, other))
            assert row == other
            torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)  # roundings of float16


def test_a_stopped_run_goes_on_with_the_batches_of_one_that_was_not(
    tmp_path: Path, speech: list[Utterance], features: FeatureEncoder
) -> None:
    encode(speech, features, tmp_path / "whole", batch_s=0.5)
    list(itertools.islice(encode_shards(speech, features, tmp_path / "stopped", batch_s=0.5), 3))
    encode(speech, features, tmp_path / "stopped", batch_s=0.5)
    assert content(tmp_path / "stopped") == content(tmp_path / "whole")


def test_a_batch_holds_similar_lengths_and_no_more_seconds_than_asked_for(
    tmp_path: Path, speech: list[Utterance], features: FeatureEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("speechllm.data.shards.SHARD_SIZE", 10)
    found = batches(monkeypatch)
    unknown = replace(speech[9], id="unknown", duration_s=0.0)
    encode([unknown, *speech[8::-1]], features, tmp_path, batch_s=0.5)
    sizes = [round(utterance.duration_s * RATE) for utterance in speech[:9]]
    assert found == [sizes[:3], sizes[3:5], sizes[5:7], sizes[7:], [len(load_audio(unknown.path))]]
    assert all(len(batch) * max(batch) <= 0.5 * RATE for batch in found)


def test_a_recording_whose_features_float16_cannot_hold_is_skipped(
    tmp_path: Path, speech: list[Utterance], features: FeatureEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    size, encode_batch = len(load_audio(speech[1].path)), Encoding.encode_batch

    def overflowing(self: Encoding, codec: AudioTokenizer, waveforms: list[Tensor]) -> list:
        found = encode_batch(self, codec, waveforms)
        return [1e9 * x if len(waveform) == size else x for x, waveform in zip(found, waveforms, strict=True)]

    monkeypatch.setattr(Encoding, "encode_batch", overflowing)
    assert sum(encode(speech[:3], features, tmp_path, batch_s=0.5)) == 3
    assert load_codes(tmp_path)[0]["id"] == [speech[0].id, speech[2].id]
    (row,) = skipped_of_shards(tmp_path)
    assert (row["id"], row["reason"]) == (speech[1].id, "no features") and "beyond float16" in row["detail"]
    encode([speech[0], speech[2], speech[3], speech[1]], features, tmp_path / "last")  # alone in its shard of three
    assert load_codes(tmp_path / "last")[0]["id"] == [speech[0].id, speech[2].id, speech[3].id]
    monkeypatch.setattr("speechllm.data.shards.SHARD_SIZE", 1)
    with pytest.raises(InputError, match=r"beyond float16.*; so it is with all recordings of codes_00000\.arrow"):
        encode([speech[1], speech[0]], features, tmp_path / "never")


def test_a_tokenizer_that_does_not_say_it_can_is_given_one_utterance_at_a_time(
    tmp_path: Path, speech: list[Utterance], small_codec: SpeechCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode(speech, small_codec, tmp_path / "single")
    monkeypatch.setattr(SpeechCodec, "batched", False)
    encode(speech, small_codec, tmp_path / "asked", batch_s=60.0)
    assert content(tmp_path / "asked") == content(tmp_path / "single")


# ---- recordings that cannot be used


@pytest.fixture(scope="module")
def bad_speech(tmp_path_factory: pytest.TempPathFactory, speech: list[Utterance]) -> list[Utterance]:
    """Good, corrupt, silent, missing, empty, NaN, too long, corrupt once more, good."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "corrupt.flac").write_bytes(b"fLaC" + bytes(range(256)))
    (folder / "text.flac").write_text("no audio")
    soundfile.write(folder / "silent.flac", np.zeros(3_200), RATE)
    soundfile.write(folder / "empty.wav", np.zeros(0), RATE)
    soundfile.write(folder / "nan.wav", np.full(3_200, np.nan, dtype="float32"), RATE, subtype="FLOAT")
    soundfile.write(folder / "long.flac", np.random.default_rng(0).uniform(-0.1, 0.1, 8_000), RATE)
    names = ["corrupt.flac", "silent.flac", "missing.flac", "empty.wav", "nan.wav", "long.flac", "text.flac"]
    bad = [Utterance(name, str(folder / name), 0.2, "train", "TEXT", "s") for name in names]
    return [speech[0], *bad, speech[1]]


REASONS = {"unreadable": 2, "silent": 1, "missing": 1, "empty": 1, "non-finite": 1, "too long": 1}


def test_unusable_recordings_are_skipped_and_counted_by_reason(
    tmp_path: Path, bad_speech: list[Utterance], small_codec: SpeechCodec
) -> None:
    assert sum(encode(bad_speech, small_codec, tmp_path, max_duration_s=0.4)) == 9
    rows, _ = load_codes(tmp_path)
    assert rows["id"] == ["u0", "u1"]
    summary = summarize_shards(tmp_path)
    assert summary["skipped"] == REASONS
    assert summary["utterances"] == 2
    assert summary["hours"] == pytest.approx((1_600 + 1_867) / RATE / 3600)
    for utterance, row in zip(bad_speech[1:-1], skipped_of_shards(tmp_path), strict=True):
        assert (row["id"], row["path"]) == (utterance.id, utterance.path) and row["detail"].startswith(utterance.path)


def test_the_recipe_lists_all_recordings_it_skipped_and_prints_the_first(
    tmp_path: Path,
    bad_speech: list[Utterance],
    codec_folder: Path,
    recipe: Callable,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [{"id": u.id, "path": u.path, "duration_s": u.duration_s} for u in bad_speech]
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    module, output = recipe("encode_speech.py"), tmp_path / "codes"
    with pytest.raises(InputError, match="3 of 9 recordings are missing or unreadable"):
        module.main(module.EncodeConfig(str(codec_folder), str(tmp_path), str(output), max_duration_s=0.4))
    listed = read_jsonl(output / "skipped.jsonl")
    assert [(row["id"], row["path"]) for row in listed] == [(u.id, u.path) for u in bad_speech[1:-1]]
    assert Counter(row["reason"] for row in listed) == REASONS
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("skipped: ")]
    assert printed == [
        *(f"skipped: {row['detail']}" for row in listed[:5]),
        f"skipped: 2 more, see {output}/skipped.jsonl",
    ]


def test_the_recipe_is_not_done_while_many_recordings_are_missing_or_unreadable(
    tmp_path: Path, codec_folder: Path, speech: list[Utterance], recipe: Callable
) -> None:
    rows = [{"id": u.id, "path": f"{u.id}.flac", "duration_s": u.duration_s} for u in speech]
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for row, one in zip(rows, speech, strict=True):
        shutil.copy(one.path, tmp_path / row["path"])
    whole = {place: (tmp_path / rows[place]["path"]).read_bytes() for place in (2, 5)}
    for place in whole:
        (tmp_path / rows[place]["path"]).write_bytes(b"no sound")
    module, output = recipe("encode_speech.py"), tmp_path / "codes"
    run = functools.partial(module.main, module.EncodeConfig(str(codec_folder), str(tmp_path), str(output)))
    with pytest.raises(InputError, match=r"2 of 10 recordings are missing or unreadable, the first is .*u2\.flac, "):
        run()
    assert len(load_codes(output)[0]) == 8 and not (output / "done.json").exists()
    (tmp_path / rows[2]["path"]).write_bytes(whole[2])  # one may always be missing
    run()
    assert json.loads((output / "done.json").read_text())["skipped"] == {"unreadable": 1}


def test_the_recipe_ends_with_an_error_if_nothing_can_be_used(
    tmp_path: Path, codec_folder: Path, recipe: Callable
) -> None:
    (tmp_path / "a.wav").write_bytes(b"no sound")
    (tmp_path / "manifest.jsonl").write_text('{"path": "a.wav", "duration_s": 1}\n', encoding="utf-8")
    module = recipe("encode_speech.py")
    with pytest.raises(DataError, match=r"no recording can be used, all are skipped \({'unreadable': 1}\)"):
        module.main(module.EncodeConfig(str(codec_folder), str(tmp_path), str(tmp_path / "codes")))


def test_codes_with_and_without_merged_repeats_are_distinguished(tmp_path: Path, speech: list[Utterance]) -> None:
    """Of codes without a fixed rate nobody can say when they are spoken; older folders do not know."""
    torch.manual_seed(0)
    encoder = FeatureEncoder(SemanticTeacher(small_hubert(hidden_size=16, layers=1), 1))
    for merged in (True, False):
        units = UnitTokenizer(encoder, torch.randn(4, 16), deduplicate=merged)
        encode(speech, units, tmp_path / str(merged))
        encoding = load_codes(tmp_path / str(merged))[1]
        assert encoding == Encoding.of(units) and encoding.deduplicated is merged
    assert Encoding("f" * 16, RATE, 50.0, 1, 4).deduplicated is False


def test_a_folder_without_usable_recordings_is_empty(
    tmp_path: Path, bad_speech: list[Utterance], small_codec: SpeechCodec
) -> None:
    encode(bad_speech[1:-1], small_codec, tmp_path, max_duration_s=0.4)
    rows, encoding = load_codes(tmp_path)
    assert len(rows) == 0 and encoding == Encoding.of(small_codec)
    assert summarize_shards(tmp_path)["skipped"] == REASONS


# ---- what is refused


def test_a_folder_of_another_codec_is_refused_and_not_changed(
    tmp_path: Path, speech: list[Utterance], small_codec: SpeechCodec, other_codec: SpeechCodec
) -> None:
    encode(speech, small_codec, tmp_path)
    before = stamps(tmp_path)
    refused = [(speech, other_codec, {}, f"fingerprint: {small_codec.fingerprint} -> {other_codec.fingerprint}")]
    speech_changed = r"speech: \w+ -> \w+"
    refused += [(speech[:-1], small_codec, {}, rf"utterances: 10 -> 9; {speech_changed}")]
    corrected = [replace(speech[0], text="SOMETHING ELSE"), *speech[1:]]
    moved = [replace(speech[0], split="another"), *speech[1:]]
    refused += [(part, small_codec, {}, speech_changed) for part in (speech[::-1], corrected, moved)]
    refused += [(speech, small_codec, {"layers": 1}, "layers: 2 -> 1")]
    refused += [(speech, small_codec, {"max_duration_s": 5.0}, r"max_duration_s: 60\.0 -> 5\.0")]
    for utterances, codec, more, change in refused:
        for process in (0, 1):
            with pytest.raises(DataError, match=rf"another codec, other speech or other settings \({change}\)"):
                encode(utterances, codec, tmp_path, process=process, processes=2, **more)
    assert stamps(tmp_path) == before
    assert json.loads((tmp_path / "request.json").read_text())["fingerprint"] == small_codec.fingerprint


def test_mixed_shards_are_refused(
    tmp_path: Path, speech: list[Utterance], small_codec: SpeechCodec, other_codec: SpeechCodec
) -> None:
    encode(speech, small_codec, tmp_path / "a")
    encode(speech, other_codec, tmp_path / "b")
    shutil.copy(tmp_path / "b" / SHARDS[2], tmp_path / "a" / SHARDS[2])
    with pytest.raises(DataError, match="mixes codes of 2 codecs"):
        load_codes(tmp_path / "a")


def test_ids_must_be_unique(tmp_path: Path, speech: list[Utterance], small_codec: SpeechCodec) -> None:
    with pytest.raises(DataError, match="u2 occurs more than once"):
        encode([*speech, speech[2]], small_codec, tmp_path)
    assert not list(tmp_path.iterdir())


def test_codes_of_another_codec_are_refused(small_codec: SpeechCodec, other_codec: SpeechCodec) -> None:
    encoding = Encoding.of(small_codec)
    encoding.require(small_codec.fingerprint, "the model")
    message = f"codes are from codec {small_codec.fingerprint}, but the model is for codec {other_codec.fingerprint}"
    with pytest.raises(DataError, match=message):
        encoding.require(other_codec.fingerprint, "the model")


def test_a_folder_without_codes_is_reported_with_the_recipe(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DataError, match=r"holds no encoded speech .*run recipes/encode_speech\.py first"):
            load_codes(folder)


def test_splits_are_selected_and_a_missing_one_is_reported(
    tmp_path: Path, speech: list[Utterance], small_codec: SpeechCodec
) -> None:
    encode(speech, small_codec, tmp_path)
    assert load_codes(tmp_path, ["test"])[0]["id"] == ["u7", "u8", "u9"]
    assert load_codes(tmp_path, ["test", "train"])[0]["id"] == [f"u{i}" for i in range(10)]
    with pytest.raises(DataError, match="has no split dev, tset; it has train, test$"):
        load_codes(tmp_path, ["dev", "train", "tset"])


# ---- batches

SIZES = [(1, 4), (4, 4), (5, 4), (23, 4), (999, 7), (1000, 8), (3, 1)]


def some_lengths(count: int) -> list[float]:
    draw = random.Random(count)
    return [draw.uniform(1, 20) for _ in range(count)]


@pytest.mark.parametrize("count, size", SIZES)
def test_batches_are_full_and_hold_every_index_at_most_once(count: int, size: int) -> None:
    for epoch in range(3):
        batches = grouped_batches(some_lengths(count), size, seed=0, epoch=epoch)
        indices = [int(i) for batch in batches for i in batch]
        assert len(set(indices)) == len(indices) and set(indices) <= set(range(count))
        if count < size:
            assert [len(batch) for batch in batches] == [count]  # all there is
        else:
            assert [len(batch) for batch in batches] == [size] * (count // size)


def test_batches_are_a_pure_function_of_seed_and_epoch() -> None:
    lengths = some_lengths(60)
    before = list(lengths)

    def listed(seed: int, epoch: int) -> list[list[int]]:
        np.random.seed(len(lengths) + epoch)  # the global state must not matter
        return [batch.tolist() for batch in grouped_batches(lengths, 4, seed, epoch)]

    assert listed(0, 1) == listed(0, 1) and lengths == before
    orders = [listed(0, 0), listed(0, 1), listed(1, 0), listed(1, 1)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


def test_lengths_within_a_batch_are_similar() -> None:
    lengths = some_lengths(200)  # one window: its batches are slices of the sorted lengths
    batches = sorted(grouped_batches(lengths, 4, 0, 0), key=lambda batch: lengths[batch[0]])
    ordered = [sorted(lengths[i] for i in batch) for batch in batches]
    assert sum(ordered, []) == sorted(lengths)
    assert [batch[0] for batch in grouped_batches(lengths, 4, 0, 0)] != [batch[0] for batch in batches]


def test_little_is_padding_also_over_many_windows() -> None:
    lengths = np.array(some_lengths(4000))
    batches = grouped_batches(lengths, 16, 0, 0)
    padded = sum(lengths[batch].max() * len(batch) for batch in batches)
    assert padded < 1.03 * lengths.sum()
    at_random = np.random.default_rng(0).permutation(lengths).reshape(-1, 16)
    assert (at_random.max(1) * 16).sum() > 1.5 * lengths.sum()


def test_the_remainder_differs_between_epochs() -> None:
    seen = Counter(
        int(i) for epoch in range(30) for batch in grouped_batches(some_lengths(7), 4, 0, epoch) for i in batch
    )
    assert set(seen) == set(range(7)) and max(seen.values()) <= 30


def test_equal_lengths_are_shuffled_too() -> None:
    batches = grouped_batches([1.0] * 40, 4, 0, 0)
    assert sorted(int(i) for batch in batches for i in batch) == list(range(40))
    assert any(abs(int(a) - int(b)) > 1 for batch in batches for a, b in zip(batch, batch[1:], strict=False))


def test_no_utterances_make_no_batches() -> None:
    assert grouped_batches([], 4, 0, 0) == []


# ---- batches of tokens


def first_batches(
    lengths: list[int], tokens: int, count: int, seed: int = 0, start: int = 0, weights: list[float] | None = None
) -> list[list[int]]:
    sizes, shares = np.array(lengths), None if weights is None else np.array(weights)
    batches = token_batches(len(sizes), sizes.take, tokens, seed, start, shares)
    return [batch.tolist() for batch in itertools.islice(batches, count)]


@pytest.mark.parametrize(
    ("lengths", "weights", "message"), [([], None, "no examples"), ([3, 4], [0.0, 0.0], "all weights are 0")]
)
def test_where_nothing_would_ever_be_read_is_refused(
    lengths: list[int], weights: list[float] | None, message: str
) -> None:
    with pytest.raises(DataError, match=f"nothing to train on: {message}"):
        first_batches(lengths, 100, 1, weights=weights)


@pytest.mark.parametrize("count, tokens", [(1, 30), (5, 30), (23, 100), (400, 250), (3, 10_000)])
def test_batches_are_as_large_as_possible_and_examples_equally_frequent(count: int, tokens: int) -> None:
    lengths = [int(length) for length in some_lengths(count)]
    batches = first_batches(lengths, tokens, 60)
    stream = [i for batch in batches for i in batch]
    for epoch in range(len(stream) // count):
        assert sorted(stream[epoch * count : (epoch + 1) * count]) == list(range(count))
    for batch, behind in itertools.pairwise(batches):
        size = sum(lengths[i] for i in batch)
        assert size <= tokens < size + lengths[behind[0]]


def test_batches_are_those_of_all_lengths_known_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an array operation over whole epochs, which earlier versions did: runs that they began go on the same."""
    monkeypatch.setattr("speechllm.data.batches.BLOCK", 7)
    sizes = np.array([int(length) for length in some_lengths(50)])
    order = np.concatenate([np.random.default_rng((3, epoch)).permutation(50) for epoch in range(4)])
    for batch in first_batches(sizes.tolist(), 90, 25, seed=3):
        count = max(1, int(np.searchsorted(np.cumsum(sizes[order]), 90, side="right")))
        assert batch == order[:count].tolist()
        order = order[count:]


def test_weights_are_how_often_an_example_is_in_an_epoch() -> None:
    weights = [1.0, 2.0, 0.0, 0.5, 1.5]
    stream = [i for batch in first_batches([1] * 5, 5, 1000, weights=weights) for i in batch]
    shares = np.bincount(stream, minlength=5) / 1000  # an epoch has 5 on average
    assert shares == pytest.approx(weights, abs=0.06) and shares[2] == 0
    assert stream.count(1) == pytest.approx(2 * stream.count(0), abs=2)


def test_an_example_longer_than_a_batch_is_a_batch_of_its_own() -> None:
    batches = first_batches([5, 50, 5], 12, 40)
    assert [1] in batches and [len(batch) for batch in batches if 1 in batch] == [1] * batches.count([1])


def test_batches_of_tokens_are_random_and_a_pure_function_of_seed_and_number() -> None:
    lengths = [int(length) for length in some_lengths(40)]
    whole = first_batches(lengths, 60, 50)
    for start in (0, 1, 17, 49):
        np.random.seed(start)  # the global state must not matter
        assert first_batches(lengths, 60, 50 - start, start=start) == whole[start:]
    stream = [i for batch in whole for i in batch]
    assert stream[:40] != stream[40:80] and stream[:40] != list(range(40))
    assert first_batches(lengths, 60, 5, seed=1) != whole[:5]


SPOILED_SHARDS = {
    "a code too high": ({"codes": [8] * 300}, "holds the code 8, the codec's codebooks end at 7"),
    "a frame cut": ({"codes": [1] * 301}, "has 301 codes, which is no multiple of 3"),
    "no codes": ({"codes": None}, "utterances or frames have no codes"),
    "empty codes": ({"codes": []}, "utterance u1 has no codes"),
}


@pytest.mark.parametrize("kind", SPOILED_SHARDS)
def test_codes_that_the_codec_cannot_have_made_are_refused(
    speech: list[Utterance], codec: SpeechCodec, tmp_path: Path, kind: str
) -> None:
    encode(speech[:3], codec, tmp_path)
    change, message = SPOILED_SHARDS[kind]
    table = open_shard(file := tmp_path / SHARDS[0])
    rows = [row | change if row["id"] == "u1" else row for row in table.to_pylist()]
    write_table(file, type(table).from_pylist(rows, table.schema))
    with pytest.raises(DataError, match=message):
        load_codes(tmp_path)
