"""One training step of the codec: reconstruction, and lessons for single layers weighed at the latents (eq. 7)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.codec import SpeechCodec
from tokenizer.corpus import Crops
from tokenizer.losses import MultiScaleMelLoss, scale_for


@dataclass(frozen=True)
class Lesson:
    """An auxiliary loss on one layer: student(layer's output [B, D, T], teacher(waveform [B, N]), mask [B, T]).

    weight: lambda of eq. 7. gradient_cap: largest ratio of its gradient to the reconstruction's at z0, or None.
    """

    name: str
    layer: int
    teacher: nn.Module
    student: nn.Module
    weight: float
    gradient_cap: float | None


@dataclass(frozen=True)
class ReconstructionLoss:
    """L_Encodec without the adversary: time * L1 + mel * multi-scale log-mel + commitment * commitment loss."""

    mel_loss: MultiScaleMelLoss
    time: float = 0.1
    mel: float = 1.0
    commitment: float = 1.0


def codec_backward(
    codec: SpeechCodec,
    waveform: Tensor,
    lengths: Tensor,
    criterion: ReconstructionLoss,
    lessons: Sequence[Lesson] = (),
    num_layers: Tensor | None = None,
    window: int | None = None,
) -> dict[str, float]:
    """Forward and backward pass of one batch; leaves gradients on all parameters and returns the losses.

    waveform float [B, N], lengths long [B] in samples; num_layers long [B]: codebooks each utterance is decoded from
    (all when None); window: frames to decode, at a random place of each utterance's speech (all when None).

    The graph is cut at the latents z0. All gradients meet there, are weighed by their norms, and go through the
    encoder together, once: weighing costs nothing, although every loss is seen with a gradient of its own.
    """
    z = codec.latents(waveform)
    z0 = z.detach().float().requires_grad_()
    frames, hop = z.shape[2], codec.hop_length
    mask = torch.arange(frames, device=z.device) * hop < lengths[:, None]
    quantized = codec.quantizer(z0, mask, num_layers)

    window = frames if window is None else min(window, frames)
    starts = draw_starts(mask.sum(1), window)
    latents = torch.stack([x[:, start : start + window] for x, start in zip(quantized.output, starts, strict=True)])
    reconstruction = codec.decoder(latents)[:, 0].float()
    padded = F.pad(waveform, (0, frames * hop - waveform.shape[1]))
    original = torch.stack([x[s * hop : (s + window) * hop] for x, s in zip(padded, starts, strict=True)])
    losses = {
        "time": F.l1_loss(reconstruction, original),
        "mel": criterion.mel_loss(reconstruction, original),
        "commitment": quantized.commitment,
    }
    total = sum(getattr(criterion, name) * loss for name, loss in losses.items())
    total.backward(retain_graph=bool(lessons))
    assert z0.grad is not None
    gradient, reference = z0.grad.clone(), z0.grad
    ratios = {}
    for lesson in lessons:
        loss = lesson.student(quantized.layers[lesson.layer], lesson.teacher(waveform), mask)
        own = list(lesson.student.parameters())
        at_z0, *own_gradients = torch.autograd.grad(loss, [z0, *own], retain_graph=True)
        factor, ratios[f"{lesson.name}_gradient"] = scale_for(lesson.weight, lesson.gradient_cap, at_z0, reference)
        gradient += factor * at_z0
        for parameter, value in zip(own, own_gradients, strict=True):
            parameter.grad = value
        losses[lesson.name] = loss
    z.backward(gradient.to(z.dtype))
    return {name: float(loss.detach()) for name, loss in losses.items()} | ratios


def draw_starts(frames: Tensor, window: int) -> list[int]:
    """A random first frame for each utterance of `frames` long [B] frames, so that the window holds no padding."""
    room = (frames - window).clamp(min=0).cpu()
    return (torch.rand(len(room)) * (room + 1)).long().tolist()


def draw_layers(choices: Sequence[int] | None, batch: int, device: torch.device) -> Tensor | None:
    """Quantiser dropout: how many codebooks each utterance is decoded from, long [B]; None without choices."""
    if not choices:
        return None
    return torch.tensor(choices, device=device)[torch.randint(len(choices), (batch,), device=device)]


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Mean of the gradients over all processes, in one message; nothing to do for a single process."""
    if not dist.is_initialized():
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


@torch.no_grad()
def initialize_codebooks(codec: SpeechCodec, crops: Crops, batch_size: int, seed: int = 0) -> None:
    """Place the codebooks by k-means on the latents of as many crops as it takes.

    Every process computes the same from the same crops, so nothing is exchanged.
    """
    codec.train()
    device = codec.codebooks.device
    latents: list[Tensor] = []
    first = 0
    while sum(map(len, latents)) < 20 * codec.codebook_size:
        items = [crops[first + i] for i in range(batch_size)]
        first += batch_size
        z = codec.latents(torch.stack([item["waveform"] for item in items]).to(device))
        lengths = torch.tensor([item["length"] for item in items], device=device)
        mask = torch.arange(z.shape[2], device=device) * codec.hop_length < lengths[:, None]
        latents.append(z.transpose(1, 2)[mask])
    codec.quantizer.initialize(torch.cat(latents), seed)
