"""Every YAML under configs/ opens with the command that runs it, and that command would be accepted."""

import ast
import re
import shlex
import types
from collections.abc import Callable
from dataclasses import is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pytest
import yaml

from speechllm import ConfigError
from speechllm.runs.config import load_config

ROOT = Path(__file__).resolve().parents[2]
EVERY = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.yaml"))
CONFIGS = [config for config in EVERY if "/accelerate/" not in config]  # those are for Accelerate: test_train_asr.py
RECIPES = sorted(path.name for path in (ROOT / "recipes").glob("*.py"))
SYSTEMS = re.findall(r"`(\w+\.yaml)((?: [\w.]+=[^\s`]+)+)`", (ROOT / "configs/README.md").read_text(encoding="utf-8"))
COMMAND = re.compile(r"python recipes/(\w+\.py) +([^()]+)")  # one process; several: speechllm run NAME --processes N


def header(config: str) -> str:
    """The comment lines at the beginning, without #; a line that ends with a backslash goes on in the next one."""
    lines = []
    for line in (ROOT / config).read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return "\n".join(lines).replace("\\\n", " ")


def command(config: str) -> tuple[str, list[str]]:
    """Recipe and words of the command in the header."""
    commands = [(recipe, shlex.split(words)) for recipe, words in COMMAND.findall(header(config))]
    assert commands, f"{config} does not open with the command that runs it"
    return commands[0]


def config_paths(text: str) -> set[str]:
    return set(re.findall(r"\bconfigs/[\w./-]+\.yaml\b", text))


def test_there_are_configs() -> None:
    assert len(CONFIGS) >= 5


@pytest.mark.parametrize("config", CONFIGS)
def test_the_command_in_the_header_would_be_accepted(
    config: str, config_class: Callable[[str], type], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, words = command(config)
    assert recipe in RECIPES
    assert words[:2] == ["--config", config]
    assert all("=" in word for word in words[2:])
    monkeypatch.chdir(ROOT)
    loaded = load_config(config_class(recipe), config, words[2:])
    assert is_dataclass(loaded)
    values = yaml.safe_load((ROOT / config).read_text(encoding="utf-8"))
    plain = {key: value for key, value in values.items() if type(value) in (int, list, bool) and key != "systems"}
    assert plain and {key: getattr(loaded, key) for key in plain} == plain


@pytest.mark.parametrize("config", CONFIGS)
def test_nothing_in_the_command_is_there_for_nothing(config: str, config_class: Callable[[str], type]) -> None:
    recipe, words = command(config)
    whole = load_config(config_class(recipe), ROOT / config, words[2:])
    for word in words[2:]:
        try:
            without = load_config(config_class(recipe), ROOT / config, [other for other in words[2:] if other != word])
        except ConfigError as error:  # a required key
            without = str(error)
        assert without != whole


@pytest.mark.parametrize("config", CONFIGS)
def test_the_header_says_first_what_it_is(config: str) -> None:
    first = header(config).split("\n")[0]
    assert len(first) > 20 and not COMMAND.search(first)


@pytest.mark.parametrize("config", CONFIGS)
def test_the_values_name_configs_that_exist(config: str) -> None:
    missing = {path for path in config_paths((ROOT / config).read_text(encoding="utf-8")) if path not in EVERY}
    assert not missing


@pytest.mark.parametrize("file", ["Makefile", *(f"recipes/{recipe}" for recipe in RECIPES)])
def test_recipes_and_makefile_name_configs_that_exist(file: str) -> None:
    assert config_paths((ROOT / file).read_text(encoding="utf-8")) <= set(EVERY)


@pytest.mark.parametrize(("preset", "changes"), SYSTEMS)
def test_the_systems_that_have_a_name_can_be_trained(
    preset: str, changes: str, recipe: Callable[[str], types.ModuleType]
) -> None:
    trainer = recipe("train_tokenizer.py")
    file = ROOT / "configs/tokenizer" / preset
    config = load_config(trainer.TokenizerConfig, file, ["data=d", "output=o", *changes.split()])
    assert config != load_config(trainer.TokenizerConfig, file, ["data=d", "output=o"])
    codec = trainer.make_codec(config)
    assert (codec.num_codebooks, codec.codebook_size) == (config.codec.num_codebooks, config.codec.codebook_size)


def test_every_config_is_named_somewhere() -> None:
    files = [ROOT / "Makefile", *(ROOT / "configs").rglob("*.*"), *ROOT.glob("*.md"), *(ROOT / "recipes").glob("*")]
    named = {file: config_paths(file.read_text(encoding="utf-8")) for file in files if file.is_file()}
    for config in CONFIGS:
        assert any(config in paths for file, paths in named.items() if file != ROOT / config), f"who uses {config}?"


# What every configuration needs, and settings that cannot work.
NEEDED = {
    "align_speech": "data=d output=o",
    "benchmark": "row=startup output=o",
    "benchmark_serve": "model=m data=d output=o",
    "cut_speech": "codes=c letters=l output=o",
    "compare": 'data=d output=o systems=[{"name":"a","units":[]}] tasks=content',
    "demo": "",
    "draw_pipeline": "model=m audio=a output=o",
    "draw_scaling": 'curves=[{"name":"n","at":[1],"results":["r"]}] output=o.svg',
    "encode_speech": "codec=t data=d output=o",
    "eval_asr": "model=m codes=c output=o",
    "eval_codec": "codec=t data=d output=o",
    "eval_conversion": "codec=t data=d output=o",
    "eval_tokenizer": "codes=c data=d output=o",
    "fit_units": "model=m data=d output=o",
    "import_speech": "data=d output=o",
    "rehearse": "output=o",
    "train_asr": "codes=c codec=t output=o model=null",
    "train_compressor": "codes=c codec=t output=o",
    "train_repcodec": "codes=c codec=t output=o",
    "eval_rows": "model=m codes=c rows=r output=o",
    "make_rows": "data=d output=o question=q answer=a task=t",
    "train_emotion": "codes=c codec=t output=o",
    "train_teacher": "kind=speaker data=d output=o",
    "train_text": "text=t output=o",
    "train_tokenizer": "data=d output=o",
}
REFUSED = {
    "align_speech": "splits=[]",
    "benchmark": "row=x row=lm_step row=encoding repeats=0 size=2b precision=x train=x utterances=0 kind=text "
    "batch_tokens=0 micro_batch_tokens=-1 peak_tflops=0 seed=-1",
    "benchmark_serve": "recordings=0 requests=-1 clients=0 bad=-1 live=-1 minutes=-1",
    "compare": "seeds=[] seeds=1,1 seeds=-1 tasks=[] test_splits=[] quality_layers=0 conversion_pairs=0 probe_steps=-1",
    "cut_speech": "words=0 words=-1 splits=[] seed=-1 normalizer=x",
    "demo": "audio_tokenizer=t scale=0 scale=nan scale=-1 processes=0 processes=3 synthetic_dev=0 seed=-1",
    "encode_speech": "layers=0 layers=-1 max_duration_s=0 max_duration_s=-1 max_duration_s=.nan splits=[] normalizer=x",
    "draw_scaling": 'until=0 until=-1 curves=[{"name":"n","at":[1,2],"results":["r"]}]',
    "eval_asr": "beams=0 batch_tokens=-1 shuffled_utterances=1 seed=4294967296 splits=[]",
    "eval_codec": "layers=0 layers=[] layers=[-1] max_utterances=0 seed=-1",
    "eval_conversion": "pairs=0 layers=[] layers=[[]] layers=[[-1]] layers=1",
    "eval_tokenizer": "probe_steps=-1 kmeans_utterances=0 train_splits=[]",
    "eval_rows": "rows=[] answer_tokens=0 beams=0 batch_tokens=0 splits=[] precision=x",
    "make_rows": "answer=[] weight=0 weight=-1",
    "fit_units": "clusters=1 clusters=70000 bpe=0 bpe=600 bpe=70000 max_frames=0 max_frames=10 max_duration_s=0 "
    "layer=last",
    "import_speech": "splits=[]",
    "train_compressor": "width=0 depth=0 dropout=1 mask_s=-1 batch_size=0 steps=0 max_duration_s=0",
    "train_repcodec": "num_codebooks=0 codebook_size=1 codebook_decay=1 depth=0 commitment=0 crop_s=0 steps=0 seed=-1",
    "rehearse": "minutes=0 train_hours=0 test_hours=-1 recordings=0 weights=none seed=-1",
    "train_asr": "learning_rate=0 learning_rate=inf row_learning_rate=-1 clip=0 layers=0 stack=0 batch_tokens=0 "
    "small.hidden_size=17 small.num_attention_heads=0 small.num_attention_heads=3 small.num_key_value_heads=3 "
    "small.num_hidden_layers=0 small.text_tokens=3 small.text_steps=-1 small.text_steps=10_000 weight_average=0 "
    "weight_average=1 patience=0 patience=1 max_utterances=0 dev_utterances=0 speech_loss=-1 weight_decay=-1 "
    "row_steps=-1 row_steps=1 augmentation.mask=1 augmentation.spans=-1 transcription_weight=-1 "
    "transcription_weight=0 template=chat template=x "
    "lora.rank=0 lora.dropout=1 seed=-1 train=lora",
    "train_emotion": "folds=1 epochs=0 batch_size=0 warmup=0 layers=[] layers=0,0 layers=-1 bert.hidden_size=15 "
    "precision=x bert.num_hidden_layers=-1 bert.num_attention_heads=0 bert.num_attention_heads=5 clip=0 "
    "weight_decay=-1 learning_rate=-1",
    "train_teacher": "crop_s=-1 crop_s=0.01 crop_s=nan learning_rate=0 learning_rate=-1e-3 seed=-1 steps=0 "
    "batch_size=0 warmup=0 save_every=0 channels=7 hidden_size=17 layers=0 max_duration_s=0 init=x splits=[]",
    "train_text": "text=[] block=1 text_tokens=258 shape.hidden_size=17 shape.num_key_value_heads=3 warmup=-1 steps=0",
    "train_tokenizer": "crop_s=-1 crop_s=0.01 decode_s=0 decode_s=9 codec.num_codebooks=0 codec.codebook_size=1 "
    "codec.strides=0 codec.strides=[] codec.sample_rate=0 codec.n_filters=-4 losses.mel=-1 losses.mel_windows=8 "
    "losses.mel_windows=[] losses.mel_windows=200000 losses.mel_bands=[1] losses.mel_weights=[-1,1,1,1] betas=2,2 "
    "betas=0.9 adversary.betas=0.5 adversary.learning_rate=0 adversary.scale_channels=8 adversary.start=-1 clip=0 "
    "weight_average=1 codebook_decay=1 quantizer_dropout=0 quantizer_dropout=9 quantizer_dropout=[] num_workers=-1 "
    "semantic.gradient_ratio=-1 acoustic.weight=-1 log_every=0 validate_every=0 weight_decay=-1 linear_start=true "
    "codec.phases=griffin_lim codec.phases=x",
}
ANY_NUMBER = ("layer",)  # keys without a rule: hidden states can be counted from the end


@pytest.mark.parametrize("job", REFUSED)
def test_settings_that_cannot_work_are_refused_by_their_key(job: str, config_class: Callable[[str], type]) -> None:
    for word in REFUSED[job].split():
        with pytest.raises(ConfigError) as error:
            print(load_config(config_class(f"{job}.py"), None, [*NEEDED[job].split(), word]))
        assert word.partition("=")[0].rpartition(".")[2] in str(error.value), word


@pytest.mark.parametrize("job", NEEDED)
def test_every_number_of_a_recipe_has_a_rule(job: str, config_class: Callable[[str], type]) -> None:
    def options(hint: Any) -> tuple[Any, ...]:
        return (hint,) if get_origin(hint) in (Annotated, None) else get_args(hint)

    def loose(cls: type) -> list[str]:
        hints = get_type_hints(cls, include_extras=True)
        inner = [name for hint in hints.values() if is_dataclass(hint) for name in loose(hint)]
        return inner + [name for name, hint in hints.items() if {int, float} & set(options(hint))]

    cls = config_class(f"{job}.py")
    assert [name for name in loose(cls) if name not in ANY_NUMBER] == []
    load_config(cls, None, NEEDED[job].split())  # what is needed is enough


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_opens_with_the_command_that_starts_it(recipe: str) -> None:
    text = (ROOT / "recipes" / recipe).read_text(encoding="utf-8")
    document = ast.get_docstring(ast.parse(text))
    assert f"\n    python recipes/{recipe} " in document and "accelerate launch" not in document
    shares = "accelerator.num_processes" in text
    assert (f"\n    speechllm run {recipe.removesuffix('.py')} --processes " in document) is shares
