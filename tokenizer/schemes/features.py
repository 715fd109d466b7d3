"""Continuous features: the frames of a frozen speech encoder, 50 per second."""

from pathlib import Path

import torch
from torch import Tensor, nn

from tokenizer.frames import split_utterances
from tokenizer.interface import Features
from tokenizer.pretrained import write_settings
from tokenizer.rates import HOP_LENGTH, SAMPLE_RATE
from tokenizer.training.teachers import SemanticTeacher


class FeatureEncoder(nn.Module):
    """A layer of HuBERT, WavLM, wav2vec 2.0 or Whisper's encoder, as a `FeatureTokenizer`."""

    sample_rate = SAMPLE_RATE
    frame_rate = SAMPLE_RATE / HOP_LENGTH

    def __init__(self, model: SemanticTeacher):
        super().__init__()
        self.model = model

    @classmethod
    def from_pretrained(cls, name: str | Path, layer: int | str | None = None) -> "FeatureEncoder":
        """Load a transformers folder or hub name, e.g. facebook/hubert-base-ls960 or openai/whisper-small.

        layer: index into the hidden states, "avg", their mean, or None: "avg", or the output of Whisper's encoder.
        Raises InputError for another kind of model, or a layer that it does not have.
        """
        return cls(SemanticTeacher.from_pretrained(name, layer))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model, its preprocessor settings and the layer."""
        self.model.save_pretrained(folder)
        write_settings(folder, "features", layer=self.layer)

    @property
    def layer(self) -> int | str:
        return self.model.layer

    @property
    def width(self) -> int:
        return self.model.width

    @property
    def fingerprint(self) -> str:
        """Hash of weights, layer and preprocessing."""
        return self.model.fingerprint

    @property
    def device(self) -> torch.device:
        return self.model.model.device

    @torch.no_grad()
    def encode(self, waveform: Tensor, lengths: Tensor | None = None) -> Features:
        """Waveforms float [B, N] at 16 kHz -> ceil(n / 320) frames for an utterance of n samples.

        Each utterance is encoded separately, because normalisation over time must not include padding.
        """
        frames = [self.model(samples[None])[0].cpu() for samples in split_utterances(waveform, lengths)]
        sizes = torch.tensor([len(x) for x in frames])
        return Features(nn.utils.rnn.pad_sequence(frames, batch_first=True), sizes)
