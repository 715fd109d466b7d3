"""From letters to units to a codec whose layer 0 they are: what each recipe writes, the next one reads."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import soundfile
import torch
from torch import Tensor

from speechllm import ConfigError, InputError, SpeechCodecConfig, load_tokenizer
from speechllm.runs.run import read_log
from tokenizer.schemes.compressor import CtcCompressor
from tokenizer.schemes.features import FeatureEncoder
from tokenizer.training.averaging import average_weights
from tokenizer.training.small_teachers import save_hubert, small_hubert

RATE, CLUSTERS = 16_000, 8
pytestmark = [
    pytest.mark.filterwarnings("ignore:Number of distinct clusters"),
    pytest.mark.usefixtures("new_accelerator"),
]


@pytest.fixture
def units(
    tmp_path: Path, noise: Callable[..., Tensor], recipe: Callable[[str], ModuleType], without_pictures: None
) -> Path:
    """The run of fit_units over a compressor's states."""
    (tmp_path / "data").mkdir()
    for i in range(6):
        soundfile.write(tmp_path / "data" / f"u{i}.wav", noise(RATE, seed=i)[0].numpy(), RATE)
    rows = [f'{{"path": "u{i}.wav", "duration_s": 1.0, "split": "{"dev" if i < 2 else "train"}"}}\n' for i in range(6)]
    (tmp_path / "data" / "manifest.jsonl").write_text("".join(rows), encoding="utf-8")
    torch.manual_seed(0)
    save_hubert(small_hubert(hidden_size=16, layers=1), tmp_path / "hubert")
    encoder = FeatureEncoder.from_pretrained(tmp_path / "hubert", 1)
    CtcCompressor(encoder, ["", "a"], width=64, depth=2).save_pretrained(tmp_path / "letters")
    fit = recipe("fit_units.py")
    paths = {"model": str(tmp_path / "letters"), "data": str(tmp_path / "data"), "output": str(tmp_path / "units")}
    fit.main(fit.UnitsConfig(**paths, clusters=CLUSTERS, layer=2))
    return tmp_path / "units"


@pytest.fixture
def settings(units: Path, recipe: Callable[[str], ModuleType]) -> Callable[..., object]:
    module = recipe("train_tokenizer.py")

    def settings(name: str, **changes: object) -> object:
        shape = {"body": "convnext", "width": 16, "depth": 1, "dimension": 8, "num_codebooks": 3}
        codec = SpeechCodecConfig(**shape, codebook_size=CLUSTERS, quantizer="units")
        values = {"codec": codec, "semantic": module.SemanticConfig(teacher=None), "linear_start": True}
        values |= {"acoustic": module.AcousticConfig(teacher=None), "splits": ["train"], "dev_splits": ["dev"]}
        values |= {"losses": module.LossConfig(adversarial=0, feature_matching=0, mel_windows=[256, 512])}
        values |= {"steps": 4, "batch_size": 2, "crop_s": 0.6, "warmup": 1, "num_workers": 0, "best": None}
        values |= {"validate_every": 2, "save_every": 2, "quantizer_dropout": [1, 3]}
        values |= {"units": module.UnitsConfig(str(units), str(units.parent / "cache"))}
        data, output = str(units.parent / "data"), str(units.parent / name)
        return module.TokenizerConfig(data, output, **(values | changes))

    settings.module = module
    return settings


def test_layer_0_of_the_trained_codec_is_the_units(
    settings: Callable[..., object], units: Path, noise: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = settings.module
    module.main(settings("whole"))
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_codec_report", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            module.main(settings("killed"))
    module.main(settings("killed"))
    assert read_log(units.parent / "killed") == read_log(units.parent / "whole")
    codec, own = load_tokenizer(units.parent / "whole" / "model"), load_tokenizer(units)
    assert average_weights(codec, 0.9).module.units is codec.units
    assert codec.fingerprint == load_tokenizer(units.parent / "killed").fingerprint
    waveform = noise(RATE, seed=9)
    assert torch.equal(codec.encode(waveform).ids[:, :1], own.encode(waveform).ids)
    assert [*(units.parent / "cache" / own.fingerprint).rglob("*.npy")]  # of each recording, for all runs
    module.main(settings("crops", units=module.UnitsConfig(str(units))))  # of every crop alone


@pytest.mark.parametrize(
    "wrong",
    [
        {"codec": SpeechCodecConfig(quantizer="units"), "units": None},
        {"codec": SpeechCodecConfig(body="convnext")},
        {"semantic": "facebook/hubert-base-ls960"},
    ],
)
def test_units_without_their_quantizer_or_beside_a_teacher_are_refused(
    settings: Callable[..., object], wrong: dict
) -> None:
    module, changes = settings.module, dict(wrong)
    if "units" in changes:
        changes["units"] = module.UnitsConfig()
    if "semantic" in changes:
        changes["semantic"] = module.SemanticConfig(teacher=changes["semantic"])
    with pytest.raises((ConfigError, ValueError), match="layer 0 of given units needs codec.quantizer=units"):
        settings("wrong", **changes)


def test_a_training_that_starts_from_a_codec_goes_on_with_it(
    settings: Callable[..., object], units: Path, noise: Callable[..., Tensor]
) -> None:
    module, start = settings.module, str(units.parent / "first" / "model")
    module.main(settings("first"))
    still = {"learning_rate": 1e-12, "codebook_decay": 0.9999999}  # the start, whatever these steps do
    module.main(settings("second", start=start, **still))
    first, second = load_tokenizer(start), load_tokenizer(units.parent / "second" / "model")
    waveform = noise(RATE, seed=9)
    torch.testing.assert_close(second.latents(waveform), first.latents(waveform))
    torch.testing.assert_close(second.codebooks, first.codebooks)


def test_a_training_cannot_start_from_a_codec_with_other_units(
    settings: Callable[..., object], units: Path, recipe: Callable[[str], ModuleType]
) -> None:
    module, fit = settings.module, recipe("fit_units.py")
    module.main(settings("first"))
    paths = {"model": str(units.parent / "letters"), "data": str(units.parent / "data")}
    fit.main(fit.UnitsConfig(**paths, output=str(units.parent / "others"), clusters=CLUSTERS, layer=2, seed=1))
    other = module.UnitsConfig(str(units.parent / "others"))
    with pytest.raises(InputError, match="start: this codec has other units"):
        module.main(settings("wrong", start=str(units.parent / "first" / "model"), units=other))
