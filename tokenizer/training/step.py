"""One training step of the codec: reconstruction and distillation losses, weighted at the latents (eq. 7)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tokenizer.codec.speech_codec import SpeechCodec
from tokenizer.frames import frame_mask
from tokenizer.progress import progress_bar
from tokenizer.training.crops import Crops
from tokenizer.training.losses import Balancer, ReconstructionLoss, gradient_ratio


@dataclass(frozen=True)
class DistillationLoss:
    """An auxiliary loss on one layer: student(layer [B, D, T], teacher(waveform [B, N], lengths [B]), mask [B, T]).

    One of these determines its share of the codec's gradient:
    gradient_ratio: norm of its gradient at z0 relative to the reconstruction's, the same at every step. Because the
        gradients of the layers above the first are not lost (see `ResidualVectorQuantizer`), eq. 5 can reshape z0; at
        ratios of about one and above it destroys the code, whichever weight that corresponds to.
    weight: lambda of eq. 7, used if gradient_ratio is None.
    """

    name: str
    layer: int
    teacher: nn.Module
    student: nn.Module
    gradient_ratio: float | None = None
    weight: float = 0.5


def codec_backward(
    codec: SpeechCodec,
    batch: Mapping[str, Tensor],
    criterion: ReconstructionLoss,
    distillations: Sequence[DistillationLoss] = (),
    num_layers: Tensor | None = None,
    window: int | None = None,
) -> dict[str, Tensor]:
    """Forward and backward pass of one batch; sets the gradients of all parameters and returns the detached losses.

    batch: "waveform" float [B, N], "length" long [B] in samples, and optionally, under the name of a distillation, the
    cached output of its teacher (see `Crops`). num_layers: long [B], codebooks each utterance is decoded from (all when
    None). window: frames to decode, from a random position in the speech of each utterance (all when None).

    The graph is cut at the reconstruction and at the latents z0. At each cut the gradients of all losses are weighted
    by their norms and summed, so that the decoder and the encoder need one backward pass each.
    The criterion's adversary, if any, is trained on the same reconstruction before its losses are computed.
    """
    waveform, lengths = batch["waveform"], batch["length"]
    z = codec.latents(waveform)
    z0 = z.detach().float().requires_grad_()
    frames, hop = z.shape[2], codec.hop_length
    mask = frame_mask(lengths, frames, hop)
    quantized = codec.quantizer(z0, mask, num_layers)

    window = frames if window is None else min(window, frames)
    starts = draw_starts(mask.sum(1), window)
    latents = torch.stack([x[:, start : start + window] for x, start in zip(quantized.output, starts, strict=True)])
    reconstruction = codec.decoder(latents)[:, 0].float()
    padded = F.pad(waveform, (0, frames * hop - waveform.shape[1]))
    original = torch.stack([x[s * hop : (s + window) * hop] for x, s in zip(padded, starts, strict=True)])

    metrics: dict[str, Tensor] = {}
    if criterion.adversary is not None:
        metrics["discriminator"] = criterion.adversary.train_step(original, reconstruction)
    at_waveform, losses = criterion.gradient(reconstruction, original)
    commitment = criterion.weights.get("commitment", 1.0) * quantized.commitment
    torch.autograd.backward([reconstruction, commitment], [at_waveform, None], retain_graph=bool(distillations))
    metrics |= losses | {"commitment": quantized.commitment.detach()}
    assert z0.grad is not None
    gradient, reference = z0.grad.clone(), z0.grad
    for distillation in distillations:
        target = batch[distillation.name] if distillation.name in batch else distillation.teacher(waveform, lengths)
        loss = distillation.student(quantized.layers[distillation.layer], target, mask)
        own = list(distillation.student.parameters())
        # as in eq. 7 the weight also applies to the student's gradient, but the factor of a ratio, which can be huge,
        # does not
        weight = distillation.weight if distillation.gradient_ratio is None else 1.0
        at_z0, *own_gradients = torch.autograd.grad(weight * loss, [z0, *own], retain_graph=True)
        ratio = gradient_ratio(at_z0, reference)
        factor = 1.0 if distillation.gradient_ratio is None else distillation.gradient_ratio / ratio.clamp(min=1e-12)
        gradient += factor * at_z0
        for parameter, value in zip(own, own_gradients, strict=True):
            parameter.grad = value
        metrics |= {distillation.name: loss.detach(), f"{distillation.name}_gradient": factor * ratio}
    z.backward(gradient.to(z.dtype))
    return metrics


def draw_starts(frames: Tensor, window: int) -> list[int]:
    """Random first frames of windows in utterances of `frames` long [B] frames; no padding in longer ones."""
    room = (frames - window).clamp(min=0).cpu()
    return (torch.rand(len(room)) * (room + 1)).long().tolist()


def draw_layers(choices: Sequence[int] | None, batch: int, device: torch.device) -> Tensor | None:
    """Quantiser dropout: number of codebooks to decode each utterance from, long [B]; None without choices."""
    if not choices:
        return None
    return torch.tensor(choices, device=device)[torch.randint(len(choices), (batch,), device=device)]


@torch.no_grad()
def initialize_codebooks(codec: SpeechCodec, crops: Crops, batch_size: int, seed: int = 0) -> None:
    """Initialise the codebooks by k-means on the latents of as many crops as necessary, the same in every process."""
    codec.train()
    device = codec.codebooks.device
    latents: list[Tensor] = []
    first, wanted = 0, 20 * codec.codebook_size
    bar = progress_bar(None, "latents for the codebooks", total=wanted, unit="frames")
    while (found := sum(map(len, latents))) < wanted:
        bar.update(found - bar.n)
        items = [crops[first + i] for i in range(batch_size)]
        first += batch_size
        z = codec.latents(torch.stack([item["waveform"] for item in items]).to(device))
        lengths = torch.tensor([item["length"] for item in items], device=device)
        mask = frame_mask(lengths, z.shape[2], codec.hop_length)
        latents.append(z.transpose(1, 2)[mask])
    bar.update(wanted - bar.n)
    bar.close()
    codec.quantizer.initialize(torch.cat(latents), seed)


@torch.no_grad()
def remember_statistics(*modules: nn.Module, balancer: Balancer | None = None) -> Callable[[], None]:
    """Remember what a forward pass in training mode changes: codebooks, statistics of batch normalisation, balancer.

    The function returned restores it, for a step that turns out to be of no use.
    """
    buffers = [buffer for module in modules for buffer in module.buffers()]
    held = [buffer.clone() for buffer in buffers]
    balance = None if balancer is None else {name: dict(part) for name, part in balancer.state_dict().items()}

    @torch.no_grad()
    def restore() -> None:
        for buffer, value in zip(buffers, held, strict=True):
            buffer.copy_(value)
        if balancer is not None and balance is not None:
            balancer.load_state_dict(balance)

    return restore


def average_weights(codec: SpeechCodec, decay: float | None) -> AveragedModel | None:
    """Moving average of all weights and codebooks, which sounds cleaner than any single step; None without decay."""
    if decay is None:
        return None
    return AveragedModel(codec, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
