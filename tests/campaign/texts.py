"""Predictions, texts and lines of codes: what is no such thing is refused with file and line."""

import json
from pathlib import Path

from judge import Case, accepted, refused
from parts import TEXT, read_json
from tables import Write, sounds


def predictions(name: str, *lines: dict[str, object] | str | bytes) -> Write:
    def write(folder: Path) -> None:
        texts = (
            line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
            for line in lines
        )
        (folder / name).write_bytes(b"".join(text + b"\n" for text in texts))

    return write


def both(*writes: Write) -> Write:
    return lambda folder: [write(folder) for write in writes]


A = {"id": "a", "reference": "one two", "hypothesis": "one two"}
GOOD = predictions("good.jsonl", A, {**A, "id": "b"})
COMPARE = "speechllm compare good.jsonl bad.jsonl"


def against(name: str, *lines: dict[str, object] | str | bytes, pattern: str = r"bad\.jsonl.*(line|row)") -> Case:
    return Case(name, COMPARE, refused(pattern), "", both(GOOD, predictions("bad.jsonl", *lines)))


def texts(reference: bytes, hypothesis: bytes) -> Write:
    return both(predictions("a.txt", reference), predictions("b.txt", hypothesis))


def code_line(**changed: object) -> Write:
    """A file of one good line of codes and one with changes."""

    def write(folder: Path) -> None:
        fingerprint = read_json(folder / "tokenizer" / "done.json")["fingerprint"]
        line = {"file": "x/a.wav", "codec": fingerprint, "samples": 640, "codes": [[0, 1], [2, 3]]}
        (folder / "codes.jsonl").write_text(
            json.dumps(line) + "\n" + json.dumps({**line, "file": "b.wav", **changed}) + "\n"
        )

    return write


def codes(name: str, **changed: object) -> Case:
    command = "speechllm decode codes.jsonl --codec tokenizer/model --output new"
    return Case(name, command, refused(r"(line|row) 2"), "tokenizer", code_line(**changed))


CASES = (
    # ---- predictions and texts
    against(
        "predictions with an id twice",
        A,
        {**A, "id": "b"},
        {**A, "id": "b", "hypothesis": "x"},
        pattern="bad.jsonl.*(twice|once|repeat|duplicate|unique|already|too)",
    ),
    against("predictions with a cut line", A, '{"id": "b", "refer'),
    against("predictions with a reference that is null", A, {**A, "id": "b", "reference": None}),
    against("predictions with a hypothesis that is a list", A, {**A, "id": "b", "hypothesis": ["one"]}),
    against("predictions of other utterances", A, {**A, "id": "c"}, pattern="only in"),
    against(
        "predictions against other references", A, {**A, "id": "b", "reference": "three"}, pattern="another reference"
    ),
    against(
        "predictions in cp1252",
        A,
        b'{"id": "b", "reference": "\xc9", "hypothesis": "x"}',
        pattern="bad.jsonl.*(utf|encod)",
    ),
    against("empty predictions", pattern="bad.jsonl"),
    Case(
        "predictions with a blank line",
        COMPARE,
        accepted(pattern="B - A"),
        "",
        both(GOOD, predictions("bad.jsonl", A, "", {**A, "id": "b"})),
    ),
    Case(
        "predictions that are a folder",
        "speechllm compare good.jsonl mine",
        refused("mine"),
        "",
        both(GOOD, lambda folder: (folder / "mine").mkdir()),
    ),
    Case(
        "wer of files of other lengths",
        "speechllm wer a.txt b.txt",
        refused("lines|references"),
        "",
        texts(b"one\ntwo", b"one"),
    ),
    Case(
        "wer of a file in cp1252",
        "speechllm wer a.txt b.txt",
        refused("a.txt.*(utf|encod)"),
        "",
        texts(b"\xc9t\xe9", b"ete"),
    ),
    Case(
        "wer of a file in UTF-16",
        "speechllm wer a.txt b.txt",
        refused("a.txt.*(utf|encod)"),
        "",
        texts("été".encode("utf-16"), b"ete"),
    ),
    Case(
        "wer of a file with a byte order mark",
        "speechllm wer a.txt b.txt",
        accepted(pattern=r"0\.00 ?%"),
        "",
        texts(b"\xef\xbb\xbfone", b"one"),
    ),
    Case(
        "wer of a file that ends as on Windows",
        "speechllm wer a.txt b.txt",
        accepted(pattern=r"0\.00 ?%"),
        "",
        texts(b"one\r\ntwo\r", b"one\ntwo"),
    ),
    Case(
        "wer of a recording",
        "speechllm wer a.wav a.wav",
        refused("a.wav.*(utf|text|encod)"),
        "",
        lambda folder: sounds(folder, "a.wav"),
    ),
    # ---- lines of codes
    codes("codes out of range", codes=[[0, 999], [1, 2]]),
    codes("negative codes", codes=[[0, -1], [1, 2]]),
    codes("codes of unequal layers", codes=[[0, 1], [2]]),
    codes("codes of more layers than the codec has", codes=[[0, 1]] * 9),
    codes("codes without layers", codes=[]),
    codes("codes that are numbers with a point", codes=[[0.5, 1.5], [1.5, 2.5]]),
    codes("codes that are words", codes="0 1 2"),
    codes("a negative number of samples", samples=-5),
    codes("a number of samples in words", samples="many"),
    codes("more samples than the codes have", samples=10**12),
    codes("codes of another codec", codec="0123456789abcdef"),
    codes("codes without a file name", file=""),
    codes("codes with a file name that leads elsewhere", file=None),
    Case(
        "codes that are a recording",
        "speechllm decode a.wav --codec tokenizer/model --output new",
        refused("a.wav"),
        "tokenizer",
        lambda folder: sounds(folder, "a.wav"),
    ),
    Case(
        "no codes at all",
        "speechllm decode codes.jsonl --codec tokenizer/model --output new",
        refused("codes.jsonl"),
        "tokenizer",
        lambda folder: (folder / "codes.jsonl").write_text(""),
    ),
    # ---- texts to learn from
    Case(
        "a text in cp1252",
        f"{TEXT} text=[bad.txt] output=new",
        refused("bad.txt"),
        "",
        lambda folder: (folder / "bad.txt").write_bytes(b"\xe9t\xe9 un deux\n" * 400),
    ),
    Case(
        "a recording for a text",
        f"{TEXT} text=[a.wav] output=new",
        refused("a.wav"),
        "",
        lambda folder: sounds(folder, "a.wav"),
    ),
    Case(
        "an empty text",
        f"{TEXT} text=[bad.txt] output=new",
        refused("bad.txt|text|sentence"),
        "",
        lambda folder: (folder / "bad.txt").write_text("\n\n"),
    ),
    Case(
        "a text shorter than a block",
        f"{TEXT} text=[bad.txt] output=new",
        refused("shorter|block|few"),
        "",
        lambda folder: (folder / "bad.txt").write_text("one two\n" * 3),
    ),
    Case("a text that is not there", f"{TEXT} text=[nowhere.txt] output=new", refused("nowhere.txt")),
    Case(
        "a .gz that is none",
        f"{TEXT} text=[bad.gz] output=new",
        refused("bad.gz"),
        "",
        lambda folder: (folder / "bad.gz").write_text("one two\n" * 400),
    ),
    Case(
        "a folder for a text",
        f"{TEXT} text=[mine] output=new",
        refused("mine"),
        "",
        lambda folder: (folder / "mine").mkdir(),
    ),
)
