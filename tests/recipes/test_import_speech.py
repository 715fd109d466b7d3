"""Data sets that `datasets` reads become corpus folders: streamed or not, killed in between, with broken rows."""

import io
import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from datasets import Audio, Dataset, DatasetDict
from huggingface_hub.errors import HTTPError

from speechllm import DataError, InputError, RunError, Utterance, read_corpus
from tokenizer.files import write_text

Run = Callable[..., Path]
PATHS = ("84-0.flac", "84-1.flac", "7-0.flac", "7-1.flac", "7-2.flac")
SECONDS = (0.1, 0.2, 0.3, 0.1, 0.2)


def sound(seconds: float, kind: str = "FLAC") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.random.default_rng(0).uniform(-0.1, 0.1, round(16_000 * seconds)), 16_000, format=kind)
    return file.getvalue()


def make(columns: dict[str, list]) -> Dataset:
    """With an Audio column, made without encoding it: that needs torchcodec."""
    return Dataset.from_dict(columns).cast_column("audio", Audio())


def speech(rows: slice = slice(None)) -> Dataset:
    """Five utterances in the columns of openslr/librispeech_asr."""
    columns = {
        "file": list(PATHS),
        "audio": [{"bytes": sound(seconds), "path": path} for path, seconds in zip(PATHS, SECONDS, strict=True)],
        "text": ["ONE", "TWO", "", "THREE\u2028É", "FOUR"],
        "speaker_id": [84, 84, 7, 7, 7],
        "id": [path.removesuffix(".flac") for path in PATHS],
    }
    return make({name: values[rows] for name, values in columns.items()})


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    """The five in two files of one split, and two of them in another split."""
    folder = tmp_path / "parquet"
    folder.mkdir()
    speech(slice(0, 3)).to_parquet(folder / "train-00000-of-00002.parquet")
    speech(slice(3, 5)).to_parquet(folder / "train-00001-of-00002.parquet")
    speech(slice(0, 2)).to_parquet(folder / "test-00000-of-00001.parquet")
    return folder


@pytest.fixture
def run(recipe: Callable[[str], ModuleType], tmp_path: Path) -> Run:
    """Import into tmp_path/out and give that folder."""

    def run(data: Path, output: str = "out", **settings: Any) -> Path:
        module = recipe("import_speech.py")
        module.main(module.ImportConfig(str(data), str(tmp_path / output), **settings))
        return tmp_path / output

    return run


def content(folder: Path) -> dict[str, bytes]:
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert files.pop("claim.json") == b'{\n  "job": "import_speech"\n}\n' and files.pop(".lock")
    return files


def same_speech(folder: Path, split: str = "train") -> None:
    """The corpus in `folder` is the five utterances, bit by bit."""
    found = read_corpus(folder, [split])
    for utterance, row, seconds in zip(found, speech().cast_column("audio", Audio(decode=False)), SECONDS, strict=True):
        expected = Utterance(row["id"], utterance.path, seconds, split, row["text"] or None, str(row["speaker_id"]))
        assert utterance == expected
        assert Path(utterance.path).read_bytes() == row["audio"]["bytes"]


@pytest.mark.parametrize("streaming", [True, False])
def test_parquet_files_are_imported(run: Run, parquet: Path, streaming: bool) -> None:
    folder = run(parquet, splits=["train"], streaming=streaming)
    same_speech(folder)
    assert {utterance.split for utterance in read_corpus(folder)} == {"train"}
    done = json.loads((folder / "done.json").read_text())
    assert done == {"utterances": 5, "hours": pytest.approx(0.9 / 3600), "skipped": {}, "skipped_first": []}
    manifest, audio = {"manifest.jsonl", "done.json", "config.yaml", "versions.json"}, "audio/train/0000"
    assert set(content(folder)) == manifest | {f"{audio}/000000{i}.flac" for i in range(5)}


@pytest.mark.parametrize("splits", [True, False])
def test_a_folder_of_save_to_disk_is_imported(run: Run, tmp_path: Path, splits: bool) -> None:
    name = "train.clean.100" if splits else "train"
    (DatasetDict({name: speech()}) if splits else speech()).save_to_disk(tmp_path / "saved")
    same_speech(run(tmp_path / "saved"), name)


def test_all_splits_are_imported_and_repeated_ids_made_unique(run: Run, parquet: Path) -> None:
    folder = run(parquet)
    found = {split: [u.id for u in read_corpus(folder, [split])] for split in ("train", "test")}
    assert found == {
        "train": ["84-0-train-0000000", "84-1-train-0000001", "7-0", "7-1", "7-2"],
        "test": ["84-0-test-0000000", "84-1-test-0000001"],
    }


def test_other_column_names_formats_and_external_files_are_imported(run: Run, tmp_path: Path) -> None:
    (tmp_path / "beside.wav").write_bytes(sound(0.4, "WAV"))
    sounds = [{"bytes": sound(0.2, "OGG"), "path": None}, {"bytes": None, "path": str(tmp_path / "beside.wav")}]
    columns = {"sentence": ["Hé.", "B"], "raw": ["x", "y"], "client_id": ["s", None], "audio": sounds}
    data = Dataset.from_dict(columns).rename_column("audio", "voice").cast_column("voice", Audio())
    data.save_to_disk(tmp_path / "saved")
    ogg, wav = read_corpus(run(tmp_path / "saved"))
    assert (ogg.id, Path(ogg.path).suffix, ogg.text, ogg.speaker) == ("0000000", ".ogg", "Hé.", "s")
    assert (wav.id, Path(wav.path).suffix, wav.text, wav.speaker) == ("beside", ".wav", "B", None)
    assert ogg.duration_s == pytest.approx(0.2) and wav.duration_s == pytest.approx(0.4)
    assert [u.text for u in read_corpus(run(tmp_path / "saved", "other", text="raw"))] == ["x", "y"]


def test_rows_without_a_readable_recording_are_skipped_and_counted(run: Run, tmp_path: Path) -> None:
    uncounted = bytearray(sound(0.3))  # the number of samples is not stated
    uncounted[21:26] = bytes([uncounted[21] & 0xF0, 0, 0, 0, 0])
    sounds = [
        {"bytes": b"fLaC" + bytes(range(200)), "path": "a.flac"},
        {"bytes": sound(0.1), "path": "b.flac"},
        {"bytes": None, "path": str(tmp_path / "nowhere.flac")},
        {"bytes": None, "path": None},
        None,
        {"bytes": b"", "path": "c.flac"},
        {"bytes": sound(0, "WAV"), "path": "d.wav"},
        {"bytes": sound(0.2), "path": "e.flac"},
        {"bytes": uncounted, "path": "f.flac"},
        {"bytes": sound(2)[:-9000], "path": "g.flac"},
        {"bytes": sound(2, "WAV")[:-9000], "path": "h.wav"},
    ]
    (tmp_path / "plain").mkdir()  # Parquet that `datasets` did not write: the column is known by its name only
    file = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    pq.write_table(pa.table({"audio": pa.array(sounds, file)}), tmp_path / "plain" / "train.parquet")
    folder = run(tmp_path / "plain")
    found = [(u.id, Path(u.path).stem, u.duration_s) for u in read_corpus(folder)]
    assert found == [("b", "0000001", 0.1), ("e", "0000007", 0.2), ("f", "0000008", 0.3)]
    done = json.loads((folder / "done.json").read_text())
    assert done["skipped"] == {"unreadable": 3, "missing": 3, "empty": 1, "truncated": 1} and done["utterances"] == 3
    assert done["skipped_first"][0].startswith("audio/train/0000/0000000: not a readable audio file")
    assert len(done["skipped_first"]) == 5


@pytest.fixture(scope="module")
def wholes() -> dict[bool, dict[str, bytes]]:
    """What an import leaves that nobody interrupts, streamed or not: made once, by the first test that needs it."""
    return {}


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("copied", range(6))
def test_a_killed_import_is_resumed(
    run: Run,
    parquet: Path,
    recipe: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    wholes: dict[bool, dict[str, bytes]],
    streaming: bool,
    copied: int,
) -> None:
    if streaming not in wholes:
        wholes[streaming] = content(run(parquet, "whole", streaming=streaming))
    module = recipe("import_speech.py")
    import_row, read = module.import_row, []

    def killed(*arguments: Any) -> dict:
        if len(read) == copied:
            raise KeyboardInterrupt
        read.append(arguments[2])
        return import_row(*arguments)

    monkeypatch.setattr(module, "import_row", killed)
    with pytest.raises(KeyboardInterrupt):
        run(parquet, streaming=streaming)
    assert not (tmp_path / "out" / "manifest.jsonl").exists()
    with (tmp_path / "out" / "rows.jsonl").open("a") as journal:
        journal.write('{"split": "train", "sha')  # cut off
    again = []
    monkeypatch.setattr(module, "import_row", lambda *arguments: again.append(arguments[2]) or import_row(*arguments))
    folder = run(parquet, streaming=streaming)
    assert len(read) == copied and not set(read) & set(again)
    configs = {"config.yaml": b""}  # differ in the folder's name
    assert content(folder) | configs == wholes[streaming] | configs


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), HTTPError("429 Too Many Requests")])
def test_a_disk_or_server_that_fails_skips_nothing_and_the_same_command_goes_on(
    run: Run, recipe: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception
) -> None:
    paths = [tmp_path / f"{i}.wav" for i in range(3)]
    for path in paths:
        path.write_bytes(sound(0.1, "WAV"))
    (tmp_path / "plain").mkdir()
    pq.write_table(pa.table({"audio": list(map(str, paths))}), tmp_path / "plain" / "train.parquet")
    fsspec, read = recipe("import_speech.py").fsspec, []
    open_it = fsspec.open

    def fail(path: str, mode: str) -> object:
        read.append(Path(path).name)
        if read == ["0.wav", "1.wav"]:
            raise error
        return open_it(path, mode)

    monkeypatch.setattr(fsspec, "open", fail)
    with pytest.raises(DataError, match=r"0000001, .*1\.wav: .*(error|Requests); the same command goes on from there"):
        run(tmp_path / "plain")
    folder = run(tmp_path / "plain")
    assert [utterance.id for utterance in read_corpus(folder)] == ["0", "1", "2"]
    assert read == ["0.wav", "1.wav", "1.wav", "2.wav"]
    assert json.loads((folder / "done.json").read_text())["skipped"] == {}


@pytest.mark.parametrize(
    "error", [PermissionError(13, "Permission denied"), OSError(40, "Too many levels"), ValueError("?")]
)
def test_a_recording_that_cannot_be_opened_is_skipped(
    run: Run, recipe: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception
) -> None:
    for name in "ab":
        (tmp_path / f"{name}.wav").write_bytes(sound(0.1, "WAV"))
    (tmp_path / "plain").mkdir()
    table = pa.table({"audio": [str(tmp_path / f"{name}.wav") for name in "ab"]})
    pq.write_table(table, tmp_path / "plain" / "train.parquet")
    fsspec = recipe("import_speech.py").fsspec
    open_it = fsspec.open

    def fail(path: str, mode: str) -> object:
        if path.endswith("a.wav"):
            raise error
        return open_it(path, mode)

    monkeypatch.setattr(fsspec, "open", fail)
    folder = run(tmp_path / "plain")
    reason = "missing" if error.args[0] == 40 else "unreadable"
    assert json.loads((folder / "done.json").read_text())["skipped"] == {reason: 1}


def test_finished_files_of_a_data_set_are_not_read_again(
    run: Run, parquet: Path, recipe: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    module = recipe("import_speech.py")
    part = module.open_splits(module.ImportConfig(str(parquet), "out"))["train"]
    columns = module.find_columns(part, module.ImportConfig(str(parquet), "out"))
    (parquet / "train-00000-of-00002.parquet").write_bytes(b"not to be read")
    before = [{"shard": 0}] * 3 + [{"shard": 1}]
    rows = module.import_split(part, columns, tmp_path, "train", before)
    assert [(row["id"], row["shard"], Path(row["path"]).stem) for row in rows] == [("7-2", 1, "0000004")]


def test_a_finished_import_is_not_repeated_and_another_one_is_refused(run: Run, parquet: Path) -> None:
    folder = run(parquet)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    run(parquet)
    with pytest.raises(RunError, match="another configuration .*splits: None -> "):
        run(parquet, splits=["train"])
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before


FILE = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def recordings(count: int = 2) -> pa.Array:
    return pa.array([{"bytes": sound(0.1), "path": f"{i}.flac"} for i in range(count)], FILE)


def test_numbers_are_texts_and_nulls_are_none(run: Run, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    columns = {"audio": recordings(), "id": [0, 1], "speaker_id": [0, None], "text": [None, "A"]}
    pq.write_table(pa.table(columns), tmp_path / "plain" / "train.parquet")
    found = [(u.id, u.speaker, u.text) for u in read_corpus(run(tmp_path / "plain"))]
    assert found == [("0", "0", None), ("1", None, "A")]


def test_a_text_of_another_kind_further_on_is_skipped(
    run: Run, parquet: Path, recipe: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = recipe("import_speech.py")
    import_row = module.import_row

    def odd(row: dict, *arguments: Any) -> dict:
        return import_row(row | ({"text": [1]} if row["id"] == "7-0" else {}), *arguments)

    monkeypatch.setattr(module, "import_row", odd)
    folder = run(parquet, splits=["train"])
    assert [u.id for u in read_corpus(folder)] == ["84-0", "84-1", "7-1", "7-2"]
    assert json.loads((folder / "done.json").read_text())["skipped"] == {"wrong type": 1}


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"audio": recordings(), "text": [["A"], ["B"]]}, r"split train: text is \['A'\], expected text"),
        ({"audio": recordings(), "text": [b"A", b"B"]}, "split train: text is b'A', expected text"),
        ({"audio": recordings(), "speaker": [True, False]}, "split train: speaker is True, expected text"),
        ({"audio": [[0.1, 0.2], [0.3]]}, "split train: Couldn't cast array of type list"),
        ({"audio": [1, 2]}, "split train: Unsupported cast from int64"),
    ],
)
def test_columns_of_another_kind_are_refused_before_anything_is_written(
    run: Run, tmp_path: Path, columns: dict, message: str
) -> None:
    (tmp_path / "plain").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "plain" / "train.parquet")
    with pytest.raises(DataError, match=message):
        run(tmp_path / "plain")
    assert not (tmp_path / "out" / "config.yaml").exists()


@pytest.mark.parametrize("file", ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"])
def test_a_cut_file_is_an_error_of_one_line(run: Run, parquet: Path, file: str) -> None:
    (parquet / file).write_bytes((parquet / file).read_bytes()[:900])
    with pytest.raises(DataError, match="Parquet magic bytes not found.*: correct the data set, or fetch it again"):
        run(parquet, splits=["train"])


def test_a_data_set_without_a_usable_recording_is_an_error(run: Run, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    pq.write_table(pa.table({"audio": ["nowhere.wav"]}), tmp_path / "plain" / "train.parquet")
    with pytest.raises(DataError, match=r"none of the 1 recordings can be used \({'missing': 1}\); the first: "):
        run(tmp_path / "plain")


@pytest.mark.parametrize("layout", ["manifest", "LibriSpeech", "sounds"])
def test_a_corpus_folder_needs_no_import(run: Run, tmp_path: Path, layout: str) -> None:
    chapter = tmp_path / "data" / "dev-clean" / "84" / "121"
    chapter.mkdir(parents=True)
    (chapter / "84-121-0000.flac").write_bytes(sound(0.1))
    message = "is a corpus folder already: no import is needed"
    if layout == "manifest":
        (tmp_path / "data" / "manifest.csv").write_text("path,duration_s\n", encoding="utf-8")
    elif layout == "LibriSpeech":
        (chapter / "84-121.trans.txt").write_text("84-121-0000 GO\n", encoding="utf-8")
    elif find_spec("torchcodec"):
        pytest.skip("imported with torchcodec")
    else:
        message = "instead of importing a folder of audio files, write a manifest.csv"
    with pytest.raises(DataError, match=message):
        run(tmp_path / "data")
    assert not (tmp_path / "out" / "config.yaml").exists()


@pytest.mark.parametrize("name", ["manifest.jsonl", "checkpoints/mine.pt", "audio/train/0000/0000000.flac"])
def test_a_corpus_of_somebody_is_not_replaced(run: Run, parquet: Path, tmp_path: Path, name: str) -> None:
    write_text(tmp_path / "out" / name, "mine")
    with pytest.raises(InputError, match=f"holds what import_speech did not write .{name.split('/')[0]}.: choose"):
        run(parquet)
    assert [path.read_text() for path in (tmp_path / "out").rglob("*") if path.is_file()] == ["mine"]


@pytest.fixture
def words(parquet: Path) -> None:
    """Beside the folder of speech, one without."""
    (parquet.parent / "words").mkdir()
    Dataset.from_dict({"text": ["a"]}).to_parquet(parquet.parent / "words" / "train.parquet")


@pytest.mark.parametrize(
    "data, settings, message",
    [
        ("parquet", {"splits": ["dev", "train"]}, "has no split dev; it has train, test$"),
        ("parquet", {"text": "txt"}, "has no column txt; it has file, audio, text, speaker_id, id$"),
        ("words", {}, "has no column audio; it has text$"),
        ("nowhere", {}, "nowhere: "),
    ],
)
@pytest.mark.usefixtures("words")
def test_missing_input_is_named_before_anything_is_written(
    run: Run, tmp_path: Path, data: str, settings: dict, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        run(tmp_path / data, **settings)
    assert not (tmp_path / "out").exists()
