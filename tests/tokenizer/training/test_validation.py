"""Validation of a codec: the best weights so far, and a codec that goes on training as before."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from speechllm import InputError, SpeechCodec
from tokenizer.training import validation
from tokenizer.training.losses import MultiScaleMelLoss
from tokenizer.training.validation import BestWeights, validate_codec


@pytest.mark.parametrize("figure, scores", [("mel", [3.0, 1.0, 2.0]), ("pesq_wb", [1.0, 3.0, 2.0])])
def test_the_best_weights_are_those_of_the_lowest_loss_or_the_highest_quality(
    make_codec: Callable[..., SpeechCodec], figure: str, scores: list[float]
) -> None:
    codec, best = make_codec(), BestWeights(figure)
    for number, score in enumerate(scores):
        with torch.no_grad():
            for parameter in codec.parameters():
                parameter.fill_(number)
        best.record(number, {f"dev_{figure}": score}, codec)
    other = BestWeights(figure)
    other.load_state_dict(best.state_dict())
    other.load_into(codec)
    assert (other.step, other.score, other.validations_without_improvement) == (1, scores[1], 1)
    assert all((parameter == 1).all() for parameter in codec.parameters())
    with pytest.raises(InputError, match=f"the validation has no dev_{figure}"):
        best.record(4, {}, codec)


def test_without_the_packages_for_a_figure_no_training_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise ImportError("pesq is needed")

    monkeypatch.setattr(validation, "scorers", missing)
    BestWeights("mel")
    with pytest.raises(ImportError, match="pesq is needed"):
        BestWeights("pesq_wb")


def test_a_codec_goes_on_training_after_its_validation(
    make_codec: Callable[..., SpeechCodec], noise: Callable[..., Tensor]
) -> None:
    codec = make_codec().train()
    found = validate_codec(codec, [noise(8_000)[0]], MultiScaleMelLoss(codec.sample_rate))
    assert codec.training and codec.quantizer.training
    assert found.counts.shape == (codec.num_codebooks, codec.codebook_size) and found.metrics["dev_mel"] > 0


def test_a_recording_shorter_than_half_of_the_largest_window_is_validated(
    make_codec: Callable[..., SpeechCodec], noise: Callable[..., Tensor]
) -> None:
    mel = MultiScaleMelLoss(16_000, windows=[512, 16_384])
    assert validate_codec(make_codec(), [noise(2_000)[0]], mel).metrics["dev_mel"] > 0
