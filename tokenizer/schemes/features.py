"""Continuous features: the frames of a frozen speech encoder, 50 per second."""

from pathlib import Path

import torch
from torch import Tensor, nn

from tokenizer.errors import InputError
from tokenizer.frames import split_utterances
from tokenizer.interface import Features
from tokenizer.pretrained import SETTINGS_FILE, check_folder, read_pretrained_json, write_settings
from tokenizer.rates import HOP_LENGTH, SAMPLE_RATE
from tokenizer.schemes.compressor import COMPRESSOR, CtcCompressor, LettersTeacher
from tokenizer.schemes.recoder import BASE
from tokenizer.training.teachers import SemanticTeacher


class FeatureEncoder(nn.Module):
    """A layer of HuBERT, WavLM, wav2vec 2.0 or Whisper's encoder, or of a compressor over one, a `FeatureTokenizer`."""

    sample_rate = SAMPLE_RATE
    frame_rate = SAMPLE_RATE / HOP_LENGTH
    batched = True

    def __init__(self, model: SemanticTeacher | LettersTeacher):
        super().__init__()
        self.model = model

    @classmethod
    def from_pretrained(cls, name: str | Path, layer: int | str | None = None) -> "FeatureEncoder":
        """Of what `load_semantic_teacher` takes, e.g. facebook/hubert-base-ls960 or openai/whisper-small."""
        return cls(load_semantic_teacher(name, layer))

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
        return next(self.model.parameters()).device

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


def load_semantic_teacher(name: str | Path, layer: int | str | None = None) -> SemanticTeacher | LettersTeacher:
    """The teacher of layer 0: of a compressor's folder a `LettersTeacher`, else a `SemanticTeacher`.

    layer: index into the hidden states, or number of a compressor's convolution; "avg": their mean; None: "avg", of
    Whisper its encoder's output, of a compressor the first one. Raises InputError for another kind of model, or a layer
    that it does not have.
    """
    folder = Path(check_folder(name, [], "a semantic teacher"))
    if (folder / COMPRESSOR).is_dir():  # of units or features of one
        folder = folder / COMPRESSOR
    if read_pretrained_json(folder, SETTINGS_FILE).get("kind") != "compressor":
        return SemanticTeacher.from_pretrained(name, layer)
    base = read_pretrained_json(folder / BASE, SETTINGS_FILE)
    if base.get("kind") != "features":
        raise InputError(
            f"{name} compresses no encoder's frames, which a teacher needs, but {base.get('kind', 'codes')}"
        )
    encoder = FeatureEncoder.from_pretrained(folder / BASE, base.get("layer"))
    return LettersTeacher(CtcCompressor.from_pretrained(folder, encoder), 1 if layer is None else layer)
