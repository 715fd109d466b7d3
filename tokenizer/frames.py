"""Samples and frames: how many frames an utterance has, and which frames of a batch hold speech."""

from typing import TypeVar

import torch
from torch import Tensor

from tokenizer.rates import HOP_LENGTH

Count = TypeVar("Count", int, Tensor)


def frame_count(samples: Count, hop_length: int = HOP_LENGTH) -> Count:
    """Number of frames that cover `samples` samples, the last one possibly in part: ceil(N / hop_length)."""
    return -(-samples // hop_length)


def frame_mask(lengths: Tensor, frames: int, hop_length: int = HOP_LENGTH) -> Tensor:
    """Lengths long [B] in samples -> bool [B, frames]: which frames hold speech."""
    return torch.arange(frames, device=lengths.device) * hop_length < lengths[:, None]


def split_utterances(waveform: Tensor, lengths: Tensor | None = None) -> list[Tensor]:
    """Waveforms float [B, N] of `lengths` [B] samples (all N when None) -> each without its padding, float [N_i].

    A model that receives one utterance at a time returns the same for it in every batch.
    Raises ValueError if the shape is not [B, N], for lengths out of range, and for NaN or infinite samples.
    """
    if waveform.ndim != 2 or waveform.shape[1] == 0:
        raise ValueError(f"expected waveforms float [B, N] with N > 0, got shape {tuple(waveform.shape)}")
    sizes = [waveform.shape[1]] * len(waveform) if lengths is None else lengths.tolist()
    if len(sizes) != len(waveform) or min(sizes) < 1 or max(sizes) > waveform.shape[1]:
        raise ValueError(f"lengths must be 1..{waveform.shape[1]} for {len(waveform)} waveforms, got {sizes}")
    utterances = [row[:size] for row, size in zip(waveform, sizes, strict=True)]
    if not all(torch.isfinite(samples).all() for samples in utterances):
        raise ValueError("the waveform contains NaN or infinite samples")
    return utterances
