"""The codec: shapes, equality across batches, files and processes, and EnCodec as an independent reference."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertModel, EncodecConfig, EncodecModel

from speechllm import AudioTokenizer, Codec, Codes, InputError, SpeechCodec, SpeechCodecConfig
from tokenizer.pretrained import module_fingerprint

pytestmark = pytest.mark.numeric

MakeCodec = Callable[..., SpeechCodec]
Noise = Callable[..., Tensor]
Same = Callable[..., None]
KINDS = {
    "plain": {},
    "causal": {"causal": True},
    "bidirectional": {"lstm": "bidirectional"},
    "no lstm, zero padding": {"lstm": "none", "pad_mode": "constant"},
    "batch norm": {"norm": "batch_norm"},
    "log mel": {"front_end": "log_mel", "norm": "batch_norm"},
    "convnext": {"body": "convnext", "width": 16, "depth": 3},
    "causal convnext": {"body": "convnext", "width": 16, "depth": 3, "causal": True, "norm": "batch_norm"},
    "griffin-lim": {"body": "convnext", "width": 16, "depth": 3, "phases": "griffin_lim", "quantizer": "split"},
    "few dimensions": {"codebook_dim": 3},
    "few dimensions, split": {"codebook_dim": 3, "quantizer": "split"},
}
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def kinds_of_codec(make_codec: MakeCodec) -> dict[str, SpeechCodec]:
    return {kind: make_codec(**settings) for kind, settings in KINDS.items()}


def encodec_with_the_weights_of(codec: SpeechCodec) -> EncodecModel:
    config = EncodecConfig(
        sampling_rate=16_000,
        upsampling_ratios=[8, 5, 4, 2],
        use_causal_conv=codec.config.causal,
        target_bandwidths=[0.5, 1.0, 2.0, 4.0],
        num_filters=codec.config.n_filters,
        hidden_size=codec.config.dimension,
        codebook_size=codec.config.codebook_size,
    )
    encodec = EncodecModel(config).eval()
    encodec.encoder.load_state_dict(codec.encoder.state_dict())
    encodec.decoder.load_state_dict(codec.decoder.state_dict())
    for layer, codebook in zip(encodec.quantizer.layers, codec.codebooks, strict=True):
        layer.codebook.embed.copy_(codebook)
    return encodec


@pytest.fixture(scope="module", params=[False, True], ids=["both sides", "causal"])
def pair(request: pytest.FixtureRequest) -> tuple[SpeechCodec, EncodecModel]:
    torch.manual_seed(0)
    # 4 kbit/s at 50 frames a second of 6 bits: EncodecModel makes 13 codebooks
    config = SpeechCodecConfig(n_filters=8, dimension=32, num_codebooks=13, codebook_size=64, causal=request.param)
    codec = SpeechCodec(config).eval()
    codec.quantizer.codebooks *= 0.1  # the size of untrained latents
    return codec, encodec_with_the_weights_of(codec)


@pytest.mark.parametrize("samples", [3_200, 3_333, 100])
@torch.no_grad()
def test_encoder_equals_encodec(pair: tuple[SpeechCodec, EncodecModel], noise: Noise, samples: int) -> None:
    codec, encodec = pair
    waveform = noise(samples, batch=2)
    expected = encodec.encoder(waveform[:, None])
    assert expected.std() > 1e-3
    torch.testing.assert_close(codec.latents(waveform), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("frames", [1, 12])
@torch.no_grad()
def test_decoder_equals_encodec(pair: tuple[SpeechCodec, EncodecModel], frames: int) -> None:
    codec, encodec = pair
    latents = torch.randn(2, 32, frames)
    expected = encodec.decoder(latents)
    assert expected.std() > 1e-3
    torch.testing.assert_close(codec.decoder(latents), expected, atol=1e-6, rtol=0)


@torch.no_grad()
def test_codes_and_speech_equal_encodec(
    pair: tuple[SpeechCodec, EncodecModel], noise: Noise, assert_same_codes: Same
) -> None:
    codec, encodec = pair
    waveform = noise(6_400, batch=2)
    codes = codec.encode(waveform)
    expected = encodec.encode(waveform[:, None], bandwidth=4.0)
    assert len(codes.ids.unique()) > 10
    assert_same_codes(codec.quantizer, codec.latents(waveform), codes.ids, expected.audio_codes[0])
    speech = encodec.decode(codes.ids[None], expected.audio_scales)[0][:, 0]
    torch.testing.assert_close(codec.decode(codes), speech, atol=1e-6, rtol=0)


@kinds
@pytest.mark.parametrize("samples", [1, 2, 319, 320, 321, 640, 961, 2_000])
def test_every_started_hop_is_a_frame_and_decoding_gives_every_sample_back(
    kinds_of_codec: dict[str, SpeechCodec], noise: Noise, kind: str, samples: int
) -> None:
    codec = kinds_of_codec[kind]
    codes = codec.encode(noise(samples))
    assert codes.ids.shape == (1, 3, math.ceil(samples / 320))
    assert codes.lengths.tolist() == [math.ceil(samples / 320)]
    assert codes.samples.tolist() == [samples]
    speech = codec.decode(codes)
    assert speech.shape == (1, samples)
    assert torch.isfinite(speech).all()


@kinds
def test_an_utterance_has_the_same_codes_and_speech_in_any_batch(
    kinds_of_codec: dict[str, SpeechCodec], noise: Noise, kind: str, assert_same_codes: Callable[..., None]
) -> None:
    codec = kinds_of_codec[kind]
    lengths = [2_000, 700, 3_111, 1]
    waveform = noise(3_200, batch=4)  # not zero after the lengths
    batch = codec.encode(waveform, torch.tensor(lengths))
    speech = codec.decode(batch)
    assert speech.shape == (4, 3_111)
    assert len(batch.ids.unique()) > 4
    for index, length in enumerate(lengths):
        single = codec.encode(waveform[index : index + 1, :length])
        latents = codec.latents(waveform[index : index + 1, :length])
        assert_same_codes(codec.quantizer, latents, batch.utterance(index)[None], single.ids)
        assert not batch.ids[index, :, single.ids.shape[2] :].any()
        alone = Codes(batch.utterance(index)[None], single.lengths, single.samples)
        torch.testing.assert_close(speech[index, :length], codec.decode(alone)[0], atol=0, rtol=0)
        assert not speech[index, length:].any()


def test_fewer_layers_are_the_first_of_all(codec: SpeechCodec, noise: Noise) -> None:
    waveform = noise(2_000, batch=2)
    full = codec.encode(waveform)
    for layers in (1, 2, 3):
        fewer = codec.encode(waveform, layers=layers)
        assert torch.equal(fewer.ids, full.ids[:, :layers])
        assert torch.equal(fewer.ids, full.first(layers).ids)
        assert torch.equal(codec.decode(fewer), codec.decode(full.first(layers)))
    assert not torch.allclose(codec.decode(full.first(1)), codec.decode(full))


def test_codes_of_unknown_length_decode_to_whole_frames(codec: SpeechCodec) -> None:
    codes = Codes(torch.randint(8, (2, 3, 5)), torch.tensor([5, 2]))
    speech = codec.decode(codes)
    assert speech.shape == (2, 5 * 320)
    assert speech[1, :640].any() and not speech[1, 640:].any()


@torch.no_grad()
def depends_on_the_future(codec: SpeechCodec, noise: Noise, frame: int) -> tuple[bool, bool]:
    """Do latents and decoded speech before `frame` change with what comes from it on?"""
    waveforms = noise(5_120, batch=2)  # 16 frames
    waveforms[1, : 320 * frame] = waveforms[0, : 320 * frame]
    latents = torch.randn(2, codec.config.dimension, 16, generator=torch.Generator().manual_seed(0))
    latents[1, :, :frame] = latents[0, :, :frame]
    z, y = codec.latents(waveforms), codec.decoder(latents)
    assert not torch.allclose(z[0, :, frame:], z[1, :, frame:])
    assert not torch.allclose(y[0, :, 320 * frame :], y[1, :, 320 * frame :])
    z, y = z[..., :frame], y[..., : 320 * frame]
    return not torch.allclose(z[0], z[1]), not torch.allclose(y[0], y[1])


@pytest.mark.parametrize(
    "settings, frame",
    # the reflection at the left edge mirrors six frames of the future into the past, as in EnCodec
    [
        ({}, 7),
        ({"norm": "batch_norm"}, 10),
        ({"pad_mode": "constant"}, 1),
        ({"pad_mode": "constant"}, 8),
        (KINDS["convnext"], 1),
        (KINDS["convnext"], 8),
    ],
)
def test_a_causal_codec_never_looks_ahead(
    make_codec: MakeCodec, noise: Noise, settings: dict[str, object], frame: int
) -> None:
    assert depends_on_the_future(make_codec(causal=True, **settings), noise, frame) == (False, False)
    assert depends_on_the_future(make_codec(causal=False, **settings), noise, frame) == (True, True)


@kinds
def test_a_saved_codec_is_loaded_the_same(
    kinds_of_codec: dict[str, SpeechCodec], noise: Noise, kind: str, tmp_path: Path
) -> None:
    codec = kinds_of_codec[kind]
    codec.save_pretrained(tmp_path)
    loaded = SpeechCodec.from_pretrained(tmp_path)
    assert not loaded.training
    assert loaded.config == codec.config
    assert loaded.fingerprint == codec.fingerprint
    codes, again = (c.encode(noise(2_000)) for c in (codec, loaded))
    assert torch.equal(codes.ids, again.ids)
    assert torch.equal(codec.decode(codes), loaded.decode(again))


def test_a_codec_made_with_the_defaults_can_be_loaded_again(tmp_path: Path) -> None:
    codec = SpeechCodec(SpeechCodecConfig(n_filters=4))
    codec.save_pretrained(tmp_path)
    assert SpeechCodec.from_pretrained(tmp_path).fingerprint == codec.fingerprint


@pytest.mark.parametrize("part", ["encoder", "quantizer", "decoder"])
def test_the_fingerprint_changes_with_one_number(make_codec: MakeCodec, part: str) -> None:
    codec = make_codec()
    before = codec.fingerprint
    tensor = next(value for name, value in codec.state_dict().items() if name.startswith(part))
    first = tensor.view(-1)[0].item()
    tensor.view(-1)[0] = first + 1e-3
    assert codec.fingerprint != before
    tensor.view(-1)[0] = first
    assert codec.fingerprint == before
    assert len(before) == 16 and int(before, 16) >= 0


def test_the_fingerprint_changes_with_the_configuration(make_codec: MakeCodec) -> None:
    codec = make_codec()
    other = SpeechCodec(SpeechCodecConfig(**{**vars(codec.config), "pad_mode": "constant"}))
    other.load_state_dict(codec.state_dict())
    assert other.fingerprint != codec.fingerprint


def test_a_setting_that_came_later_and_is_not_used_leaves_the_fingerprint(make_codec: MakeCodec) -> None:
    """Otherwise speech that was encoded before would not belong to its codec any more."""
    codec = make_codec()
    before = {key: value for key, value in vars(codec.config).items() if key not in ("codebook_dim", "phases")}
    assert codec.fingerprint == module_fingerprint(codec, before)


def test_a_codec_in_bfloat16_has_a_fingerprint(make_codec: MakeCodec) -> None:
    codec = make_codec()
    assert codec.fingerprint != codec.to(torch.bfloat16).fingerprint


def test_a_codec_in_training_mode_does_not_encode(make_codec: MakeCodec, noise: Noise) -> None:
    with pytest.raises(ValueError, match=r"training mode: call codec\.eval\(\)"):
        make_codec().train().encode(noise(640))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_samples_that_are_not_finite_are_refused(codec: SpeechCodec, noise: Noise, value: float) -> None:
    waveform = noise(640)
    waveform[0, 5] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        codec.encode(waveform)


@pytest.mark.parametrize("shape", [(640,), (1, 1, 640), (2, 0)])
def test_another_shape_is_refused_and_named(codec: SpeechCodec, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected waveforms float \[B, N\].*got shape \(") as caught:
        codec.encode(torch.zeros(shape))
    assert str(shape) in str(caught.value)


@pytest.mark.parametrize("layers", [0, 4, -1])
def test_layers_out_of_range_are_refused(codec: SpeechCodec, noise: Noise, layers: int) -> None:
    with pytest.raises(InputError, match=rf"layers must be 1\.\.3, got {layers}"):
        codec.encode(noise(640), layers=layers)


@pytest.mark.parametrize("lengths", [[640], [640, 641], [0, 640], [640, 640, 640]])
def test_lengths_that_do_not_fit_are_refused(codec: SpeechCodec, noise: Noise, lengths: list[int]) -> None:
    with pytest.raises(ValueError, match=r"lengths must be 1\.\.640 for 2 waveforms"):
        codec.encode(noise(640, batch=2), torch.tensor(lengths))


def test_a_missing_folder_is_not_looked_for_on_the_hub(tmp_path: Path) -> None:
    for name in (tmp_path / "nowhere", str(tmp_path / "nowhere"), "./nowhere", "runs/codec/last"):
        with pytest.raises(FileNotFoundError, match="no such folder"):
            SpeechCodec.from_pretrained(name)


def test_a_folder_that_lacks_files_names_them(tmp_path: Path, codec_folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"it lacks config\.json, model\.safetensors"):
        SpeechCodec.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes((codec_folder / "config.json").read_bytes())
    with pytest.raises(FileNotFoundError, match=r"it lacks model\.safetensors"):
        SpeechCodec.from_pretrained(tmp_path)


def test_the_folder_of_another_model_is_refused(tmp_path: Path) -> None:
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
    BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="holds no codec of this package"):
        SpeechCodec.from_pretrained(tmp_path)


def test_weights_of_another_shape_are_refused(tmp_path: Path, codec: SpeechCodec, codec_folder: Path) -> None:
    codec.save_pretrained(tmp_path)
    config = json.loads((codec_folder / "config.json").read_text()) | {"dimension": 16}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="model.safetensors: .* has .* weights of other shapes"):
        SpeechCodec.from_pretrained(tmp_path)


def test_all_problems_of_a_configuration_are_named_at_once() -> None:
    with pytest.raises(InputError) as caught:
        SpeechCodecConfig(
            sample_rate=0,
            dimension=-1,
            n_filters=0,
            num_codebooks=0,
            codebook_size=70_000,
            front_end="log_mel",
            lstm="bidirectional",
            causal=True,
        )
    for problem in (
        "sample_rate must be at least 1, got 0",
        "dimension must be at least 1, got -1",
        "n_filters must be at least 1, got 0",
        "num_codebooks must be at least 1, got 0",
        "codebook_size must be from 2 to 65536, got 70000",
        "front_end log_mel needs causal: false",
        "a causal codec cannot have a bidirectional lstm",
    ):
        assert problem in str(caught.value)


def test_a_log_mel_front_end_needs_its_hop() -> None:
    with pytest.raises(InputError, match="strides with a product of 320"):
        SpeechCodecConfig(front_end="log_mel", strides=(2, 4, 5, 4))
    assert SpeechCodecConfig(front_end="log_mel", strides=(4, 4, 4, 5)).strides == (4, 4, 4, 5)


@pytest.mark.parametrize("name", ["front_end", "lstm", "norm", "pad_mode"])
def test_an_unknown_choice_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=name):
        SpeechCodecConfig(**{name: "nonesuch"})


def test_the_defaults_are_the_papers() -> None:
    config = SpeechCodecConfig()
    with torch.device("meta"):
        codec = SpeechCodec(config)
    assert (codec.sample_rate, codec.hop_length, codec.frame_rate) == (16_000, 320, 50.0)
    assert (codec.num_codebooks, codec.codebook_size) == (8, 1024)
    assert codec.codebooks.shape == (8, 1024, 128)


def test_strides_set_the_hop(make_codec: MakeCodec, noise: Noise) -> None:
    codec = make_codec(strides=[2, 4, 5], sample_rate=8_000)  # a list, as from YAML
    assert codec.config.strides == (2, 4, 5)
    assert (codec.hop_length, codec.frame_rate) == (40, 200.0)
    codes = codec.encode(noise(401))
    assert codes.ids.shape == (1, 3, 11)
    assert codec.decode(codes).shape == (1, 401)


def test_a_codec_is_an_audio_tokenizer_that_can_decode(codec: SpeechCodec) -> None:
    assert isinstance(codec, AudioTokenizer)
    assert isinstance(codec, Codec)


def test_a_loss_on_the_speech_and_on_every_layer_reaches_the_encoder(make_codec: MakeCodec, noise: Noise) -> None:
    codec = make_codec().train()
    first = next(codec.encoder.parameters())
    z = codec.latents(noise(3_200, batch=2))
    quantized = codec.quantizer(z)
    for value in (codec.decoder(quantized.output), *quantized.layers, quantized.commitment):
        (gradient,) = torch.autograd.grad((value**2).mean(), first, retain_graph=True)
        assert torch.isfinite(gradient).all()
        assert gradient.abs().max() > 0


def test_codes_are_padded_with_zeros_and_cut_again() -> None:
    utterances = [torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[7], [8]])]
    codes = Codes.from_utterances(utterances)
    assert codes.ids.tolist() == [[[1, 2, 3], [4, 5, 6]], [[7, 0, 0], [8, 0, 0]]]
    assert codes.ids.dtype == torch.long
    assert codes.lengths.tolist() == [3, 1]
    assert codes.samples is None
    assert len(codes) == 2
    assert all(torch.equal(codes.utterance(i), utterance) for i, utterance in enumerate(utterances))
    assert codes.first(1).ids.tolist() == [[[1, 2, 3]], [[7, 0, 0]]]
