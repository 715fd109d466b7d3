"""Speech corpora on disk, random crops of them, and which process reads which crops."""

import csv
import json
import math
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch.utils.data import DataLoader

from speechllm import AudioError, CorpusError, InputError, Utterance, load_audio, read_corpus
from speechllm.runs.machine import available_cpus
from tokenizer import corpus as corpus_module
from tokenizer.corpus import load_each, load_usable
from tokenizer.files import read_jsonl
from tokenizer.prefetch import prefetch
from tokenizer.training.crops import Crops, StepSampler
from tokenizer.utterances import Phones, frame_phones

RATE = 16_000
SECONDS = (1.5, 0.25, 2.0, 0.5, 1.0)


def write_ramp(path: Path, seconds: float) -> None:
    """A recording whose sample n has the value (n + 1) / 32768, which identifies the start of a crop."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.arange(1, round(seconds * RATE) + 1, dtype="int16"), RATE)


def write_manifest(folder: Path, *lines: object) -> None:
    """With an empty file for every recording."""
    for line in lines:
        if isinstance(line, dict):
            (folder / line["path"]).parent.mkdir(parents=True, exist_ok=True)
            (folder / line["path"]).touch()
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "manifest.jsonl").write_text(text + "\n", encoding="utf-8")


@pytest.fixture(scope="module")
def utterances(tmp_path_factory: pytest.TempPathFactory) -> list[Utterance]:
    folder = tmp_path_factory.mktemp("ramps")
    paths = [folder / f"{index}.wav" for index in range(len(SECONDS))]
    for path, seconds in zip(paths, SECONDS, strict=True):
        write_ramp(path, seconds)
    return [Utterance(p.stem, str(p), seconds, "train") for p, seconds in zip(paths, SECONDS, strict=True)]


def test_a_manifest_is_read_in_its_order_with_everything_it_says(tmp_path: Path) -> None:
    phones = [["h", 0.1], ["i", 0.25]]
    full = {"id": "u1", "path": "x/b.wav", "duration_s": 0.25, "split": "dev", "text": "hé", "speaker": "s"}
    write_manifest(tmp_path, full | {"phones": phones}, {"path": "a.wav", "duration_s": 2})
    assert read_corpus(tmp_path) == [
        Utterance("u1", str(tmp_path / "x/b.wav"), 0.25, "dev", "hé", "s", (("h", 0.1), ("i", 0.25))),
        Utterance("a.wav", str(tmp_path / "a.wav"), 2.0, "train"),
    ]


def test_only_the_named_splits_are_given(tmp_path: Path) -> None:
    rows = [{"path": f"{i}.wav", "duration_s": 1, "split": split} for i, split in enumerate("abcab")]
    write_manifest(tmp_path, *rows)
    assert [utterance.id for utterance in read_corpus(tmp_path, ["c", "a"])] == ["0.wav", "2.wav", "3.wav"]


def test_a_missing_split_lists_those_there_are(tmp_path: Path) -> None:
    splits = enumerate(("train", "dev", "train"))
    write_manifest(tmp_path, *({"path": f"{i}.wav", "duration_s": 1, "split": split} for i, split in splits))
    with pytest.raises(CorpusError, match="has no split test, tset; it has dev, train$"):
        read_corpus(tmp_path, ["test", "dev", "tset"])


BAD_LINES = [
    '{"path": "b.wav", "duration_s": 1',
    '{"duration_s": 1}',
    '{"path": "b.wav"}',
    '{"path": "b.wav", "duration_s": "long"}',
    '{"path": "b.wav", "duration_s": null}',
    '{"path": "b.wav", "duration_s": 1, "phones": [["a"]]}',
    "not json",
    '["b.wav", 1]',
    '"b.wav"',
]


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_row_names_file_and_row(tmp_path: Path, line: str) -> None:
    write_manifest(tmp_path, {"path": "a.wav", "duration_s": 1}, line)
    with pytest.raises(CorpusError, match=r"manifest\.jsonl, row 2: .*, expected "):
        read_corpus(tmp_path)


def test_a_text_may_hold_any_character(tmp_path: Path) -> None:
    text = "a\u2028b\u0085c"  # line ends for str.splitlines, but not for JSON
    row = json.dumps({"path": "a.wav", "duration_s": 1, "text": text}, ensure_ascii=False)
    (tmp_path / "a.wav").touch()
    write_manifest(tmp_path, row)
    assert [utterance.text for utterance in read_corpus(tmp_path)] == [text]


def write_csv(folder: Path, rows: list[dict], encoding: str = "utf-8") -> None:
    with (folder / "manifest.csv").open("w", encoding=encoding, newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_csv_manifest_says_the_same_as_its_lines_in_json(tmp_path: Path, encoding: str) -> None:
    rows = [
        {"id": "u1", "path": "x/b.wav", "duration_s": 0.25, "split": "dev", "text": 'hé, "you"', "speaker": "s"},
        {"path": "a.wav", "duration_s": 2},
        {"path": "c.wav", "duration_s": 1.5, "text": "two\nlines", "speaker": "84"},
        {"path": "d.wav", "duration_s": 1, "text": ""},
    ]
    write_manifest(tmp_path, *rows)
    expected = read_corpus(tmp_path)
    write_csv(tmp_path, rows, encoding)
    assert read_corpus(tmp_path) == expected  # the JSON lines come first
    (tmp_path / "manifest.jsonl").unlink()
    assert read_corpus(tmp_path) == expected
    assert [utterance.text for utterance in expected] == ['hé, "you"', None, "two\nlines", None]
    assert read_corpus(tmp_path, ["dev"]) == expected[:1]


BAD_ROWS = {
    "b.wav,long,hi": r"duration_s is 'long', expected seconds above 0, such as 1\.5",
    "b.wav,,hi": "duration_s is '', expected seconds above 0",
    "b.wav": r"1 cells, expected 3 \(path, duration_s, text\)",
    "b.wav,1,yes, please": "4 cells, expected 3 .* into double quotes",
    ",1,hi": "path is '', expected text that is not empty",
    'b.wav,1,"hi': r"not CSV \(unexpected end of data\): close every quote",
    'b.wav,1,"hi\nc.wav,2,she said yes"': "text goes on for 2 lines with commas: close the quote",
    'b.wav,1,"hi" there': "not CSV .*close every quote, and double those",
}


@pytest.mark.parametrize("row", BAD_ROWS)
def test_a_bad_row_of_a_csv_manifest_is_named(tmp_path: Path, row: str) -> None:
    (tmp_path / "manifest.csv").write_text(f"path,duration_s,text\na.wav,1,\n\n{row}\n", encoding="utf-8")
    with pytest.raises(CorpusError, match=rf"manifest\.csv, row 2 \(line 4\): {BAD_ROWS[row]}"):
        read_corpus(tmp_path)


@pytest.mark.parametrize("cells", [{"text": 10**400}, {"phones": [["HH", 0.1], ["AY", 10**400]]}])
def test_a_number_of_many_digits_is_named(tmp_path: Path, cells: dict) -> None:
    (tmp_path / "manifest.jsonl").write_text(json.dumps({"path": "a.wav", "duration_s": 1} | cells), encoding="utf-8")
    with pytest.raises(CorpusError, match=r"manifest\.jsonl, row 1: .*0\.\.\., expected a smaller number"):
        read_corpus(tmp_path)


def test_an_alignment_cannot_stand_in_csv(tmp_path: Path) -> None:
    (tmp_path / "manifest.csv").write_text("path,duration_s,phones\na.wav,1,an alignment\n", encoding="utf-8")
    with pytest.raises(CorpusError, match="phones is 'an alignment', expected pairs of a symbol .* in JSON lines"):
        read_corpus(tmp_path)


@pytest.mark.parametrize("header", ["path,text,duration_s,text", " path , text,duration_s,path"])
def test_a_column_that_occurs_twice_is_refused(tmp_path: Path, header: str) -> None:
    (tmp_path / "manifest.csv").write_text(f"{header}\na.wav,b,1,c\n", encoding="utf-8")
    with pytest.raises(CorpusError, match=r"manifest\.csv, header: column (text|path) occurs more than once"):
        read_corpus(tmp_path)


def test_a_csv_manifest_without_its_header_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.csv").write_text("a.wav,1\nb.wav,2\n", encoding="utf-8")
    message = r"csv, row 1 \(line 2\): no path \(there is a\.wav, 1\), expected the name of a file"
    with pytest.raises(CorpusError, match=message):
        read_corpus(tmp_path)


def test_librispeech_layout_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split, speaker in (("dev-clean", "84"), ("train-clean-100", "7")):
        chapter = tmp_path / "LibriSpeech" / split / speaker / "121"
        names = [f"{speaker}-121-000{n}" for n in range(2)]
        for name, seconds in zip(names, (0.5, 0.25), strict=True):
            write_ramp(chapter / f"{name}.flac", seconds)
        lines = f"{names[0]} GO DO YOU HEAR\n{names[1]} YES\n"
        (chapter / f"{speaker}-121.trans.txt").write_text(lines, encoding="utf-8")
    found = read_corpus(tmp_path)
    assert [utterance.id for utterance in found] == ["84-121-0000", "84-121-0001", "7-121-0000", "7-121-0001"]
    path = tmp_path / "LibriSpeech/dev-clean/84/121/84-121-0000.flac"
    assert found[0] == Utterance("84-121-0000", str(path), 0.5, "dev-clean", "GO DO YOU HEAR", "84")
    assert read_corpus(tmp_path / "LibriSpeech") == found
    opened, duration = [], corpus_module._flac_duration
    monkeypatch.setattr(corpus_module, "_flac_duration", lambda path: opened.append(str(path)) or duration(path))
    assert read_corpus(tmp_path, ["train-clean-100"]) == found[2:]
    assert sorted(opened) == [utterance.path for utterance in found[2:]]  # and none of the 280,000 of other splits


def test_a_transcript_without_its_recording_is_named(tmp_path: Path) -> None:
    chapter = tmp_path / "dev/84/121"
    chapter.mkdir(parents=True)
    (chapter / "84-121.trans.txt").write_text("84-121-0000 GO\n", encoding="utf-8")
    with pytest.raises(CorpusError, match=r"1 of 1 recordings of split dev are missing .*84-121-0000\.flac"):
        read_corpus(tmp_path)


@pytest.mark.parametrize("rate, channels, samples", [(16_000, 1, 5_001), (44_100, 2, 12_345), (8_000, 1, 1)])
def test_a_duration_is_the_one_libsndfile_finds(tmp_path: Path, rate: int, channels: int, samples: int) -> None:
    chapter = tmp_path / "dev/84/121"
    chapter.mkdir(parents=True)
    (chapter / "84-121.trans.txt").write_text("84-121-0000 GO\n", encoding="utf-8")
    file = chapter / "84-121-0000.flac"
    soundfile.write(file, np.random.default_rng(0).uniform(-0.5, 0.5, (samples, channels)), rate)
    assert read_corpus(tmp_path)[0].duration_s == samples / rate == soundfile.info(file).duration
    plain = bytearray(file.read_bytes())
    tag = b"ID3\x04\0\0\0\0\0\x0a" + bytes(10)
    file.write_bytes(tag + plain)
    assert read_corpus(tmp_path)[0].duration_s == samples / rate
    plain[21] &= 0xF0  # the number of samples is unknown
    plain[22:26] = bytes(4)
    file.write_bytes(plain)
    assert read_corpus(tmp_path)[0].duration_s == samples / rate  # counted
    plain[21] |= 0x0F  # more than so few bytes can hold
    plain[22:26] = bytes([255] * 4)
    file.write_bytes(plain)
    assert read_corpus(tmp_path)[0].duration_s == samples / rate


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    chapter = tmp_path / "dev/84/121"
    chapter.mkdir(parents=True)
    (chapter / "84-121.trans.txt").write_text("84-121-0000 GO\n", encoding="utf-8")
    os.mkfifo(chapter / "84-121-0000.flac")
    with pytest.raises(CorpusError, match=r"84-121-0000\.flac"):
        read_corpus(tmp_path)


@pytest.mark.parametrize("content", [b"", b"fLaC", b"<html>not found</html> and so on"])
def test_a_recording_that_is_no_flac_is_named(tmp_path: Path, content: bytes) -> None:
    chapter = tmp_path / "dev/84/121"
    chapter.mkdir(parents=True)
    (chapter / "84-121.trans.txt").write_text("84-121-0000 GO\n", encoding="utf-8")
    (chapter / "84-121-0000.flac").write_bytes(content)
    with pytest.raises(CorpusError, match=r"or unreadable, the first is .*84-121-0000\.flac, .*: fetch them again"):
        read_corpus(tmp_path)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="nowhere: no such corpus folder"):
        read_corpus(tmp_path / "nowhere")


@pytest.mark.parametrize("manifest", ["", "\n \n"])
def test_an_empty_manifest_is_refused(tmp_path: Path, manifest: str) -> None:
    for name in ("manifest.csv", "manifest.jsonl"):
        (tmp_path / name).write_text(manifest, encoding="utf-8")
        with pytest.raises(CorpusError, match=f"{name} holds no utterances, expected a row for each recording"):
            read_corpus(tmp_path)


def test_a_folder_without_utterances_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"neither a manifest\.jsonl or manifest\.csv with utterances nor LibriSp"):
        read_corpus(tmp_path)


def test_the_phone_of_a_frame_is_the_one_at_its_centre() -> None:
    utterance = Utterance("u", "u.wav", 0.12, "train", phones=(("a", 0.025), ("b", 0.051), ("c", 0.1)))
    assert frame_phones(utterance, 5) == ["a", "b", "b", "c", "c"]  # centres 0.01, 0.03, 0.05, 0.07, 0.09 s
    assert frame_phones(utterance, 2, frame_rate=10) == ["b", "c"]
    assert frame_phones(utterance, 9)[5:] == ["c"] * 4  # after the end the last one continues


def test_an_alignment_is_a_sequence_of_pairs_in_little_memory() -> None:
    pairs = tuple((f"P{i % 40}", i / 100) for i in range(1000))
    phones = Phones(*zip(*pairs, strict=True))
    assert phones == pairs == tuple(phones) and len(phones) == 1000 and hash(phones) == hash(pairs)
    assert (phones[-1], phones[3:9]) == (pairs[-1], pairs[3:9])
    assert pickle.loads(pickle.dumps(phones)) == phones != Phones(["a"], [0.1])
    assert sys.getsizeof(phones) + sys.getsizeof(phones.symbols) + sys.getsizeof(phones.ends) < 17 * len(pairs)
    assert phones.symbols[0] is phones.symbols[40]


def crop_start(item: dict[str, object]) -> int:
    return round(float(item["waveform"][0]) * 32768) - 1


def test_a_crop_is_the_recording_from_one_place_on(utterances: list[Utterance]) -> None:
    crops = Crops(utterances, crop_s=0.4)
    for index in range(15):
        item = crops[index]
        assert item["waveform"].shape == (6_400,)
        length, start = item["length"], crop_start(item)
        whole = load_audio(utterances[item["utterance"]].path)
        assert length == min(6_400, len(whole))
        assert torch.equal(item["waveform"][:length], whole[start : start + length])


def test_short_utterances_are_padded_with_zeros_and_keep_their_length(utterances: list[Utterance]) -> None:
    crops = Crops(utterances, crop_s=0.4)
    short = [item for item in (crops[index] for index in range(5)) if item["utterance"] == 1]
    assert [(item["length"], crop_start(item)) for item in short] == [(4_000, 0)]
    assert not short[0]["waveform"][4_000:].any()


def test_an_item_depends_on_its_index_only(utterances: list[Utterance]) -> None:
    order = list(range(17))
    one = [Crops(utterances, 0.4, seed=3)[index] for index in order]
    again = Crops(utterances, 0.4, seed=3)
    for index in [*reversed(order), 11, 2, 11]:
        assert again[index]["utterance"] == one[index]["utterance"]
        assert torch.equal(again[index]["waveform"], one[index]["waveform"])


def test_every_epoch_visits_utterances_by_their_duration_in_a_new_order(utterances: list[Utterance]) -> None:
    crops = Crops(utterances, 0.1)
    seconds = sum(utterance.duration_s for utterance in utterances)
    size = math.ceil(seconds / 0.1)
    epochs = [tuple(crops[size * epoch + i]["utterance"] for i in range(size)) for epoch in range(4)]
    for epoch in epochs:
        for number, utterance in enumerate(utterances):
            assert abs(epoch.count(number) - size * utterance.duration_s / seconds) < 2
    assert len(set(epochs)) == 4


def test_crops_move_over_the_whole_recording(utterances: list[Utterance]) -> None:
    crops = Crops(utterances[2:3], crop_s=0.5)  # 2 s: starts from 0 to 1.5 s
    starts = np.array([crop_start(crops[index]) for index in range(60)])
    assert starts.min() < 4_000 and starts.max() > 20_000
    assert starts.max() <= 24_000


class Silence:
    """A cache whose features are zero."""

    hop = 320

    def crop(self, utterance: Utterance, start_frame: int, frames: int) -> torch.Tensor:
        return torch.zeros(frames, 1)


def test_crops_start_anywhere_but_with_features_on_whole_codec_frames(utterances: list[Utterance]) -> None:
    for caches, whole in ((None, False), ({"semantic": Silence()}, True)):
        crops = Crops(utterances, crop_s=0.123, caches=caches)
        starts = [crop_start(crops[index]) for index in range(40)]
        assert all(start % 320 == 0 for start in starts) == whole
        assert len(set(starts)) > 20


def test_the_last_crop_ends_with_the_recording(utterances: list[Utterance]) -> None:
    crops = Crops(utterances[1:2], crop_s=0.23, caches={"semantic": Silence()})  # 0.25 s: 0 and 320 are the only starts
    items = [crops[index] for index in range(20)]
    assert {crop_start(item) for item in items} == {0, 320}
    assert all(item["length"] == 3_680 for item in items)


def test_another_seed_gives_other_crops(utterances: list[Utterance]) -> None:
    drawn = [[crop_start(Crops(utterances, 0.4, seed=seed)[index]) for index in range(10)] for seed in (0, 1)]
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize(
    "hundredths",
    [29, 110, 230, 403],
)
def test_a_crop_has_as_many_samples_as_its_duration_says(utterances: list[Utterance], hundredths: int) -> None:
    assert len(Crops(utterances, crop_s=hundredths / 100)[0]["waveform"]) == hundredths * 160


def test_an_unusable_recording_is_skipped_with_a_warning_and_replaced_by_another(
    utterances: list[Utterance], tmp_path: Path
) -> None:
    (tmp_path / "broken.wav").write_text("not a sound")
    broken = Utterance("broken", str(tmp_path / "broken.wav"), 1.0, "train")
    crops = Crops([utterances[0], broken, utterances[2]], crop_s=0.4, skipped=tmp_path / "skipped.jsonl")
    with pytest.warns(UserWarning, match=r"skipped: .*broken\.wav: not a readable audio file"):
        items = [crops[index] for index in range(30)]
    numbers = [item["utterance"] for item in items]
    assert set(numbers) == {0, 2}
    rows = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {(row["path"], row["reason"]) for row in rows} == {(broken.path, "unreadable")}
    assert min(numbers.count(0), numbers.count(2)) > 5
    with pytest.warns(UserWarning, match="skipped"):
        again = [Crops(crops.utterances, crop_s=0.4)[index] for index in reversed(range(30))]
    for item, same in zip(items, reversed(again), strict=True):
        assert item["utterance"] == same["utterance"]
        assert item["length"] == same["length"] == 6_400
        assert torch.equal(item["waveform"], same["waveform"])


def test_a_recording_on_a_disk_that_fails_is_replaced_by_another(
    utterances: list[Utterance], tmp_path: Path, failing_disk: Callable
) -> None:
    crops = Crops(utterances[:2], crop_s=0.4, skipped=tmp_path / "skipped.jsonl")
    with failing_disk(utterances[0].path), pytest.warns(UserWarning, match="Input/output error"):
        assert {crops[index]["utterance"] for index in range(9)} == {1}
    assert {(row["id"], row["reason"]) for row in read_jsonl(tmp_path / "skipped.jsonl")} == {
        (utterances[0].id, "unreadable")
    }


def test_usable_recordings_come_whole_and_the_others_are_listed(utterances: list[Utterance], tmp_path: Path) -> None:
    gone = Utterance("gone", str(tmp_path / "gone.wav"), 1.0, "train")
    with pytest.warns(UserWarning, match=r"skipped: .*gone\.wav: no such audio file"):
        found = list(load_usable([gone, *utterances], 8_000, tmp_path / "skipped.jsonl"))
    assert [utterance for utterance, _ in found] == utterances
    for utterance, waveform in found:
        assert torch.equal(waveform, load_audio(utterance.path, 8_000))
    row = json.loads((tmp_path / "skipped.jsonl").read_text(encoding="utf-8"))
    detail = f"{gone.path}: no such audio file"
    assert row == {"id": "gone", "path": gone.path, "reason": "missing", "detail": detail}


def test_recordings_that_cannot_be_used_keep_their_place(utterances: list[Utterance], tmp_path: Path) -> None:
    gone = Utterance("gone", str(tmp_path / "gone.wav"), 1.0, "train")
    mixed = [gone, utterances[0], gone, *utterances[1:], gone]
    loaded = list(load_each(mixed))
    assert [utterance for utterance, _ in loaded] == mixed
    for utterance, found in loaded:
        if utterance is gone:
            assert isinstance(found, AudioError) and found.reason == "missing"
        else:
            assert torch.equal(found, load_audio(utterance.path))


def test_threads_read_the_crops_that_one_alone_reads(utterances: list[Utterance]) -> None:
    crops = Crops(utterances, 0.3, seed=1)
    numbers = [crops.per_epoch * (i % 7) + i for i in range(40)]  # of many epochs at once
    for number, item in zip(numbers, prefetch(crops.__getitem__, numbers), strict=True):
        assert torch.equal(item["waveform"], Crops(utterances, 0.3, seed=1)[number]["waveform"])


@pytest.mark.filterwarnings("ignore:skipped")
def test_a_corpus_of_unusable_recordings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"recordings in a row cannot be used; the last one is .*gone\.wav"):
        Crops([Utterance("gone", str(tmp_path / "gone.wav"), 1.0, "train")], 0.4)[0]


def test_crops_need_an_utterance() -> None:
    with pytest.raises(CorpusError, match="no utterances"):
        Crops([], 1.0)


def test_shares_of_two_processes_make_the_batch_of_one() -> None:
    whole = list(StepSampler(6, 2, 5))
    shares = [list(StepSampler(6, 2, 5, process, 2)) for process in range(2)]
    assert [a + b for a, b in zip(*shares, strict=True)] == whole
    assert whole == [[12, 13, 14, 15, 16, 17], [18, 19, 20, 21, 22, 23], [24, 25, 26, 27, 28, 29]]


def test_a_resumed_run_sees_the_batches_that_were_left(utterances: list[Utterance]) -> None:
    def batches(start: int) -> list[dict[str, torch.Tensor]]:
        sampler = StepSampler(3, start, 6)
        assert len(sampler) == 6 - start
        return list(DataLoader(Crops(utterances, 0.3, seed=1), batch_sampler=sampler))

    full, resumed = batches(0), batches(4)
    assert len(full) == 6
    assert len(resumed) == 2
    for a, b in zip(full[4:], resumed, strict=True):
        assert a["waveform"].shape == (3, 4_800)
        assert torch.equal(a["waveform"], b["waveform"])
        assert torch.equal(a["length"], b["length"])


def test_a_batch_that_cannot_be_shared_equally_is_refused() -> None:
    with pytest.raises(InputError, match="batch_size 7 must be a multiple of the number of processes, 2"):
        StepSampler(7, 0, 1, 0, 2)


def test_there_is_a_cpu() -> None:
    assert available_cpus() >= 1


# ---- several corpora as one


def two_corpora(folder: Path) -> tuple[Path, Path]:
    """Both with an utterance u1 of a speaker 7; the splits and speakers of the other utterances differ."""
    first, second = folder / "a, b", folder / "c"
    row = {"path": "1.wav", "duration_s": 1, "id": "u1", "speaker": "7"}
    for place, split, other in ((first, "dev", {"id": "u2", "speaker": "8"}), (second, "test", {"id": "u3"})):
        place.mkdir()
        write_manifest(place, {**row, "split": "train"}, {"path": "2.wav", "duration_s": 2, "split": split, **other})
    return first, second


def test_several_corpora_are_joined_and_only_shared_names_get_their_folder(tmp_path: Path) -> None:
    first, second = two_corpora(tmp_path)
    found = read_corpus([first, str(second)])
    names = [("a, b/u1", "a, b/7"), ("u2", "8"), ("c/u1", "c/7"), ("u3", None)]
    assert [(one.id, one.speaker) for one in found] == names
    assert [Path(one.path) for one in found] == [place / f"{n}.wav" for place in (first, second) for n in (1, 2)]
    assert read_corpus([first, second], ["test", "train"]) == [found[0], *found[2:]]
    assert read_corpus([first, second], ["dev"]) == found[1:2]  # u1 is called the same whatever is asked for
    assert read_corpus([second, first]) == [*found[2:], *found[:2]]
    assert read_corpus([first]) == read_corpus(first) and read_corpus(first)[0].id == "u1"


def test_each_split_of_each_corpus_is_counted_and_then_the_sum(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = two_corpora(tmp_path)
    with caplog.at_level("INFO", logger="tokenizer"):
        read_corpus([first, second], ["train", "test"])
    one = "1 utterances, 0.00 h, 1 speakers, 0 with text"
    assert caplog.messages == [
        f"{first / 'manifest.jsonl'}, train: {one}",
        f"{second / 'manifest.jsonl'}, train: {one}",
        f"{second / 'manifest.jsonl'}, test: 1 utterances, 0.00 h, 0 speakers, 0 with text",
        "together, train: 2 utterances, 0.00 h, 2 speakers, 0 with text",
        "together, test: 1 utterances, 0.00 h, 0 speakers, 0 with text",
    ]


def test_a_split_must_be_in_one_of_the_corpora(tmp_path: Path) -> None:
    first, second = two_corpora(tmp_path)
    with pytest.raises(CorpusError, match="a, b, .*c have no split tset; they have dev, test, train$"):
        read_corpus([first, second], ["dev", "test", "tset"])


def test_folders_of_one_name_are_told_apart_by_those_above(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    for folder in (tmp_path / "corpus", tmp_path / "x" / "corpus"):
        folder.mkdir()
        write_manifest(folder, {"path": "1.wav", "duration_s": 1})
    found = [one.id for one in read_corpus([tmp_path / "corpus", tmp_path / "x/corpus"])]
    assert found == [f"{tmp_path.name}/corpus/1.wav", "x/corpus/1.wav"]


def test_what_would_be_there_twice_is_refused(tmp_path: Path) -> None:
    first, second = two_corpora(tmp_path)
    with pytest.raises(CorpusError, match="a corpus is given twice"):
        read_corpus([first, second, tmp_path / "c" / ".." / "c"])
    aligned = tmp_path / "aligned"
    aligned.mkdir()
    row = {"path": str(first / "1.wav"), "duration_s": 1, "id": "u1"}
    (aligned / "manifest.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(CorpusError, match=r"two of them hold the recording .*1\.wav as u1"):
        read_corpus([first, aligned])
    other = tmp_path / "other"
    other.mkdir()
    write_manifest(other, {"path": "1.wav", "duration_s": 1, "id": "c/u1"})
    with pytest.raises(CorpusError, match="two utterances would be called c/u1: rename a folder"):
        read_corpus([first, second, other])


def test_folders_named_without_brackets_are_pointed_to_them(tmp_path: Path) -> None:
    first, second = two_corpora(tmp_path)
    with pytest.raises(CorpusError, match=r"no such corpus folder .*; several are \[A, B\]"):
        read_corpus(f"{first},{second}")
