"""Metrics of codes, against cases of known value and against scikit-learn."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.metrics import mutual_info_score
from torchaudio.functional import melscale_fbanks

from speechllm import InputError, codebook_usage
from tokenizer.codec.log_mel import BANDS, LogMel
from tokenizer.metrics.code_usage import count_codes, label_information, log_mel_features, speaker_accuracy


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(0)


def test_uniform_use_has_the_perplexity_of_the_size() -> None:
    usage = codebook_usage(np.tile(np.arange(32), 5), 32)
    assert usage == {"used": 32, "dead": 0, "perplexity": pytest.approx(32)}


def test_codes_of_utterances_are_counted_together(random: np.random.Generator) -> None:
    utterances = [random.integers(0, 6, (3, size)) for size in (4, 1, 9)]
    counts, read = count_codes(iter(utterances), 3, 7)
    assert read == 3 and count_codes([], 2, 5)[0].tolist() == [[0] * 5] * 2
    for layer, row in zip(np.concatenate(utterances, 1), counts, strict=True):
        assert [int((layer == code).sum()) for code in range(7)] == row.tolist()


def test_one_code_has_perplexity_1_and_leaves_the_others_dead() -> None:
    assert codebook_usage(np.full(9, 3), 8) == {"used": 1, "dead": 7, "perplexity": pytest.approx(1)}


def test_perplexity_is_the_exponential_of_the_entropy() -> None:
    usage = codebook_usage(np.array([0, 0, 1, 5]), 6)
    assert usage == {"used": 3, "dead": 3, "perplexity": pytest.approx(2**1.5)}


def test_codes_that_determine_their_label_are_pure_and_fully_informed(random: np.random.Generator) -> None:
    ids = random.integers(0, 12, 5_000)
    labels = [f"phone {code // 3}" for code in ids]
    assert label_information(ids, labels) == {"purity": pytest.approx(1), "pnmi": pytest.approx(1)}


def test_codes_independent_of_labels_have_no_information() -> None:
    codes, labels = np.meshgrid(np.arange(6), ["a", "a", "b", "c"])  # every pair equally often
    found = label_information(codes.ravel(), labels.ravel().tolist())
    assert found["purity"] == pytest.approx(0.5)  # the share of "a"
    assert found["pnmi"] == pytest.approx(0, abs=1e-12)


def test_a_single_label_has_no_information() -> None:
    assert label_information(np.array([0, 1, 2]), ["a", "a", "a"]) == {"purity": pytest.approx(1), "pnmi": 0.0}


def test_pnmi_and_purity_equal_independent_computations(random: np.random.Generator) -> None:
    ids = random.integers(0, 20, 3_000)
    labels = [
        ("abcdefg")[(code * 3 + noise) % 7] for code, noise in zip(ids, random.integers(0, 3, 3_000), strict=True)
    ]
    found = label_information(ids, labels)
    shares = np.unique(labels, return_counts=True)[1] / len(labels)
    entropy = -(shares * np.log(shares)).sum()
    assert found["pnmi"] == pytest.approx(mutual_info_score(labels, ids) / entropy)
    best = [max(np.unique(np.array(labels)[ids == code], return_counts=True)[1]) for code in range(20)]
    assert found["purity"] == pytest.approx(sum(best) / len(ids))
    assert 0.1 < found["pnmi"] < 0.9


def test_the_interval_of_the_information_is_that_of_leaving_out_each_utterance(random: np.random.Generator) -> None:
    sizes = random.integers(5, 60, 12).tolist()
    ids = random.integers(0, 20, sum(sizes))
    labels = (ids * 3 + random.integers(0, 3, len(ids))) % 7
    ends = np.cumsum(sizes)
    without = []
    for start, end in zip(ends - sizes, ends, strict=True):
        rest = np.r_[0:start, end : len(ids)]
        without.append(mutual_info_score(labels[rest], ids[rest]) / mutual_info_score(labels[rest], labels[rest]))
    deviations = np.array(without) - np.mean(without)
    error = np.sqrt((len(sizes) - 1) / len(sizes) * (deviations**2).sum())  # Efron's jackknife
    found = label_information(ids, list(map(str, labels)), sizes)
    low, high = found["pnmi_ci95"]
    assert (low + high) / 2 == pytest.approx(found["pnmi"]) and (high - low) / 2 == pytest.approx(1.96 * error)
    assert found["pnmi"] == label_information(ids, list(map(str, labels)))["pnmi"]


def test_utterances_that_say_the_same_leave_no_doubt_about_the_information() -> None:
    found = label_information(np.tile([0, 1, 1, 2], 5), list("abcc") * 5, [4] * 5)
    assert found["pnmi_ci95"] == pytest.approx([found["pnmi"]] * 2)
    assert "pnmi_ci95" not in label_information(np.array([0, 1]), ["a", "b"], [2])


def test_the_sizes_of_the_utterances_add_up_to_the_codes() -> None:
    with pytest.raises(InputError, match="3 codes, but the sizes of the utterances add up to 4"):
        label_information(np.array([0, 1, 1]), list("abb"), [2, 2])


def utterances_of(
    speakers: int, each: int, speech_of: Callable[[int], np.ndarray]
) -> tuple[list[np.ndarray], list[str]]:
    names = [f"s{speaker}" for speaker in range(speakers) for _ in range(each)]
    return [speech_of(int(name[1:])) for name in names], names


def test_speakers_with_codes_of_their_own_are_classified(random: np.random.Generator) -> None:
    utterances, names = utterances_of(4, 6, lambda speaker: random.integers(8 * speaker, 8 * speaker + 8, 40))
    order = random.permutation(len(names))  # speakers need not come one after the other
    assert speaker_accuracy([utterances[i] for i in order], [names[i] for i in order], 32) == 1.0


def test_speakers_with_the_same_codes_are_guessed_at_chance(random: np.random.Generator) -> None:
    utterances, names = utterances_of(4, 100, lambda _: random.integers(0, 32, 40))
    assert speaker_accuracy(utterances, names, 32) == pytest.approx(0.25, abs=0.1)  # 3 standard errors


def test_the_length_of_an_utterance_does_not_reveal_the_speaker(random: np.random.Generator) -> None:
    utterances, names = utterances_of(2, 200, lambda speaker: np.tile(random.integers(0, 8, 10), 1 + 9 * speaker))
    assert speaker_accuracy(utterances, names, 8) == pytest.approx(0.5, abs=0.12)


@pytest.mark.parametrize("samples", [321, 3_200, 3_333])
def test_features_have_two_frames_of_80_bands_every_hop(samples: int) -> None:
    features = log_mel_features(torch.randn(samples))
    assert features.shape == (-(-samples // 320), 160)
    assert np.isfinite(features).all()


def test_one_frame_has_features() -> None:
    assert np.isfinite(log_mel_features(torch.randn(320))).all()


def test_features_do_not_depend_on_the_level() -> None:
    waveform = torch.randn(6_400, generator=torch.Generator().manual_seed(0))
    features = log_mel_features(waveform)
    np.testing.assert_allclose(log_mel_features(0.1 * waveform), features, atol=0.01)
    np.testing.assert_allclose(features.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(features.std(0), 1, atol=1e-3)


def test_a_mel_frame_is_centred_on_its_hop() -> None:
    for frame in (0, 3, 9):
        waveform = torch.zeros(1, 1_600)
        waveform[0, 160 * frame + 80] = 1.0
        energy = LogMel()(waveform)[0].mean(0)
        assert energy.shape == (10,)
        assert int(energy.argmax()) == frame
        if 0 < frame < 9:
            torch.testing.assert_close(energy[frame - 1], energy[frame + 1], atol=1e-3, rtol=0)


@pytest.mark.parametrize("frequency", [300, 1_000, 5_000])
def test_a_tone_is_loudest_in_the_mel_band_of_its_frequency(frequency: int) -> None:
    tone = torch.sin(2 * torch.pi * frequency * torch.arange(3_200) / 16_000)
    band = LogMel()(tone[None])[0].mean(1).argmax()
    gain = melscale_fbanks(16_001, 0.0, 8_000.0, BANDS, 16_000)[2 * frequency]  # one bin every half hertz
    assert gain[band] == gain.max()


def test_no_mel_band_is_empty() -> None:
    assert (LogMel().filters.sum(0) > 0).all()


@pytest.mark.parametrize("labels", ["abc", ["a", "b"], ["a", "b", None], ["a", "b", 3]])
def test_information_needs_one_text_for_each_frame(labels: object) -> None:
    with pytest.raises(InputError, match="labels"):
        label_information(np.array([0, 1, 1]), labels)


@pytest.mark.parametrize("speakers", ["aab", ["a", "b"], ["a", "a", None], ["a", "b", "c"]])
def test_voices_need_one_speaker_for_each_utterance_and_two_of_one(speakers: object) -> None:
    with pytest.raises(InputError, match="speaker"):
        speaker_accuracy([np.array([0, 1])] * 3, speakers, 2)
