"""Validation of a codec during training: all metrics in one pass over a few utterances."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tokenizer.codec.speech_codec import SpeechCodec
from tokenizer.metrics.code_usage import usage_of_counts
from tokenizer.metrics.quality import QualityError, speech_quality
from tokenizer.training.distillation import SemanticDistillation
from tokenizer.training.losses import MultiScaleMelLoss
from tokenizer.training.step import DistillationLoss


@dataclass(frozen=True)
class Validation:
    """metrics: by name, means over the utterances; counts: int [Q, K], the number of uses of each code."""

    metrics: dict[str, float]
    counts: np.ndarray


@torch.no_grad()
def validate_codec(
    codec: SpeechCodec,
    waveforms: Iterable[Tensor],
    mel: MultiScaleMelLoss,
    distillations: Sequence[DistillationLoss] = (),
) -> Validation:
    """Waveforms float [N] -> quality of the reconstruction from all codebooks, distillation losses, codebook usage.

    dev_mel: `mel` loss. dev_pesq_wb, dev_stoi: if the packages are installed and the utterances can be scored.
    dev_<distillation>: the loss of that name; dev_semantic_cosine: mean cosine of eq. 4. dev_perplexity_<layer>,
    dev_dead_<layer>: codebook usage. Restores the mode (training or eval) of the codec.
    """
    training = codec.training
    codec.eval()
    device = codec.codebooks.device
    figures: dict[str, list[float]] = {}
    counts = np.zeros((codec.num_codebooks, codec.codebook_size), int)
    shortest = codec.sample_rate // 4  # the largest mel window must fit
    for waveform in waveforms:
        waveform = F.pad(waveform, (0, max(0, shortest - len(waveform))))[None].to(device)
        quantized = codec.quantizer(codec.latents(waveform))
        reconstruction = codec.decoder(quantized.output)[:, 0, : waveform.shape[1]]
        values = {"mel": float(mel(reconstruction, waveform))}
        values |= _quality(waveform[0], reconstruction[0], codec.sample_rate)
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


def _quality(original: Tensor, reconstruction: Tensor, sample_rate: int) -> dict[str, float]:
    try:
        quality = speech_quality(original.cpu(), reconstruction.cpu(), sample_rate)
    except (QualityError, ImportError):  # silence, or the extra `eval` is not installed: the other metrics remain
        return {}
    return {"pesq_wb": quality.pesq_wb, "stoi": quality.stoi}


def _distillation_metrics(distillation: DistillationLoss, layer: Tensor, waveform: Tensor) -> dict[str, float]:
    target = distillation.teacher(waveform)
    mask = torch.ones(layer.shape[0], layer.shape[2], dtype=torch.bool, device=layer.device)
    values = {distillation.name: float(distillation.student(layer, target, mask))}
    if isinstance(distillation.student, SemanticDistillation):
        values[f"{distillation.name}_cosine"] = float(distillation.student.cosine(layer, target, mask).mean())
    return values
