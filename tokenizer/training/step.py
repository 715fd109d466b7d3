"""The training loss of the codec: reconstruction and distillation of one batch (eq. 7)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.codec.speech_codec import SpeechCodec
from tokenizer.frames import frame_mask
from tokenizer.training.crops import units_of
from tokenizer.training.gradients import GradientCaps
from tokenizer.training.losses import Balancer, ReconstructionLoss


@dataclass(frozen=True)
class DistillationLoss:
    """An auxiliary loss on one layer: student(layer [B, D, T], teacher(waveform [B, N], lengths [B]), mask [B, T]).

    weight: lambda of eq. 7. gradient_ratio: most that the norm of its gradient at the latents may be, relative to the
    reconstruction's; None: anything. Because the gradients of the layers above the first are not lost (see
    `ResidualVectorQuantizer`), eq. 5 can reshape the latents of layer 0; at ratios of about one and above it destroys
    the code, whichever weight that corresponds to.
    """

    name: str
    layer: int
    teacher: nn.Module
    student: nn.Module
    gradient_ratio: float | None = None
    weight: float = 0.5


class CodecLoss(nn.Module):
    """Codec and students as one module whose forward pass returns the loss of a batch, for an ordinary backward pass.

    The criterion's adversary, if any, is trained on the same reconstruction before its losses are computed.
    """

    def __init__(
        self, codec: SpeechCodec, criterion: ReconstructionLoss, distillations: Sequence[DistillationLoss] = ()
    ):
        super().__init__()
        self.codec = codec
        self.students = nn.ModuleList(distillation.student for distillation in distillations)
        self.caps = GradientCaps({one.name: one.gradient_ratio for one in distillations})
        self.criterion = criterion
        self.distillations = tuple(distillations)  # of frozen teachers, which are no part of this module

    def forward(
        self,
        batch: Mapping[str, Tensor],
        num_layers: Tensor | None = None,
        window: int | None = None,
        shares: bool = False,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its parts by name, detached. After the backward pass call `caps.update`.

        batch: "waveform" float [B, N], "length" long [B] in samples, and optionally what `Crops` has read from a cache:
        under the name of a distillation the output of its teacher, as "units" the codes of layer 0. num_layers: long
        [B], codebooks each utterance is decoded from (all when None). window: frames to decode, from a random position
        in the speech of each utterance (all when None). shares: see `ReconstructionLoss`.
        """
        codec, criterion, waveform, lengths = self.codec, self.criterion, batch["waveform"], batch["length"]
        z = codec.latents(waveform).float()
        frames, hop = z.shape[2], codec.hop_length
        mask = frame_mask(lengths, frames, hop)
        quantized = codec.quantizer(z, mask, num_layers, units_of(codec, batch))

        window = frames if window is None else min(window, frames)
        starts = draw_starts(mask.sum(1), window)
        latents = cut(self.caps.reference(quantized.output), starts, window)
        padded = F.pad(waveform, (0, frames * hop - waveform.shape[1]))
        original = cut(padded[:, None], starts * hop, window * hop)[:, 0]
        with torch.autocast(waveform.device.type, enabled=False):  # bfloat16 has a noise as large as the codec's
            reconstruction = codec.reconstruct(latents, original)
        # padding is nothing that a loss or a discriminator should see
        speech = lengths - starts * hop
        reconstruction, original = repeat_speech(reconstruction, speech), repeat_speech(original, speech)

        metrics: dict[str, Tensor] = {}
        if criterion.adversary is not None:
            metrics["discriminator"] = criterion.adversary.train_step(original, reconstruction)
        features = None
        if criterion.perceptual_model is not None and window == frames and bool((lengths == waveform.shape[1]).all()):
            # then a distillation may need the same
            features = criterion.perceptual_model(original)
        loss, losses = criterion(reconstruction, original, features, shares)
        metrics |= losses | {"commitment": quantized.commitment.detach()}
        loss = loss + criterion.weights.get("commitment", 1.0) * quantized.commitment
        for one in self.distillations:
            if one.name in batch:
                target = batch[one.name]
            elif features is not None and one.teacher is criterion.perceptual_model:
                target = features
            else:
                target = one.teacher(waveform, lengths)
            own = one.student(self.caps.limit(one.name, quantized.layers[one.layer]), target, mask)
            metrics[one.name] = own.detach()
            loss = loss + one.weight * own
        return loss, metrics


def draw_starts(frames: Tensor, window: int) -> Tensor:
    """Random first frames, long [B], of windows within the `frames` long [B] frames of speech of each utterance."""
    room = (frames - window).clamp(min=0)
    return (torch.rand(len(room), device=room.device) * (room + 1)).long().clamp(max=room)


def cut(x: Tensor, starts: Tensor, size: int) -> Tensor:
    """Windows float [B, C, size] of x float [B, C, T] from `starts` long [B] on."""
    if size == x.shape[2]:
        return x
    index = starts[:, None, None] + torch.arange(size, device=x.device)
    return x.gather(2, index.expand(-1, x.shape[1], -1))


def repeat_speech(waveform: Tensor, lengths: Tensor) -> Tensor:
    """Waveforms float [B, N] with their first `lengths` long [B] samples again and again in place of what follows."""
    size = waveform.shape[1]
    index = torch.arange(size, device=waveform.device)
    return waveform.gather(1, index % lengths.clamp(1, size)[:, None])


def draw_layers(choices: Sequence[int] | None, batch: int, device: torch.device) -> Tensor | None:
    """Quantiser dropout: number of codebooks to decode each utterance from, long [B]; None without choices."""
    if not choices:
        return None
    return torch.tensor(choices)[torch.randint(len(choices), (batch,))].to(device, non_blocking=True)


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Trained parameters for an optimizer: weight decay for weights, none for biases, gains and norms."""
    named = [(name, p) for name, p in module.named_parameters() if not name.endswith("caps.squares")]
    plain = [p for name, p in named if p.ndim < 2 or name.endswith("weight.original0")]  # the gains of weight_norm
    others = {id(p) for p in plain}
    decayed = [p for _, p in named if id(p) not in others]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


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
