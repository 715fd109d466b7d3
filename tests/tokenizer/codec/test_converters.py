"""Converted codecs against the original packages: the same codes, the same audio, and what is refused."""

import copy
import json
import re
import shutil
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import EncodecConfig, EncodecModel, MimiConfig

from speechllm import InputError, SpeechCodec, convert_encodec, convert_speechtokenizer, load_tokenizer

pytestmark = pytest.mark.numeric

Noise = Callable[..., Tensor]
HOP = 40
LENGTHS = [1, 2, 7, HOP - 1, HOP, HOP + 1, 12 * HOP, 50 * HOP + 17]
ENCODEC = {
    "sampling_rate": 16_000,
    "upsampling_ratios": [5, 4, 2],
    "num_filters": 4,
    "hidden_size": 16,
    "codebook_size": 32,
    "target_bandwidths": [2.0, 6.0, 10.0],  # kbit/s: 1, 3 and 5 codebooks at 400 frames/s of 5 bits
}
SPEECHTOKENIZER = {
    "n_filters": 4,
    "strides": [5, 4, 2],
    "dimension": 16,
    "semantic_dimension": 12,
    "bidirectional": True,
    "dilation_base": 2,
    "residual_kernel_size": 3,
    "n_residual_layers": 1,
    "lstm_layers": 2,
    "activation": "ELU",
    "sample_rate": 16_000,
    "codebook_size": 32,
    "n_q": 4,
}
KINDS = {
    "encodec, causal": ENCODEC,
    "encodec": ENCODEC | {"use_causal_conv": False},
    "encodec, zero padding": ENCODEC | {"pad_mode": "constant"},
    "speechtokenizer": SPEECHTOKENIZER,
    "speechtokenizer, forward": SPEECHTOKENIZER | {"bidirectional": False},
}


@dataclass
class Original:
    """A codec of one of the two packages and the folder that holds it; codes in our shape, long [B, Q, T]."""

    model: nn.Module
    folder: Path

    @property
    def is_encodec(self) -> bool:
        return isinstance(self.model, EncodecModel)

    def encode(self, waveform: Tensor, bandwidth: float = 10.0) -> Tensor:
        if self.is_encodec:
            return self.model.encode(waveform[:, None], bandwidth=bandwidth).audio_codes[0]
        return self.model.encode(waveform[:, None]).transpose(0, 1)

    def decode(self, ids: Tensor) -> Tensor:
        if self.is_encodec:
            return self.model.decode(ids[None], [None]).audio_values[:, 0]
        return self.model.decode(ids.transpose(0, 1))[:, 0]

    def converted(self) -> SpeechCodec:
        return (convert_encodec if self.is_encodec else convert_speechtokenizer)(self.folder)

    def copied(self, folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> "Original":
        """The same in another folder, with changed parameters in its file."""
        shutil.copy(self.folder / "config.json", folder)
        if self.is_encodec:
            file = "model.safetensors"
            save_file(change(load_file(self.folder / file)), folder / file, metadata={"format": "pt"})
        else:
            file = "SpeechTokenizer.pt"
            torch.save(change(torch.load(self.folder / file)), folder / file)
        return Original(self.model, folder)


@pytest.fixture(scope="module")
def speechtokenizer() -> Iterator[Callable[..., nn.Module]]:
    """SpeechTokenizer's class. Its package also imports its trainer, which needs packages that it does not declare."""
    trainer = types.ModuleType("speechtokenizer.trainer")
    trainer.SpeechTokenizerTrainer = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, trainer.__name__, trainer)
        yield pytest.importorskip("speechtokenizer", reason="needs the dev extra").SpeechTokenizer


@pytest.fixture(scope="module", params=KINDS)
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Original:
    """With random weights, and random codebooks of about the latents' size: both packages start these at zero."""
    config, folder = KINDS[request.param], tmp_path_factory.mktemp("original")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if request.param.startswith("encodec"):
            model = EncodecModel(EncodecConfig(**config)).eval()
        else:
            model = request.getfixturevalue("speechtokenizer")(config).eval()
        for name, buffer in model.named_buffers():
            if name.endswith("embed"):
                buffer.normal_(std=0.1)
    if isinstance(model, EncodecModel):
        model.save_pretrained(folder)
    else:  # the published layout
        (folder / "config.json").write_text(json.dumps(config))
        torch.save(model.state_dict(), folder / "SpeechTokenizer.pt")
    return Original(model, folder)


@pytest.fixture(scope="module")
def converted(original: Original) -> SpeechCodec:
    """For tests that only look at it."""
    return original.converted()


@torch.no_grad()
def test_codes_and_audio_are_those_of_the_original(
    original: Original, converted: SpeechCodec, noise: Noise, assert_same_codes: Callable[..., None]
) -> None:
    codec = converted
    assert not codec.training
    seen = set()
    for length in LENGTHS:
        waveform = noise(length)
        codes, expected = codec.encode(waveform), original.encode(waveform)
        assert_same_codes(codec.quantizer, codec.latents(waveform), codes.ids, expected)
        speech = original.decode(codes.ids)[:, :length]
        torch.testing.assert_close(codec.decode(codes), speech, atol=1e-5, rtol=0)
        seen |= set(codes.ids.unique().tolist())
    assert len(seen) > 10 and speech.std() > 1e-3


@pytest.mark.parametrize("original", ["encodec"], indirect=True)
@torch.no_grad()
def test_fewer_layers_are_a_lower_bandwidth_of_encodec(
    original: Original, converted: SpeechCodec, noise: Noise, assert_same_codes: Callable[..., None]
) -> None:
    codec, waveform = converted, noise(1_000)
    for bandwidth, layers in ((2.0, 1), (6.0, 3), (10.0, 5)):
        expected = original.encode(waveform, bandwidth)
        assert expected.shape[1] == layers
        assert_same_codes(codec.quantizer, codec.latents(waveform), codec.encode(waveform, layers=layers).ids, expected)


def test_a_converted_codec_is_saved_and_loaded_like_any_other(
    original: Original, converted: SpeechCodec, noise: Noise, tmp_path: Path
) -> None:
    codec = converted
    codec.save_pretrained(tmp_path)
    loaded = SpeechCodec.from_pretrained(tmp_path)
    assert loaded.fingerprint == codec.fingerprint == original.converted().fingerprint
    assert torch.equal(loaded.encode(noise(1_000)).ids, codec.encode(noise(1_000)).ids)


@torch.no_grad()
def test_training_continues_from_the_converted_codebooks(converted: SpeechCodec, noise: Noise) -> None:
    codec = copy.deepcopy(converted)
    before = codec.codebooks.clone()
    ids = codec.train().quantizer(codec.latents(noise(1_000))).ids
    for layer in range(codec.num_codebooks):
        used = ids[:, layer].unique()
        unused = torch.ones(codec.codebook_size, dtype=torch.bool).index_fill(0, used, False)
        torch.testing.assert_close(codec.codebooks[layer, unused], before[layer, unused], atol=1e-6, rtol=0)
        assert not torch.allclose(codec.codebooks[layer, used], before[layer, used])
    assert (codec.codebooks - before).abs().max() < 0.5 * before.abs().max()


def test_both_names_of_weight_normalisation_are_supported(
    original: Original, converted: SpeechCodec, tmp_path: Path
) -> None:
    names = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    if not original.is_encodec:  # the package itself uses the older one
        names = {old: new for new, old in names.items()}

    def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
        assert any(name.endswith(tuple(names)) for name in state)
        for here, there in names.items():
            state = {name.replace(here, there): value for name, value in state.items()}
        return state

    assert original.copied(tmp_path, renamed).converted().fingerprint == converted.fingerprint


@pytest.mark.parametrize("original", ["encodec", "speechtokenizer"], indirect=True)
@pytest.mark.parametrize("part", [r"encoder.*bias", r"decoder.*bias", r"codebook\.embed"])
@pytest.mark.parametrize("change", ["one more", "one less", "another shape"])
def test_parameters_that_do_not_match_are_refused(original: Original, tmp_path: Path, change: str, part: str) -> None:
    def spoiled(state: dict[str, Tensor]) -> dict[str, Tensor]:
        name = next(name for name in state if re.search(part, name))
        if change == "one more":
            return state | {re.sub(r"\.\d+\.", ".99.", name, count=1): state[name].clone()}
        value = state.pop(name)
        return state if change == "one less" else state | {name: value[:2].clone()}

    with pytest.raises(InputError, match="the parameters are not those of its configuration"):
        original.copied(tmp_path, spoiled).converted()


@pytest.mark.parametrize("original", ["speechtokenizer"], indirect=True)
def test_speechtokenizer_is_also_found_on_the_hub(
    original: Original, converted: SpeechCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda name, file: fetch(original.folder / file))

    def fetch(file: Path) -> str:
        if not file.is_file():
            raise EntryNotFoundError(file.name)
        return str(file)

    assert load_tokenizer("owner/model").fingerprint == converted.fingerprint
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda name, file: fetch(original.folder / "nothing"))
    with pytest.raises(FileNotFoundError, match=r"owner/model lacks config\.json or SpeechTokenizer\.pt"):
        convert_speechtokenizer("owner/model")


def test_every_setting_of_encodec_that_is_not_ours_is_named_at_once(tmp_path: Path) -> None:
    settings = {
        "audio_channels": 2,
        "normalize": True,
        "chunk_length_s": 1.0,
        "norm_type": "time_group_norm",
        "pad_mode": "replicate",
        "kernel_size": 5,
        "last_kernel_size": 5,
        "residual_kernel_size": 5,
        "num_residual_layers": 2,
        "use_conv_shortcut": False,
        "compress": 4,
        "num_lstm_layers": 1,
        "trim_right_ratio": 0.5,
    }
    EncodecConfig(**settings).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="cannot be converted") as caught:
        convert_encodec(tmp_path)
    for name, value in settings.items():
        assert f"{name} is {value!r}, not " in str(caught.value)


def test_every_setting_of_speechtokenizer_that_is_not_ours_is_named_at_once(tmp_path: Path) -> None:
    settings = {"activation": "Snake", "residual_kernel_size": 5, "n_residual_layers": 3, "lstm_layers": 0}
    (tmp_path / "config.json").write_text(json.dumps(SPEECHTOKENIZER | settings))
    torch.save({}, tmp_path / "SpeechTokenizer.pt")
    with pytest.raises(InputError, match="cannot be converted") as caught:
        convert_speechtokenizer(tmp_path)
    for name, value in settings.items():
        assert f"{name} is {value!r}, not " in str(caught.value)


def test_another_model_of_transformers_is_refused(tmp_path: Path) -> None:
    MimiConfig().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="model_type is 'mimi', not 'encodec'"):
        convert_encodec(tmp_path)


def test_a_folder_that_lacks_files_names_them(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"it lacks config\.json"):
        convert_encodec(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"it lacks config\.json, SpeechTokenizer\.pt"):
        convert_speechtokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        convert_encodec(tmp_path / "nowhere")
