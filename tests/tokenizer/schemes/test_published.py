"""EnCodec, Mimi and DAC of transformers with our interface: the codes, audio and lengths of the originals."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    DacConfig,
    DacFeatureExtractor,
    DacModel,
    EncodecConfig,
    EncodecFeatureExtractor,
    EncodecModel,
    MimiConfig,
    MimiModel,
    PreTrainedModel,
)

from speechllm import Codec, Codes, InputError
from tokenizer.schemes.published import PublishedCodec

pytestmark = pytest.mark.numeric

Noise = Callable[..., Tensor]
RATE = 16_000
ENCODEC = {
    "sampling_rate": RATE,
    "upsampling_ratios": [8, 5, 4, 2],
    "num_filters": 4,
    "hidden_size": 8,
    "codebook_size": 16,
    "target_bandwidths": [0.2, 0.6],  # kbit/s: 1 and 3 codebooks at 50 frames/s of 4 bits
}
SHAPES = {"encodec": (3, 16, 320, 8), "mimi": (4, 16, 640, 6), "dac": (3, 16, 320, 4)}  # Q, K, samples a frame, D


@torch.no_grad()
def make(kind: str) -> PreTrainedModel:
    """A tiny original in eval mode with codebooks among its latents, so that several codes are in use."""
    torch.manual_seed(0)
    sound = torch.randn(1, 1, 20_000) * torch.linspace(0, 1, 20_000)
    if kind == "encodec":
        model = EncodecModel(EncodecConfig(**ENCODEC)).eval()
        place([layer.codebook.embed for layer in model.quantizer.layers], model.encoder(sound))
    elif kind == "mimi":
        tiny = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 4}
        shape = {"hidden_size": 8, "intermediate_size": 8, "num_filters": 4, "codebook_dim": 6, "codebook_size": 16}
        quantizer = {"vector_quantization_hidden_dimension": 6, "num_quantizers": 4, "sampling_rate": RATE}
        rates = {"upsampling_ratios": [8, 5, 4, 2], "upsample_groups": 8}
        model = MimiModel(MimiConfig(**tiny, **shape, **quantizer, **rates, sliding_window=20)).eval()
        encoded = model.encoder(sound)
        latents = getattr(encoded, "latents", encoded)  # older versions of transformers give the tensor itself
        for name in ("semantic", "acoustic"):
            part = getattr(model.quantizer, f"{name}_residual_vector_quantizer")
            place([layer.codebook.embed_sum for layer in part.layers], part.input_proj(latents))
            for layer in part.layers:
                layer.codebook.cluster_usage.fill_(2.0)  # vectors are sums divided by how often they were used
                layer.codebook.embed_sum.mul_(2.0)
    else:
        shape = {"encoder_hidden_size": 4, "decoder_hidden_size": 32, "codebook_dim": 4, "codebook_size": 16}
        ratios = {"downsampling_ratios": [2, 4, 5, 8], "upsampling_ratios": [8, 5, 4, 2]}
        model = DacModel(DacConfig(n_codebooks=3, sampling_rate=RATE, **shape, **ratios)).eval()
    return model


def place(codebooks: list[Tensor], latents: Tensor) -> None:
    """The first codebook [K, D] gets some of the latents [1, D, T], the others vectors of the size of what is left."""
    frames = latents[0].T
    for layer, codebook in enumerate(codebooks):
        some = frames[torch.randint(len(frames), codebook.shape[:1])]
        codebook.copy_(0.3**layer * (some - frames.mean(0)) + (frames.mean(0) if layer == 0 else 0))


@pytest.fixture(scope="module", params=SHAPES)
def original(request: pytest.FixtureRequest) -> PreTrainedModel:
    return make(request.param)


def encode(original: PreTrainedModel, waveform: Tensor, **settings: object) -> Tensor:
    """Codes long [Q, T] of a waveform float [N] by the original's own preprocessing and `encode`."""
    kind, x = original.config.model_type, waveform[None, None]
    if kind == "encodec":
        extractor = EncodecFeatureExtractor(sampling_rate=RATE)
        x = extractor(waveform.numpy(), sampling_rate=RATE, return_tensors="pt").input_values
        return original.encode(x, **(settings or {"bandwidth": 0.6})).audio_codes[0, 0]
    if kind == "dac":
        extractor = DacFeatureExtractor(sampling_rate=RATE, hop_length=320)
        x = torch.as_tensor(extractor(waveform.numpy(), sampling_rate=RATE, return_tensors="np").input_values)
    return original.encode(x, **settings).audio_codes[0]


def decode(original: PreTrainedModel, ids: Tensor) -> Tensor:
    if original.config.model_type == "encodec":
        return original.decode(ids[None, None], [None]).audio_values.flatten()
    return original.decode(audio_codes=ids[None]).audio_values.flatten()


def test_shapes_and_rates_are_those_of_the_original(original: PreTrainedModel) -> None:
    codec = PublishedCodec(original)
    layers, size, hop, width = SHAPES[original.config.model_type]
    assert isinstance(codec, Codec)
    assert (codec.num_codebooks, codec.codebook_size, codec.codebooks.shape) == (layers, size, (layers, size, width))
    assert (codec.sample_rate, codec.frame_rate, codec.device) == (RATE, RATE / hop, torch.device("cpu"))


@pytest.mark.parametrize("samples", [1, 319, 640, 641, 12_345])
@torch.no_grad()
def test_codes_and_audio_are_those_of_the_original(original: PreTrainedModel, noise: Noise, samples: int) -> None:
    codec, waveform = PublishedCodec(original), noise(samples)
    codes = codec.encode(waveform)
    expected = encode(original, waveform[0])
    assert torch.equal(codes.ids[0], expected)
    assert codes.ids.shape == (1, codec.num_codebooks, -(-samples // SHAPES[original.config.model_type][2]))
    if samples > 10_000:
        assert all(len(layer.unique()) > 3 for layer in expected)
    speech, known = codec.decode(codes), decode(original, expected)[:samples]
    assert speech.shape == (1, samples)
    assert torch.equal(speech[0, : len(known)], known) and not speech[0, len(known) :].any()
    assert samples - len(known) <= 8  # DAC of an odd stride


@torch.no_grad()
def test_fewer_layers_are_what_the_original_calls_so(original: PreTrainedModel, noise: Noise) -> None:
    codec, waveform = PublishedCodec(original), noise(6_400)
    fewer = {"encodec": {"bandwidth": 0.2}, "mimi": {"num_quantizers": 1}, "dac": {"n_quantizers": 1}}
    codes = codec.encode(waveform, layers=1)
    assert torch.equal(codes.ids[0], encode(original, waveform[0], **fewer[original.config.model_type]))
    assert torch.equal(codes.ids, codec.encode(waveform).first(1).ids)
    known = decode(original, codes.ids[0])[:6_400]
    assert torch.equal(codec.decode(codes)[0, : len(known)], known)


def test_no_utterance_depends_on_its_batch(original: PreTrainedModel, noise: Noise) -> None:
    codec, waveform, lengths = PublishedCodec(original), noise(9_000, batch=3), torch.tensor([9_000, 700, 5_000])
    together = codec.encode(waveform, lengths)
    speech = codec.decode(together)
    assert speech.shape == (3, 9_000) and torch.equal(together.samples, lengths)
    for index, size in enumerate(lengths.tolist()):
        alone = codec.encode(waveform[index : index + 1, :size])
        assert torch.equal(together.utterance(index), alone.ids[0])
        assert torch.equal(speech[index, :size], codec.decode(alone)[0]) and not speech[index, size:].any()


def test_codes_of_unknown_length_are_whole_frames(original: PreTrainedModel) -> None:
    codec, hop = PublishedCodec(original), SHAPES[original.config.model_type][2]
    codes = Codes(torch.zeros(2, codec.num_codebooks, 5, dtype=torch.long), torch.tensor([5, 3]))
    assert codec.decode(codes).shape == (2, 5 * hop)


@torch.no_grad()
def test_the_code_vectors_are_what_is_summed(noise: Noise) -> None:
    """EnCodec: the decoder receives the sum over the layers of `codebooks`."""
    original = make("encodec")
    codec = PublishedCodec(original)
    ids = codec.encode(noise(3_200)).ids[0]
    latents = sum(book[row] for book, row in zip(codec.codebooks, ids, strict=True))
    torch.testing.assert_close(original.quantizer.decode(ids[:, None])[0], latents.T)


def test_a_saved_codec_is_the_same(original: PreTrainedModel, noise: Noise, tmp_path: Path) -> None:
    codec, waveform = PublishedCodec(original), noise(3_200)
    codec.save_pretrained(tmp_path)
    loaded = PublishedCodec.from_pretrained(tmp_path)
    assert type(AutoModel.from_pretrained(tmp_path)) is type(original)
    assert loaded.fingerprint == codec.fingerprint
    assert torch.equal(loaded.encode(waveform).ids, codec.encode(waveform).ids)
    with torch.no_grad():
        next(loaded.parameters()).add_(1e-3)
    assert loaded.fingerprint != codec.fingerprint


@pytest.mark.parametrize("layers", [0, 5])
def test_layers_there_are_not_are_refused(original: PreTrainedModel, noise: Noise, layers: int) -> None:
    with pytest.raises(InputError, match=rf"layers must be 1\.\.[34], got {layers}"):
        PublishedCodec(original).encode(noise(640), layers=layers)


@pytest.mark.parametrize("setting", [{"audio_channels": 2}, {"normalize": True}, {"chunk_length_s": 1.0}])
def test_an_encodec_that_keeps_more_than_codes_is_refused(setting: dict[str, object]) -> None:
    with pytest.raises(InputError, match="is stereo or stores loudness besides its codes"):
        PublishedCodec(EncodecModel(EncodecConfig(**ENCODEC, **setting)))


def test_another_model_is_refused() -> None:
    tiny = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
    with pytest.raises(InputError, match="expected a model of encodec, mimi, dac, got bert"):
        PublishedCodec(BertModel(tiny))


def test_a_checkpoint_that_lacks_weights_is_refused(original: PreTrainedModel, tmp_path: Path) -> None:
    state = {name: value for name, value in original.state_dict().items() if not name.startswith("decoder.")}
    original.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(InputError, match=r"lacks \d+ weights of a \w+Model, decoder\."):
        PublishedCodec.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", SHAPES)
def test_nothing_stays_behind_when_a_codec_is_moved(kind: str) -> None:
    """Not even on a device without numbers: it would end the first encoding on a GPU."""
    codec = PublishedCodec(make(kind))
    codec.encode(torch.randn(1, 4_000))
    values = [value for part in codec.to("meta").modules() for value in vars(part).values()]
    held = [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]
    assert all(value.device.type == "meta" for value in [*held, codec.codebooks])
