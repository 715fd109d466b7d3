"""Recordings: what cannot be used is skipped and counted with a reason, what can be used is read as it is.

Most cases are a corpus of three good recordings and one other, which is encoded.
"""

import io
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile
from judge import SOME, Case, Outcome, accepted, refused, skipped
from parts import RATE, SPEAKER, TOKENIZER, UNITS, imports, read_json, tone

from speechllm.data.shards import open_shard

ENCODE = "encode_speech.py codec=tokenizer/model data=mine output=new"
SECONDS = 0.5
GOOD = tone(SECONDS, 9)
Make = Callable[[Path], object]


def manifest(folder: Path, rows: list[dict[str, object]]) -> None:
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def corpus_with(name: str, make: Make, duration_s: float = SECONDS, good: int = 3) -> Make:
    """A corpus in `mine` of good recordings and one of this name, which `make` writes."""

    def write(folder: Path) -> None:
        mine = folder / "mine"
        mine.mkdir()
        names = [f"u{i}.wav" for i in range(good)]
        for i, own in enumerate(names):
            soundfile.write(mine / own, tone(SECONDS, i), RATE)
        make(mine / name)
        row = {"text": "ONE TWO", "duration_s": SECONDS, "split": "train"}
        rows = [{**row, "path": own, "speaker": f"s{i % 2}"} for i, own in enumerate(names)]
        manifest(mine, [*rows, {**row, "path": name, "speaker": "s0", "duration_s": duration_s}])

    return write


def counted(reason: str = "") -> Outcome:
    """Three are encoded, one is skipped, for a reason."""

    def check(folder: Path, _: str) -> bool:
        done = read_json(folder / "new" / "done.json")
        row = json.loads((folder / "new" / "skipped.jsonl").read_text())
        found = done["utterances"] == 3 and sum(done["skipped"].values()) == 1 and bool(row["detail"])
        return found and (not reason or reason in row["reason"])

    return skipped(check)


def encoded(seconds: float = SECONDS, tolerance_s: float = 0.03) -> Outcome:
    """All four are encoded, the last with as many seconds as it holds."""

    def check(folder: Path, _: str) -> bool:
        rows = open_shard(folder / "new" / "codes_00000.arrow").to_pylist()
        return len(rows) == 4 and abs(rows[-1]["duration_s"] - seconds) <= tolerance_s

    return accepted(check)


def wave(samples: np.ndarray = GOOD, rate: int = RATE, **settings: str) -> Make:
    return lambda path: soundfile.write(path, samples, rate, **settings)


def cut(make: Make, share: float) -> Make:
    def write(path: Path) -> None:
        make(path)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])

    return write


def header(data: bytes, rate: int = RATE, channels: int = 1, kind: int = 1, bits: int = 16, size: int = -1) -> bytes:
    """A WAV file with a header of one's own; size: of the data, as the header states it."""
    size = len(data) if size < 0 else size
    block = channels * bits // 8
    head = struct.pack("<4sI4s4sIHHIIHH", b"RIFF", (36 + size) & 0xFFFFFFFF, b"WAVE", b"fmt ", 16, kind, channels, rate,
                       rate * block & 0xFFFFFFFF, block, bits)  # fmt: skip
    return head + struct.pack("<4sI", b"data", size) + data


def raw(content: bytes) -> Make:
    return lambda path: path.write_bytes(content)


def flac(samples: int) -> bytes:
    """A FLAC file whose header states another number of samples; 0: it does not say."""
    file = io.BytesIO()
    soundfile.write(file, GOOD, RATE, format="FLAC")
    content = bytearray(file.getvalue())
    fields = int.from_bytes(content[18:26], "big")  # the last 36 bits are the number of samples
    content[18:26] = ((fields >> 36 << 36) | samples).to_bytes(8, "big")
    return bytes(content)


def pcm(samples: np.ndarray = GOOD) -> bytes:
    return (samples * 32767).astype("<i2").tobytes()


def floats(values: np.ndarray) -> Make:
    return wave(values.astype(np.float32), subtype="FLOAT")


def peak(low: float, high: float) -> str:
    """Code that prints whether a recording is refused, or read with its peak in bounds."""
    bounds = f"{low} <= float(sound.abs().max()) <= {high}"
    return (
        f"from speechllm import load_audio; sound = load_audio('mine/bad.wav'); print('right' if {bounds} else 'wrong')"
    )


def one(name: str, file: str, make: Make, *outcomes: Outcome, duration_s: float = SECONDS, **settings: object) -> Case:
    return Case(name, ENCODE, outcomes, "tokenizer", corpus_with(file, make, duration_s), **settings)


def hours(seconds: int) -> Make:
    def write(folder: Path) -> None:
        part = pcm(tone(60, 1))
        with open(folder / "long.wav", "wb") as file:
            file.write(header(b"", size=len(part) * seconds // 60))
            for _ in range(seconds // 60):
                file.write(part)

    return write


def ogg(**settings: str) -> Make:
    return wave(tone(20, 3), format="OGG", **settings)


def shards_with(content: bytes | None) -> Make:
    def write(folder: Path) -> None:
        (folder / "mine").mkdir()
        sounds = [{"bytes": imports.sound(0.1), "path": "a.flac"}, {"bytes": content, "path": None}]
        imports.make({"id": ["a", "b"], "audio": sounds, "text": ["A", "B"]}).to_parquet(
            folder / "mine" / "train-00000-of-00001.parquet"
        )

    return write


def one_imported(folder: Path, _: str) -> bool:
    done = read_json(folder / "new" / "done.json")
    return done["utterances"] == 1 and sum(done["skipped"].values()) == 1 and done["hours"] < 1


def finite_weights(folder: Path, _: str) -> bool:
    import torch

    states = [torch.load(file, weights_only=True) for file in (folder / "new" / "model").glob("*.ckpt")]
    tensors = [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
    return bool(tensors) and all(bool(value.isfinite().all()) for value in tensors if value.is_floating_point())


def good_and_bad(folder: Path) -> None:
    soundfile.write(folder / "good.wav", GOOD, RATE)
    (folder / "bad.wav").write_text("not a sound")


def only_bad(folder: Path) -> None:
    (folder / "mine").mkdir()
    rows = [{"path": f"u{i}.wav", "duration_s": 1.0, "text": "A", "speaker": f"s{i % 2}"} for i in range(8)]
    for row in rows:
        (folder / "mine" / str(row["path"])).write_text("not a sound")
    manifest(folder / "mine", rows)


UNUSABLE = "usable|unreadable|no recording|none of|cannot be used"
EITHER = (counted(), encoded())
WEIGHTS = "alignment speaker"
CASES = (
    # ---- FLAC that does not say how long it is, or lies
    one("FLAC that does not state its length", "bad.flac", raw(flac(0)), *EITHER),
    one("FLAC that states 5.8e14 s", "bad.flac", raw(flac((1 << 36) - 1)), *EITHER),
    one("FLAC that states twice its length", "bad.flac", raw(flac(2 * len(GOOD))), *EITHER),
    one("FLAC that states half its length", "bad.flac", raw(flac(len(GOOD) // 2)), *EITHER),
    one("FLAC cut in half", "bad.flac", cut(wave(), 0.5), counted()),
    one("FLAC cut behind its header", "bad.flac", raw(b"fLaC\0\0\0\x22" + bytes(34)), counted()),
    Case(
        "import of FLAC that states 5.8e14 s",
        "import_speech.py data=mine output=new",
        (skipped(one_imported), accepted(lambda at, _: read_json(at / "new/done.json")["hours"] < 1)),
        "",
        shards_with(flac((1 << 36) - 1)),
    ),
    Case(
        "import of a row without recording",
        "import_speech.py data=mine output=new",
        skipped(one_imported),
        "",
        shards_with(None),
    ),
    Case(
        "import of an empty recording",
        "import_speech.py data=mine output=new",
        skipped(one_imported),
        "",
        shards_with(b""),
    ),
    Case(
        "import of a text for a recording",
        "import_speech.py data=mine output=new",
        skipped(one_imported),
        "",
        shards_with(b"not a sound"),
    ),
    # ---- cut
    one("WAV cut in half", "bad.wav", cut(wave(), 0.5), counted()),
    one("WAV cut by one sample", "bad.wav", cut(wave(), 0.99), counted(), encoded(tolerance_s=0.02)),
    one("MP3 cut in half", "bad.mp3", cut(wave(tone(20, 3), format="MP3"), 0.5), counted(), duration_s=20),
    one("Opus cut in half", "bad.opus", cut(ogg(subtype="OPUS"), 0.5), counted(), duration_s=20),
    one("Vorbis cut in half", "bad.ogg", cut(ogg(subtype="VORBIS"), 0.5), counted(), duration_s=20),
    one("WAV without samples", "bad.wav", raw(header(b"")), counted()),
    one("an empty file", "bad.wav", raw(b""), counted()),
    one("one byte", "bad.flac", raw(b"f"), counted()),
    one("WAV of one sample", "bad.wav", wave(GOOD[100:101]), counted(), encoded(0, 0.05)),
    one("WAV of ten samples", "bad.wav", wave(GOOD[:10]), counted(), encoded(0, 0.05)),
    # ---- no recording at all
    one("samples without a header (.raw)", "bad.raw", raw(pcm()), counted()),
    one("samples without a header (.pcm)", "bad.pcm", raw(pcm()), counted()),
    one("a page that says 404 (.wav)", "bad.wav", raw(b"<html>404 Not Found</html>"), counted()),
    one(
        "a Git LFS pointer (.flac)", "bad.flac", raw(b"version https://git-lfs.github.com/spec/v1\nsize 1\n"), counted()
    ),
    one("a picture (.wav)", "bad.wav", raw(b"\x89PNG\r\n\x1a\n" + bytes(500)), counted()),
    one("random bytes (.mp3)", "bad.mp3", raw(np.random.default_rng(0).bytes(5000)), counted()),
    one("no such file", "bad.wav", lambda path: None, counted("missing")),
    one("a folder of that name", "bad.wav", lambda path: path.mkdir(), counted()),
    one("a link to itself", "bad.wav", lambda path: path.symlink_to(path.name), counted()),
    one("a pipe of that name", "bad.wav", lambda path: os.mkfifo(path), counted(), limit_s=40),
    one("a link to /dev/zero", "bad.wav", lambda path: path.symlink_to("/dev/zero"), counted(), limit_s=40),
    one("a link to a recording", "bad.wav", lambda path: path.symlink_to("u0.wav"), encoded()),
    # ---- rates
    one("11,127 Hz", "bad.wav", wave(tone(0.5, 9, 11_127), 11_127), encoded(), limit_s=40, memory=2e9),
    one("44,101 Hz", "bad.wav", wave(tone(0.5, 9, 44_101), 44_101), encoded(), limit_s=40, memory=2e9),
    one("47,999 Hz", "bad.wav", wave(tone(0.5, 9, 47_999), 47_999), encoded(), limit_s=40, memory=2e9),
    one("2^31 - 1 Hz", "bad.wav", raw(header(pcm(), 2**31 - 1)), counted(), limit_s=40, memory=2e9),
    one("1 Hz", "bad.wav", raw(header(pcm(), 1)), counted(), limit_s=40, memory=2e9, duration_s=8000),
    one("0 Hz", "bad.wav", raw(header(pcm(), 0)), counted()),
    one("192,000 Hz", "bad.wav", wave(tone(0.5, 9, 192_000), 192_000), encoded()),
    one("8,000 Hz", "bad.wav", wave(tone(0.5, 9, 8000), 8000), encoded()),
    # ---- samples that are none
    one("NaN in a float file", "bad.wav", floats(np.where(np.arange(len(GOOD)) == 99, np.nan, GOOD)), counted()),
    one("an infinite sample", "bad.wav", floats(np.where(np.arange(len(GOOD)) == 99, np.inf, GOOD)), counted()),
    one("a peak of 4.5e29", "bad.wav", floats(4.5e29 * GOOD), counted()),
    one("float samples in integer units", "bad.wav", floats(32767 * GOOD), *EITHER),
    Case(
        "float samples in integer units are not given as they are",
        ["python", peak(0.01, 1.0)],
        (accepted(pattern="right"), refused("bad.wav")),
        "",
        corpus_with("bad.wav", floats(32767 * GOOD)),
    ),
    one("digital silence", "bad.wav", wave(np.zeros(8000)), counted("silent")),
    one("silence with a single click of one bit", "bad.wav", wave(np.eye(1, 8000)[0] / 32768), *EITHER),
    one("stereo in opposite phase", "bad.wav", wave(np.stack([GOOD, -GOOD], 1)), *EITHER),
    Case(
        "stereo in opposite phase is no silence",
        ["python", peak(0.01, 1.0)],
        (accepted(pattern="right"), refused("bad.wav.*(phase|cancel|silent|channel)")),
        "",
        corpus_with("bad.wav", wave(np.stack([GOOD, -GOOD], 1))),
    ),
    Case(
        "stereo in nearly opposite phase is no silence",
        ["python", peak(0.01, 1.0)],
        (accepted(pattern="right"), refused("bad.wav.*(phase|cancel|silent|channel)")),
        "",
        corpus_with("bad.wav", wave(np.stack([GOOD, -0.999 * GOOD], 1))),
    ),
    Case(
        "one channel of two is silent",
        ["python", peak(0.05, 1.0)],
        accepted(pattern="right"),
        "",
        corpus_with("bad.wav", wave(np.stack([GOOD, 0 * GOOD], 1))),
    ),
    # ---- other formats that are right
    one("WAV of unknown size, as from a pipe", "bad.wav", raw(header(pcm(), size=0xFFFFFFFF)), *EITHER),
    one("WAV of 8 bits", "bad.wav", wave(subtype="PCM_U8"), encoded()),
    one("WAV of 24 bits", "bad.wav", wave(subtype="PCM_24"), encoded()),
    one("WAV in A-law", "bad.wav", wave(subtype="ALAW"), encoded()),
    one("WAV of 6 channels", "bad.wav", wave(np.stack([GOOD] * 6, 1)), encoded()),
    one("FLAC by the name of .wav", "bad.wav", wave(format="FLAC"), encoded()),
    one("WAV with something behind it", "bad.wav", raw(header(pcm()) + b"LIST\x04\0\0\0abcd" + bytes(3)), *EITHER),
    one("WAV with data of half a sample", "bad.wav", raw(header(pcm() + b"x")), *EITHER),
    one("61 s, where 60 are allowed", "bad.wav", wave(tone(61, 1)), counted("long"), duration_s=61),
    one("61 s that are stated as one", "bad.wav", wave(tone(61, 1)), counted("long"), duration_s=1),
    # ---- in other commands
    Case(
        "an hour through speechllm encode",
        "speechllm encode long.wav --codec tokenizer/model --layers 1",
        (accepted(pattern='"samples": 57600000'), refused("long.wav.*(long|split|limit|at most)")),
        "tokenizer",
        hours(3600),
        limit_s=240,
        memory=2e9,
    ),
    Case(
        "a bad and a good recording through speechllm transcribe",
        "speechllm transcribe bad.wav good.wav --model asr/model",
        skipped(lambda _, said: "good.wav\t" in said, "skipped.*bad.wav", (1,)),
        "asr",
        good_and_bad,
    ),
    Case(
        "a bad recording through speechllm encode",
        "speechllm encode bad.wav good.wav --codec tokenizer/model",
        (refused("bad.wav"), skipped(lambda _, said: '"file": "good.wav"' in said, "skipped.*bad.wav", (1,))),
        "tokenizer",
        good_and_bad,
    ),
    Case(
        "a bad recording through speechllm reconstruct",
        "speechllm reconstruct bad.wav good.wav --codec tokenizer/model --output new",
        skipped(lambda at, _: (at / "new/good.png").exists(), "skipped.*bad.wav", (1,)),
        "tokenizer",
        good_and_bad,
    ),
    Case(
        "a bad recording through speechllm convert",
        "speechllm convert bad.wav good.wav --codec tokenizer/model --output new.wav",
        refused("bad.wav"),
        "tokenizer",
        good_and_bad,
    ),
    Case(
        "no recording for speechllm transcribe",
        "speechllm transcribe nowhere.wav --model asr/model",
        (refused("nowhere.wav"), skipped(lambda *_: True, "nowhere.wav", (1,))),
        "asr",
    ),
    Case(
        "a peak of 4.5e29 for a speaker teacher",
        f"{SPEAKER} data=mine dev_splits=null output=new",
        (skipped(finite_weights, "skipped"), refused("bad.wav")),
        "",
        corpus_with("bad.wav", floats(4.5e29 * GOOD)),
    ),
    Case(
        "NaN for fit_units",
        f"{UNITS} data=mine output=new",
        skipped(lambda at, _: sum(read_json(at / "new/results.json")["skipped"].values()) == 1),
        "alignment",
        corpus_with("bad.wav", floats(np.nan * GOOD)),
    ),
    Case(
        "a bad recording for eval_codec",
        "eval_codec.py codec=tokenizer/model data=mine output=new",
        skipped(lambda at, _: len(read_json(at / "new/results.json")["failed"]) == 1, "not scored"),
        "tokenizer",
        corpus_with("bad.wav", raw(b"no")),
    ),
    Case(
        "a bad recording for align_speech",
        "align_speech.py data=mine output=new",
        skipped(lambda *_: True, "unreadable"),
        "",
        corpus_with("bad.wav", raw(b"no")),
    ),
    Case(
        "a bad recording for train_tokenizer",
        f"{TOKENIZER} data=mine dev_splits=null output=new",
        skipped(lambda at, _: read_json(at / "new/done.json")["skipped"] == 1, "skipped"),
        WEIGHTS,
        corpus_with("bad.wav", raw(b"no")),
    ),
    Case(
        "only bad recordings for encode_speech",
        ENCODE,
        (refused(UNUSABLE, lines=SOME), skipped(lambda at, _: read_json(at / "new/done.json")["utterances"] == 0)),
        "tokenizer",
        only_bad,
    ),
    Case(
        "only bad recordings for train_teacher",
        f"{SPEAKER} data=mine splits=null dev_splits=null output=new",
        refused(UNUSABLE, lines=SOME),
        "",
        only_bad,
    ),
    Case(
        "only bad recordings for train_tokenizer",
        f"{TOKENIZER} data=mine splits=null dev_splits=null output=new",
        refused(UNUSABLE, lines=SOME),
        WEIGHTS,
        only_bad,
    ),
    Case(
        "only bad recordings for fit_units",
        f"{UNITS} data=mine output=new",
        refused("unreadable|frames", lines=SOME),
        "alignment",
        only_bad,
    ),
    Case(
        "only bad recordings for eval_codec",
        "eval_codec.py codec=tokenizer/model data=mine output=new",
        (refused(UNUSABLE, lines=SOME), skipped(lambda *_: True, "not scored")),
        "tokenizer",
        only_bad,
    ),
    Case(
        "only bad recordings for speechllm codebooks",
        "speechllm codebooks --codec tokenizer/model --data mine",
        refused(UNUSABLE, lines=SOME),
        "tokenizer",
        only_bad,
    ),
)
