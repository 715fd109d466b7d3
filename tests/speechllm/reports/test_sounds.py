"""One utterance before and after the codec: from how many codebooks, in which files."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from speechllm import SpeechCodec, SpeechCodecConfig
from speechllm.reports.sounds import Reconstruction, read_sounds, save_sounds

Noise = Callable[..., Tensor]


def make_codec(**settings: object) -> SpeechCodec:
    """Tiny, with random weights and codebooks, in eval mode."""
    torch.manual_seed(0)
    return SpeechCodec(SpeechCodecConfig(n_filters=4, dimension=8, codebook_size=8, **settings)).eval()


def some(name: str, level: float = 0.5) -> Reconstruction:
    """Three short ramps of different heights, exact in 16 bits."""
    ramp = np.arange(-8, 8, dtype=np.float32) / 16 * level
    return Reconstruction(name, 16_000, ramp, {1: ramp / 4, 3: ramp / 2})


@pytest.mark.parametrize("codebooks, counts", [(1, [1]), (3, [1, 2, 3]), (4, [1, 2, 4])])
def test_the_sounds_are_those_of_the_first_codebooks(noise: Noise, codebooks: int, counts: list[int]) -> None:
    codec, waveform = make_codec(num_codebooks=codebooks), noise(5_000)[0]
    found = Reconstruction.of(codec, "name", waveform)
    assert (found.name, found.sample_rate, list(found.reconstructions)) == ("name", codec.sample_rate, counts)
    np.testing.assert_array_equal(found.original, waveform)
    codes = codec.encode(waveform[None])
    for count, sound in found.reconstructions.items():
        np.testing.assert_array_equal(sound, codec.decode(codes.first(count))[0])


@pytest.mark.parametrize("training", [True, False])
def test_a_codec_in_training_decodes_in_eval_mode_and_is_not_changed(noise: Noise, training: bool) -> None:
    codec = make_codec(num_codebooks=3, norm="batch_norm")
    fingerprint, expected = codec.fingerprint, Reconstruction.of(codec, "a", noise(5_000)[0])
    found = Reconstruction.of(codec.train(training), "a", noise(5_000)[0])
    assert all(module.training is training for module in codec.modules())
    assert codec.fingerprint == fingerprint
    assert not any(parameter.grad is not None for parameter in codec.parameters())
    np.testing.assert_array_equal(found.reconstructions[3], expected.reconstructions[3])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_codec_on_the_gpu_gives_sounds_on_the_cpu(noise: Noise) -> None:
    found = Reconstruction.of(make_codec(num_codebooks=3).cuda(), "a", noise(5_000)[0])
    assert all(isinstance(sound, np.ndarray) and len(sound) == 5_000 for sound in found.reconstructions.values())


def test_saved_sounds_are_read_again(tmp_path: Path) -> None:
    save_sounds(tmp_path, some("b"))
    names = {"b_original.wav", "b_1_codebooks.wav", "b_3_codebooks.wav"}
    assert {path.name for path in tmp_path.iterdir()} == names
    found = read_sounds(tmp_path)
    assert (found.name, found.sample_rate, list(found.reconstructions)) == ("b", 16_000, [1, 3])
    np.testing.assert_array_equal(found.original, some("b").original)
    np.testing.assert_array_equal(found.reconstructions[3], some("b").reconstructions[3])


def test_the_first_utterance_is_read_and_no_other_is_mixed_in(tmp_path: Path) -> None:
    for name, level in (("b", 0.125), ("a[1]_x", 0.25), ("a[1]", 1.0)):
        save_sounds(tmp_path, some(name, level))
    found = read_sounds(tmp_path)
    assert found.name == "a[1]" and list(found.reconstructions) == [1, 3]
    np.testing.assert_array_equal(found.reconstructions[1], some("a[1]", 1.0).reconstructions[1])


def test_an_id_with_slashes_creates_no_folders(tmp_path: Path) -> None:
    save_sounds(tmp_path / "samples", some("dev/a.flac"))
    assert read_sounds(tmp_path / "samples").name == "dev_a.flac"
    assert [path.name for path in tmp_path.iterdir()] == ["samples"]


def test_a_folder_without_sounds_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"{tmp_path.name} holds no NAME_original.wav"):
        read_sounds(tmp_path)


@pytest.mark.parametrize("name", ["x" * 300, "語" * 100, "a/" * 150, "../../a", "caf\udce9"])
def test_a_name_of_any_length_and_bytes_becomes_a_file_name(tmp_path: Path, name: str) -> None:
    save_sounds(tmp_path, some(name))
    assert len(list(tmp_path.iterdir())) == 3
    cut = name.replace("/", "_").replace("\udce9", "").encode()[:200].decode(errors="ignore")
    assert read_sounds(tmp_path).name == cut


def test_sounds_are_written_below_a_folder_whose_name_is_not_utf8(tmp_path: Path) -> None:
    save_sounds(tmp_path / "caf\udce9", some("a"))
    assert len(list((tmp_path / "caf\udce9").iterdir())) == 3
