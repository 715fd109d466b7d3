"""Folders are owned: what a user has is not written over, not emptied, not taken for something else."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import soundfile
from judge import Case, Killed, accepted, recipe_after, refused
from parts import ALIGNMENT, ASR, EMOTION, ENCODE, EVAL_ASR, RATE, SPEAKER, TEXT, TOKENIZER, UNITS, read_json, tone

OWNED = r"hold|not empty|exists|another|other|belong|was not|foreign|not made by|claim|inside|outside|did not write"
BUSY = r"in use|already|running|another process|locked|being written"
UNWRITABLE = r"cannot write|not a directory|not a folder|no such|permission|read-only|cannot create|is a file|hold"


def wrote(*names: str) -> Callable[[Path], None]:
    """Files of the user's, in folders or not."""

    def write(folder: Path) -> None:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("years of work\n")

    return write


def said_twice(folder: Path) -> None:
    for place in "ab":
        (folder / place).mkdir()
        soundfile.write(folder / place / "1.wav", tone(0.3, ord(place)), RATE)


def codes_of_both(folder: Path, places: str = "ab") -> None:
    rows = [{"file": f"{place}/1.wav", "samples": 640, "codes": [[0, 1], [2, 3]]} for place in places]
    fingerprint = read_json(folder / "tokenizer" / "done.json")["fingerprint"]
    lines = (json.dumps({**row, "codec": fingerprint}) + "\n" for row in rows)
    (folder / "codes.jsonl").write_text("".join(lines))


def before_any_work(_: Path, said: str) -> bool:
    """Nothing was computed before the output was looked at: no bar of a recipe's own has moved."""
    return not re.search(r"(encode|transcribe|score|features|align|teacher|tokenizer|asr|fold \w+): +\d+%", said)


def moved(old: str, new: str) -> Callable[[Path], object]:
    return lambda folder: shutil.move(folder / old, folder / new)


def has(*names: str) -> Callable[[Path, str], bool]:
    return lambda folder, _: all((folder / name).exists() for name in names)


def went_on(run: str) -> Callable[[Path, str], bool]:
    """The log's first line, marked before, is still there."""
    return lambda folder, _: (
        (folder / run / "done.json").exists() and "kept" in (folder / run / "log.jsonl").read_text()
    )


def marked(run: Path) -> None:
    log = run / "log.jsonl"
    head, _, rest = log.read_text().partition("\n")
    log.write_text(json.dumps(json.loads(head) | {"kept": True}) + "\n" + rest)


def moved_and_marked(folder: Path) -> None:
    shutil.move(folder / "old", folder / "new")
    marked(folder / "new")


def same_codes(folder: Path, _: str) -> bool:
    return read_json(folder / "new" / "done.json")["utterances"] == 24


def owned(
    name: str,
    command: str,
    needs: str,
    *mine: str,
    prepare: Callable[[Path], object] | None = None,
    writes: tuple[str, ...] = ("new", "new/*", "new.*"),
) -> Case:
    """An output that is somebody's: another job's, or the user's, whose files these are. Said before any work."""
    prepare = prepare or (wrote(*mine) if mine else None)
    return Case(name, command, refused(OWNED, before_any_work), needs, prepare, writes=writes)


def unwritable(name: str, command: str, needs: str) -> Case:
    """Where nothing can be written, below a file; said before any work."""
    return Case(name, command, refused(UNWRITABLE, before_any_work), needs, wrote("notes.txt"))


RUN = ("new/*",)
SLOWLY = (
    "import time, speechllm.data.shards as shards; write = shards._write_shard\n"
    "shards._write_shard = lambda *a, **k: (time.sleep(8), write(*a, **k))"
)
SLOW_ENCODE = recipe_after(SLOWLY, f"{ENCODE} output=new")
TEACHER_NEW = f"{SPEAKER} output=mine"
KILLED_TEACHER = Killed(f"{SPEAKER} save_every=2 steps=60 output=old", "old/checkpoints/step_0000001[2-9].pt")
CASES = (
    # ---- published codecs
    owned(
        "import-codec into a folder with a thesis",
        "speechllm import-codec --kind encodec encodec mine",
        "encodec",
        "mine/thesis.txt",
    ),
    Case(
        "import-codec beside a folder of the user's that ends in .part",
        "speechllm import-codec --kind encodec encodec new",
        (accepted(has("new/config.json")), refused(OWNED)),
        "encodec",
        wrote("new.part/thesis.txt"),
    ),
    Case(
        "import-codec onto its source",
        "speechllm import-codec --kind encodec encodec encodec",
        refused("encodec"),
        "encodec",
    ),
    owned(
        "import-codec onto its source by a link",
        "speechllm import-codec --kind encodec encodec link",
        "encodec",
        prepare=lambda folder: (folder / "link").symlink_to("encodec"),
    ),
    owned(
        "import-codec onto another codec",
        "speechllm import-codec --kind encodec encodec tokenizer/model",
        "encodec tokenizer",
    ),
    # ---- runs of another job
    owned("fit_units into a finished train_asr run", f"{UNITS} output=asr", "alignment corpus asr"),
    owned("train_teacher into a folder of codes", f"{SPEAKER} output=codes", "corpus codes"),
    owned("train_tokenizer into a folder of codes", f"{TOKENIZER} output=codes", "corpus codes alignment speaker"),
    owned("train_asr into a folder of codes", f"{ASR} output=codes", "codes tokenizer"),
    owned("train_emotion into a train_asr run", f"{EMOTION} output=asr", "actor_codes tokenizer asr"),
    owned("train_text into a train_asr run", f"{TEXT} output=asr", "text.txt asr"),
    owned("encode_speech into a training's folder", f"{ENCODE} output=asr", "corpus tokenizer asr"),
    owned("encode_speech into its corpus", f"{ENCODE} output=corpus", "corpus tokenizer"),
    owned("eval_asr into a training's folder", f"{EVAL_ASR} output=tokenizer", "asr codes tokenizer"),
    owned("another teacher into a teacher's folder", f"{ALIGNMENT} output=speaker", "corpus speaker"),
    owned(
        "a benchmark into a training's folder",
        "benchmark.py row=lm_step codes=codes repeats=1 output=asr",
        "codes asr",
    ),
    owned("train_asr into the folder of its base model", f"{ASR} model=text/model output=text", "codes tokenizer text"),
    owned("a demo into its corpus", "demo.py data=corpus output=corpus", "corpus"),
    owned(
        "a comparison into a training's folder",
        "compare.py --config tiny/compare.yaml data=corpus output=asr",
        "corpus tiny tokenizer asr",
    ),
    # ---- folders of the user's
    owned("train_teacher beside a model of the user's", TEACHER_NEW, "corpus", "mine/model/best.pt"),
    owned("train_teacher beside checkpoints of the user's", TEACHER_NEW, "corpus", "mine/checkpoints/best.pt"),
    owned("train_teacher beside a log of the user's", TEACHER_NEW, "corpus", "mine/log.jsonl"),
    owned("train_text beside a model of the user's", f"{TEXT} output=mine", "text.txt", "mine/model/best.pt"),
    owned("train_asr beside notes of the user's", f"{ASR} output=mine", "codes tokenizer", "mine/notes.txt"),
    owned(
        "train_emotion beside folds of the user's",
        f"{EMOTION} output=mine",
        "actor_codes tokenizer",
        "mine/folds/0.json",
    ),
    owned("fit_units beside a model of the user's", f"{UNITS} output=mine", "alignment corpus", "mine/model/best.pt"),
    owned("encode_speech beside results of the user's", f"{ENCODE} output=mine", "corpus tokenizer", "mine/done.json"),
    owned(
        "encode_speech beside Parquet of the user's",
        f"{ENCODE} output=mine",
        "corpus tokenizer",
        "mine/codes_00000.arrow",
    ),
    owned("eval_asr beside results of the user's", f"{EVAL_ASR} output=mine", "asr codes", "mine/results.json"),
    owned(
        "eval_codec beside results of the user's",
        "eval_codec.py codec=tokenizer/model data=corpus splits=[test] output=mine",
        "tokenizer corpus",
        "mine/utterances.jsonl",
    ),
    owned(
        "eval_conversion beside results of the user's",
        "eval_conversion.py codec=tokenizer/model data=corpus pairs=2 output=mine",
        "tokenizer corpus",
        "mine/audio/song.wav",
    ),
    owned(
        "eval_tokenizer onto a file of the user's",
        "eval_tokenizer.py codes=codes data=corpus output=mine.json",
        "codes corpus",
        "mine.json",
    ),
    owned(
        "eval_tokenizer beside a page of the user's",
        "eval_tokenizer.py codes=codes data=corpus output=mine.json",
        "codes corpus",
        "mine.html",
        writes=("mine.json",),
    ),
    owned(
        "import_speech beside checkpoints of the user's",
        "import_speech.py data=shards output=mine",
        "shards",
        "mine/checkpoints/best.pt",
    ),
    owned("import_speech into a corpus", "import_speech.py data=shards output=corpus", "shards corpus"),
    owned("import_speech into its data", "import_speech.py data=shards output=shards", "shards"),
    Case(
        "align_speech onto its corpus",
        "align_speech.py data=corpus output=corpus splits=[train]",
        refused("corpus|" + OWNED),
        "corpus",
    ),
    Case(
        "align_speech onto its corpus by another name",
        "align_speech.py data=corpus output=./x/../corpus splits=[train]",
        refused("corpus|" + OWNED),
        "corpus",
        lambda folder: (folder / "x").mkdir(),
    ),
    owned(
        "align_speech onto another corpus",
        "align_speech.py data=corpus output=other splits=[train]",
        "corpus",
        prepare=lambda folder: shutil.copytree(folder / "corpus", folder / "other"),
    ),
    owned("synthesize_speech into a corpus", "synthesize_speech.py corpus --train 1 --dev 1 --test 1", "corpus"),
    owned(
        "a demo that starts over in a folder of the user's",
        "demo.py data=corpus output=mine --fresh",
        "corpus",
        "mine/thesis.txt",
    ),
    owned("a demo beside a thesis", "demo.py data=corpus output=mine", "corpus", "mine/thesis.txt"),
    owned(
        "a comparison beside results of the user's",
        "compare.py --config tiny/compare.yaml data=corpus output=mine",
        "corpus tiny tokenizer",
        "mine/results.json",
    ),
    owned(
        "a link to a folder of the user's",
        f"{SPEAKER} output=link",
        "corpus",
        prepare=lambda folder: (wrote("mine/model/best.pt")(folder), (folder / "link").symlink_to("mine")),
    ),
    owned("here, where everything lies", f"{SPEAKER} output=.", "corpus"),
    Case(
        "features cached beside files of the user's",
        f"{TOKENIZER} steps=2 output=new semantic.cache=mine",
        (accepted(), refused(OWNED)),
        "corpus alignment speaker",
        wrote("mine/notes.txt"),
        writes=("new*", "mine/*"),
    ),
    Case("export onto its model", "speechllm export asr/model asr/model", refused("asr/model|" + OWNED), "asr"),
    Case("merge onto its model", "speechllm merge asr/model asr/model", refused("asr/model|" + OWNED), "asr"),
    owned("export beside files of the user's", "speechllm export asr/model mine", "asr", "mine/config.json"),
    owned(
        "codebooks onto numbers of the user's",
        "speechllm codebooks --codec tokenizer/model --data corpus --output mine.json",
        "tokenizer corpus",
        "mine.json",
    ),
    owned(
        "codebooks onto a picture of the user's",
        "speechllm codebooks --codec tokenizer/model --data corpus --picture mine.png",
        "tokenizer corpus",
        "mine.png",
    ),
    Case(
        "convert onto a recording",
        "speechllm convert a/1.wav b/1.wav --codec tokenizer/model --output b/1.wav",
        refused("1.wav"),
        "tokenizer",
        said_twice,
    ),
    # ---- two outputs of one name
    Case(
        "decode of a/1.wav and b/1.wav",
        "speechllm decode codes.jsonl --codec tokenizer/model --output new",
        (refused("1.wav"), accepted(lambda at, _: len([*(at / "new").rglob("*.wav")]) == 2)),
        "tokenizer",
        codes_of_both,
    ),
    Case(
        "reconstruct of a/1.wav and b/1.wav",
        "speechllm reconstruct a/1.wav b/1.wav --codec tokenizer/model --output new",
        (refused("name"), accepted(lambda at, _: len([*(at / "new").rglob("*_1_codebooks.wav")]) == 2)),
        "tokenizer",
        said_twice,
    ),
    Case(
        "decode onto a recording of the user's",
        "speechllm decode codes.jsonl --codec tokenizer/model --output a",
        refused("1.wav|" + OWNED),
        "tokenizer",
        lambda folder: (said_twice(folder), codes_of_both(folder, "a")),
    ),
    owned(
        "reconstruct onto a picture of the user's",
        "speechllm reconstruct a/1.wav --codec tokenizer/model --output a",
        "tokenizer",
        prepare=lambda folder: (said_twice(folder), wrote("a/1.png")(folder)),
        writes=("a/1_*",),
    ),
    # ---- twice at once, moved, renamed
    Case(
        "the same training twice at once",
        f"{SPEAKER} output=new",
        refused(BUSY),
        "corpus",
        beside=Killed(f"{SPEAKER} steps=40 output=new", "new/log.jsonl"),
    ),
    Case(
        "the same encoding twice at once",
        f"{ENCODE} output=new",
        refused(BUSY),
        "corpus tokenizer",
        beside=Killed(
            SLOW_ENCODE,
            "new/*",
        ),
    ),
    Case(
        "two trainings of other settings at once",
        f"{SPEAKER} seed=1 output=new",
        refused(BUSY + "|" + OWNED),
        "corpus",
        beside=Killed(f"{SPEAKER} steps=40 output=new", "new/log.jsonl"),
    ),
    Case(
        "a killed run that was moved goes on",
        f"{SPEAKER} save_every=2 steps=60 output=new",
        accepted(went_on("new")),
        "corpus",
        before=(KILLED_TEACHER,),
        then=moved_and_marked,
        changes=RUN,
    ),
    Case(
        "a finished run that was renamed is finished",
        f"{ASR} output=new",
        accepted(pattern="is finished"),
        "codes tokenizer asr",
        lambda folder: shutil.move(folder / "asr", folder / "new"),
        changes=("new/config.yaml",),
    ),
    Case(
        "a finished run is not begun again",
        f"{SPEAKER} output=speaker",
        accepted(pattern="is finished"),
        "corpus speaker",
        writes=("speaker/checkpoints",),
    ),
    Case(
        "codes that were renamed are done",
        f"{ENCODE} output=new",
        accepted(same_codes),
        "corpus tokenizer codes",
        lambda folder: shutil.move(folder / "codes", folder / "new"),
        changes=RUN,
    ),
    Case(
        "an import that was moved goes on",
        "import_speech.py data=shards output=new",
        accepted(lambda at, _: read_json(at / "new/done.json")["utterances"] == 140),
        "shards",
        before=(Killed("import_speech.py data=shards output=old", "old/audio/train/0000/*20.flac"),),
        then=moved("old", "new"),
        changes=RUN,
    ),
    Case(
        "a lock of a process that has died",
        f"{SPEAKER} save_every=2 steps=60 output=old",
        accepted(has("old/done.json")),
        "corpus",
        before=(KILLED_TEACHER,),
        changes=("old/*",),
    ),
    Case(
        "a user's checkpoint among those of a run",
        f"{SPEAKER} save_every=2 steps=60 output=old",
        (accepted(has("old/checkpoints/mine.txt")), refused(OWNED)),
        "corpus",
        before=(KILLED_TEACHER,),
        then=wrote("old/checkpoints/mine.txt"),
        changes=("old/[!c]*", "old/checkpoints", "old/checkpoints/step*", "old/config.yaml"),
    ),
    Case(
        "a user's notes in the model of a run",
        f"{UNITS} output=units",
        (accepted(has("units/model/notes.txt")), refused(OWNED)),
        "alignment corpus units",
        wrote("units/model/notes.txt"),
        changes=("units", "units/[!m]*", "units/model", "units/model/[!n]*"),
    ),
    Case(
        "a user's notes in a demo that starts over",
        "demo.py data=corpus output=mine --fresh tokenizer_stage=nowhere.yaml",
        (accepted(), refused("")),
        "corpus",
        lambda folder: (wrote("mine/notes.txt")(folder), (folder / "mine/demo.json").write_text("{}")),
        changes=("mine/demo.json",),
        writes=("mine/*",),
    ),
    # ---- where nothing can be written: known before the work
    unwritable("eval_asr into a file", f"{EVAL_ASR} output=notes.txt/x", "asr codes"),
    Case(
        "eval_asr onto a file",
        f"{EVAL_ASR} output=notes.txt",
        refused(UNWRITABLE + "|" + OWNED, before_any_work),
        "asr codes",
        wrote("notes.txt"),
    ),
    unwritable("fit_units into a file", f"{UNITS} output=notes.txt/x", "alignment corpus"),
    unwritable(
        "eval_codec into a file",
        "eval_codec.py codec=tokenizer/model data=corpus output=notes.txt/x",
        "tokenizer corpus",
    ),
    unwritable(
        "eval_tokenizer into a file",
        "eval_tokenizer.py codes=codes data=corpus output=notes.txt/x.json",
        "codes corpus",
    ),
    unwritable("align_speech into a file", "align_speech.py data=corpus output=notes.txt/x", "corpus"),
    unwritable("encode_speech into a file", f"{ENCODE} output=notes.txt/x", "corpus tokenizer"),
    Case("a training into /proc", f"{SPEAKER} output=/proc/x", refused(UNWRITABLE), "corpus"),
    Case(
        "import-codec into /proc",
        "speechllm import-codec --kind encodec encodec /proc/x",
        refused(UNWRITABLE),
        "encodec",
    ),
    Case(
        "decode into a file",
        "speechllm decode codes.jsonl --codec tokenizer/model --output notes.txt",
        refused(UNWRITABLE),
        "tokenizer",
        lambda folder: (codes_of_both(folder, "a"), wrote("notes.txt")(folder)),
    ),
)
