"""Validation of a codec during training: all metrics in one pass over a few utterances, and the best weights so far."""

import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tokenizer.codec.speech_codec import SpeechCodec
from tokenizer.errors import InputError
from tokenizer.metrics.code_usage import usage_of_counts
from tokenizer.metrics.quality import QualityError, layer_counts, pesq_and_stoi, scorers
from tokenizer.training.distillation import SemanticDistillation
from tokenizer.training.losses import MultiScaleMelLoss
from tokenizer.training.step import DistillationLoss


@dataclass(frozen=True)
class Validation:
    """metrics: by name, means over the utterances; counts: int [Q, K], the number of uses of each code."""

    metrics: dict[str, float]
    counts: np.ndarray


class BestWeights:
    """The weights of the best validation so far; part of a checkpoint.

    figure: what is compared, by the name that it has in a `Validation`, without dev_.
    """

    HIGHER = ("pesq_wb", "stoi")  # of these figures the highest is best, of losses the lowest

    def __init__(self, figure: str):
        if figure in self.HIGHER:
            scorers()  # without which a training would end at its first validation
        self.figure = figure
        self.step, self.validations_without_improvement = 0, 0
        self.score = -math.inf if figure in self.HIGHER else math.inf
        self.weights: dict[str, Tensor] | None = None

    def record(self, step: int, metrics: Mapping[str, float], codec: SpeechCodec) -> None:
        """Keep a copy of the weights if the validation is the best. Raises InputError if it lacks the figure."""
        if (score := metrics.get(f"dev_{self.figure}")) is None:
            raise InputError(f"the validation has no dev_{self.figure}: no utterance of the dev splits could be scored")
        if score > self.score if self.figure in self.HIGHER else score < self.score:
            self.step, self.score, self.validations_without_improvement = step, score, 0
            self.weights = {name: value.to("cpu", copy=True) for name, value in codec.state_dict().items()}
        else:
            self.validations_without_improvement += 1

    def load_into(self, codec: SpeechCodec) -> None:
        """Load the best weights, if there are any."""
        if self.weights is not None:
            codec.load_state_dict(self.weights)

    def state_dict(self) -> dict[str, Any]:
        """For `load_state_dict`."""
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        vars(self).update(state)


@torch.no_grad()
def validate_codec(
    codec: SpeechCodec,
    waveforms: Iterable[Tensor],
    mel: MultiScaleMelLoss,
    distillations: Sequence[DistillationLoss] = (),
) -> Validation:
    """Waveforms float [N] -> quality of the reconstruction, distillation losses, codebook usage.

    dev_mel: `mel` loss from all codebooks. dev_pesq_wb, dev_stoi: if the packages are installed and the utterances can
    be scored. dev_mel_<n> and so on: from the first n codebooks, 1, 2, 4 and so on.
    dev_<distillation>: the loss of that name; dev_semantic_cosine: mean cosine of eq. 4. dev_perplexity_<layer>,
    dev_dead_<layer>: codebook usage. Restores the mode (training or eval) of the codec.
    """
    training = codec.training
    codec.eval()
    device = codec.codebooks.device
    figures: dict[str, list[float]] = {}
    counts = np.zeros((codec.num_codebooks, codec.codebook_size), int)
    shortest = max(codec.sample_rate // 4, mel.shortest)
    for waveform in waveforms:
        waveform = F.pad(waveform, (0, max(0, shortest - len(waveform))))[None].to(device)
        quantized = codec.quantizer(codec.latents(waveform), first=codec.given_codes(waveform))
        values: dict[str, float] = {}
        for count in layer_counts(codec):
            suffix = "" if count == codec.num_codebooks else f"_{count}"
            latents = codec.quantizer.decode(quantized.ids[:, :count])
            reconstruction = codec.decoder(latents)[:, 0, : waveform.shape[1]]
            found = {"mel": float(mel(reconstruction, waveform))}
            with contextlib.suppress(QualityError, ImportError):  # silence, or no extra `eval`: the others remain
                found |= pesq_and_stoi(waveform[0], reconstruction[0], codec.sample_rate)
            values |= {name + suffix: value for name, value in found.items()}
        for distillation in distillations:
            values |= _distillation_metrics(distillation, quantized.layers[distillation.layer], waveform)
        for name, value in values.items():
            figures.setdefault(f"dev_{name}", []).append(value)
        for layer, ids in enumerate(quantized.ids[0].cpu().numpy()):
            counts[layer] += np.bincount(ids, minlength=codec.codebook_size)
    codec.train(training)
    metrics = {name: float(np.mean(values)) for name, values in figures.items()}
    for layer, row in enumerate(counts):
        usage = usage_of_counts(row)
        metrics |= {f"dev_perplexity_{layer}": usage["perplexity"], f"dev_dead_{layer}": usage["dead"]}
    return Validation(metrics, counts)


def _distillation_metrics(distillation: DistillationLoss, layer: Tensor, waveform: Tensor) -> dict[str, float]:
    target = distillation.teacher(waveform)
    mask = torch.ones(layer.shape[0], layer.shape[2], dtype=torch.bool, device=layer.device)
    values = {distillation.name: float(distillation.student(layer, target, mask))}
    if isinstance(distillation.student, SemanticDistillation):
        values[f"{distillation.name}_cosine"] = float(distillation.student.cosine(layer, target, mask).mean())
    return values
