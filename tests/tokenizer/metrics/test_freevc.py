"""FreeVC from files in the published format: the audio, the windows of the speaker encoder, and what is refused.

The files here have random weights and small widths under the published names, which the references use too.
"""

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchaudio.transforms import MelSpectrogram
from transformers import HubertConfig, HubertModel, WavLMConfig, WavLMModel

from tokenizer.errors import InputError
from tokenizer.metrics.freevc import FreeVC

Conv = Callable[[str, Tensor], Tensor]
Noise = Callable[..., Tensor]
FEATURES, WIDTH, DIMENSION, CHANNELS = 16, 6, 4, 16
MODEL = {
    "inter_channels": DIMENSION,
    "hidden_channels": WIDTH,
    "resblock": "1",
    "resblock_kernel_sizes": [3, 7],
    "resblock_dilation_sizes": [[1, 3, 5], [1, 3]],
    "upsample_rates": [10, 8, 2, 2],
    "upsample_initial_channel": CHANNELS,
    "upsample_kernel_sizes": [16, 16, 4, 4],
    "gin_channels": 256,
    "ssl_dim": FEATURES,
    "use_spk": True,
}
SMALL = {
    "hidden_size": FEATURES,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "conv_dim": (8,) * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
}


def gated_shapes(name: str, layers: int, speaker: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    if speaker:
        yield f"{name}.cond_layer.weight_v", (2 * WIDTH * layers, speaker, 1)
    for layer in range(layers):
        yield f"{name}.in_layers.{layer}.weight_v", (2 * WIDTH, WIDTH, 5)
        yield f"{name}.res_skip_layers.{layer}.weight_v", ((1 if layer == layers - 1 else 2) * WIDTH, WIDTH, 1)


def encoder_shapes(name: str, features: int, speaker: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.pre.weight", (WIDTH, features, 1)
    yield f"{name}.proj.weight", (2 * DIMENSION, WIDTH, 1)
    yield from gated_shapes(f"{name}.enc", 16, speaker)


def published_shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every weight of freevc.pth; `weight_v` are normalised and have a `weight_g` besides."""
    yield from encoder_shapes("enc_p", FEATURES, 0)
    yield from encoder_shapes("enc_q", 641, 256)
    for place in (0, 2, 4, 6):
        yield f"flow.flows.{place}.pre.weight", (WIDTH, DIMENSION // 2, 1)
        yield f"flow.flows.{place}.post.weight", (DIMENSION // 2, WIDTH, 1)
        yield from gated_shapes(f"flow.flows.{place}.enc", 4, 256)
    yield "dec.conv_pre.weight", (CHANNELS, DIMENSION, 7)
    yield "dec.cond.weight", (CHANNELS, 256, 1)
    yield "dec.conv_post.weight", (1, CHANNELS // 16, 7)
    for step, kernel in enumerate(MODEL["upsample_kernel_sizes"]):
        width = CHANNELS // 2 ** (step + 1)
        yield f"dec.ups.{step}.weight_v", (2 * width, width, kernel)
        for shape, (size, dilations) in enumerate(zip(*list(MODEL.values())[3:5], strict=True)):
            for layer in range(len(dilations)):
                for convolutions in ("convs1", "convs2"):
                    yield f"dec.resblocks.{2 * step + shape}.{convolutions}.{layer}.weight_v", (width, width, size)


def published_weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    weights = {}
    for name, shape in published_shapes():
        weights[name] = torch.randn(shape) / math.sqrt(shape[1] * shape[2] / 2)
        if name.endswith("_v"):
            weights[name.replace("_v", "_g")] = 0.5 + torch.rand(shape[0], 1, 1)
        if name != "dec.conv_post.weight":
            outputs = shape[1] if ".ups." in name else shape[0]
            weights[re.sub("weight(_v)?$", "bias", name)] = 0.1 * torch.randn(outputs)
    return weights


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return published_weights()


@pytest.fixture(scope="module")
def wavlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("wavlm")
    WavLMModel(WavLMConfig(**SMALL)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def published(weights: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three published files."""
    folder = tmp_path_factory.mktemp("freevc")
    save(folder, weights)
    (folder / "freevc.json").write_text(json.dumps({"train": {}, "data": {}, "model": MODEL}))
    torch.manual_seed(0)
    lstm, linear = torch.nn.LSTM(40, 256, 3), torch.nn.Linear(256, 256)
    lstm.weight_ih_l0.data *= 30  # so that embeddings of such small spectra differ
    speaker = {f"lstm.{name}": value for name, value in lstm.state_dict().items()}
    speaker |= {f"linear.{name}": value for name, value in linear.state_dict().items()}
    speaker |= {"similarity_weight": torch.tensor([10.0]), "similarity_bias": torch.tensor([-5.0])}
    state = {"step": 5_805_001, "model_state": speaker, "optimizer_state": {}}
    torch.save(state, folder / "pretrained_bak_5805000.pt")
    return folder


@pytest.fixture(scope="module")
def freevc(published: Path, wavlm: Path) -> FreeVC:
    return FreeVC.from_pretrained(published, wavlm)


@pytest.fixture
def folder(published: Path, tmp_path: Path) -> Path:
    """A copy of the published files, to be changed."""
    return shutil.copytree(published, tmp_path / "freevc")


def save(folder: Path, weights: dict[str, Tensor]) -> None:
    torch.save({"model": weights, "iteration": 1, "optimizer": {}, "learning_rate": 1e-4}, folder / "freevc.pth")


def reference_gates(name: str, conv: Conv, hidden: Tensor, layers: int, speaker: Tensor | None) -> Tensor:
    skipped = 0
    for layer in range(layers):
        gates = conv(f"{name}.in_layers.{layer}", hidden)
        if speaker is not None:
            gates = gates + conv(f"{name}.cond_layer", speaker)[:, 2 * WIDTH * layer : 2 * WIDTH * (layer + 1)]
        mixed = conv(f"{name}.res_skip_layers.{layer}", gates[:, :WIDTH].tanh() * gates[:, WIDTH:].sigmoid())
        if layer == layers - 1:
            return skipped + mixed
        hidden, skipped = hidden + mixed[:, :WIDTH], skipped + mixed[:, WIDTH:]
    raise AssertionError("no layers")


def reference(weights: dict[str, Tensor], content: Tensor, speaker: Tensor, noise: Tensor) -> Tensor:
    """Independent implementation of the published network, by parameter names: float [1, C, T] -> float [N]."""

    def weight(name: str) -> Tensor:
        if f"{name}.weight" in weights:
            return weights[f"{name}.weight"]
        return torch._weight_norm(weights[f"{name}.weight_v"], weights[f"{name}.weight_g"], 0)

    def conv(name: str, value: Tensor, dilation: int = 1) -> Tensor:
        padding = dilation * (weight(name).shape[-1] - 1) // 2
        return F.conv1d(value, weight(name), weights.get(f"{name}.bias"), padding=padding, dilation=dilation)

    stats = conv("enc_p.proj", reference_gates("enc_p.enc", conv, conv("enc_p.pre", content), 16, None))
    z = stats[:, :DIMENSION] + noise * stats[:, DIMENSION:].exp()
    for place in (6, 4, 2, 0):
        name = f"flow.flows.{place}"
        first, second = z.flip(1).split(DIMENSION // 2, 1)
        shift = conv(f"{name}.post", reference_gates(f"{name}.enc", conv, conv(f"{name}.pre", first), 4, speaker))
        z = torch.cat([first, second - shift], 1)
    hidden = conv("dec.conv_pre", z) + conv("dec.cond", speaker)
    for step, rate in enumerate(MODEL["upsample_rates"]):
        name = f"dec.ups.{step}"
        padding = (weight(name).shape[-1] - rate) // 2
        hidden = F.leaky_relu(hidden, 0.1)
        hidden = F.conv_transpose1d(hidden, weight(name), weights[f"{name}.bias"], stride=rate, padding=padding)
        blocks = []
        for shape, dilations in enumerate(MODEL["resblock_dilation_sizes"]):
            name, block = f"dec.resblocks.{2 * step + shape}", hidden
            for layer, dilation in enumerate(dilations):
                inner = conv(f"{name}.convs1.{layer}", F.leaky_relu(block, 0.1), dilation)
                block = block + conv(f"{name}.convs2.{layer}", F.leaky_relu(inner, 0.1))
            blocks.append(block)
        hidden = sum(blocks) / len(blocks)
    return conv("dec.conv_post", F.leaky_relu(hidden, 0.01)).tanh().flatten()


def test_audio_is_that_of_the_published_network(
    freevc: FreeVC, weights: dict[str, Tensor], wavlm: Path, noise: Noise
) -> None:
    source, target = noise(8_000)[0], noise(30_000, seed=1)[0]
    with torch.no_grad():
        content = WavLMModel.from_pretrained(wavlm).eval()(source[None]).last_hidden_state.mT
        drawn = torch.randn(1, DIMENSION, content.shape[-1], generator=torch.Generator().manual_seed(3))
        expected = reference(weights, content, freevc.speaker_encoder(target)[..., None], drawn)
    assert expected.std() > 0.1
    torch.testing.assert_close(freevc.convert(source, target, seed=3), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("samples", [1_600, 1_679, 1_680, 5_000])
def test_every_wavlm_frame_becomes_320_samples(freevc: FreeVC, noise: Noise, samples: int) -> None:
    source = noise(samples)[0]
    frames = freevc.wavlm(source[None]).last_hidden_state.shape[1]
    converted = freevc.convert(source, noise(4_000, seed=1)[0])
    assert converted.shape == (320 * frames,)
    assert frames == (samples - 80) // 320
    assert converted.dtype == torch.float32


def test_wavlm_in_half_precision_runs_in_single(published: Path, tmp_path: Path, noise: Noise) -> None:
    WavLMModel(WavLMConfig(**SMALL)).half().save_pretrained(tmp_path)
    freevc = FreeVC.from_pretrained(published, tmp_path)
    assert {parameter.dtype for parameter in freevc.parameters()} == {torch.float32}
    assert torch.isfinite(freevc.convert(noise(8_000)[0], noise(8_000, seed=1)[0])).all()


def test_a_wavlm_that_lacks_weights_is_refused(published: Path, tmp_path: Path) -> None:
    model = WavLMModel(WavLMConfig(**SMALL))
    whole = model.state_dict()
    model.save_pretrained(
        tmp_path, state_dict={name: whole[name] for name in whole if "layers.0.attention" not in name}
    )
    with pytest.raises(InputError, match=r"lacks \d+ weights of a WavLMModel"):
        FreeVC.from_pretrained(published, tmp_path)


def test_the_result_depends_on_source_target_and_seed_only(freevc: FreeVC, noise: Noise) -> None:
    source, target, other = (noise(26_000, seed=seed)[0] for seed in range(3))
    source, different = source[:4_000], source[-4_000:]
    converted = freevc.convert(source, target)
    torch.manual_seed(99)
    assert torch.equal(freevc.convert(source, target), converted)
    assert not torch.allclose(freevc.convert(source, target, seed=1), converted, atol=1e-3)
    assert not torch.allclose(freevc.convert(source, other), converted, atol=1e-3)
    assert not torch.allclose(freevc.convert(different, target), converted, atol=1e-3)


def test_silence_around_the_target_does_not_matter(freevc: FreeVC, noise: Noise) -> None:
    source, speech = noise(3_000)[0], noise(26_000, seed=1)[0]
    converted = freevc.convert(source, F.pad(speech, (5_120, 5_120)))
    assert torch.equal(freevc.convert(source, F.pad(speech, (51_200, 25_600))), converted)
    for level, same in ((0.003, True), (0.03, False)):  # -30 and -10 dB
        murmur = torch.cat([torch.full((51_200,), level), F.pad(speech, (5_120, 5_120))])
        assert torch.equal(freevc.convert(source, murmur), converted) is same


@pytest.mark.parametrize("samples", [1_600, 25_600, 31_519, 31_520, 43_839, 43_840])
def test_the_speaker_embedding_is_the_mean_over_windows(freevc: FreeVC, noise: Noise, samples: int) -> None:
    waveform, encoder = noise(samples)[0], freevc.speaker_encoder
    # as Resemble's encoder cuts: a window every 16000 / 1.3 samples, the last one only where 75 % of it are speech
    frames, step = math.ceil((samples + 1) / 160), round(16_000 / 1.3 / 160)
    starts = list(range(0, max(1, frames - 160 + step + 1), step))
    if len(starts) > 1 and (samples - starts[-1] * 160) / 25_600 < 0.75:
        starts.pop()
    end = (starts[-1] + 160) * 160
    padded = F.pad(waveform, (0, end - samples)) if end >= samples else waveform
    mel = MelSpectrogram(16_000, 400, hop_length=160, n_mels=40, norm="slaney", mel_scale="slaney")(padded).T
    partial = []
    for start in starts:
        _, (hidden, _) = encoder.lstm(mel[None, start : start + 160])
        raw = encoder.linear(hidden[-1]).relu()[0]
        partial.append(raw / raw.norm())
    mean = torch.stack(partial).mean(0)
    torch.testing.assert_close(encoder(waveform)[0], mean / mean.norm(), atol=1e-5, rtol=0)


def test_only_the_posterior_encoder_may_be_absent(
    freevc: FreeVC, folder: Path, wavlm: Path, weights: dict[str, Tensor], noise: Noise
) -> None:
    source, target = noise(2_000, batch=2)
    converted = freevc.convert(source, target)
    save(folder, {name: value for name, value in weights.items() if not name.startswith("enc_q.")})
    assert torch.equal(FreeVC.from_pretrained(folder, wavlm).convert(source, target), converted)
    save(folder, {name: value for name, value in weights.items() if name != "flow.flows.2.enc.cond_layer.weight_g"})
    with pytest.raises(InputError, match=r"freevc\.pth is not the published one.*flow\.flows\.2\.enc\.cond_layer"):
        FreeVC.from_pretrained(folder, wavlm)
    save(folder, weights | {"enc_spk.linear.weight": torch.zeros(2, 2)})
    with pytest.raises(InputError, match=r"enc_spk\.linear\.weight"):
        FreeVC.from_pretrained(folder, wavlm)


def test_missing_files_are_named_with_what_was_found(folder: Path, wavlm: Path, tmp_path: Path) -> None:
    (folder / "pretrained_bak_5805000.pt").rename(folder / "speaker.pt")
    (folder / "freevc.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks freevc\.json .*, pretrained_bak_5805000\.pt") as error:
        FreeVC.from_pretrained(folder, wavlm)
    assert "holds freevc.pth, speaker.pt" in str(error.value)
    with pytest.raises(FileNotFoundError, match="holds nothing"):
        FreeVC.from_pretrained(tmp_path / "nowhere", wavlm)


def test_other_models_are_refused(folder: Path, wavlm: Path, tmp_path: Path) -> None:
    torch.save({"other": {}}, folder / "freevc.pth")
    with pytest.raises(InputError, match=r"freevc\.pth is not the published one.*model"):
        FreeVC.from_pretrained(folder, wavlm)
    (folder / "freevc.json").write_text(
        json.dumps({"model": MODEL | {"use_spk": False, "upsample_rates": [10, 6, 4, 2]}})
    )
    with pytest.raises(InputError, match=r"use_spk is False, not True; upsample_rates is \[10, 6, 4, 2\]"):
        FreeVC.from_pretrained(folder, wavlm)
    with pytest.raises(FileNotFoundError, match="a WavLM model"):
        FreeVC.from_pretrained(folder, tmp_path / "nowhere")


@pytest.mark.parametrize("kind, width", [("hubert", FEATURES), ("wavlm", 24)])
def test_features_of_another_kind_or_width_are_refused(folder: Path, tmp_path: Path, kind: str, width: int) -> None:
    config, model = {"hubert": (HubertConfig, HubertModel), "wavlm": (WavLMConfig, WavLMModel)}[kind]
    model(config(**SMALL | {"hidden_size": width})).save_pretrained(tmp_path / "features")
    with pytest.raises(InputError, match=rf"is a {kind} model of width {width}: .* needs WavLM of width {FEATURES}"):
        FreeVC.from_pretrained(folder, tmp_path / "features")


@pytest.mark.parametrize(
    "waveform, message",
    [
        (torch.zeros(1_599), r"has 1599 samples: expected at least 1600 \(0.1 s\)"),
        (torch.zeros(1, 16_000), r"shape \[1, 16000\]: expected one waveform"),
        (torch.zeros(16_000), "is silent or not finite"),
        (torch.full((16_000,), math.nan), "is silent or not finite"),
        (torch.full((16_000,), math.inf), "is silent or not finite"),
    ],
    ids=["short", "batch", "silent", "nan", "infinite"],
)
def test_unusable_waveforms_are_refused(freevc: FreeVC, noise: Noise, waveform: Tensor, message: str) -> None:
    speech = noise(2_000)[0]
    with pytest.raises(ValueError, match=f"the source .*{message}"):
        freevc.convert(waveform, speech)
    with pytest.raises(ValueError, match=f"the target .*{message}"):
        freevc.convert(speech, waveform)
