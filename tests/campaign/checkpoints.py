"""Codes, language models and checkpoints: complete and of the right kind, or refused with the name of the file."""

import shutil
from pathlib import Path

from damage import (
    BASE_WEIGHTS,
    PAGE,
    SHARD,
    VOCABULARY,
    Change,
    both,
    codes_with,
    content,
    cut,
    foreign_shard,
    gone,
    loads,
    not_a_number,
    nothing_ran,
    pickle_that_runs_code,
    recording,
    settings,
    tensors,
    without_column,
    without_half,
    wrong,
)
from judge import Case, Killed, accepted, refused
from parts import ASR, EMOTION, EVAL_ASR, SPEAKER, TEXT, read_json


def opinions(folder: Path) -> None:
    """A copy of the model whose generation_config would change every answer."""
    recording(folder)
    shutil.copytree(folder / "asr", folder / "other")
    words = {"suppress_tokens": [*range(200)], "bad_words_ids": [[i] for i in range(200, 300)], "max_length": 3}
    settings("other/model/generation_config.json", **words, guidance_scale=9.0, repetition_penalty=9.0, num_beams=3)(
        folder
    )


SAME_ANSWERS = (
    "from speechllm import load_speech_llm, transcribe; "
    "a, b = (transcribe(['a.wav'], load_speech_llm(f'{name}/model')) for name in ('asr', 'other')); "
    "print('same' if a == b else (a, b))"
)


def base(name: str, change: Change, file: str) -> Case:
    """A language model to start from."""
    return loads(name, change, file, "text", f"{ASR} model=text/model output=new", "codes tokenizer")


def model(name: str, change: Change, file: str) -> Case:
    """A speech language model to evaluate."""
    return loads(name, change, file, "asr", f"{EVAL_ASR} output=new", "codes")


def code(name: str, change: Change, file: str) -> Case:
    return loads(name, change, file, "codes", f"{ASR} output=new", "tokenizer")


def checkpoint_cut(folder: Path) -> None:
    newest = sorted((folder / "new" / "checkpoints").glob("step_*.pt"))[-1]
    newest.write_bytes(newest.read_bytes()[:2000])


def all_checkpoints_cut(folder: Path) -> None:
    for file in (folder / "new" / "checkpoints").glob("step_*.pt"):
        file.write_bytes(b"")


def random_codes(rows: list[dict[str, object]]) -> None:
    rows[3]["codes"] = [999] * len(rows[3]["codes"])


def ragged(rows: list[dict[str, object]]) -> None:
    rows[3]["codes"] = rows[3]["codes"][:-1]


def empty(rows: list[dict[str, object]]) -> None:
    rows[3]["codes"] = []


RUNNING = f"{SPEAKER} save_every=2 steps=60 output=new"
KILLED = (Killed(RUNNING, "new/checkpoints/step_0000001[2-9].pt"),)
CASES = (
    # ---- codes
    code("codes out of range", codes_with(random_codes), "codes_00000.arrow|999|u03|range"),
    code("codes of unequal layers", codes_with(ragged), "codes_00000.arrow|u03"),
    code("an utterance without codes", codes_with(empty), "codes_00000.arrow|u03"),
    code("codes in a foreign Arrow file", foreign_shard, "codes_00000.arrow"),
    code("codes without a column", without_column("text"), "codes_00000.arrow"),
    code("codes in a cut file", cut(SHARD), "codes_00000.arrow"),
    code("codes in an empty file", content(SHARD, b""), "codes_00000.arrow"),
    code("codes in a page", content(SHARD, PAGE), "codes_00000.arrow"),
    code("codes whose request is cut", cut("codes/request.json"), "request.json"),
    code("codes of which a shard is missing", gone(SHARD), "codes"),
    code(
        "codes beside those of another codec",
        lambda at: shutil.copy(
            at.parent.parent.parent / "parts/actor_codes/codes_00000.arrow", at / "codes/codes_00001.arrow"
        ),
        "codes",
    ),
    wrong("codes of another codec for train_asr", f"{ASR} codec=units/model output=new", "codec", "codes units"),
    wrong("layers that the codes lack", f"{ASR} layers=99 output=new", "99|layers", "codes tokenizer"),
    Case(
        "codes of another codec for eval_asr",
        "eval_asr.py model=asr/model codes=new output=results",
        refused("codec"),
        "asr corpus units",
        before=("encode_speech.py codec=units/model data=corpus layers=null output=new",),
    ),
    # ---- language models
    base("a language model that is cut", cut(BASE_WEIGHTS), "model.safetensors|text/model"),
    base("a language model without tokenizer", gone("text/model/tokenizer.json"), "text/model|tokenizer.json"),
    base("a language model whose tokenizer is cut", cut("text/model/tokenizer.json"), "text/model|tokenizer.json"),
    base("a language model whose configuration is cut", cut("text/model/config.json"), "text/model|config.json"),
    base("a language model that lacks tensors", tensors(BASE_WEIGHTS, without_half), "text/model"),
    Case(
        "a HuBERT for a language model",
        f"{ASR} model=alignment/model output=new",
        refused("alignment/model"),
        "alignment codes tokenizer",
    ),
    Case(
        "a codec for a language model",
        f"{ASR} model=tokenizer/model output=new",
        refused("tokenizer/model"),
        "tokenizer codes",
    ),
    model("a speech model that is cut", cut("asr/model/model.safetensors"), "model.safetensors|asr/model"),
    model("a speech model without vocabulary", gone(VOCABULARY), "audio_vocabulary.json"),
    model("a speech model whose vocabulary is cut", cut(VOCABULARY), "audio_vocabulary.json"),
    model("a speech model whose vocabulary is empty", content(VOCABULARY, b"{}"), "audio_vocabulary.json"),
    loads(
        "a speech model whose codec is cut",
        both(recording, cut("asr/model/codec/model.safetensors")),
        "model.safetensors|asr/model/codec",
        "asr",
        "speechllm transcribe a.wav --model asr/model",
    ),
    loads(
        "a speech model without codec",
        both(recording, lambda at: shutil.rmtree(at / "asr/model/codec")),
        "codec",
        "asr",
        "speechllm transcribe a.wav --model asr/model",
    ),
    Case(
        "a codec for a speech model",
        "eval_asr.py model=tokenizer/model codes=codes output=new",
        refused("tokenizer/model"),
        "tokenizer codes",
    ),
    loads(
        "an empty folder for a speech model",
        lambda at: (at / "mine").mkdir(),
        "mine",
        "codes",
        "eval_asr.py model=./mine codes=codes output=new",
    ),
    model("a speech model of NaN", tensors("asr/model/model.safetensors", not_a_number), "NaN|finite|asr/model"),
    Case("a generation_config with opinions", ["python", SAME_ANSWERS], accepted(pattern="same"), "asr", opinions),
    # ---- checkpoints
    Case(
        "the newest checkpoint is cut",
        RUNNING,
        accepted(lambda at, _: (at / "new/done.json").exists(), r"step_0+\d+|checkpoint"),
        "corpus",
        before=KILLED,
        then=checkpoint_cut,
        changes=("new/*",),
    ),
    Case(
        "all checkpoints are empty",
        RUNNING,
        (refused("checkpoint|step_"), accepted(pattern="checkpoint|step_")),
        "corpus",
        before=KILLED,
        then=all_checkpoints_cut,
        changes=("new/*",),
    ),
    Case(
        "a checkpoint that runs code",
        RUNNING,
        (refused("checkpoint|step_", nothing_ran), accepted(nothing_ran, "checkpoint|step_")),
        "corpus",
        before=KILLED,
        then=lambda at: [
            pickle_that_runs_code(str(f.relative_to(at)))(at) for f in (at / "new/checkpoints").glob("step_*.pt")
        ],
        changes=("new/*",),
    ),
    Case(
        "the configuration of a run is cut",
        RUNNING,
        refused("config.yaml"),
        "corpus",
        before=KILLED,
        then=content("new/config.yaml", b"kind: [speak"),
        changes=("new/*",),
    ),
    Case(
        "the configuration of a run is empty",
        RUNNING,
        (refused("config.yaml|config"), accepted()),
        "corpus",
        before=KILLED,
        then=content("new/config.yaml", b""),
        changes=("new/*",),
    ),
    wrong(
        "the summary of a run is cut",
        f"{SPEAKER} output=speaker",
        "done.json",
        "corpus speaker",
        cut("speaker/done.json"),
    ),
    Case(
        "the log of a run is cut",
        RUNNING,
        accepted(lambda at, _: (at / "new/done.json").exists()),
        "corpus",
        before=KILLED,
        then=cut("new/log.jsonl", 0.9),
        changes=("new/*",),
    ),
    Case(
        "a fold of a run is cut",
        f"{EMOTION} output=emotion",
        (refused("folds|0.json"), accepted()),
        "actor_codes tokenizer emotion",
        both(cut("emotion/folds/0.json"), gone("emotion/done.json")),
        changes=("emotion/*",),
    ),
    Case(
        "a journal of an import is cut",
        "import_speech.py data=shards output=new",
        accepted(lambda at, _: read_json(at / "new/done.json")["utterances"] == 140),
        "shards",
        before=(Killed("import_speech.py data=shards output=new", "new/audio/train/0000/*50.flac"),),
        then=cut("new/rows.jsonl", 0.99),
        changes=("new/*",),
    ),
    Case(
        "the newest checkpoint of train_text is empty",
        f"{TEXT} output=new",
        (refused("checkpoint"), accepted(lambda at, _: (at / "new/done.json").exists())),
        "text.txt",
        before=(Killed(f"{TEXT} output=new", "new/checkpoints/checkpoint-6/trainer_state.json"),),
        then=lambda at: [file.write_bytes(b"") for file in (at / "new/checkpoints/checkpoint-6").iterdir()],
        changes=("new/*",),
    ),
)
