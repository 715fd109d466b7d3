"""Paths are paths: words of the command line are taken as they are, and what lies on the disk is found by its name."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import soundfile
from judge import Case, Outcome, accepted, refused, skipped
from parts import ALIGNMENT, ASR, RATE, SPEAKER, TOKENIZER, emotion, read_json, tone
from recordings import manifest

from speechllm.data.shards import open_shard

ENCODE = ["encode_speech.py", "codec=tokenizer/model", "data=corpus", "layers=null"]
CODES = "codes_00000.arrow"
ROW = {"duration_s": 0.3, "text": "ONE", "speaker": "s"}
BYTES = os.fsdecode(b"caf\xe9")  # a name that is not UTF-8


def renamed(old: str, new: str) -> Callable[[Path], object]:
    def move(folder: Path) -> None:
        (folder / new).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(folder / old, folder / new)

    return move


def written(name: str, utterances: int = 24) -> Outcome:
    """So many utterances are in the folder of exactly this name."""
    return accepted(
        lambda at, _: (at / name / CODES).is_file() and read_json(at / name / "done.json")["utterances"] == utterances
    )


def output(name: str, *others: Outcome) -> Case:
    """An output with a name that YAML takes for something else."""
    return Case(
        f"output={name}",
        [*ENCODE, f"output={name}"],
        (written(name), *others),
        "corpus tokenizer",
        writes=(glob(name), glob(name) + "/*"),
    )


def glob(name: str) -> str:
    """A pattern that matches this name alone."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def data(name: str) -> Case:
    words = ["encode_speech.py", "codec=tokenizer/model", f"data={name}", "layers=null", "output=new"]
    return Case(f"data={name}", words, written("new"), "corpus tokenizer", renamed("corpus", name))


def codec(name: str) -> Case:
    words = ["encode_speech.py", f"codec={name}", "data=corpus", "layers=null", "output=new"]
    return Case(f"codec={name}", words, written("new"), "corpus tokenizer", renamed("tokenizer/model", name))


def features(name: str, layer: str = "#1") -> Case:
    words = ["encode_speech.py", f"codec=features:{name}{layer}", "data=corpus", "layers=null", "output=new"]
    return Case(f"features:{name}{layer}", words, written("new"), "corpus alignment", renamed("alignment/model", name))


def corpus(name: str, write: Callable[[Path], object], *outcomes: Outcome) -> Case:
    """A corpus in `mine` that is encoded."""
    words = ["encode_speech.py", "codec=tokenizer/model", "data=mine", "output=new"]

    def prepare(folder: Path) -> None:
        (folder / "mine").mkdir()
        write(folder / "mine")

    return Case(name, words, outcomes, "tokenizer", prepare)


def sounds(folder: Path, *names: str) -> None:
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(os.fsencode(folder / name), tone(0.3, i), RATE)


def actors(*prefixes: str) -> Callable[[Path], None]:
    """RAVDESS below folders of these names."""

    def write(folder: Path) -> None:
        for actor, prefix in enumerate(prefixes, 1):
            sounds(folder, *(f"{prefix}/{emotion.ravdess_id(kind, actor)}.wav" for kind in emotion.EMOTIONS))

    return write


def listed(*names: str, **more: object) -> Callable[[Path], None]:
    """Recordings of these names and a manifest of them, without ids."""

    def write(folder: Path) -> None:
        sounds(folder, *names)
        manifest(folder, [{**ROW, **more, "path": name} for name in names])

    return write


def all_or_counted(rows: int) -> Outcome:
    """Every row is encoded or counted as skipped."""

    def check(at: Path, _: str) -> bool:
        done = read_json(at / "new/done.json")
        return done["utterances"] + sum(done["skipped"].values()) == rows

    return skipped(check)


def two_ids(at: Path, _: str) -> bool:
    return len({row["id"] for row in open_shard(at / "new" / CODES).to_pylist()}) == 2


def librispeech_named(folder: Path) -> None:
    """A split whose name is not UTF-8."""
    for split in ("train", BYTES):
        sounds(folder, f"{split}/84/1/84-1-{'train caf'.index(split[0])}.flac")
        name = next((folder / split / "84" / "1").iterdir()).stem
        (folder / split / "84" / "1" / "84-1.trans.txt").write_text(f"{name} ONE\n")


RUN_HELP = r"tokenizer/model|asr/model|text/model|alignment/model|RUN/model|/model"
CASES = (
    # ---- what YAML would take for a comment, a date, a number, nothing, a list, an object, a reference
    *map(
        output,
        ("codes #2", "2026-11-28", "12:30", "1e3", "007", "0x10", "true", "null", "[x]", "{x}", "a: b", "*x", "&x")
        + (
            "!x",
            "%x",
            "@x",
            "|",
            ">",
            "'x",
            '"x"',
            "- x",
            "?",
            "x,y",
            "new ",
            "été",
            "语音",
            "=x",
            "--x",
            "1_000",
            ".5",
        ),
    ),
    Case("output=", [*ENCODE, "output="], refused("output"), "corpus tokenizer"),
    Case("output=~", [*ENCODE, "output=~"], refused("holds what encode_speech did not write"), "corpus tokenizer"),
    Case("output=~/new", [*ENCODE, "output=~/new"], (written("new"), refused("~|home")), "corpus tokenizer"),
    Case(
        "data=~/corpus",
        ["encode_speech.py", "codec=~/tokenizer/model", "data=~/corpus", "layers=null", "output=new"],
        (written("new"), refused("~|home")),
        "corpus tokenizer",
    ),
    Case(
        "output of 300 letters",
        [*ENCODE, f"output={'x' * 300}"],
        refused("too long|cannot write|name"),
        "corpus tokenizer",
    ),
    Case("data with NUL", ["python", "from speechllm import read_corpus; read_corpus('a\\0b')"], refused("")),
    data("exp #2"),
    data("2026-11-28"),
    data("12:30"),
    data("a: b"),
    data("[train]"),
    data("C:\\speech"),
    data("x\ty"),
    data("été 語"),
    data(BYTES),
    codec("runs/2026-11-28_12:30:00/model"),
    codec("C:\\codec"),
    codec("C:codec"),
    codec("features:mine"),
    codec("model #2"),
    codec("mine.py:Codec"),
    codec("1e3"),
    features("h #1"),
    features("h#1"),
    features("12:30"),
    features("h #1", ""),
    Case(
        "splits=train",
        [*ENCODE, "splits=train", "output=new"],
        (written("new", 12), refused(r"\[train\]|list")),
        "corpus tokenizer",
    ),
    Case(
        "splits=train,dev",
        [*ENCODE, "splits=train,dev", "output=new"],
        (written("new", 18), refused(r"\[train, ?dev\]|list")),
        "corpus tokenizer",
    ),
    Case("splits=[train,dev]", [*ENCODE, "splits=[train,dev]", "output=new"], written("new", 18), "corpus tokenizer"),
    Case(
        "splits=train-clean-100, which is not there",
        [*ENCODE, "splits=train-clean-100", "output=new"],
        refused("train-clean-100"),
        "corpus tokenizer",
    ),
    Case(
        "splits named as numbers",
        ["encode_speech.py", "codec=tokenizer/model", "data=mine", "splits=[2026-11-28]", "output=new"],
        (written("new", 2), refused("2026-11-28")),
        "tokenizer",
        lambda at: ((at / "mine").mkdir(), listed("a.wav", "b.wav", split="2026-11-28")(at / "mine")),
    ),
    # ---- RUN for RUN/model
    Case(
        "a run for its codec",
        "encode_speech.py codec=tokenizer data=corpus layers=null output=new",
        (written("new"), refused(RUN_HELP)),
        "corpus tokenizer",
    ),
    Case(
        "a run for its speech model",
        "eval_asr.py model=asr codes=codes splits=[test] output=new",
        (accepted(lambda at, _: (at / "new/results.json").exists()), refused(RUN_HELP)),
        "codes asr",
    ),
    Case(
        "a run for its language model",
        f"{ASR} steps=2 model=text output=new",
        (accepted(), refused(RUN_HELP)),
        "codes tokenizer text",
    ),
    Case(
        "a run for its teacher",
        f"{TOKENIZER} steps=2 semantic.teacher=alignment output=new",
        (accepted(), refused(RUN_HELP)),
        "corpus alignment speaker",
    ),
    Case(
        "a run for its speaker teacher",
        f"{TOKENIZER} steps=2 acoustic.teacher=speaker output=new",
        (accepted(), refused(RUN_HELP)),
        "corpus alignment speaker",
    ),
    Case(
        "a run for its HuBERT",
        f"{ALIGNMENT} steps=2 init=alignment output=new",
        (accepted(), refused(RUN_HELP)),
        "corpus alignment",
    ),
    Case(
        "a run for a recogniser",
        "encode_speech.py codec=recognizer:ctc data=corpus layers=null output=new",
        (accepted(), refused(RUN_HELP)),
        "corpus ctc",
    ),
    # ---- data that is no folder
    Case(
        "data that is not there",
        "encode_speech.py codec=tokenizer/model data=./nowhere output=new",
        refused("nowhere"),
        "tokenizer",
    ),
    Case(
        "data that is a file",
        "encode_speech.py codec=tokenizer/model data=corpus/manifest.jsonl output=new",
        refused("manifest.jsonl"),
        "tokenizer corpus",
    ),
    Case(
        "data that is a link to nowhere",
        "encode_speech.py codec=tokenizer/model data=link output=new",
        refused("link"),
        "tokenizer",
        lambda at: (at / "link").symlink_to("nowhere"),
    ),
    Case(
        "data that is an empty folder",
        "encode_speech.py codec=tokenizer/model data=mine output=new",
        refused("mine"),
        "tokenizer",
        lambda at: (at / "mine").mkdir(),
    ),
    Case(
        "data that is a folder of recordings alone",
        "encode_speech.py codec=tokenizer/model data=mine output=new",
        (refused("mine.*manifest"), accepted()),
        "tokenizer",
        lambda at: sounds(at / "mine", "a.wav", "b.wav"),
    ),
    Case(
        "data with a slash behind it",
        "encode_speech.py codec=tokenizer/model/ data=./corpus/ layers=null output=./new/",
        written("new"),
        "tokenizer corpus",
    ),
    Case(
        "a link for the corpus",
        "encode_speech.py codec=tokenizer/model data=link layers=null output=new",
        written("new"),
        "tokenizer corpus",
        lambda at: (at / "link").symlink_to("corpus"),
    ),
    # ---- names of recordings
    corpus("a recording whose name is not UTF-8, in RAVDESS", actors("Actor_01", BYTES), all_or_counted(8)),
    corpus("a split whose name is not UTF-8, in LibriSpeech", librispeech_named, all_or_counted(2)),
    corpus(
        "a recording whose name is not UTF-8, in a manifest",
        listed("a.wav", f"{BYTES}.wav"),
        all_or_counted(2),
        refused("manifest.*2"),
    ),
    corpus("a path of 235 letters for an id", listed("a.wav", "x" * 110 + "/" + "y" * 120 + ".wav"), all_or_counted(2)),
    corpus("an id of 300 letters", listed("a.wav", "b.wav", id="z" * 300), refused("zzz")),
    corpus("recordings that differ by their folder alone", listed("a/1.wav", "b/1.wav"), accepted(two_ids)),
    corpus("a name with a line break", listed("a.wav", "b\nc.wav"), all_or_counted(2)),
    corpus("a name with an accent of its own", listed("a.wav", "cafe\u0301.wav"), all_or_counted(2)),
    corpus("a path with ..", listed("a.wav", "x/../b.wav"), all_or_counted(2)),
    corpus("a path with ~", listed("a.wav", "~b.wav"), all_or_counted(2)),
    Case(
        "samples with a long id",
        f"{TOKENIZER} data=mine dev_splits=[train] output=new",
        accepted(lambda at, _: (at / "new/done.json").exists()),
        "alignment speaker",
        lambda at: (
            (at / "mine").mkdir(),
            listed(*("x" * 110 + "/" + "y" * 110 + f"{i}.wav" for i in range(4)))(at / "mine"),
        ),
    ),
    Case(
        "samples whose ids hold slashes",
        f"{TOKENIZER} data=mine dev_splits=[train] output=new",
        accepted(lambda at, _: (at / "new/done.json").exists()),
        "alignment speaker",
        lambda at: ((at / "mine").mkdir(), listed(*(f"../../a/{i}.wav" for i in range(4)))(at / "mine")),
        writes=("new", "new/*", "a", "a/*", "features*"),
    ),
    Case(
        "speechllm encode of a name that is not UTF-8",
        ["speechllm", "encode", f"{BYTES}.wav", "--codec", "tokenizer/model"],
        (accepted(pattern='"codes"'), refused("caf")),
        "tokenizer",
        lambda at: sounds(at, f"{BYTES}.wav"),
    ),
    Case(
        "speechllm transcribe of a name that is not UTF-8",
        ["speechllm", "transcribe", f"{BYTES}.wav", "--model", "asr/model"],
        (accepted(pattern="caf"), refused("caf")),
        "asr",
        lambda at: sounds(at, f"{BYTES}.wav"),
    ),
    Case(
        "speechllm transcribe of a name with a tab",
        ["speechllm", "transcribe", "a\tb.wav", "--model", "asr/model"],
        (accepted(pattern="a.+b.wav\t"), refused("a.+b.wav")),
        "asr",
        lambda at: sounds(at, "a\tb.wav"),
    ),
    Case(
        "speechllm reconstruct of names in other letters",
        ["speechllm", "reconstruct", "語 音.wav", "--codec", "tokenizer/model", "--output", "new"],
        accepted(lambda at, _: (at / "new/語 音.png").exists()),
        "tokenizer",
        lambda at: sounds(at, "語 音.wav"),
    ),
    Case(
        "speechllm reconstruct into a folder named as an option",
        ["speechllm", "reconstruct", "a.wav", "--codec", "tokenizer/model", "--output=--new"],
        accepted(lambda at, _: (at / "--new/a.png").exists()),
        "tokenizer",
        lambda at: sounds(at, "a.wav"),
        writes=("--new", "--new/*"),
    ),
    # ---- files of configurations
    Case(
        "a configuration that is not there",
        f"{SPEAKER} --config nowhere.yaml output=new",
        refused("nowhere.yaml"),
        "corpus",
    ),
    Case("a configuration that is a folder", f"{SPEAKER} --config corpus output=new", refused("corpus"), "corpus"),
    Case(
        "a configuration that is a recording",
        f"{SPEAKER} --config a.wav output=new",
        refused("a.wav"),
        "corpus",
        lambda at: sounds(at, "a.wav"),
    ),
    Case(
        "a configuration in cp1252",
        f"{SPEAKER} --config a.yaml output=new",
        refused("a.yaml"),
        "corpus",
        lambda at: (at / "a.yaml").write_bytes(b"# \xe9\nseed: 1\n"),
    ),
    Case(
        "a configuration with a tab",
        f"{SPEAKER} --config a.yaml output=new",
        refused("a.yaml"),
        "corpus",
        lambda at: (at / "a.yaml").write_text("codec:\n\tn: 1\n"),
    ),
    Case(
        "a configuration that is a list",
        f"{SPEAKER} --config a.yaml output=new",
        refused("a.yaml.*key"),
        "corpus",
        lambda at: (at / "a.yaml").write_text("- seed\n"),
    ),
    Case(
        "a configuration that runs code",
        f"{SPEAKER} --config a.yaml output=new",
        refused("a.yaml"),
        "corpus",
        lambda at: (at / "a.yaml").write_text("seed: !!python/object/apply:os.system ['touch pwned']\n"),
    ),
    Case(
        "a configuration with a key twice",
        f"{SPEAKER} --config a.yaml output=new",
        (refused("seed.*(twice|duplicate|again)|(twice|duplicate).*seed"),),
        "corpus",
        lambda at: (at / "a.yaml").write_text("seed: 1\nseed: 2\n"),
    ),
    Case(
        "a configuration with a path of # in quotes",
        "encode_speech.py --config a.yaml",
        written("codes #2"),
        "corpus tokenizer",
        lambda at: (at / "a.yaml").write_text(
            'codec: tokenizer/model\ndata: corpus\nlayers: null\noutput: "codes #2"\n'
        ),
        writes=("codes #2", "codes #2/*"),
    ),
    Case("a key that is misspelt", f"{SPEAKER} output=new stepps=3", refused("did you mean steps"), "corpus"),
    Case("a word without =", f"{SPEAKER} output=new steps 3", refused("key=value"), "corpus"),
    Case("a recipe that is misspelt", "speechllm run train_teecher", refused("did you mean train_teacher")),
)
