"""What the campaign tries things on: a tiny corpus of tones, and one of everything that recipes make of it."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import soundfile
import torch
import yaml
from start import ROOT, Lane

RATE = 16_000


def test_file(name: str) -> ModuleType:
    """A file of the tests, whose tiny corpora and settings are used here too."""
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / "tests" / name)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


chain, emotion, imports = map(
    test_file, ("recipes/test_recipes.py", "recipes/test_train_emotion.py", "recipes/test_import_speech.py")
)
SMALL = "hidden_size=16 layers=1"
ALIGNMENT = f"train_teacher.py kind=semantic objective=alignment {SMALL} {chain.TEACHER}"
CTC = f"train_teacher.py kind=semantic objective=ctc {SMALL} {chain.TEACHER}"
SPEAKER = f"train_teacher.py kind=speaker channels=8 crop_s=0.4 {chain.TEACHER}"
TOKENIZER = f"train_tokenizer.py {chain.RANDOM}"
ENCODE = "encode_speech.py codec=tokenizer/model data=corpus layers=null"
ASR = f"train_asr.py {chain.ASR_RANDOM}"
TEXT_SHAPE = (
    "shape.hidden_size=16 shape.intermediate_size=32 shape.num_hidden_layers=2 shape.num_attention_heads=2 "
    "shape.num_key_value_heads=1"
)
TEXT = (
    f"train_text.py text=[text.txt] text_tokens=300 {TEXT_SHAPE} block=32 steps=12 batch_size=4 warmup=2 "
    "validate_every=6 save_every=3 log_every=1"
)
EMOTION = f"train_emotion.py codes=actor_codes codec=tokenizer/model {' '.join(emotion.WORDS)}"
UNITS = "fit_units.py model=alignment/model data=corpus clusters=8 layer=1"
COMPRESSOR = (
    "train_compressor.py codes=codes codec=tokenizer/model splits=[train] dev_splits=[dev] width=64 depth=1 steps=12 "
    "batch_size=4 warmup=2 validate_every=6 save_every=2 log_every=1"
)
FRAMES = "encode_speech.py codec=features:alignment/model#1 data=corpus"
REPCODEC = (
    "train_repcodec.py codes=frames codec=features:alignment/model#1 splits=[train] dev_splits=[dev] codebook_size=8 "
    "depth=1 steps=12 batch_size=4 warmup=2 validate_every=6 save_every=2 log_every=1"
)
CUT = "cut_speech.py codes=codes letters=letters/model splits=[train]"
EVAL_ASR = "eval_asr.py model=asr/model codes=codes splits=[test]"
MAKE_ROWS = "make_rows.py data=corpus task=words answer=text question=What?"
EVAL_ROWS = "eval_rows.py model=asr/model codes=codes rows=[rows/test.jsonl] splits=[test] answer_tokens=8"
MADE = {  # in this order, one of another
    "alignment": ALIGNMENT,
    "ctc": CTC,
    "speaker": SPEAKER,
    "tokenizer": TOKENIZER,
    "codes": ENCODE,
    "asr": ASR,
    "evaluation": EVAL_ASR,
    "rows": MAKE_ROWS,
    "units": UNITS,
    "letters": COMPRESSOR,
    "frames": FRAMES,
    "text": TEXT,
    "actor_codes": "encode_speech.py codec=tokenizer/model data=actors layers=null",
    "emotion": EMOTION,
}


def make_parts(folder: Path, lane: Lane) -> None:
    """Everything that is not there yet."""
    written = {
        "corpus": chain.write_corpus,
        "actors": write_actors,
        "text.txt": write_text,
        "shards": write_shards,
        "encodec": write_encodec,
        "tiny": write_configs,
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, write in written.items():
        if not (folder / name).exists():
            write(folder / name)
    for name, command in MADE.items():
        if not any((folder / name / file).exists() for file in ("done.json", "results.json")):
            ended = lane.run(f"{command} output={name}", folder, limit_s=300)
            if ended.code:
                raise SystemExit(f"{command} output={name}\n{ended.errors[-3000:]}")


def tone(seconds: float, seed: int = 0, rate: int = RATE) -> np.ndarray:
    """Something that changes all the time: float [N] in [-0.5, 0.5]."""
    draw, time = np.random.default_rng(seed), np.arange(round(seconds * rate)) / rate
    level = np.repeat(draw.uniform(0.1, 1, len(time) // 200 + 1), 200)[: len(time)]
    return level * (0.3 * np.sin(2 * np.pi * draw.uniform(200, 900) * time) + 0.05 * draw.standard_normal(len(time)))


def write_actors(folder: Path) -> None:
    """RAVDESS in its official layout: four actors, four emotions, each said twice."""
    for actor in range(1, 5):
        for emotion_name in emotion.EMOTIONS:
            for statement in (1, 2):
                name = emotion.ravdess_id(emotion_name, actor, statement)
                path = folder / f"Actor_{actor:02}" / f"{name}.wav"
                path.parent.mkdir(parents=True, exist_ok=True)
                soundfile.write(path, tone(0.3, hash((actor, statement)) % 1000), RATE)


def write_text(file: Path) -> None:
    draw, words = np.random.default_rng(0), "the a red blue lamp door opens closes now never room is dark cold".split()
    file.write_text("".join(" ".join(draw.choice(words, 6)) + "\n" for _ in range(400)), encoding="utf-8")


def write_shards(folder: Path) -> None:
    """A data set as Parquet files: 120 recordings in three files of one split, 20 in another."""
    folder.mkdir()
    for split, parts in (("train", 3), ("test", 1)):
        for part in range(parts):
            names = [f"{split}-{part}-{i}" for i in range(40 if split == "train" else 20)]
            sounds = [{"bytes": imports.sound(0.1), "path": f"{name}.flac"} for name in names]
            columns = {"id": names, "audio": sounds, "text": ["ONE TWO"] * len(names), "speaker_id": [84] * len(names)}
            imports.make(columns).to_parquet(folder / f"{split}-{part:05}-of-{parts:05}.parquet")


def write_encodec(folder: Path) -> None:
    from transformers import EncodecConfig, EncodecModel

    torch.manual_seed(0)
    converters = test_file("tokenizer/codec/test_converters.py")
    EncodecModel(EncodecConfig(**converters.ENCODEC)).save_pretrained(folder)


def write_configs(folder: Path) -> None:
    """Configurations of the demo and of a comparison that take seconds."""
    folder.mkdir()

    def settings(command: str) -> dict[str, object]:
        found: dict[str, object] = {}
        for word in command.split()[1:]:
            key, _, value = word.partition("=")
            *sections, last = key.split(".")
            section = found
            for name in sections:
                section = section.setdefault(name, {})
            section[last] = value if value == "no" else yaml.safe_load(value)
        return found

    def write(name: str, values: dict[str, object], *without: str) -> None:
        kept = {key: value for key, value in values.items() if key not in without}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(kept), encoding="utf-8")

    write("semantic", settings(ALIGNMENT), "data")
    write("speaker", settings(SPEAKER), "data")
    tokenizer_settings = settings(TOKENIZER)
    for part in ("semantic", "acoustic"):
        tokenizer_settings[part].pop("teacher")
        tokenizer_settings[part].pop("cache", None)
    write("codec", tokenizer_settings, "data")
    write("asr", settings(ASR) | {"steps": 12}, "codes", "codec")
    system = {"name": "one", "tokenizer": "tokenizer/model"}
    comparison = {"tasks": ["content", "asr"], "asr": "tiny/asr.yaml", "systems": [system], "seeds": [0, 1]}
    write("compare", comparison | {"probe_steps": 2})


def read_json(file: Path) -> dict[str, object]:
    return json.loads(file.read_text(encoding="utf-8"))
