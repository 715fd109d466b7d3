"""Continuous features: the frames of a frozen speech encoder, 50 per second."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenizer.errors import InputError
from tokenizer.frames import frame_count, split_utterances
from tokenizer.interface import Features
from tokenizer.pretrained import (
    check_folder,
    load_config,
    load_frozen,
    load_part,
    module_fingerprint,
    write_settings,
)
from tokenizer.rates import HOP_LENGTH, SAMPLE_RATE
from tokenizer.training.small_teachers import save_hubert
from tokenizer.training.teachers import SemanticTeacher


class WhisperFrames(nn.Module):
    """Output of a Whisper encoder, one frame per 320 samples; longer speech in consecutive windows of 30 s."""

    def __init__(self, encoder: Any, extractor: Any):
        """encoder: transformers' WhisperEncoder; extractor: its WhisperFeatureExtractor."""
        super().__init__()
        self.model, self.extractor = encoder.eval().requires_grad_(False), extractor

    @property
    def width(self) -> int:
        return self.model.config.d_model

    @property
    def fingerprint(self) -> str:
        return module_fingerprint(self.model, {})

    @classmethod
    def from_pretrained(cls, name: str | Path) -> "WhisperFrames":
        """Load the encoder of a transformers Whisper folder or hub name; without the decoder."""
        from transformers import AutoFeatureExtractor, WhisperModel
        from transformers.models.whisper.modeling_whisper import WhisperEncoder

        expected = "a Whisper model"
        extractor = load_part(AutoFeatureExtractor, name, f"the preprocessor settings of {expected}")
        if load_config(name, expected).architectures == ["WhisperEncoder"]:  # saved alone
            return cls(load_frozen(WhisperEncoder, name, expected), extractor)
        return cls(load_frozen(WhisperModel, name, expected).encoder, extractor)

    @torch.no_grad()
    def forward(self, waveform: Tensor) -> Tensor:
        """One utterance float [1, N] at 16 kHz -> float [1, ceil(N / 320), C]; padded with silence to 30 s."""
        windows = [window.cpu().numpy() for window in waveform[0].split(self.extractor.n_samples)]
        mel = self.extractor(windows, sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features
        states = [self.model(window[None]).last_hidden_state for window in mel.to(self.model.device)]
        return torch.cat(states, 1)[:, : frame_count(waveform.shape[1])]


class FeatureEncoder(nn.Module):
    """A layer of HuBERT, WavLM or wav2vec 2.0, or a Whisper encoder, as a `FeatureTokenizer`."""

    sample_rate = SAMPLE_RATE
    frame_rate = SAMPLE_RATE / HOP_LENGTH
    batched = True

    def __init__(self, model: SemanticTeacher | WhisperFrames):
        super().__init__()
        self.model = model

    @classmethod
    def from_pretrained(cls, name: str | Path, layer: int | str | None = None) -> "FeatureEncoder":
        """Load a transformers folder or hub name, e.g. facebook/hubert-base-ls960 or openai/whisper-small.

        layer: index into the hidden states, or "avg" (also None), their mean; must be None for Whisper.
        Raises InputError for another kind of model, or a layer that it does not have.
        """
        expected = "HuBERT, WavLM or wav2vec 2.0, or Whisper"
        name = check_folder(name, ["config.json"], expected)
        config = load_config(name, expected)
        if config.model_type != "whisper" and not hasattr(config, "conv_stride"):
            raise InputError(f"{name} is a {config.model_type} model: expected {expected}")
        check_folder(name, ["preprocessor_config.json"], expected)
        if config.model_type != "whisper":
            return cls(SemanticTeacher.from_pretrained(name, "avg" if layer is None else layer))
        if layer is not None:
            raise InputError(
                f"{name} is a Whisper model, of which only the encoder's output is available: omit the layer {layer}"
            )
        return cls(WhisperFrames.from_pretrained(name))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model, its preprocessor settings and the layer."""
        if isinstance(self.model, WhisperFrames):
            self.model.model.save_pretrained(folder)
            self.model.extractor.save_pretrained(folder)
        else:
            save_hubert(self.model.model, Path(folder), self.model.normalize)
        write_settings(folder, "features", layer=self.layer)

    @property
    def layer(self) -> int | str | None:
        return None if isinstance(self.model, WhisperFrames) else self.model.layer

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

        Convolutions take each utterance separately, because normalisation over time must not include padding; the
        transformer of a HuBERT takes all at once, which is equal up to rounding.
        """
        utterances = split_utterances(waveform, lengths)
        if len(utterances) > 1 and isinstance(self.model, SemanticTeacher):
            frames = [states.cpu() for states in self.model.forward_each(utterances)]
        else:
            frames = [self.model(samples[None])[0].cpu() for samples in utterances]
        sizes = torch.tensor([len(x) for x in frames])
        return Features(nn.utils.rnn.pad_sequence(frames, batch_first=True), sizes)
