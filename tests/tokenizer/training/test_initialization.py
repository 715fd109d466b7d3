"""How a codec begins: against principal components and least squares of NumPy."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from speechllm import InputError, SpeechCodec, SpeechCodecConfig
from tokenizer.codec.convnext import ConvNeXtBlock, LocalAttention
from tokenizer.training.initialization import LINEAR_FRAMES_PER_CODE, initialize_codec, start_from

pytestmark = pytest.mark.numeric

K, BATCH, FRAMES = 8, 2, 30


def make(gain: float = 0.0, **settings: object) -> SpeechCodec:
    """gain: of what the blocks add, which is the only part that is not linear."""
    torch.manual_seed(0)
    small = {"body": "convnext", "depth": 1, "num_codebooks": 3, "codebook_size": K}
    codec = SpeechCodec(SpeechCodecConfig(**small, **settings))
    for module in codec.modules():
        if isinstance(module, ConvNeXtBlock | LocalAttention):
            nn.init.constant_(module.gain, gain)
    return codec


@pytest.fixture
def crops(noise: Callable[..., Tensor]) -> list[dict]:
    """Crops of coloured noise whose level wanders; every second one ends early."""
    found = []
    for seed in range(40):
        sound = noise(320 * FRAMES, seed=seed)[0]
        sound = sound.cumsum(0) * 0.03 * torch.rand(1, generator=torch.Generator().manual_seed(seed))
        length = 320 * FRAMES if seed % 2 else 320 * 19 - 7
        sound[length:] = 0
        found.append({"waveform": sound, "length": length})
    return found


def speech(codec: SpeechCodec, crops: list[dict], of: Callable[[Tensor], Tensor]) -> np.ndarray:
    """Frames [M, C] of `of`'s float [1, C, T] that hold speech, of the crops that the codec begins with."""
    wanted, rows = LINEAR_FRAMES_PER_CODE * K, []
    for first in range(0, len(crops), BATCH):
        if sum(map(len, rows)) >= wanted:
            break
        for crop in crops[first : first + BATCH]:
            frames = -(-crop["length"] // 320)
            rows.append(of(crop["waveform"][None])[0, :, :frames].T.double().numpy())
    return np.concatenate(rows)


@pytest.mark.parametrize("gain", [0.0, 0.5])
@pytest.mark.parametrize("quantizer", ["residual", "split"])
@torch.no_grad()
def test_latents_begin_as_principal_components(crops: list[dict], quantizer: str, gain: float) -> None:
    codec = make(gain, width=40, dimension=12, quantizer=quantizer)
    initialize_codec(codec, crops, BATCH, linear=True)
    codec.eval()
    kept = 6 if quantizer == "split" else 12
    spectra = speech(codec, crops, lambda waveform: codec.encoder.spectra(waveform[:, None]))
    latents = speech(codec, crops, codec.latents)
    centred = spectra - spectra.mean(0)
    _, strengths, directions = np.linalg.svd(centred, full_matrices=False)
    components = centred @ directions[:kept].T
    components *= np.sqrt((kept * (len(components) - 1)) / (strengths[:kept] ** 2).sum())
    *others, sound = np.split(latents, 12 // kept, axis=1)
    for half in [*others, sound] if gain == 0 else [sound]:  # to the last, blocks add nothing; signs may differ
        np.testing.assert_allclose(np.abs(half), np.abs(components), atol=2e-2)
        assert np.mean(np.var(half, axis=0, ddof=1)) == pytest.approx(1, rel=1e-3)


@torch.no_grad()
def test_the_decoder_begins_with_the_levels_that_least_squares_predict(crops: list[dict]) -> None:
    codec = make(width=40, dimension=8, phases="griffin_lim")
    initialize_codec(codec, crops, BATCH, linear=True)
    codec.eval()
    head = codec.decoder.inverse

    def neighbours(waveform: Tensor) -> Tensor:
        z = torch.nn.functional.pad(codec.quantizer.decode(codec.quantizer.encode(codec.latents(waveform))), (1, 1))
        return torch.cat([z[..., :-2], z[..., 1:-1], z[..., 2:]], 1)

    def predicted(waveform: Tensor) -> Tensor:
        z = codec.quantizer.decode(codec.quantizer.encode(codec.latents(waveform)))
        return codec.decoder.output(codec.decoder.blocks(codec.decoder.input(z)))

    known, wanted = speech(codec, crops, neighbours), speech(codec, crops, head.levels)
    known = np.concatenate([known, np.ones((len(known), 1))], 1)
    expected = known @ np.linalg.lstsq(known, wanted, rcond=None)[0]
    found = speech(codec, crops, predicted)
    assert np.square(wanted - expected).mean() < 0.9 * np.square(wanted - wanted.mean(0)).mean()
    # directions in which codes hardly vary are damped
    assert np.square(found - expected).mean() < 1e-2 * np.square(wanted - expected).mean()


@torch.no_grad()
def test_predicted_phases_begin_anywhere_and_their_levels_do_not(crops: list[dict]) -> None:
    codec = make(width=40, dimension=8)
    before = copy.deepcopy(codec.decoder.output.weight)
    initialize_codec(codec, crops, BATCH, linear=True)
    changed = (codec.decoder.output.weight != before).flatten(1).any(1).unflatten(0, (2, 2, -1))  # window, kind, bin
    assert changed[:, 0].all() and not changed[:, 1].any()


def test_without_it_the_weights_stay_as_they_are(crops: list[dict]) -> None:
    codec = make(width=16, dimension=8)
    before = copy.deepcopy([*codec.parameters()])
    initialize_codec(codec, crops, BATCH)
    assert all(map(torch.equal, before, codec.parameters()))
    codes = codec.eval().encode(crops[1]["waveform"][None]).ids[0]
    assert all(len(ids.unique()) > 2 for ids in codes)


def test_a_codec_that_starts_from_another_has_its_weights_codebooks_and_their_averages(crops: list[dict]) -> None:
    trained, codec = make(width=16, dimension=8), make(gain=0.5, width=16, dimension=8)
    initialize_codec(trained, crops, BATCH, linear=True)
    start_from(codec, trained)
    own, other = codec.state_dict(), trained.state_dict()
    assert own.keys() == other.keys() and all(torch.equal(own[name], other[name]) for name in own)
    assert codec.fingerprint == trained.fingerprint


def test_a_codec_cannot_start_from_one_of_another_kind_or_shape() -> None:
    with pytest.raises(InputError, match="start: this codec has codec.dimension=6 codec.width=24: give the same"):
        start_from(make(width=16, dimension=8), make(width=24, dimension=6))
    with pytest.raises(InputError, match="start: this is no codec of this package"):
        start_from(make(width=16, dimension=8), nn.Identity())
