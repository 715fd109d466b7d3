"""Models and checkpoints at the door: complete and of the right kind, or refused with the name of the file."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
import torch
from judge import Case, Killed, Outcome, accepted, refused
from parts import ALIGNMENT, ASR, EMOTION, EVAL_ASR, RATE, ROOT, SPEAKER, TEXT, TOKENIZER, UNITS, read_json, tone
from safetensors.torch import load_file, save_file

Change = Callable[[Path], object]
PAGE = b"<!DOCTYPE html><html>403 Forbidden</html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
ENCODE = "encode_speech.py data=corpus output=new codec="


def cut(file: str, share: float = 0.5) -> Change:
    def write(folder: Path) -> None:
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content[: int(len(content) * share)])

    return write


def content(file: str, data: bytes) -> Change:
    return lambda folder: (folder / file).write_bytes(data)


def gone(file: str) -> Change:
    return lambda folder: (folder / file).unlink()


def settings(file: str, **changed: object) -> Change:
    """Other values in a JSON file; ... removes a key."""

    def write(folder: Path) -> None:
        values = {**read_json(folder / file), **changed}
        (folder / file).write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))

    return write


def tensors(file: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    """Other tensors in a safetensors file."""

    def write(folder: Path) -> None:
        values = load_file(folder / file)
        change(values)
        save_file(values, folder / file, {"format": "pt"})

    return write


def ecapa(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def write(folder: Path) -> None:
        file = folder / "speaker" / "model" / "embedding_model.ckpt"
        values = torch.load(file, weights_only=True)
        change(values)
        torch.save(values, file)

    return write


def renamed(values: dict[str, torch.Tensor]) -> None:
    for key in list(values):
        values[f"module.{key}"] = values.pop(key)


def without_half(values: dict[str, torch.Tensor]) -> None:
    for key in sorted(values)[::2]:
        del values[key]


def without_one(values: dict[str, torch.Tensor]) -> None:
    del values[sorted(values)[-1]]


def not_a_number(values: dict[str, torch.Tensor]) -> None:
    for value in values.values():
        if value.is_floating_point():
            value.fill_(float("nan"))


def recipe_that_runs_code(line: str) -> Change:
    """A line in hyperparams.yaml that writes a file, if it is run."""

    def write(folder: Path) -> None:
        file = folder / "speaker" / "model" / "hyperparams.yaml"
        file.write_text(f"{line}\n{file.read_text()}")

    return write


def pickle_that_runs_code(file: str) -> Change:
    def write(folder: Path) -> None:
        place = str(folder / "pwned").encode()
        (folder / file).write_bytes(b"cos\nsystem\n(S'touch " + place + b"'\ntR.")

    return write


def nothing_ran(folder: Path, _: str) -> bool:
    return not (folder / "pwned").exists()


def own_tokenizer(without: str = "", encode: str = "") -> Change:
    """The tokenizer of one's own from the documents, but for an attribute."""
    text = (ROOT / "tokenizer" / "README.md").read_text(encoding="utf-8")
    (block,) = [part for part in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "class Loudness" in part]

    def write(folder: Path) -> None:
        code = block + (f"\n\ndel Loudness.{without}\n" if without else "")
        (folder / "mine.py").write_text(code + (f"\nLoudness.encode = {encode}\n" if encode else ""), encoding="utf-8")

    return write


def codes_with(change: Callable[[list[dict[str, object]]], object]) -> Change:
    def write(folder: Path) -> None:
        file = folder / "codes" / "codes_00000.parquet"
        table = pq.read_table(file)
        rows = table.to_pylist()
        change(rows)
        pq.write_table(pa.Table.from_pylist(rows, table.schema), file)

    return write


def foreign_parquet(folder: Path) -> None:
    pq.write_table(pa.table({"a": [1, 2]}), folder / "codes" / "codes_00000.parquet")


def without_column(name: str) -> Change:
    def write(folder: Path) -> None:
        file = folder / "codes" / "codes_00000.parquet"
        pq.write_table(pq.read_table(file).drop([name]), file)

    return write


def recording(folder: Path) -> None:
    soundfile.write(folder / "a.wav", tone(0.5, 3), RATE)


def both(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


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


def loads(name: str, change: Change, file: str, part: str, command: str, needs: str = "", **more: object) -> Case:
    """A part that is changed, and refused by a command with the name of its file or folder."""
    return Case(name, command, refused(file), f"{part} {needs}".strip(), change, **more)


def codec(name: str, change: Change, file: str = "tokenizer/model") -> Case:
    return loads(name, change, file, "tokenizer", f"{ENCODE}tokenizer/model", "corpus")


def code(name: str, change: Change, file: str) -> Case:
    return loads(name, change, file, "codes", f"{ASR} output=new", "tokenizer")


def speaker(name: str, change: Change, pattern: str = "speaker/model|embedding_model") -> Case:
    command = "eval_codec.py codec=tokenizer/model data=corpus splits=[test] speaker=speaker/model output=new"
    return Case(name, command, refused(pattern, nothing_ran), "speaker tokenizer corpus", change)


def features(name: str, spelling: str, *outcomes: Outcome, change: Change | None = None) -> Case:
    return Case(
        name,
        f"{ENCODE}{spelling} layers=null",
        outcomes or (refused(spelling.split(":")[1].split("#")[0]),),
        "alignment corpus",
        change,
    )


def own(name: str, without: str) -> Case:
    return Case(name, f"{ENCODE}mine.py:Loudness layers=null", refused(without), "corpus", own_tokenizer(without))


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
KILLED = (Killed(RUNNING, "new/checkpoints/step_00000004.pt"),)
EMOTION_BERT = f"{EMOTION} output=new model="
BROKEN = "|safetensors|cannot|not a|cut|broken|damaged|incomplete|unreadable|corrupt"
CASES = (
    # ---- codecs
    codec("a codec's weights are cut", cut("tokenizer/model/model.safetensors"), "model.safetensors"),
    codec("a codec's weights are empty", content("tokenizer/model/model.safetensors", b""), "model.safetensors"),
    codec("a codec's weights are a page", content("tokenizer/model/model.safetensors", PAGE), "model.safetensors"),
    codec(
        "a codec's weights are a Git LFS pointer",
        content("tokenizer/model/model.safetensors", POINTER),
        "model.safetensors",
    ),
    codec("a codec's weights are missing", gone("tokenizer/model/model.safetensors"), "model.safetensors"),
    codec("a codec lacks one tensor", tensors("tokenizer/model/model.safetensors", without_one)),
    codec("a codec's tensors have other names", tensors("tokenizer/model/model.safetensors", renamed)),
    codec("a codec of NaN", tensors("tokenizer/model/model.safetensors", not_a_number), "tokenizer/model|NaN|finite"),
    codec("a codec's configuration is cut", cut("tokenizer/model/config.json"), "config.json"),
    codec("a codec's configuration is empty", content("tokenizer/model/config.json", b""), "config.json"),
    codec("a codec's configuration is a list", content("tokenizer/model/config.json", b"[1]"), "config.json"),
    codec("a codec's configuration is missing", gone("tokenizer/model/config.json")),
    codec("a codec's configuration lacks a key", settings("tokenizer/model/config.json", num_codebooks=...)),
    codec("a codec's configuration has a foreign key", settings("tokenizer/model/config.json", colour="red"), "colour"),
    codec(
        "a codec's configuration has words for numbers",
        settings("tokenizer/model/config.json", num_codebooks="two"),
        "num_codebooks",
    ),
    codec("a codec's configuration has other sizes", settings("tokenizer/model/config.json", dimension=12)),
    codec(
        "a codec is a language model",
        both(
            lambda at: shutil.rmtree(at / "tokenizer/model"),
            lambda at: shutil.copytree(at.parent.parent.parent / "parts/text/model", at / "tokenizer/model"),
        ),
    ),
    codec(
        "a codec is an empty folder",
        both(lambda at: shutil.rmtree(at / "tokenizer/model"), lambda at: (at / "tokenizer/model").mkdir()),
    ),
    codec(
        "a codec is a file", both(lambda at: shutil.rmtree(at / "tokenizer/model"), content("tokenizer/model", b"x"))
    ),
    Case("a codec's name is a typo", f"{ENCODE}./tokenizer/modle", refused("tokenizer/modle"), "corpus"),
    loads(
        "units' centroids are cut",
        lambda at: [cut(str(f.relative_to(at)))(at) for f in (at / "units/model").glob("centroids*")],
        "centroids",
        "units",
        f"{ENCODE}units/model layers=null",
        "corpus",
    ),
    loads(
        "units' settings are cut",
        cut("units/model/audio_tokenizer.json"),
        "audio_tokenizer.json",
        "units",
        f"{ENCODE}units/model layers=null",
        "corpus",
    ),
    loads(
        "units' model is cut",
        cut("units/model/model.safetensors"),
        "model.safetensors",
        "units",
        f"{ENCODE}units/model layers=null",
        "corpus",
    ),
    loads(
        "an EnCodec is cut",
        cut("encodec/model.safetensors"),
        "model.safetensors|encodec",
        "encodec",
        "speechllm import-codec --kind encodec encodec new",
    ),
    loads(
        "an EnCodec's configuration is cut",
        cut("encodec/config.json"),
        "config.json|encodec",
        "encodec",
        "speechllm import-codec --kind encodec encodec new",
    ),
    loads(
        "an EnCodec lacks a tensor",
        tensors("encodec/model.safetensors", without_one),
        "encodec",
        "encodec",
        "speechllm import-codec --kind encodec encodec new",
    ),
    loads(
        "a HuBERT for an EnCodec",
        lambda at: None,
        "alignment",
        "alignment",
        "speechllm import-codec --kind encodec alignment/model new",
    ),
    loads(
        "a folder without SpeechTokenizer's files",
        lambda at: None,
        "encodec",
        "encodec",
        "speechllm import-codec --kind speechtokenizer encodec new",
    ),
    # ---- features and recognisers
    features("layer 99", "features:alignment/model#99", refused("99")),
    features("layer -99", "features:alignment/model#-99", refused("-?99")),
    features("a layer in words", "features:alignment/model#last", refused("last")),
    features(
        "a HuBERT that is cut",
        "features:alignment/model#1",
        refused("model.safetensors"),
        change=cut("alignment/model/model.safetensors"),
    ),
    features(
        "a HuBERT whose configuration is cut",
        "features:alignment/model#1",
        refused("config.json"),
        change=cut("alignment/model/config.json"),
    ),
    features(
        "a HuBERT that lacks a tensor",
        "features:alignment/model#1",
        refused("alignment/model"),
        change=tensors("alignment/model/model.safetensors", without_one),
    ),
    features(
        "a HuBERT that lacks half of its tensors",
        "features:alignment/model#1",
        refused("alignment/model"),
        change=tensors("alignment/model/model.safetensors", without_half),
    ),
    features("a HuBERT for a recogniser", "recognizer:alignment/model", refused("alignment/model")),
    features("a HuBERT for a codec", "alignment/model", refused("features:alignment/model")),
    features("an unknown kind", "feature:alignment/model", refused("feature:|features:|kind")),
    Case(
        "a layer for a teacher that has one",
        f"{TOKENIZER} steps=2 semantic.layer=99 output=new",
        refused("99"),
        "corpus alignment speaker",
    ),
    Case("layer 99 for fit_units", f"{UNITS} layer=99 output=new", refused("99"), "corpus alignment"),
    Case(
        "a language model for fit_units", f"{UNITS} model=text/model output=new", refused("text/model"), "corpus text"
    ),
    Case(
        "an emotional BERT that is a HuBERT",
        f"{EMOTION_BERT}alignment/model",
        refused("alignment/model"),
        "actor_codes tokenizer alignment",
    ),
    Case(
        "an emotional BERT that is a Qwen2",
        f"{EMOTION_BERT}text/model",
        refused("text/model"),
        "actor_codes tokenizer text",
    ),
    Case(
        "an emotional BERT that is an empty folder",
        f"{EMOTION_BERT}./mine",
        refused("mine"),
        "actor_codes tokenizer",
        lambda at: (at / "mine").mkdir(),
    ),
    Case(
        "a codec for a semantic teacher",
        f"{TOKENIZER} steps=2 semantic.teacher=tokenizer/model output=new",
        refused("tokenizer/model"),
        "corpus tokenizer speaker",
    ),
    Case(
        "a HuBERT for a speaker teacher",
        f"{TOKENIZER} steps=2 acoustic.teacher=alignment/model output=new",
        refused("alignment/model"),
        "corpus alignment",
    ),
    Case(
        "a speaker teacher for a HuBERT to start from",
        f"{ALIGNMENT} init=speaker/model output=new",
        refused("speaker/model"),
        "corpus speaker",
    ),
    # ---- speaker teachers
    speaker("an ECAPA that lacks half of its keys", ecapa(without_half)),
    speaker("an ECAPA that lacks one key", ecapa(without_one)),
    speaker("an ECAPA whose keys have other names", ecapa(renamed)),
    speaker("an ECAPA of NaN", ecapa(not_a_number), "speaker/model|NaN|finite"),
    speaker("an ECAPA that is cut", cut("speaker/model/embedding_model.ckpt"), "embedding_model.ckpt"),
    speaker("an ECAPA that is a page", content("speaker/model/embedding_model.ckpt", PAGE), "embedding_model.ckpt"),
    speaker("an ECAPA that is missing", gone("speaker/model/embedding_model.ckpt"), "embedding_model.ckpt"),
    speaker("an ECAPA that runs code (pickle)", pickle_that_runs_code("speaker/model/embedding_model.ckpt")),
    speaker(
        "an ECAPA that runs code (!apply)",
        recipe_that_runs_code("evil: !apply:os.system ['touch pwned']"),
        "hyperparams.yaml",
    ),
    speaker(
        "an ECAPA that runs code (!new)",
        recipe_that_runs_code("evil: !new:subprocess.Popen [['touch', 'pwned']]"),
        "hyperparams.yaml",
    ),
    speaker(
        "an ECAPA that runs code (!!python)",
        recipe_that_runs_code("evil: !!python/object/apply:os.system ['touch pwned']"),
        "hyperparams.yaml",
    ),
    speaker("an ECAPA that names code (!name)", recipe_that_runs_code("evil: !name:os.system"), "hyperparams.yaml"),
    speaker(
        "an ECAPA that includes a file (!include)",
        recipe_that_runs_code("evil: !include:/etc/passwd"),
        "hyperparams.yaml",
    ),
    speaker("an ECAPA whose settings are cut", cut("speaker/model/hyperparams.yaml", 0.55), "hyperparams.yaml"),
    speaker("an ECAPA whose settings are a page", content("speaker/model/hyperparams.yaml", PAGE), "hyperparams.yaml"),
    speaker(
        "an ECAPA of another size",
        lambda at: (at / "speaker/model/hyperparams.yaml").write_text(
            (at / "speaker/model/hyperparams.yaml").read_text().replace("lin_neurons: 8", "lin_neurons: 12")
        ),
    ),
    # ---- tokenizers of one's own
    Case(
        "a tokenizer of one's own",
        f"{ENCODE}mine.py:Loudness layers=null",
        accepted(lambda at, _: read_json(at / "new/done.json")["encoding"]["kind"] == "codes"),
        "corpus",
        own_tokenizer(),
    ),
    own("a tokenizer of one's own without num_codebooks", "num_codebooks"),
    own("a tokenizer of one's own without codebook_size", "codebook_size"),
    own("a tokenizer of one's own without codebooks", "codebooks"),
    own("a tokenizer of one's own without encode", "encode"),
    own("a tokenizer of one's own without fingerprint", "fingerprint"),
    own("a tokenizer of one's own without parameters", "parameters"),
    Case(
        "a tokenizer of one's own that returns a list",
        f"{ENCODE}mine.py:Loudness layers=null",
        refused("Loudness|encode"),
        "corpus",
        own_tokenizer(encode="lambda self, *a, **k: [1, 2]"),
    ),
    Case(
        "a tokenizer of one's own in a file with a mistake",
        f"{ENCODE}mine.py:Loudness layers=null",
        refused("mine.py"),
        "corpus",
        content("mine.py", b"class Loudness(:\n"),
    ),
    Case(
        "a tokenizer of one's own whose import fails",
        f"{ENCODE}mine.py:Loudness layers=null",
        refused("no_such_module|mine.py"),
        "corpus",
        content("mine.py", b"import no_such_module\n"),
    ),
    Case(
        "a tokenizer of one's own under another name",
        f"{ENCODE}mine.py:Noise layers=null",
        refused("no class Noise"),
        "corpus",
        own_tokenizer(),
    ),
    # ---- codes
    code("codes out of range", codes_with(random_codes), "codes_00000.parquet|999|u03|range"),
    code("codes of unequal layers", codes_with(ragged), "codes_00000.parquet|u03"),
    code("an utterance without codes", codes_with(empty), "codes_00000.parquet|u03"),
    code("codes in a foreign Parquet file", foreign_parquet, "codes_00000.parquet"),
    code("codes without a column", without_column("text"), "codes_00000.parquet"),
    code("codes in a cut file", cut("codes/codes_00000.parquet"), "codes_00000.parquet"),
    code("codes in an empty file", content("codes/codes_00000.parquet", b""), "codes_00000.parquet"),
    code("codes in a page", content("codes/codes_00000.parquet", PAGE), "codes_00000.parquet"),
    code("codes whose request is cut", cut("codes/request.json"), "request.json"),
    code("codes of which a shard is missing", gone("codes/codes_00000.parquet"), "codes"),
    code(
        "codes beside those of another codec",
        lambda at: shutil.copy(
            at.parent.parent.parent / "parts/actor_codes/codes_00000.parquet", at / "codes/codes_00001.parquet"
        ),
        "codes",
    ),
    Case(
        "codes of another codec for train_asr", f"{ASR} codec=units/model output=new", refused("codec"), "codes units"
    ),
    Case("layers that the codes lack", f"{ASR} layers=99 output=new", refused("99|layers"), "codes tokenizer"),
    Case(
        "codes of another codec for eval_asr",
        "eval_asr.py model=asr/model codes=new output=results",
        refused("codec"),
        "asr corpus units",
        before=("encode_speech.py codec=units/model data=corpus layers=null output=new",),
    ),
    # ---- language models
    loads(
        "a language model that is cut",
        cut("text/model/model.safetensors"),
        "model.safetensors|text/model",
        "text",
        f"{ASR} model=text/model output=new",
        "codes tokenizer",
    ),
    loads(
        "a language model without tokenizer",
        gone("text/model/tokenizer.json"),
        "text/model|tokenizer.json",
        "text",
        f"{ASR} model=text/model output=new",
        "codes tokenizer",
    ),
    loads(
        "a language model whose tokenizer is cut",
        cut("text/model/tokenizer.json"),
        "text/model|tokenizer.json",
        "text",
        f"{ASR} model=text/model output=new",
        "codes tokenizer",
    ),
    loads(
        "a language model whose configuration is cut",
        cut("text/model/config.json"),
        "text/model|config.json",
        "text",
        f"{ASR} model=text/model output=new",
        "codes tokenizer",
    ),
    loads(
        "a language model that lacks tensors",
        tensors("text/model/model.safetensors", without_half),
        "text/model",
        "text",
        f"{ASR} model=text/model output=new",
        "codes tokenizer",
    ),
    loads(
        "a HuBERT for a language model",
        lambda at: None,
        "alignment/model",
        "alignment",
        f"{ASR} model=alignment/model output=new",
        "codes tokenizer",
    ),
    loads(
        "a codec for a language model",
        lambda at: None,
        "tokenizer/model",
        "tokenizer",
        f"{ASR} model=tokenizer/model output=new",
        "codes",
    ),
    loads(
        "a speech model that is cut",
        cut("asr/model/model.safetensors"),
        "model.safetensors|asr/model",
        "asr",
        f"{EVAL_ASR} output=new",
        "codes",
    ),
    loads(
        "a speech model without vocabulary",
        gone("asr/model/audio_vocabulary.json"),
        "audio_vocabulary.json",
        "asr",
        f"{EVAL_ASR} output=new",
        "codes",
    ),
    loads(
        "a speech model whose vocabulary is cut",
        cut("asr/model/audio_vocabulary.json"),
        "audio_vocabulary.json",
        "asr",
        f"{EVAL_ASR} output=new",
        "codes",
    ),
    loads(
        "a speech model whose vocabulary is empty",
        content("asr/model/audio_vocabulary.json", b"{}"),
        "audio_vocabulary.json",
        "asr",
        f"{EVAL_ASR} output=new",
        "codes",
    ),
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
    loads(
        "a codec for a speech model",
        lambda at: None,
        "tokenizer/model",
        "tokenizer",
        "eval_asr.py model=tokenizer/model codes=codes output=new",
        "codes",
    ),
    loads(
        "an empty folder for a speech model",
        lambda at: (at / "mine").mkdir(),
        "mine",
        "codes",
        "eval_asr.py model=./mine codes=codes output=new",
    ),
    loads(
        "a speech model of NaN",
        tensors("asr/model/model.safetensors", not_a_number),
        "NaN|finite|asr/model",
        "asr",
        f"{EVAL_ASR} output=new",
        "codes",
    ),
    Case("a generation_config with opinions", ["python", SAME_ANSWERS], accepted(pattern="same"), "asr", opinions),
    # ---- checkpoints
    Case(
        "the newest checkpoint is cut",
        RUNNING,
        accepted(lambda at, _: (at / "new/done.json").exists(), "step_0*4|checkpoint"),
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
    Case(
        "the summary of a run is cut",
        f"{SPEAKER} output=speaker",
        refused("done.json"),
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
