"""A codec whose layer 0 is given by units: theirs everywhere, with vectors that are the means of their latents."""

from collections.abc import Callable
from pathlib import Path

import pytest
import soundfile
import torch
from torch import Tensor

from speechllm import InputError, SpeechCodec, SpeechCodecConfig, Utterance, load_audio, load_tokenizer
from tokenizer.codec import speech_codec
from tokenizer.interface import Codes
from tokenizer.schemes.features import FeatureEncoder
from tokenizer.schemes.units import UnitTokenizer
from tokenizer.training.feature_cache import FeatureCache, UnitIds
from tokenizer.training.initialization import initialize_codec
from tokenizer.training.small_teachers import small_hubert
from tokenizer.training.teachers import SemanticTeacher

K = 8
Noise = Callable[..., Tensor]
pytestmark = pytest.mark.numeric


@pytest.fixture(scope="module")
def units(noise: Noise) -> UnitTokenizer:
    torch.manual_seed(0)
    encoder = FeatureEncoder(SemanticTeacher(small_hubert(hidden_size=16, layers=1), 1))
    frames = encoder.encode(noise(16_000)).utterance(0)
    return UnitTokenizer(encoder, frames[:: len(frames) // K][:K].clone())


@pytest.fixture(params=["seanet", "convnext"])
def codec(units: UnitTokenizer, request: pytest.FixtureRequest) -> SpeechCodec:
    return make(units, body=request.param)


def make(units: UnitTokenizer | None, **settings: object) -> SpeechCodec:
    torch.manual_seed(0)
    small = {"n_filters": 2, "dimension": 12, "width": 16, "depth": 1, "num_codebooks": 3, "codebook_size": K}
    return SpeechCodec(SpeechCodecConfig(**{**small, "quantizer": "units", **settings}), units).eval()


def test_layer_0_is_the_units_in_every_batch(codec: SpeechCodec, units: UnitTokenizer, noise: Noise) -> None:
    both, lengths = torch.cat([noise(9_001), noise(9_001, seed=1)]), torch.tensor([9_001, 5_000])
    encoded = codec.encode(both, lengths)
    expected = units.encode(both, lengths)
    assert torch.equal(encoded.ids[:, :1], expected.ids) and torch.equal(encoded.lengths, expected.lengths)
    assert torch.equal(codec.encode(both, lengths, layers=1).ids, expected.ids)
    alone = codec.encode(both[1:, :5_000])
    assert torch.equal(alone.utterance(0), encoded.utterance(1))
    assert codec.decode(encoded).shape == both.shape


def test_only_the_units_are_computed_where_only_layer_0_is_wanted(
    codec: SpeechCodec, noise: Noise, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codec.encoder, "forward", None)
    assert codec.encode(noise(3_200), layers=1).ids.shape == (1, 1, 10)


def test_the_next_codebook_quantises_what_the_unit_leaves(codec: SpeechCodec, noise: Noise) -> None:
    waveform = noise(6_400)
    first, second, _ = codec.encode(waveform).utterance(0)
    rest = codec.latents(waveform)[0].T - codec.codebooks[0, first]
    assert torch.equal(torch.cdist(rest, codec.codebooks[1]).argmin(1), second)


def test_long_speech_in_chunks_has_the_same_codes(units: UnitTokenizer, noise: Noise) -> None:
    codec, waveform = make(units, body="convnext"), noise(32_000)
    whole = codec.encode(waveform)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speech_codec, "CHUNK_S", 0.5)
        assert torch.equal(codec.encode(waveform).ids, whole.ids)


def test_saved_and_loaded_it_is_the_same(codec: SpeechCodec, noise: Noise, tmp_path: Path) -> None:
    codec.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert isinstance(loaded, SpeechCodec) and loaded.fingerprint == codec.fingerprint
    assert torch.equal(loaded.encode(noise(9_000)).ids, codec.encode(noise(9_000)).ids)
    assert not any("units" in name for name in loaded.state_dict())  # their weights are in their own folder
    with pytest.raises(InputError, match="if and only if its quantizer is units"):
        SpeechCodec.from_pretrained(tmp_path)


def test_other_units_make_another_codec_and_unfit_ones_are_refused(units: UnitTokenizer) -> None:
    others = UnitTokenizer(units.encoder, units.centroids + 1)
    assert make(others).fingerprint != make(units).fingerprint
    with pytest.raises(InputError, match="if and only if its quantizer is units"):
        make(None)
    with pytest.raises(InputError, match="if and only if its quantizer is units"):
        make(units, quantizer="residual")
    merged = UnitTokenizer(units.encoder, units.centroids, deduplicate=True)
    for wrong in (merged, UnitTokenizer(units.encoder, units.centroids[:4])):
        with pytest.raises(InputError, match="must be .* but are"):
            make(wrong)
    for setting in ({"causal": True}, {"codebook_dim": 4}):
        with pytest.raises(InputError, match="quantizer units needs causal: false"):
            make(units, **setting)


def test_vectors_begin_as_the_mean_latents_of_their_units(units: UnitTokenizer, noise: Noise) -> None:
    codec = make(units, body="convnext")
    crops = [{"waveform": noise(9_600, seed=seed)[0], "length": 9_600 if seed % 2 else 6_000} for seed in range(40)]
    initialize_codec(codec, crops, batch_size=2, linear=True)
    codec.eval()
    ids, latents = [], []
    for crop in crops[:32]:  # 60 frames for each of 8 codes, in batches of two
        if sum(map(len, ids)) >= 60 * K:
            break
        speech = crop["waveform"][None, : crop["length"]]
        ids.append(units.encode(speech).utterance(0)[0])
        latents.append(codec.latents(crop["waveform"][None])[0, :, : len(ids[-1])].T)
    found, rows = torch.cat(ids), torch.cat(latents)
    for unit in found.unique().tolist():
        torch.testing.assert_close(codec.codebooks[0, unit], rows[found == unit].mean(0), atol=1e-4, rtol=1e-4)


def test_in_training_they_follow_their_units_and_z_is_not_committed_to_them(units: UnitTokenizer) -> None:
    codec = make(units).train()
    z, first = torch.randn(2, 12, 30, requires_grad=True), torch.randint(0, K - 1, (2, 30))  # one never occurs
    before = codec.codebooks.clone()
    quantized = codec.quantizer(z, first=first)
    assert torch.equal(quantized.ids[:, 0], first)
    unused = K - 1
    torch.testing.assert_close(codec.codebooks[0, unused], before[0, unused])  # it is not begun anew elsewhere
    assert not torch.equal(codec.codebooks[0, 0], before[0, 0])
    one_layer = codec.quantizer(z, num_layers=torch.ones(2, dtype=torch.long), first=first)
    assert float(one_layer.commitment.detach()) == 0.0


def test_crops_that_are_all_short_have_units_for_their_padding(codec: SpeechCodec, noise: Noise) -> None:
    waveform, lengths = torch.cat([noise(6_400), noise(6_400, seed=1)]), torch.tensor([5_000, 3_000])
    given = codec.given_codes(waveform, lengths)
    assert given.shape == (2, 20) and codec.latents(waveform).shape[2] == 20
    assert torch.equal(given[0, :16], codec.encode(waveform[:1, :5_000], layers=1).ids[0, 0])
    assert make(None, quantizer="residual").given_codes(waveform) is None


def test_units_that_do_not_occur_for_long_keep_their_vectors(units: UnitTokenizer) -> None:
    quantizer = make(units).train().quantizer
    quantizer.decay = 0.5
    before = quantizer.codebooks[0, K - 1].clone()
    for step in range(60):
        torch.manual_seed(step)
        quantizer(torch.randn(1, 12, 10), first=torch.zeros(1, 10, dtype=torch.long))
    torch.testing.assert_close(quantizer.codebooks[0, K - 1], before)


def test_memory_is_not_bounded_where_units_see_the_whole(units: UnitTokenizer) -> None:
    assert not make(units, body="convnext").bounded and make(None, body="convnext", quantizer="residual").bounded


def test_a_cache_keeps_units_as_whole_numbers(units: UnitTokenizer, noise: Noise, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", noise(9_600)[0].numpy(), 16_000)
    utterance = Utterance("a", tmp_path / "a.wav", 0.6, split="train")
    expected = units.encode(load_audio(tmp_path / "a.wav")[None]).ids[0, 0]
    for one, shift in ((UnitIds(units), 0), (UnitIds(_Large(units)), 60_000)):  # float16 cannot tell these apart
        cache = FeatureCache(tmp_path / str(shift), one.fingerprint, one.hop)
        cache.fill([utterance], one)
        assert torch.equal(cache.crop(utterance, 5, 10)[:, 0].long(), expected[5:15] + shift)


class _Large:
    """Units with large numbers."""

    def __init__(self, units: UnitTokenizer):
        self.units, self.device, self.fingerprint = units, units.device, units.fingerprint
        self.sample_rate, self.frame_rate = units.sample_rate, units.frame_rate

    def encode(self, waveform: Tensor, layers: int) -> Codes:
        return Codes(self.units.encode(waveform).ids + 60_000, torch.tensor([0]))
