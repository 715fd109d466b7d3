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
    batched = True

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

        The frames of an utterance are those that it has alone, up to rounding.
        """
        utterances = split_utterances(waveform, lengths)
        several = len(utterances) > 1
        each = self.model.forward_each(utterances) if several else [self.model(utterances[0][None])[0]]
        frames = [states.cpu() for states in each]
        sizes = torch.tensor([len(x) for x in frames])
        return Features(nn.utils.rnn.pad_sequence(frames, batch_first=True), sizes)
