"""Distillation of content into layer 0 (eq. 4) and of the speaker into layer 1 (eq. 5) from frozen teachers."""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FLAT = 0.1  # norm below which what is compared of the student (a dimension over time) counts as constant


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of values float [B, T] over the frames where mask bool [B, T] is true."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


class SemanticDistillation(nn.Module):
    """Eq. 4: layer 0 follows the teacher's features.

    Axis "D", the paper's and SpeechTokenizer's: every dimension does so over time. L = mean over utterances and
    dimensions d of -log sigmoid(cos_t(W q0[:, d], S(x)[:, d])), the cosine over time (the sum in eq. 4 runs over the P
    dimensions of the semantic feature). Axis "T" (SpeechTokenizer's alternative): every frame does so over dimensions,
    L = mean over frames t of -log sigmoid(cos_d(W q0[t], S(x)[t])). W projects the codec's dimension to the teacher's.
    `center` subtracts the means over time from both first: otherwise a student that outputs only the teacher's constant
    offsets already has a low loss. The paper's literal form is `center=False`.
    """

    def __init__(self, dimension: int, teacher_width: int, center: bool = True, axis: Literal["D", "T"] = "D"):
        super().__init__()
        self.projection = nn.Linear(dimension, teacher_width)
        self.center, self.axis = center, axis

    def cosine(self, layer0: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        """layer0 float [B, D, T], target float [B, T, P], mask bool [B, T] -> cosines: axis "D" [B, P], "T" [B, T].

        They are 0 for the frames that are masked.
        """
        student = self.projection(layer0.transpose(1, 2)).float()
        weights = mask[..., None].float()
        student, teacher = student * weights, target.float() * weights
        if self.center:
            frames = weights.sum(1, keepdim=True).clamp(min=1)
            student = (student - student.sum(1, keepdim=True) / frames) * weights
            teacher = (teacher - teacher.sum(1, keepdim=True) / frames) * weights
        dim = 1 if self.axis == "D" else 2
        # where a code does not change during a short crop, the gradient is unbounded without a floor
        return (F.normalize(student, dim=dim, eps=FLAT) * F.normalize(teacher, dim=dim)).sum(dim)

    def forward(self, layer0: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        """Scalar loss: 1.31 at cosine -1, 0.69 (ln 2) at 0, 0.31 at 1."""
        losses = -F.logsigmoid(self.cosine(layer0, target, mask))
        return losses.mean() if self.axis == "D" else masked_mean(losses, mask)


class AcousticDistillation(nn.Module):
    """Eq. 5: layer 1, as a distribution over its D dimensions, follows the align layer's output for the speaker.

    The align layer maps the speaker teacher's frames E [B, T_e, C] to A [B, T, D]: projection to `width`,
    normalisation, sinusoidal positions, 8-head self-attention over the speech with a skip connection, average pooling
    to the codec's frame rate, projection to D. L = mean over frames of KL(softmax_D(q1) || softmax_D(A)). The teacher
    is frozen; the align layer is trained with the codec and not needed afterwards.
    """

    def __init__(self, dimension: int, teacher_width: int, width: int = 256, heads: int = 8):
        super().__init__()
        self.input = nn.Linear(teacher_width, width)
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.output = nn.Linear(width, dimension)

    def align(self, frames: Tensor, mask: Tensor) -> Tensor:
        """Teacher frames float [B, T_e, C], mask bool [B, T] -> float [B, T, D]; ignores masked frames."""
        x = self.norm(self.input(frames))
        x = x + _positions(x.shape[1], x.shape[2], x.device)
        padding = ~mask[:, torch.arange(x.shape[1], device=x.device) * mask.shape[1] // x.shape[1]]
        x = x + self.attention(x, x, x, key_padding_mask=padding, need_weights=False)[0]
        return self.output(F.adaptive_avg_pool1d(x.transpose(1, 2), mask.shape[1]).transpose(1, 2))

    def forward(self, layer1: Tensor, frames: Tensor, mask: Tensor) -> Tensor:
        """layer1 float [B, D, T], frames float [B, T_e, C], mask bool [B, T] -> scalar."""
        aligned = self.align(frames, mask).float()
        student = F.log_softmax(layer1.transpose(1, 2).float(), -1)
        divergence = F.kl_div(F.log_softmax(aligned, -1), student, reduction="none", log_target=True).sum(-1)
        return masked_mean(divergence, mask)


class SpeakerDistillation(nn.Module):
    """Layer 1 tells the speaker: an alternative to eq. 5 whose target is fixed and therefore cannot collapse.

    In eq. 5 both sides of the divergence learn, and they can agree on something that says nothing of the speaker. Here
    the layer passes through the same 8-head attention, is pooled over time by attention, and predicts the speaker
    embedding of the frozen teacher: L = mean over utterances of 1 - cos(u(q1), pool(E)).
    """

    def __init__(
        self,
        dimension: int,
        embedding_size: int,
        pool: Callable[[Tensor, Tensor], Tensor],
        width: int = 256,
        heads: int = 8,
    ):
        """pool: the teacher's, frames float [B, T_e, C] and mask bool [B, T] -> embeddings float [B, E]."""
        super().__init__()
        self.pool = pool
        self.input = nn.Linear(dimension, width)
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.relevance = nn.Linear(width, 1)
        self.output = nn.Linear(width, embedding_size)

    def embed(self, layer1: Tensor, mask: Tensor) -> Tensor:
        """layer1 float [B, D, T], mask bool [B, T] -> float [B, E]; ignores masked frames."""
        x = self.norm(self.input(layer1.transpose(1, 2)))
        x = x + self.attention(x, x, x, key_padding_mask=~mask, need_weights=False)[0]
        share = self.relevance(x).masked_fill(~mask[..., None], -torch.inf).softmax(1)
        return self.output((share * x).sum(1))

    def forward(self, layer1: Tensor, frames: Tensor, mask: Tensor) -> Tensor:
        """layer1 float [B, D, T], frames float [B, T_e, C], mask bool [B, T] -> scalar from 0 to 2."""
        return (1 - F.cosine_similarity(self.embed(layer1, mask).float(), self.pool(frames, mask).float())).mean()


def _positions(length: int, width: int, device: torch.device) -> Tensor:
    """Sinusoidal position encoding, float [length, width]."""
    rates = torch.exp(torch.arange(0, width, 2, device=device) * (-9.21 / width))  # wavelengths up to 10,000 frames
    angles = torch.arange(length, device=device)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)[:, :width]
