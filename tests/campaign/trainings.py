"""Trainings end in one way: saved on a signal, gone on with what may change, stopped where going on makes no sense."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import soundfile
from folders import marked, moved, went_on
from judge import SOME, Case, Killed, Outcome, accepted, recipe_after, refused, skipped
from parts import ALIGNMENT, ASR, CTC, EMOTION, ENCODE, RATE, SPEAKER, TEXT, TOKENIZER, read_json, tone
from recordings import corpus_with, finite_weights, floats, manifest, only_bad

LONG = f"{SPEAKER} save_every=2 steps=60 output=new"
KILLED = Killed(LONG, "new/checkpoints/step_0000001[2-9].pt")  # it logs every 10 steps
RUN = ("new/*",)
FULL = "disk|space|cannot write|could not write|too large|failed"
NONE = r"nan|inf|not finite|non-finite|gradient|loss"


def goes_on(
    name: str, words: str, *outcomes: Outcome, long: str = LONG, killed: Killed = KILLED, needs: str = "corpus"
) -> Case:
    """A killed run that is started again with other settings."""
    return Case(
        name,
        f"{long} {words}",
        outcomes or (accepted(went_on("new")),),
        needs,
        before=(killed,),
        then=lambda folder: marked(folder / "new"),
        changes=RUN,
    )


def saved(name: str, command: str, needs: str, sent: signal.Signals, at: str = "new/log.jsonl") -> Case:
    """A signal comes long before the first checkpoint; one is saved, and the run goes on from there."""

    def check(folder: Path) -> None:
        if not any((folder / "new" / "checkpoints").glob("*[0-9]*")):
            (folder / "no_checkpoint_was_saved").write_text("")
        marked(folder / "new")

    def good(folder: Path, said: str) -> bool:
        return not (folder / "no_checkpoint_was_saved").exists() and went_on("new")(folder, said)

    command = f"{command} save_every=1000 output=new"
    return Case(name, command, accepted(good), needs, before=(Killed(command, at, sent),), then=check, changes=RUN)


def disk_full(
    name: str, command: str, needs: str, limit: int, check: Callable[[Path, str], object] | None = None
) -> Case:
    """No file may grow beyond so many bytes, which ends a write as a full disk does."""
    lines = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
    )
    return Case(name, recipe_after(lines, f"{command} output=new"), refused(FULL, check), needs)


def diverging(name: str, command: str, needs: str) -> Case:
    return Case(name, f"{command} output=new", refused(NONE, no_model), needs)


def no_model(folder: Path, _: str) -> bool:
    return not (folder / "new" / "model").exists() and not (folder / "new" / "done.json").exists()


def nan_gradients(command: str, steps: str, function: str = "accelerate.Accelerator.backward") -> list[str]:
    """A training in which the gradients of these steps (a condition on `count[0]`) are not finite.

    function: one that takes the loss as its first argument, or returns one, once in a step.
    """
    lines = (
        f"import accelerate, tokenizer.training.losses; count = [0]; real = {function}\n"
        "def broken(self, *values):\n"
        f"    count[0] += 1; factor = float('nan') if {steps} else 1.0\n"
        "    return real(self, values[0] * factor, *values[1:])\n"
        f"{function} = broken"
    )
    return recipe_after(lines, f"{command} output=new")


def finite_and_counted(folder: Path, said: str) -> bool:
    done = (folder / "new" / "done.json").read_text()
    return finite_weights(folder, said) and any(word in done + said for word in ("finite", "skipped", "gradient"))


def one_speaker(folder: Path) -> None:
    (folder / "mine").mkdir()
    rows = [{"path": f"u{i}.wav", "duration_s": 0.5, "text": "ONE", "speaker": "s"} for i in range(4)]
    for i, row in enumerate(rows):
        soundfile.write(folder / "mine" / str(row["path"]), tone(0.5, i), RATE)
    manifest(folder / "mine", rows)


def words_of(command: str) -> str:
    return command.split(maxsplit=1)[1]


TEXT_SMALL = f"{TEXT} steps=60"
CASES = (
    # ---- what may change
    goes_on(
        "a teacher is prolonged",
        "steps=70",
        accepted(lambda at, said: went_on("new")(at, said) and read_json(at / "new/done.json")["steps"] == 70),
    ),
    goes_on("a teacher saves less often", "save_every=30"),
    goes_on("a teacher with another learning rate", "learning_rate=1e-3", refused("learning_rate.*0.002.*0.001")),
    goes_on("a teacher with another seed", "seed=5", refused("seed")),
    goes_on("a teacher on other splits", "splits=[train,test]", refused("splits")),
    goes_on("a teacher that is shortened below its checkpoint", "steps=2", refused("steps"), accepted()),
    goes_on(
        "a tokenizer is prolonged, with other intervals",
        "steps=40 log_every=2 validate_every=20 save_every=10 num_workers=1",
        long=f"{TOKENIZER} steps=30 output=new",
        killed=Killed(f"{TOKENIZER} steps=30 output=new", "new/checkpoints/step_00000006.pt"),
        needs="corpus alignment speaker",
    ),
    goes_on(
        "a tokenizer with another codec",
        "codec.n_filters=8",
        refused("n_filters"),
        long=f"{TOKENIZER} steps=30 output=new",
        killed=Killed(f"{TOKENIZER} steps=30 output=new", "new/checkpoints/step_00000006.pt"),
        needs="corpus alignment speaker",
    ),
    goes_on(
        "a language model is prolonged, with other intervals",
        "steps=90 log_every=2 validate_every=30 save_every=10",
        long=f"{ASR} output=new",
        killed=Killed(f"{ASR} output=new", "new/checkpoints/step_000000[1-7]?.pt"),
        needs="codes tokenizer",
    ),
    goes_on(
        "a text model is prolonged, with other intervals",
        "steps=70 save_every=10 log_every=2 validate_every=35",
        long=f"{TEXT_SMALL} output=new",
        killed=Killed(f"{TEXT_SMALL} output=new", "new/checkpoints/checkpoint-6/trainer_state.json"),
        needs="text.txt",
    ),
    Case(
        "a run goes on in two processes",
        f"speechllm run train_teacher --processes 2 {words_of(LONG)}",
        accepted(went_on("new")),
        "corpus",
        before=(KILLED,),
        then=lambda at: marked(at / "new"),
        changes=RUN,
        limit_s=240,
    ),
    Case(
        "a finished run with more steps",
        f"{SPEAKER} steps=9 output=speaker",
        (refused("steps|finished"), accepted(lambda at, _: read_json(at / "speaker/done.json")["steps"] == 9)),
        "corpus speaker",
        changes=("speaker/*",),
    ),
    Case("a finished run with another seed", f"{SPEAKER} seed=5 output=speaker", refused("seed"), "corpus speaker"),
    # ---- signals
    saved("SIGTERM saves a teacher", f"{SPEAKER} steps=60", "corpus", signal.SIGTERM),
    saved("SIGUSR1 saves a teacher", f"{SPEAKER} steps=60", "corpus", signal.SIGUSR1),
    saved("SIGTERM saves a tokenizer", f"{TOKENIZER} steps=30", "corpus alignment speaker", signal.SIGTERM),
    saved("SIGTERM saves a language model", ASR, "codes tokenizer", signal.SIGTERM),
    saved("SIGUSR1 saves a language model", ASR, "codes tokenizer", signal.SIGUSR1),
    saved("SIGTERM saves a text model", TEXT_SMALL, "text.txt", signal.SIGTERM),
    # ---- a full disk
    disk_full(
        "a full disk at a teacher's checkpoint",
        f"{SPEAKER} save_every=2 steps=60",
        "corpus",
        60_000,
        lambda at, _: not list((at / "new/checkpoints").glob("step_*.pt")),
    ),
    disk_full(
        "a full disk at a tokenizer's checkpoint",
        TOKENIZER,
        "corpus alignment speaker",
        60_000,
    ),
    disk_full(
        "a full disk at a language model's checkpoint",
        ASR,
        "codes tokenizer",
        60_000,
    ),
    disk_full("a full disk at a text model's checkpoint", TEXT, "text.txt", 20_000),
    disk_full(
        "a full disk at a shard of codes",
        ENCODE,
        "corpus tokenizer",
        2000,
        lambda at, _: not list((at / "new").glob("codes_*.arrow")),
    ),
    disk_full("a full disk at an import", "import_speech.py data=shards", "shards", 2500),
    Case(
        "a run goes on after the disk was full",
        LONG,
        accepted(lambda at, _: (at / "new/done.json").exists()),
        "corpus",
        before=(KILLED,),
        then=lambda at: (at / "new/checkpoints/step_00000099.part").write_bytes(b"half"),
        changes=RUN,
    ),
    # ---- numbers that are none
    diverging("a teacher that diverges", f"{SPEAKER} learning_rate=1e30 steps=30", "corpus"),
    diverging("an aligned teacher that diverges", f"{ALIGNMENT} learning_rate=1e30 steps=30", "corpus"),
    diverging("a tokenizer that diverges", f"{TOKENIZER} learning_rate=1e30 steps=30", "corpus alignment speaker"),
    diverging("a language model that diverges", f"{ASR} learning_rate=1e30", "codes tokenizer"),
    diverging("a text model that diverges", f"{TEXT} learning_rate=1e30", "text.txt"),
    diverging("emotions that diverge", f"{EMOTION} learning_rate=1e30", "actor_codes tokenizer"),
    Case(
        "one gradient of a teacher that is none",
        nan_gradients(f"{SPEAKER}", "count[0] == 3"),
        skipped(finite_and_counted),
        "corpus",
    ),
    Case(
        "many gradients of a teacher that are none",
        nan_gradients(f"{SPEAKER} steps=80", "count[0] > 3"),
        refused(r"u\d\d|finite|nan", no_model),
        "corpus",
    ),
    Case(
        "one gradient of a tokenizer that is none",
        nan_gradients(TOKENIZER, "count[0] == 3", "tokenizer.training.losses.MultiScaleMelLoss.forward"),
        skipped(lambda at, said: "finite" in (at / "new/done.json").read_text() + said or "gradient" in said),
        "corpus alignment speaker",
    ),
    Case(
        "many gradients of a language model that are none",
        nan_gradients(f"{ASR}", "count[0] > 3"),
        refused(NONE, no_model),
        "codes tokenizer",
    ),
    # ---- nothing to learn from
    Case(
        "a speaker teacher of one speaker",
        f"{SPEAKER} data=mine splits=null dev_splits=null output=new",
        refused("2 speakers|speaker", no_model),
        "",
        one_speaker,
    ),
    Case(
        "an aligned teacher without phones",
        f"{ALIGNMENT} data=mine splits=null dev_splits=null output=new",
        refused("phones", no_model),
        "",
        one_speaker,
    ),
    Case(
        "a teacher of characters without texts",
        f"{CTC} data=actors splits=null dev_splits=null output=new max_duration_s=0.1",
        refused("text|long|utterance", no_model),
        "actors",
    ),
    Case(
        "a teacher whose utterances are all too long",
        f"{SPEAKER} max_duration_s=0.1 output=new",
        refused("0.1|long|speaker|utterance", no_model),
        "corpus",
    ),
    Case(
        "a crop longer than every recording",
        f"{SPEAKER} crop_s=50 output=new",
        (refused("crop"), accepted(finite_weights)),
        "corpus",
    ),
    Case(
        "a peak of 4.5e29 for a tokenizer",
        f"{TOKENIZER} data=mine dev_splits=null output=new",
        (skipped(lambda at, _: read_json(at / "new/done.json")["skipped"] == 1), refused("bad.wav")),
        "alignment speaker",
        corpus_with("bad.wav", floats(tone(0.5, 1) * 4.5e29)),
    ),
    Case(
        "a recording that disappears",
        f"{SPEAKER} data=mine splits=null dev_splits=null output=new",
        refused("used|usable|missing|recording", no_model, SOME),
        "",
        only_bad,
        then=lambda at: [f.unlink() for f in (at / "mine").glob("*.wav")],
    ),
    Case(
        "emotions of one actor",
        f"{EMOTION} codes=new output=results",
        refused("actor"),
        "actors tokenizer",
        lambda at: [shutil.rmtree(at / "actors" / f"Actor_{i:02}") for i in (2, 3, 4)],
        ("encode_speech.py codec=tokenizer/model data=actors layers=null output=new",),
    ),
    Case(
        "emotions of recordings that are none of RAVDESS",
        f"{EMOTION} codes=codes output=new",
        refused("RAVDESS"),
        "codes tokenizer",
    ),
    # ---- other things around a run
    Case(
        "a tracker that is not installed",
        f"{ASR} trackers=[tensorboard] output=new",
        (refused("tensorboard.*(install|pip)"), accepted()),
        "codes tokenizer",
    ),
    Case(
        "a stage file that is cut",
        "demo.py data=corpus output=new semantic_teacher=tiny/semantic.yaml",
        refused("stages.json|demo.json"),
        "corpus tiny",
        lambda at: ((at / "new").mkdir(), (at / "new/demo.json").write_text('{"data": "co')),
        changes=RUN,
    ),
    Case(
        "a comparison whose corpus is not there",
        "compare.py --config tiny/compare.yaml data=nowhere output=new",
        refused("nowhere"),
        "tiny tokenizer",
    ),
    Case(
        "a comparison whose tokenizer is not there",
        "compare.py --config tiny/compare.yaml data=corpus output=new",
        refused("tokenizer/model", lines=12),  # of every seed
        "tiny corpus",
        limit_s=240,
    ),
    Case("a demo whose corpus is not there", "demo.py data=nowhere output=new", refused("nowhere")),
    Case(
        "a demo with other settings in the same folder",
        "demo.py data=corpus scale=3 output=new",
        refused("settings|scale"),
        "corpus",
        lambda at: (
            (at / "new").mkdir(),
            (at / "new/claim.json").write_text('{"job": "demo"}'),
            (at / "new/demo.json").write_text(json.dumps({"scale": 1})),
        ),
    ),
    Case(
        "an aligned corpus that was moved",
        f"{SPEAKER} data=there steps=2 output=new2",
        (accepted(), refused("missing|no such|usable|recording")),
        "corpus",
        before=("align_speech.py data=corpus output=new",),
        then=moved("new", "there"),
        writes=("new2", "new2/*"),
    ),
)
