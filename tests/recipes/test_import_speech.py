"""Data sets that `datasets` reads become corpus folders: streamed or not, killed in between, with broken rows."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from datasets import Audio, Dataset, DatasetDict

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
    sounds = [
        {"bytes": b"fLaC" + bytes(range(200)), "path": "a.flac"},
        {"bytes": sound(0.1), "path": "b.flac"},
        {"bytes": None, "path": str(tmp_path / "nowhere.flac")},
        {"bytes": None, "path": None},
        None,
        {"bytes": b"", "path": "c.flac"},
        {"bytes": sound(0, "WAV"), "path": "d.wav"},
        {"bytes": sound(0.2), "path": "e.flac"},
    ]
    (tmp_path / "plain").mkdir()  # Parquet that `datasets` did not write: the column is known by its name only
    file = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    pq.write_table(pa.table({"audio": pa.array(sounds, file)}), tmp_path / "plain" / "train.parquet")
    folder = run(tmp_path / "plain")
    assert [(u.id, Path(u.path).stem) for u in read_corpus(folder)] == [("b", "0000001"), ("e", "0000007")]
    done = json.loads((folder / "done.json").read_text())
    assert done["skipped"] == {"unreadable": 2, "missing": 3, "empty": 1} and done["utterances"] == 2
    assert done["skipped_first"][0].startswith("audio/train/0000/0000000: not a readable audio file")
    assert len(done["skipped_first"]) == 5


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("copied", range(6))
def test_a_killed_import_is_resumed(
    run: Run,
    parquet: Path,
    recipe: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    streaming: bool,
    copied: int,
) -> None:
    whole = run(parquet, "whole", streaming=streaming)
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
    assert content(folder) | configs == content(whole) | configs


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
