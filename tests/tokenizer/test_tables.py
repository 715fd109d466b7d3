"""What users write as tables: encodings, cells of the wrong kind, rows of the wrong shape, named with their place."""

import gzip
import json
import logging
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from speechllm import AudioError, CorpusError, Utterance, read_corpus
from tokenizer.corpus import is_corpus, load_usable, load_utterance
from tokenizer.files import read_jsonl
from tokenizer.tables import TableError, read_lines, read_table, require_utf8, required_name, required_text
from tokenizer.training.crops import Crops

ROW = {"path": "a.wav", "duration_s": 1.5}


def sound(file: Path, seconds: float = 0.25) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(file, np.random.default_rng(0).uniform(-0.1, 0.1, round(16_000 * seconds)), 16_000)
    return file


def manifest(folder: Path, *rows: dict[str, Any]) -> Path:
    """A manifest, with an empty file for every recording."""
    for row in rows:
        (folder / str(row["path"])).touch()
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


# ---- cells


@pytest.mark.parametrize(
    "cells, found",
    [
        ({"speaker": 84}, {"speaker": "84"}),
        ({"speaker": 0, "id": 7}, {"speaker": "0", "id": "7"}),
        ({"speaker": 84.0, "text": 3.5}, {"speaker": "84", "text": "3.5"}),
        ({"speaker": " 84 ", "split": " dev"}, {"speaker": "84", "split": "dev"}),
        ({"speaker": "", "text": " ", "split": None, "id": ""}, {"speaker": None, "text": None, "split": "train"}),
        ({"duration_s": "1.5"}, {"duration_s": 1.5}),
        ({"license": ["any"], "codec": True}, {}),
    ],
)
def test_numbers_are_names_and_empty_cells_are_none(tmp_path: Path, cells: dict, found: dict) -> None:
    utterance = read_corpus(manifest(tmp_path, ROW | cells))[0]
    assert {name: getattr(utterance, name) for name in found} == found


@pytest.mark.parametrize("column", ["id", "text", "speaker", "split", "path"])
@pytest.mark.parametrize("cell", [["84"], {"a": 1}, True, math.nan, "a\0b", "half \ud83d"])
def test_a_text_of_another_kind_is_refused(tmp_path: Path, column: str, cell: object) -> None:
    manifest(tmp_path, ROW)
    line = json.dumps(ROW | {column: cell})
    (tmp_path / "manifest.jsonl").write_text(f"{json.dumps(ROW)}\n\n{line}\n", encoding="utf-8")
    with pytest.raises(CorpusError, match=rf"manifest\.jsonl, row 3: {column} is .*, expected "):
        read_corpus(tmp_path)


@pytest.mark.parametrize("cell", [0, -1, math.inf, math.nan, True, [1], "", "1,5", None, 10**400])
def test_a_duration_that_is_none_is_refused(tmp_path: Path, cell: object) -> None:
    with pytest.raises(CorpusError, match=r"row 1: duration_s is .*, expected seconds above 0, such as 1\.5"):
        read_corpus(manifest(tmp_path, ROW | {"duration_s": cell}))


@pytest.mark.parametrize(
    "phones",
    [[["a", "b"]], [["a", 1, 2]], [[1, 1.0]], [["a", 1.0], ["b", 0.5]], [["a", -1]], [["a", math.nan]], "ab", {"a": 1}],
)
def test_phones_of_another_shape_or_order_are_refused(tmp_path: Path, phones: object) -> None:
    with pytest.raises(CorpusError, match="row 1: phones is .*, expected pairs of a symbol and its end in s, in time"):
        read_corpus(manifest(tmp_path, ROW | {"phones": phones}))


def test_phones_end_with_the_recording(tmp_path: Path) -> None:
    assert read_corpus(manifest(tmp_path, ROW | {"phones": [["a", 1], ["b", 1.51]]}))[0].phones == (
        ("a", 1),
        ("b", 1.51),
    )
    with pytest.raises(CorpusError, match=r"row 1: phones end at 2 s, expected at most the duration of 1\.5 s"):
        read_corpus(manifest(tmp_path, ROW | {"phones": [["a", 1], ["b", 2]]}))


@pytest.mark.parametrize("line", ["[" * 100_000, '{"path": ' + "1" * 5_000 + "}", "{} {}", "[]", "null"])
def test_a_line_that_is_no_object_is_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "manifest.jsonl").write_text(line, encoding="utf-8")
    with pytest.raises(CorpusError, match=r"manifest\.jsonl, row 1: "):
        read_corpus(tmp_path)


# ---- characters


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_unicode_is_read_whatever_its_encoding(tmp_path: Path, encoding: str, end: str) -> None:
    (tmp_path / "é.wav").touch()
    rows = {
        "manifest.jsonl": ['{"path": "é.wav", "duration_s": 1, "text": "hé"}'],
        "manifest.csv": ["path, duration_s, text", 'é.wav, 1, "hé"', ",,"],
    }
    for name, lines in rows.items():
        (tmp_path / name).write_bytes(end.join([*lines, "", ""]).encode(encoding))
        assert read_corpus(tmp_path) == [Utterance("é.wav", str(tmp_path / "é.wav"), 1.0, "train", "hé")]
        assert read_lines(tmp_path / name) == [*lines, ""]
        (tmp_path / name).unlink()


def test_other_encodings_and_damage_are_named_with_their_line(tmp_path: Path) -> None:
    file, zipped = tmp_path / "texts.txt", tmp_path / "texts.gz"
    for content, message in {
        "one\nhé\n".encode("cp1252"): r"line 2: byte e9 is not UTF-8: save the file as UTF-8",
        b"one\ntw\0o\n": r"line 2: a NUL character",
        b"one\n" + "two\n".encode("utf-16-le"): "line 2: a NUL character",
    }.items():
        file.write_bytes(content)
        zipped.write_bytes(gzip.compress(content))
        for read, name in ((read_lines, file), (require_utf8, file), (require_utf8, zipped)):
            with pytest.raises(TableError, match=rf"{name.name}, {message}"):
                read(name)
    zipped.write_bytes(gzip.compress(bytes(range(100)) * 50)[:40])
    with pytest.raises(TableError, match=r"texts\.gz"):
        require_utf8(zipped)
    zipped.write_bytes(gzip.compress(b"one\n" * 9))
    require_utf8(zipped)


def test_rows_of_a_run_may_end_in_the_middle_of_a_line(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"st', encoding="utf-8")
    assert read_jsonl(file) == [{"step": 1}, {"step": 2}]
    file.write_text('{"step": 1}\n{"step": 2}', encoding="utf-8")
    assert read_jsonl(file) == [{"step": 1}, {"step": 2}]
    file.write_text('{"step": 1}\n{"st\n{"step": 3}\n', encoding="utf-8")
    with pytest.raises(TableError, match=r"log\.jsonl, row 2: not JSON"):
        read_jsonl(file)
    assert read_jsonl(tmp_path / "none.jsonl") == []


def test_columns_that_are_not_read_are_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"id": 1, "a": "", "speakr": 1}\n{"id": 2, "a": "x", "speakr": 1}\n', encoding="utf-8")
    with caplog.at_level(logging.INFO):
        rows = [row for _, row in read_table(file, {"id": required_name, "a": required_text})]
    assert rows == [{"id": "1", "a": ""}, {"id": "2", "a": "x"}]
    assert caplog.messages == [f"{file}: columns that are not read: speakr"]


# ---- corpora


def test_what_occurs_twice_is_refused_with_both_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"path": f"{i}.wav", "duration_s": 1, "id": name} for i, name in enumerate("aba")]
    with pytest.raises(CorpusError, match=r"jsonl, row 3: id 'a' is that of .*manifest\.jsonl, row 1, too: give every"):
        read_corpus(manifest(tmp_path, *rows))
    with pytest.raises(CorpusError, match=r"row 2: id 'a\.wav' is that of .*row 1, too: give every"):
        read_corpus(manifest(tmp_path, ROW, ROW | {"path": "./a.wav"}))
    with caplog.at_level(logging.INFO):
        assert len(read_corpus(manifest(tmp_path, ROW, ROW | {"path": "./a.wav", "id": "b"}))) == 2
    assert "1 rows name a recording that another row names, too" in caplog.text


def test_a_few_recordings_may_be_missing_and_are_skipped_when_they_are_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"path": f"{i}.wav", "duration_s": 0.25, "split": "dev" if i > 20 else "train"} for i in range(23)]
    manifest(tmp_path, *rows)
    sound(tmp_path / "0.wav")
    for gone in (1, 2, 21):
        (tmp_path / f"{gone}.wav").unlink()
    (tmp_path / "3.wav").unlink()
    with pytest.raises(CorpusError, match="3 of 21 recordings of split train are missing .*expected one or 10% at"):
        read_corpus(tmp_path)
    (tmp_path / "3.wav").touch()
    with caplog.at_level(logging.INFO):
        found = read_corpus(tmp_path)
    assert [message.partition(", ")[2] for message in caplog.messages] == [
        "train: 21 utterances, 0.00 h, 0 speakers, 0 with text; 2 recordings missing",
        "dev: 2 utterances, 0.00 h, 0 speakers, 0 with text; 1 recordings missing",
    ]
    with pytest.warns(UserWarning, match="no such audio file"):
        usable = [utterance.id for utterance, _ in load_usable(found[:3], skipped=tmp_path / "skipped.jsonl")]
    assert usable == ["0.wav"]
    assert [row["reason"] for row in read_jsonl(tmp_path / "skipped.jsonl")] == ["missing", "missing"]


@pytest.mark.skipif(os.sep != "/", reason="backslashes separate folders")
def test_paths_may_be_absolute_or_of_windows(tmp_path: Path) -> None:
    sound(tmp_path / "far" / "b.wav")
    (tmp_path / "x").mkdir()
    rows = [{"path": "x\\a.wav", "duration_s": 1}, {"path": "c\\d.wav", "duration_s": 1}]
    manifest(tmp_path, {"path": str(tmp_path / "far" / "b.wav"), "duration_s": 0.25}, *rows)
    os.rename(tmp_path / "x\\a.wav", tmp_path / "x" / "a.wav")
    paths = [Path(utterance.path) for utterance in read_corpus(tmp_path)]
    assert paths == [tmp_path / "far" / "b.wav", tmp_path / "x" / "a.wav", tmp_path / "c\\d.wav"]


def test_names_that_are_long_or_not_utf_8_do_not_end_anything(tmp_path: Path) -> None:
    odd = os.fsdecode(b"caf\xe9.wav")
    sound(tmp_path / "a.wav")
    try:
        (tmp_path / "a.wav").rename(tmp_path / odd)
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    rows = [{"path": name, "duration_s": 0.25} for name in (odd, f"{'x' * 240}/{'y' * 300}.wav")]
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    first, second = read_corpus(tmp_path)
    assert first.id == "caf\\xe9.wav" and Path(first.path).is_file() and first.id.encode()
    assert len(second.id) == 545
    with pytest.raises(AudioError) as error:
        load_utterance(second)
    assert error.value.reason == "missing"


@pytest.mark.parametrize("stated_s", [2.5, 12.0])
def test_a_recording_of_another_duration_is_skipped(tmp_path: Path, stated_s: float) -> None:
    path = str(sound(tmp_path / "a.wav", 1.2))
    right, wrong = Utterance("a", path, 1.0, "train"), Utterance("b", path, stated_s, "train")
    assert len(load_utterance(right)) == 19_200
    with pytest.raises(AudioError) as error:
        load_utterance(wrong)
    assert error.value.reason in ("duration", "truncated")
    with pytest.warns(
        UserWarning, match=f"1.20 s long, but the corpus states {stated_s:.2f} s: correct its duration_s"
    ):
        items = [Crops([right, wrong], 0.5, skipped=tmp_path / "skipped.jsonl")[index] for index in range(8)]
    assert {item["utterance"] for item in items} == {0}
    assert {row["reason"] for row in read_jsonl(tmp_path / "skipped.jsonl")} == {"duration"}


def librispeech(folder: Path, split: str, speaker: str, count: int) -> Path:
    chapter = folder / split / speaker / "121"
    names = [f"{speaker}-121-{number:04}" for number in range(count)]
    for name in names:
        sound(chapter / f"{name}.flac")
    lines = "".join(f"{name} HÉ\n" for name in names)
    (chapter / f"{speaker}-121.trans.txt").write_bytes(b"\xef\xbb\xbf" + lines.replace("\n", "\r\n").encode() + b"\n")
    return chapter


def test_librispeech_with_gaps_hidden_files_and_linked_splits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    elsewhere, corpus = tmp_path / "elsewhere", tmp_path / "corpus"
    librispeech(elsewhere, "train-clean-100", "7", 2)
    chapter = librispeech(corpus, "dev-clean", "84", 12)
    (corpus / "train-clean-100").symlink_to(elsewhere / "train-clean-100")
    (corpus / "dev-clean" / "loop").symlink_to(corpus)
    (chapter / "._84-121.trans.txt").write_bytes(b"\0\x05\x16\x07")
    (chapter / "._84-121-0000.flac").write_bytes(b"\0\x05\x16\x07")
    (chapter / "84-121-0000.flac").write_bytes(b"fLaC")
    sound(chapter / "84-121-9999.flac")
    with caplog.at_level(logging.INFO):
        found = read_corpus(corpus)
    assert [(one.split, one.duration_s) for one in found] == [
        *[("dev-clean", 0.0)],
        *[("dev-clean", 0.25)] * 11,
        *[("train-clean-100", 0.25)] * 2,
    ]
    assert {one.text for one in found} == {"HÉ"} and is_corpus(corpus)
    assert [message.partition("corpus")[2] for message in caplog.messages] == [
        ": 1 recordings have no transcript and are left out",
        ", dev-clean: 12 utterances, 0.00 h, 1 speakers, 12 with text; 1 recordings missing",
        ", train-clean-100: 2 utterances, 0.00 h, 1 speakers, 2 with text",
    ]
    (chapter / "84-121-0001.flac").unlink()
    with pytest.raises(CorpusError, match="2 of 12 recordings of split dev-clean are missing or unreadable"):
        read_corpus(corpus)
    assert len(read_corpus(corpus, ["train-clean-100"])) == 2


def test_a_transcript_in_another_encoding_or_twice_is_named(tmp_path: Path) -> None:
    chapter = librispeech(tmp_path, "dev", "84", 1)
    (chapter / "84-121.trans.txt").write_bytes(b"84-121-0000 H\xc9\n")
    with pytest.raises(CorpusError, match=r"84-121\.trans\.txt, line 1: byte c9 is not UTF-8"):
        read_corpus(tmp_path)
    (chapter / "84-121.trans.txt").write_text("84-121-0000 A\n84-121-0000 B\n", encoding="utf-8")
    with pytest.raises(CorpusError, match=r"trans\.txt, line 2: id '84-121-0000' is that of .*trans\.txt, line 1, too"):
        read_corpus(tmp_path)


def test_ravdess_at_two_levels_is_read_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = [f"03-01-05-01-02-0{number}-01.wav" for number in (1, 2)]
    for folder in ("Actor_01", "audio_speech/Actor_01"):
        for name in names:
            sound(tmp_path / folder / name)
        (tmp_path / folder / f"._{names[0]}").write_bytes(b"\0\x05")
    with caplog.at_level(logging.INFO):
        found = read_corpus(tmp_path)
    assert [one.path for one in found] == [str(tmp_path / "Actor_01" / name) for name in names]
    assert "2 recordings are there twice and read once" in caplog.text
    sound(tmp_path / "audio_speech" / "Actor_01" / names[0], 0.5)
    with pytest.raises(CorpusError, match="have one name and other sizes: keep the one that is whole"):
        read_corpus(tmp_path)


def test_folders_that_are_none(tmp_path: Path) -> None:
    file = sound(tmp_path / "songs" / "03-02-05-01-02-01-01.wav")
    with pytest.raises(CorpusError, match="songs of RAVDESS .* are not read"):
        read_corpus(tmp_path / "songs")
    with pytest.raises(CorpusError, match="is a file, no corpus folder"):
        read_corpus(file)
    assert not is_corpus(tmp_path)
