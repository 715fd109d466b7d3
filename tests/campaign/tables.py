"""Corpora of users: manifests, and the folders of LibriSpeech and RAVDESS; errors name file and row."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile
from judge import Case, Outcome, accepted, refused, skipped
from parts import ENCODE, RATE, SPEAKER, emotion, read_json, tone

from speechllm.data.shards import open_shard

ENCODE_MINE = "encode_speech.py codec=tokenizer/model data=mine output=new"
Write = Callable[[Path], object]
SECONDS = 0.5
ROW = {"path": "u0.wav", "duration_s": SECONDS, "text": "ONE TWO", "speaker": "s0", "split": "train"}


def sounds(folder: Path, *names: str) -> None:
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / name, tone(SECONDS, i), RATE)


def jsonl(*last: dict[str, object] | str | bytes, name: str = "manifest.jsonl") -> Write:
    """A corpus in `mine` with two good rows and these, rows or whole lines."""

    def write(folder: Path) -> None:
        sounds(folder / "mine", "u0.wav", "u1.wav", "u2.wav")
        good = [{**ROW, "path": f"u{i}.wav", "speaker": f"s{i}"} for i in range(2)]
        lines = [line if isinstance(line, str | bytes) else json.dumps(line) for line in (*good, *last)]
        content = b"".join(
            (line if isinstance(line, bytes) else line.encode("utf-8", "surrogatepass")) + b"\n" for line in lines
        )
        (folder / "mine" / name).write_bytes(content)

    return write


def third(**changed: object) -> Write:
    """The third row is good but for this."""
    row = {**ROW, "path": "u2.wav", "speaker": "s2", **changed}
    return jsonl({key: value for key, value in row.items() if value is not ...})


def csv(text: str, encoding: str = "utf-8") -> Write:
    """A corpus in `mine` of three recordings with this manifest.csv."""

    def write(folder: Path) -> None:
        sounds(folder / "mine", "u0.wav", "u1.wav", "u2.wav")
        (folder / "mine" / "manifest.csv").write_bytes(text.encode(encoding))

    return write


HEAD = "path,duration_s,text,speaker\n"


def rows_of(folder: Path) -> list[dict[str, object]]:
    return [row for file in sorted((folder / "new").glob("codes_*.arrow")) for row in open_shard(file).to_pylist()]


def with_rows(count: int, **last: object) -> Outcome:
    """So many rows are encoded, the last with these values."""

    def check(folder: Path, _: str) -> bool:
        rows = rows_of(folder)
        return len(rows) == count and all(rows[-1][key] == value for key, value in last.items())

    return accepted(check)


def row_skipped(folder: Path, _: str) -> bool:
    done = read_json(folder / "new" / "done.json")
    return done["utterances"] == 2 and sum(done["skipped"].values()) == 1


ROW_3 = r"manifest\.(jsonl|csv).*(row|line) 3"


def row(name: str, write: Write, *outcomes: Outcome) -> Case:
    """A corpus with a third row that is refused with file and row, unless something else is right."""
    return Case(name, ENCODE_MINE, outcomes or (refused(ROW_3),), "tokenizer", write)


def librispeech(*splits: str, beside: Write | None = None) -> Write:
    """Two chapters a split, each of two recordings."""

    def write(folder: Path) -> None:
        for number, split in enumerate(splits):
            for speaker in (f"{84 + number}", f"{7 + number}"):
                chapter = folder / "mine" / split / speaker / "1"
                names = [f"{speaker}-1-{i:04}" for i in range(2)]
                sounds(chapter, *(f"{name}.flac" for name in names))
                (chapter / f"{speaker}-1.trans.txt").write_text("".join(f"{name} ONE TWO\n" for name in names))
        if beside:
            beside(folder / "mine")

    return write


def linked_split(folder: Path) -> None:
    """A split that lies elsewhere."""
    shutil.move(folder / "dev-clean", folder.parent / "elsewhere")
    (folder / "dev-clean").symlink_to(folder.parent / "elsewhere")


FIRST = "train-clean-100/84/1/84-1-0000.flac"
TRANSCRIPT = "train-clean-100/84/1/84-1.trans.txt"


def mac_files(folder: Path) -> None:
    """As macOS leaves them on disks of other systems."""
    for path in [*folder.rglob("*.flac"), *folder.rglob("*.txt"), *folder.rglob("*.wav")]:
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X        ")


def most_missing(folder: Path) -> None:
    for path in sorted(folder.rglob("*.flac"))[1:]:
        path.unlink()


def ravdess(*places: str, beside: Write | None = None) -> Write:
    def write(folder: Path) -> None:
        for place in places:
            names = [emotion.ravdess_id(kind, 1) for kind in emotion.EMOTIONS]
            sounds(folder / "mine" / place, *(f"Actor_01/{name}.wav" for name in names))
        if beside:
            beside(folder / "mine")

    return write


def repaired(folder: Path) -> None:
    sounds(folder / "mine", "u0.wav", "u1.wav", "u2.wav")


def broken_third(folder: Path) -> None:
    third()(folder)
    (folder / "mine" / "u2.wav").write_text("not a sound")


def replaced(folder: Path) -> None:
    """Another recording of the same length and name; what was encoded before is kept to compare with."""
    shutil.copy(folder / "new" / "codes_00000.arrow", folder / "before.arrow")
    noise = np.random.default_rng(0).normal(0, 0.1, round(SECONDS * RATE))
    soundfile.write(folder / "mine" / "u2.wav", noise, RATE)


def encoded_again(folder: Path, _: str) -> bool:
    """The shard is of the new content; the codes of so small a codec need not differ."""
    files = folder / "before.arrow", folder / "new" / "codes_00000.arrow"
    before, after = (json.loads(open_shard(file).schema.metadata[b"recordings"])["content"] for file in files)
    return before != after and [row["id"] for row in rows_of(folder)] == ["u0.wav", "u1.wav", "u2.wav"]


NOT_UTF8 = r"manifest\.(csv|jsonl).*(utf|encod)"
COUNTS = r"train.*12.*dev.*6.*test.*6|12 utt|12.*(hours|h\b).*3 speakers"
CASES = (
    # ---- types
    row("a speaker that is a number", third(speaker=84), with_rows(3, speaker="84"), refused(ROW_3)),
    row("speaker 0", third(speaker=0), with_rows(3, speaker="0"), refused(ROW_3)),
    row("id 0", third(id=0), with_rows(3, id="0"), refused(ROW_3)),
    row("a text that is a number", third(text=5), with_rows(3, text="5"), refused(ROW_3)),
    row("text 0", third(text=0), with_rows(3, text="0"), refused(ROW_3)),
    row("a text that is a list", third(text=["ONE"])),
    row("a text that is an object", third(text={"en": "ONE"})),
    row("a split that is a number", third(split=1), with_rows(3, split="1"), refused(ROW_3)),
    row("a path that is a number", third(path=5), refused(ROW_3)),
    row("a path that is null", third(path=None)),
    row("an empty path", third(path="")),
    row("no path", third(path=...)),
    row("no duration", third(duration_s=...), refused(ROW_3), with_rows(3)),
    row("a duration in words", third(duration_s="half a second")),
    row("a negative duration", third(duration_s=-1), refused(ROW_3), with_rows(3)),
    row("an infinite duration", third(duration_s=float("inf")), refused(ROW_3), with_rows(3)),
    row("a duration that is NaN", third(duration_s=float("nan")), refused(ROW_3), with_rows(3)),
    row("a duration that is true", third(duration_s=True), refused(ROW_3), with_rows(3)),
    row("phones that end in words", third(phones=[["A", "x"]])),
    row("phones that are a text", third(phones="A B")),
    row("phones that go back in time", third(phones=[["A", 0.4], ["B", 0.1]])),
    row("a speaker that is a list", third(speaker=["a"])),
    row("a row that is a list", jsonl("[1, 2]")),
    row("a row that is null", jsonl("null")),
    row("a row that is cut", jsonl('{"path": "u2.wav", "dura')),
    row("two objects in a line", jsonl(json.dumps(ROW) * 2)),
    row(
        "half of a surrogate pair in a text", third(text="A \ud800"), refused(ROW_3), with_rows(3), skipped(row_skipped)
    ),
    row("NUL in a text", third(text="A\0B"), refused(ROW_3), with_rows(3)),
    row("NUL in a path", third(path="u2\0.wav"), refused(ROW_3), skipped(row_skipped)),
    row(
        "the same id twice",
        third(id="u1.wav"),
        refused("u1.wav.*is that of .*row 2"),
    ),
    row("the same recording twice", third(path="u1.wav"), refused("u1.wav")),
    # ---- the whole file
    row(
        "a list instead of lines",
        lambda folder: (third()(folder), (folder / "mine/manifest.jsonl").write_text(json.dumps([ROW, ROW], indent=1))),
        refused("manifest.jsonl"),
    ),
    row("a blank line in the middle", jsonl("", {**ROW, "path": "u2.wav"}), with_rows(3)),
    row("blank lines at the end", jsonl({**ROW, "path": "u2.wav"}, "", "  "), with_rows(3)),
    row("lines that end as on Windows", jsonl(json.dumps({**ROW, "path": "u2.wav"}) + "\r"), with_rows(3)),
    row(
        "a manifest.jsonl in UTF-16",
        lambda folder: (
            third()(folder),
            (folder / "mine/manifest.jsonl").write_text(json.dumps(ROW) + "\n", encoding="utf-16"),
        ),
        refused(NOT_UTF8),
        with_rows(1),
    ),
    row(
        "a manifest.jsonl in cp1252",
        jsonl(json.dumps({**ROW, "path": "u2.wav", "text": "ÉTÉ"}, ensure_ascii=False).encode("cp1252")),
        refused(NOT_UTF8),
    ),
    row(
        "a manifest.jsonl with a byte order mark",
        lambda folder: (
            third()(folder),
            (folder / "mine/manifest.jsonl").write_text(
                json.dumps({**ROW, "path": "u2.wav"}) + "\n", encoding="utf-8-sig"
            ),
        ),
        with_rows(1),
    ),
    row(
        "an empty manifest",
        lambda folder: (third()(folder), (folder / "mine/manifest.jsonl").write_text("")),
        refused("manifest"),
    ),
    row(
        "a manifest that is a folder",
        lambda folder: (folder / "mine/manifest.jsonl").mkdir(parents=True),
        refused("manifest"),
    ),
    row("a manifest that is gzip", jsonl(b"\x1f\x8b\x08\0\0\0\0\0"), refused("manifest")),
    # ---- CSV
    row(
        "CSV with a comma in a text without quotes",
        csv(HEAD + "u0.wav,0.5,ONE,s\nu1.wav,0.5,ONE,s\nu2.wav,0.5,ONE, TWO,s\n"),
        refused("manifest.csv.*(row|line) [34]"),
    ),
    row(
        "CSV with an open quote",
        csv(HEAD + 'u0.wav,0.5,"ONE,s\nu1.wav,0.5,ONE,s\nu2.wav,0.5,ONE,s\n'),
        refused("manifest.csv.*(row|line) [12]"),
    ),
    row(
        "CSV with a row too short",
        csv(HEAD + "u0.wav,0.5,ONE,s\nu1.wav,0.5\nu2.wav,0.5,ONE,s\n"),
        refused("manifest.csv.*(row|line) [23]"),
    ),
    row(
        "CSV with semicolons",
        csv((HEAD + "u0.wav,0.5,ONE,s\n").replace(",", ";")),
        refused("manifest.csv"),
        with_rows(1),
    ),
    row("CSV with tabs", csv((HEAD + "u0.wav,0.5,ONE,s\n").replace(",", "\t")), refused("manifest.csv"), with_rows(1)),
    row("CSV without a header", csv("u0.wav,0.5,ONE,s\nu1.wav,0.5,ONE,s\n"), refused("manifest.csv")),
    row("CSV with a header only", csv(HEAD), refused("manifest.csv")),
    row(
        "CSV with a column twice", csv("path,duration_s,text,text\nu0.wav,0.5,ONE,TWO\n"), refused("manifest.csv.*text")
    ),
    row(
        "CSV with blank lines",
        csv(HEAD + "u0.wav,0.5,ONE,s\n\nu1.wav,0.5,TWO,s\n\n"),
        with_rows(2, text="two"),
        with_rows(2, text="TWO"),
    ),
    row("CSV in cp1252", csv(HEAD + "u0.wav,0.5,ÉTÉ,s\n", "cp1252"), refused(NOT_UTF8)),
    row("CSV in UTF-16", csv(HEAD + "u0.wav,0.5,ONE,s\n", "utf-16"), refused(NOT_UTF8), with_rows(1)),
    row("CSV with a decimal comma", csv(HEAD + 'u0.wav,"0,5",ONE,s\n'), refused("manifest.csv.*(row|line) [12]")),
    row("CSV with a comma in quotes", csv(HEAD + 'u0.wav,0.5,"ONE, TWO",s\n'), with_rows(1, speaker="s")),
    row(
        "CSV with a line break in quotes",
        csv(HEAD + 'u0.wav,0.5,"ONE\nTWO",s\n'),
        with_rows(1, speaker="s"),
        refused("manifest.csv"),
    ),
    # ---- durations against the files
    Case(
        "a duration ten times too long, for a teacher",
        f"{SPEAKER} data=mine splits=null dev_splits=null output=new crop_s=0.4",
        (accepted(lambda at, _: (at / "new/done.json").exists()), refused("u2.wav.*(duration|states|long)|duration")),
        "",
        third(duration_s=5.0),
    ),
    Case(
        "all durations a hundred times too long, for a teacher",
        f"{SPEAKER} data=mine splits=null dev_splits=null output=new crop_s=0.4 max_duration_s=100",
        (accepted(lambda at, _: (at / "new/done.json").exists()), refused("duration")),
        "",
        jsonl(*({**ROW, "path": f"u{i}.wav", "id": f"x{i}", "speaker": f"s{i}", "duration_s": 50.0} for i in range(3))),
    ),
    Case(
        "a duration of zero, for a teacher",
        f"{SPEAKER} data=mine splits=null dev_splits=null output=new crop_s=0.4",
        (accepted(), refused("duration")),
        "",
        third(duration_s=0),
    ),
    # ---- LibriSpeech and RAVDESS
    Case(
        "a split that is a link",
        "encode_speech.py codec=tokenizer/model data=mine output=new",
        accepted(lambda at, _: {r["split"] for r in rows_of(at)} == {"train-clean-100", "dev-clean"}),
        "tokenizer",
        librispeech("train-clean-100", "dev-clean", beside=linked_split),
    ),
    Case(
        "files of macOS in LibriSpeech",
        ENCODE_MINE,
        accepted(lambda at, _: len(rows_of(at)) == 4),
        "tokenizer",
        librispeech("train-clean-100", beside=mac_files),
    ),
    Case(
        "files of macOS in RAVDESS",
        ENCODE_MINE,
        accepted(lambda at, _: len(rows_of(at)) == 4),
        "tokenizer",
        ravdess("", beside=mac_files),
    ),
    Case(
        "a missing recording in LibriSpeech",
        ENCODE_MINE,
        skipped(lambda at, _: len(rows_of(at)) == 3, "84-1-0000|missing|skipped"),
        "tokenizer",
        librispeech("train-clean-100", beside=lambda mine: (mine / FIRST).unlink()),
    ),
    Case(
        "a cut recording in LibriSpeech",
        ENCODE_MINE,
        skipped(lambda at, _: len(rows_of(at)) == 3, "84-1-0000|unreadable|skipped"),
        "tokenizer",
        librispeech(
            "train-clean-100", beside=lambda mine: (mine / FIRST).write_bytes((mine / FIRST).read_bytes()[:3000])
        ),
    ),
    Case(
        "an empty recording in LibriSpeech",
        ENCODE_MINE,
        skipped(lambda at, _: len(rows_of(at)) == 3, "84-1-0000|unreadable|skipped"),
        "tokenizer",
        librispeech("train-clean-100", beside=lambda mine: (mine / FIRST).write_bytes(b"")),
    ),
    Case(
        "most recordings of LibriSpeech are missing",
        ENCODE_MINE,
        refused("missing|lack|not there|share|of 4"),
        "tokenizer",
        librispeech("train-clean-100", beside=most_missing),
    ),
    Case(
        "a transcript of LibriSpeech in UTF-16",
        ENCODE_MINE,
        (refused(r"84-1\.trans\.txt"), accepted()),
        "tokenizer",
        librispeech(
            "train-clean-100", beside=lambda mine: (mine / TRANSCRIPT).write_text("84-1-0000 ONE\n", encoding="utf-16")
        ),
    ),
    Case(
        "a blank line in a transcript of LibriSpeech",
        ENCODE_MINE,
        accepted(lambda at, _: len(rows_of(at)) == 4),
        "tokenizer",
        librispeech(
            "train-clean-100", beside=lambda mine: (mine / TRANSCRIPT).write_text("84-1-0000 ONE\n\n84-1-0001 TWO\n\n")
        ),
    ),
    Case(
        "a line twice in a transcript of LibriSpeech",
        ENCODE_MINE,
        refused("84-1-0000"),
        "tokenizer",
        librispeech(
            "train-clean-100",
            beside=lambda mine: (mine / TRANSCRIPT).write_text("84-1-0000 ONE\n84-1-0000 TWO\n84-1-0001 TWO\n"),
        ),
    ),
    Case(
        "a transcript without a text in LibriSpeech",
        ENCODE_MINE,
        (accepted(lambda at, _: len(rows_of(at)) == 4), refused(r"84-1\.trans\.txt")),
        "tokenizer",
        librispeech(
            "train-clean-100", beside=lambda mine: (mine / TRANSCRIPT).write_text("84-1-0000\n84-1-0001 TWO\n")
        ),
    ),
    Case(
        "RAVDESS with actors at two levels",
        ENCODE_MINE,
        (accepted(lambda at, _: len(rows_of(at)) == 4), refused("03-01-")),
        "tokenizer",
        ravdess("", "audio"),
    ),
    Case(
        "a cut recording in RAVDESS",
        ENCODE_MINE,
        skipped(lambda at, _: len(rows_of(at)) == 3, "skipped|unreadable"),
        "tokenizer",
        ravdess("", beside=lambda mine: next(mine.rglob("*.wav")).write_bytes(b"RIFF")),
    ),
    Case(
        "import_speech of a LibriSpeech tree",
        "import_speech.py data=mine output=new",
        refused(
            "no import|not needed|need(s)? no import|read as it is|directly|already",
            lambda at, _: not (at / "new").exists(),
        ),
        "",
        librispeech("train-clean-100"),
    ),
    Case(
        "import_speech of a corpus with a manifest",
        "import_speech.py data=corpus output=new",
        refused(
            "no import|not needed|need(s)? no import|read as it is|directly|already",
            lambda at, _: not (at / "new").exists(),
        ),
        "corpus",
    ),
    Case(
        "import_speech of an empty folder",
        "import_speech.py data=mine output=new",
        refused("mine", lambda at, _: not (at / "new").exists()),
        "",
        lambda folder: (folder / "mine").mkdir(),
    ),
    Case(
        "import_speech of a cut Parquet file",
        "import_speech.py data=shards output=new",
        refused("parquet|shards"),
        "shards",
        lambda folder: [os.truncate(file, 3000) for file in (folder / "shards").iterdir()],
    ),
    # ---- what is read is said; finished work is known by its content
    Case(
        "the splits of a corpus are counted aloud", f"{ENCODE} output=new", accepted(pattern=COUNTS), "tokenizer corpus"
    ),
    Case(
        "a repaired recording is encoded again",
        ENCODE_MINE,
        with_rows(3),
        "tokenizer",
        broken_third,
        (ENCODE_MINE,),
        repaired,
        changes=("new/*",),
    ),
    Case(
        "a replaced recording is encoded again",
        ENCODE_MINE,
        accepted(encoded_again),
        "tokenizer",
        third(),
        (ENCODE_MINE,),
        replaced,
        changes=("new/*",),
    ),
    Case(
        "a changed text is stored again, or refused",
        ENCODE_MINE,
        (with_rows(3, text="THREE"), with_rows(3, text="three"), refused("other speech|text|changed")),
        "tokenizer",
        third(),
        (ENCODE_MINE,),
        third(text="THREE"),
        changes=("new/*",),
    ),
    Case(
        "splits that are not there",
        f"{ENCODE} splits=[nowhere] output=new",
        refused("nowhere.*(has|train)"),
        "tokenizer corpus",
    ),
    Case(
        "an empty list of splits", f"{ENCODE} splits=[] output=new", refused("splits|no utterance"), "tokenizer corpus"
    ),
)
