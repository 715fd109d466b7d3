"""Whisper's encoder as a teacher: its spectrogram, windows of any length, their batches, gradients and folders."""

import copy
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperModel

from tokenizer.errors import InputError
from tokenizer.training.teachers import SemanticTeacher, WhisperTeacher
from tokenizer.training.whisper import WhisperSpectrogram

pytestmark = pytest.mark.numeric

Noise = Callable[..., Tensor]
WINDOW = 16_000  # samples: a Whisper of 50 positions, so that a second takes the place of 30
SILENCE = 8_000  # samples after the speech


def tiny(model_class: type = WhisperModel, **settings: int) -> nn.Module:
    torch.manual_seed(0)
    shape = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "init_std": 0.5}
    tokens = {"vocab_size": 9, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "decoder_start_token_id": 1}
    sizes = {"max_source_positions": 50, "max_target_positions": 8}
    return model_class(WhisperConfig(**{**shape, **heads, **tokens, **sizes, **settings})).eval()


def make(layer: int | str = -1) -> WhisperTeacher:
    return WhisperTeacher(tiny().encoder, WhisperFeatureExtractor(), layer)


def log_mel(extractor: WhisperFeatureExtractor, waveform: Tensor) -> Tensor:
    """What transformers computes from waveforms float [B, N], without padding or a cut."""
    options = {"padding": "longest", "truncation": False, "sampling_rate": 16_000, "return_tensors": "pt"}
    return extractor(list(waveform.numpy()), **options).input_features


@pytest.fixture
def teacher() -> WhisperTeacher:
    return make()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whisper")
    tiny(WhisperForConditionalGeneration).save_pretrained(folder)
    WhisperFeatureExtractor().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("bands", [80, 128])
def test_the_spectrogram_is_the_one_of_the_feature_extractor(bands: int, noise: Noise) -> None:
    extractor = WhisperFeatureExtractor(feature_size=bands)
    waveform = noise(9_600, batch=3) * torch.tensor([[1.0], [0.01], [0.0]])
    waveform[1, 4_000:] = 0
    found = WhisperSpectrogram(extractor)(waveform)
    assert found.shape == (3, bands, 61)
    torch.testing.assert_close(found[:, :, :-1], log_mel(extractor, waveform), atol=1e-4, rtol=0)


def test_the_spectrogram_stays_in_float32_where_the_rest_does_not(teacher: WhisperTeacher, noise: Noise) -> None:
    waveform = nn.functional.pad(noise(6_000), (0, 400))
    with torch.autocast("cpu", torch.bfloat16):
        mel, features = teacher.log_mel(waveform), teacher(waveform, torch.tensor([6_000]))
    assert torch.equal(mel, teacher.log_mel(waveform))
    alone = teacher(waveform[:, :6_000])
    assert nn.functional.cosine_similarity(features[:, :19].float(), alone, dim=-1).mean() > 0.98


@pytest.mark.parametrize("samples", [1, 320, 321, 3_200, WINDOW - 1, WINDOW, WINDOW + 1, 40_000])
def test_there_is_one_frame_per_started_hop(teacher: WhisperTeacher, noise: Noise, samples: int) -> None:
    features = teacher(noise(samples, batch=2))
    assert features.shape == (2, math.ceil(samples / 320), teacher.width) and teacher.width == 16
    assert features.isfinite().all() and features.std() > 0


@torch.no_grad()
@pytest.mark.parametrize("samples", [640, 3_333, WINDOW - SILENCE, 12_345])
def test_a_window_has_the_states_of_a_whisper_of_as_many_positions(noise: Noise, samples: int) -> None:
    """And of the whole one if speech and silence fill its window."""
    teacher, waveform = make(), noise(samples, batch=2)
    frames = math.ceil(samples / 320)
    positions = min(frames + SILENCE // 320, 50)
    padded = nn.functional.pad(waveform, (0, 320 * positions + 160 - samples))  # from its second frame on
    mel = log_mel(teacher.extractor, padded)[:, :, 1:]
    encoder = copy.deepcopy(teacher.model)
    encoder.config.max_source_positions = positions
    encoder.embed_positions = nn.Embedding.from_pretrained(encoder.embed_positions.weight[:positions])
    expected = encoder(mel, output_hidden_states=True).hidden_states
    found = teacher.hidden_states(waveform)
    assert len(found) == len(expected) == 3
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs[:, :frames], atol=1e-3, rtol=1e-3)


def test_layers_are_numbered_as_in_transformers(noise: Noise) -> None:
    waveform = noise(3_200, batch=2)
    first, second, last = make().hidden_states(waveform)
    for layer, expected in ((0, first), (1, second), (2, last), (-1, last), (-3, first)):
        assert torch.equal(make(layer)(waveform), expected)
    torch.testing.assert_close(make("avg")(waveform), (first + second + last) / 3)
    torch.testing.assert_close(last.std(-1, correction=0), torch.ones(2, 10), atol=1e-3, rtol=0)  # normalised
    with pytest.raises(InputError, match='layer must be "avg" or an index up to 2'):
        make(3)


def test_every_frame_is_centred_on_its_codec_frame() -> None:
    """One changed sample changes exactly the frames whose five spectra see it, 519 samples on either side."""
    teacher = make(0).double()
    waveform = torch.randn(1, 10 * 320, dtype=torch.double)  # no level is 80 dB below the loudest
    centre = 4 * 320 + 160
    for sample in (centre, centre - 519, centre - 520, centre + 519, centre + 520):
        changed = waveform.clone()
        changed[0, sample] += 1
        moved = (teacher(changed) - teacher(waveform))[0].abs().amax(1) > 1e-12
        assert moved.tolist() == [abs(sample - (320 * frame + 160)) <= 519 for frame in range(10)]


def test_an_utterance_has_the_frames_alone_that_it_has_in_a_batch(noise: Noise) -> None:
    lengths = torch.tensor([40_000, 400, 8_123, 20_000, 16_000, 15_700, 1])
    waveform = noise(40_000, batch=7)
    waveform[torch.arange(40_000) >= lengths[:, None]] = 0
    for teacher in (make(), make("avg")):
        together = teacher(waveform, lengths)
        assert together.isfinite().all()
        for row, length in enumerate(lengths.tolist()):
            alone = teacher(waveform[row : row + 1, :length])[0]
            torch.testing.assert_close(together[row, : len(alone)], alone, atol=1e-4, rtol=1e-4)


def test_longer_speech_is_encoded_in_consecutive_windows(teacher: WhisperTeacher, noise: Noise) -> None:
    waveform = noise(40_000)
    windows = [teacher(waveform[:, start : start + WINDOW]) for start in range(0, 40_000, WINDOW)]
    assert torch.equal(teacher(waveform), torch.cat(windows, 1))


def test_a_loss_on_features_reaches_the_waveform_and_nothing_else(teacher: WhisperTeacher, noise: Noise) -> None:
    waveform = noise(3_200, batch=3)
    waveform[1, 1_600:] = 0
    waveform[2] = 0
    features = teacher.features(waveform.requires_grad_(), torch.tensor([3_200, 1_600, 3_200]))
    features.sin().mean().backward()
    assert waveform.grad.isfinite().all()
    assert (waveform.grad[0] != 0).float().mean() > 0.99
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not teacher(waveform).requires_grad and not teacher.train().training


def test_the_gradient_of_the_features_is_the_slope(noise: Noise) -> None:
    teacher, waveform = make().double(), noise(700).double().requires_grad_()
    direction = torch.randn_like(waveform)

    def loss(x: Tensor) -> Tensor:
        return teacher.features(x, torch.tensor([600])).sin().sum()

    (gradient,) = torch.autograd.grad(loss(waveform), waveform)
    with torch.no_grad():
        slope = (loss(waveform + 1e-7 * direction) - loss(waveform - 1e-7 * direction)) / 2e-7
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("model_class", [WhisperForConditionalGeneration, WhisperModel])
def test_a_whole_whisper_and_its_saved_encoder_are_the_same_teacher(
    model_class: type, noise: Noise, tmp_path: Path
) -> None:
    tiny(model_class).save_pretrained(tmp_path / "whole")
    WhisperFeatureExtractor().save_pretrained(tmp_path / "whole")
    teacher = SemanticTeacher.from_pretrained(tmp_path / "whole", 1)
    assert type(teacher) is WhisperTeacher and type(teacher.model).__name__ == "WhisperEncoder"
    expected = WhisperTeacher(tiny(model_class).get_encoder(), WhisperFeatureExtractor(), 1)
    assert teacher.fingerprint == expected.fingerprint
    teacher.save_pretrained(tmp_path / "alone")
    assert not any("decoder" in name for name in load_file(tmp_path / "alone" / "model.safetensors"))
    assert SemanticTeacher.from_pretrained(tmp_path / "alone", 1).fingerprint == expected.fingerprint
    assert SemanticTeacher.from_pretrained(tmp_path / "alone").layer == -1


def test_a_fingerprint_is_of_weights_and_layer() -> None:
    other = make()
    with torch.no_grad():
        other.model.layer_norm.bias[0] += 1e-3
    assert len({t.fingerprint for t in (make(), make("avg"), make(1), other)}) == 4 and make(1).normalize is False


@pytest.mark.parametrize("lacking", ["encoder.layers.1", "decoder.layers.0"])
def test_weights_of_the_encoder_must_be_complete(folder: Path, tmp_path: Path, lacking: str) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    weights = load_file(folder / "model.safetensors")
    found = {name: value for name, value in weights.items() if lacking not in name}
    assert len(found) < len(weights)
    save_file(found, tmp_path / "model.safetensors", {"format": "pt"})
    if lacking.startswith("encoder"):
        with pytest.raises(InputError, match=r"lacks 15 weights of a WhisperEncoder, layers\.1\."):
            SemanticTeacher.from_pretrained(tmp_path)
    else:
        assert SemanticTeacher.from_pretrained(tmp_path).fingerprint == make().fingerprint


@pytest.mark.parametrize(
    "file, change, message",
    [
        ("config.json", {"encoder_layers": 1}, "has 15 weights that a WhisperEncoder has not"),
        ("config.json", {"d_model": 8}, "weights of other shapes than its configuration"),
        ("preprocessor_config.json", {"feature_size": 128}, "settings of another Whisper.* feature_size of 80, got"),
        ("preprocessor_config.json", {"hop_length": 80}, "settings of another Whisper.* half of 160 and 80"),
    ],
)
def test_files_of_another_whisper_are_refused(
    folder: Path, tmp_path: Path, file: str, change: dict[str, int], message: str
) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / file).write_text(json.dumps(json.loads((folder / file).read_text()) | change))
    with pytest.raises(InputError, match=message):
        SemanticTeacher.from_pretrained(tmp_path)
