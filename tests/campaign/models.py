"""Models at the door: complete and of the right kind, or refused with the name of the file."""

import re
import shutil
from pathlib import Path

from damage import (
    CODEC_CONFIG,
    CODEC_WEIGHTS,
    ECAPA,
    PAGE,
    POINTER,
    Change,
    both,
    content,
    cut,
    ecapa,
    gone,
    loads,
    not_a_number,
    nothing_ran,
    pickle_that_runs_code,
    recipe_that_runs_code,
    renamed,
    settings,
    tensors,
    without_half,
    without_one,
    wrong,
)
from judge import Case, Outcome, accepted, refused
from parts import ALIGNMENT, EMOTION, ROOT, TOKENIZER, UNITS, read_json

ENCODE = "encode_speech.py data=corpus output=new codec="


def own_tokenizer(without: str = "", encode: str = "") -> Change:
    """The tokenizer of one's own from the documents, but for an attribute."""
    text = (ROOT / "tokenizer" / "README.md").read_text(encoding="utf-8")
    (block,) = [part for part in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "class Loudness" in part]

    def write(folder: Path) -> None:
        code = block + (f"\n\ndel Loudness.{without}\n" if without else "")
        (folder / "mine.py").write_text(code + (f"\nLoudness.encode = {encode}\n" if encode else ""), encoding="utf-8")

    return write


def units(name: str, change: Change, file: str) -> Case:
    return loads(name, change, file, "units", f"{ENCODE}units/model layers=null", "corpus")


def encodec(name: str, change: Change, file: str) -> Case:
    return loads(name, change, file, "encodec", "speechllm import-codec --kind encodec encodec new")


def codec(name: str, change: Change, file: str = "tokenizer/model") -> Case:
    return loads(name, change, file, "tokenizer", f"{ENCODE}tokenizer/model", "corpus")


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


EMOTION_BERT = f"{EMOTION} output=new model="
CASES = (
    # ---- codecs
    codec("a codec's weights are cut", cut(CODEC_WEIGHTS), "model.safetensors"),
    codec("a codec's weights are empty", content(CODEC_WEIGHTS, b""), "model.safetensors"),
    codec("a codec's weights are a page", content(CODEC_WEIGHTS, PAGE), "model.safetensors"),
    codec(
        "a codec's weights are a Git LFS pointer",
        content(CODEC_WEIGHTS, POINTER),
        "model.safetensors",
    ),
    codec("a codec's weights are missing", gone(CODEC_WEIGHTS), "model.safetensors"),
    codec("a codec lacks one tensor", tensors(CODEC_WEIGHTS, without_one)),
    codec("a codec's tensors have other names", tensors(CODEC_WEIGHTS, renamed)),
    codec("a codec of NaN", tensors(CODEC_WEIGHTS, not_a_number), "tokenizer/model|NaN|finite"),
    codec("a codec's configuration is cut", cut(CODEC_CONFIG), "config.json"),
    codec("a codec's configuration is empty", content(CODEC_CONFIG, b""), "config.json"),
    codec("a codec's configuration is a list", content(CODEC_CONFIG, b"[1]"), "config.json"),
    codec("a codec's configuration is missing", gone(CODEC_CONFIG)),
    codec("a codec's configuration lacks a key", settings(CODEC_CONFIG, num_codebooks=...)),
    codec(
        "a codec's configuration has words for numbers",
        settings(CODEC_CONFIG, num_codebooks="two"),
        "num_codebooks|damaged",
    ),
    codec("a codec's configuration has other sizes", settings(CODEC_CONFIG, dimension=12)),
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
    wrong("a codec's name is a typo", f"{ENCODE}./tokenizer/modle", "tokenizer/modle", "corpus"),
    units(
        "units' centroids are cut",
        lambda at: [cut(str(f.relative_to(at)))(at) for f in (at / "units/model").glob("centroids*")],
        "centroids",
    ),
    units("units' settings are cut", cut("units/model/audio_tokenizer.json"), "audio_tokenizer.json"),
    units("units' model is cut", cut("units/model/model.safetensors"), "model.safetensors"),
    encodec("an EnCodec is cut", cut("encodec/model.safetensors"), "model.safetensors|encodec"),
    encodec("an EnCodec's configuration is cut", cut("encodec/config.json"), "config.json|encodec"),
    encodec("an EnCodec lacks a tensor", tensors("encodec/model.safetensors", without_one), "encodec"),
    Case(
        "a HuBERT for an EnCodec",
        "speechllm import-codec --kind encodec alignment/model new",
        refused("alignment"),
        "alignment",
    ),
    Case(
        "a folder without SpeechTokenizer's files",
        "speechllm import-codec --kind speechtokenizer encodec new",
        refused("encodec"),
        "encodec",
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
    wrong(
        "a layer for a teacher that has one",
        f"{TOKENIZER} steps=2 semantic.layer=99 output=new",
        "99",
        "corpus alignment speaker",
    ),
    wrong("layer 99 for fit_units", f"{UNITS} layer=99 output=new", "99", "corpus alignment"),
    wrong("a language model for fit_units", f"{UNITS} model=text/model output=new", "text/model", "corpus text"),
    wrong(
        "an emotional BERT that is a HuBERT",
        f"{EMOTION_BERT}alignment/model",
        "alignment/model",
        "actor_codes tokenizer alignment",
    ),
    wrong("an emotional BERT that is a Qwen2", f"{EMOTION_BERT}text/model", "text/model", "actor_codes tokenizer text"),
    wrong(
        "an emotional BERT that is an empty folder",
        f"{EMOTION_BERT}./mine",
        "mine",
        "actor_codes tokenizer",
        lambda at: (at / "mine").mkdir(),
    ),
    wrong(
        "a codec for a semantic teacher",
        f"{TOKENIZER} steps=2 semantic.teacher=tokenizer/model output=new",
        "tokenizer/model",
        "corpus tokenizer speaker",
    ),
    wrong(
        "a HuBERT for a speaker teacher",
        f"{TOKENIZER} steps=2 acoustic.teacher=alignment/model output=new",
        "alignment/model",
        "corpus alignment",
    ),
    wrong(
        "a speaker teacher for a HuBERT to start from",
        f"{ALIGNMENT} init=speaker/model output=new",
        "speaker/model",
        "corpus speaker",
    ),
    # ---- speaker teachers
    speaker("an ECAPA that lacks half of its keys", ecapa(without_half)),
    speaker("an ECAPA that lacks one key", ecapa(without_one)),
    speaker("an ECAPA whose keys have other names", ecapa(renamed)),
    speaker("an ECAPA of NaN", ecapa(not_a_number), "speaker/model|NaN|finite"),
    speaker("an ECAPA that is cut", cut(ECAPA), "embedding_model.ckpt"),
    speaker("an ECAPA that is a page", content(ECAPA, PAGE), "embedding_model.ckpt"),
    speaker("an ECAPA that is missing", gone(ECAPA), "embedding_model.ckpt"),
    speaker("an ECAPA that runs code (pickle)", pickle_that_runs_code(ECAPA)),
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
    wrong(
        "a tokenizer of one's own that returns a list",
        f"{ENCODE}mine.py:Loudness layers=null",
        "Loudness|encode",
        "corpus",
        own_tokenizer(encode="lambda self, *a, **k: [1, 2]"),
    ),
    wrong(
        "a tokenizer of one's own in a file with a mistake",
        f"{ENCODE}mine.py:Loudness layers=null",
        "mine.py",
        "corpus",
        content("mine.py", b"class Loudness(:\n"),
    ),
    wrong(
        "a tokenizer of one's own whose import fails",
        f"{ENCODE}mine.py:Loudness layers=null",
        "no_such_module|mine.py",
        "corpus",
        content("mine.py", b"import no_such_module\n"),
    ),
    wrong(
        "a tokenizer of one's own under another name",
        f"{ENCODE}mine.py:Noise layers=null",
        "no class Noise",
        "corpus",
        own_tokenizer(),
    ),
)
