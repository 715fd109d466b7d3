"""Whisper's encoder (Radford et al., arXiv 2212.04356) on windows of any length, with a gradient for the waveform."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.pretrained import load_complete


class WhisperSpectrogram(nn.Module):
    """The log-mel spectrogram of transformers' WhisperFeatureExtractor, which is numpy and has no gradient.

    Waveform float [B, N] at 16 kHz, N > 200 -> float [B, bands, N // 160 + 1]; frame m is centred on sample 160 m.
    """

    filters: Tensor
    window: Tensor

    def __init__(self, extractor: Any):
        super().__init__()
        self.n_fft, self.hop_length = extractor.n_fft, extractor.hop_length
        self.register_buffer("filters", torch.from_numpy(extractor.mel_filters).float().T, persistent=False)
        self.register_buffer("window", torch.hann_window(self.n_fft), persistent=False)

    def forward(self, waveform: Tensor) -> Tensor:
        with torch.autocast(waveform.device.type, enabled=False):
            x = waveform.to(self.window)
            spectrum = torch.stft(x, self.n_fft, self.hop_length, window=self.window, return_complex=True)
            power = torch.view_as_real(spectrum).square().sum(-1)  # the gradient of abs() at 0 is not finite
            levels = (self.filters @ power).clamp(min=1e-10).log10()
            return (torch.maximum(levels, levels.amax((1, 2), keepdim=True) - 8) + 4) / 4


def encoder_states(encoder: Any, mel: Tensor, last: int, seen: Tensor | None = None) -> list[Tensor]:
    """Log-mel frames float [B, bands, 2 T] -> hidden states 0 to `last`, float [B, T, P], of a WhisperEncoder.

    Its own forward pass takes 30 s only; here its position embeddings are cut to T. As in transformers the first state
    is the input of the first layer, and only the last one is normalised. seen: long [B], frames that an utterance would
    have alone, and beyond which it sees nothing (all T when None). The states beyond them mean nothing.
    """
    mask = None
    if seen is not None:
        beyond = torch.arange(mel.shape[2] // 2, device=mel.device) >= seen[:, None]
        mel = mel.masked_fill(beyond.repeat_interleave(2, 1)[:, None], 0)  # with which the convolutions pad
        mask = torch.zeros_like(beyond, dtype=mel.dtype).masked_fill(beyond, -torch.inf)[:, None, None]
    x = F.gelu(encoder.conv2(F.gelu(encoder.conv1(mel)))).transpose(1, 2)
    states = [x + encoder.embed_positions.weight[: x.shape[1]]]
    for layer in encoder.layers[:last]:
        states.append(layer(states[-1], mask))
    if last == len(encoder.layers):
        states[-1] = encoder.layer_norm(states[-1])
    return states


def load_whisper_encoder(name: str, expected: str) -> Any:
    """The encoder of a Whisper in a transformers folder or hub model, whole or saved alone, frozen, in float32."""
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    prefixes = {r"^(?:model\.)?encoder\.": ""}  # so that the decoder is not read
    return load_complete(WhisperEncoder, name, expected, key_mapping=prefixes).requires_grad_(False)
