"""Tokenizers of what another tokenizer makes of the speech: a network over its frames or codes, which are on disk."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tokenizer.interface import AudioTokenizer, Codes, Features
from tokenizer.pretrained import SETTINGS_FILE, fill_weights, read_pretrained_json, read_weights, write_settings
from tokenizer.reading import reading

BASE = "base"  # subfolder of the other tokenizer


class Recoder(nn.Module, ABC):
    """An `AudioTokenizer` over another one, its `base`, which is saved with it.

    kind: its name in the settings, and of the file with the weights of its network.
    """

    kind: ClassVar[str]
    base: AudioTokenizer
    network: nn.Module

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Hash of base and network."""

    @abstractmethod
    def encode(self, waveform: Tensor, lengths: Tensor | None = None) -> Codes | Features:
        """As `AudioTokenizer.encode`: what `recode` makes of what the base makes of the speech."""

    @abstractmethod
    def recode(self, speech: Tensor) -> Tensor:
        """One utterance as the base encodes it -> as this one encodes it, on the CPU."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What `from_settings` needs, for JSON."""

    @classmethod
    @abstractmethod
    def from_settings(cls, settings: dict[str, Any], base: AudioTokenizer) -> Self:
        """One with random weights."""

    @classmethod
    def from_pretrained(cls, name: str | Path, base: AudioTokenizer) -> Self:
        """Load what `save_pretrained` wrote, in eval mode; base: the tokenizer in its subfolder."""
        settings, file = read_pretrained_json(name, SETTINGS_FILE), Path(name) / f"{cls.kind}.safetensors"
        with reading(Path(name) / SETTINGS_FILE, f"the settings of a {cls.kind}"):
            made = cls.from_settings(settings, base)
        fill_weights(made.network, read_weights(file, f"the weights of a {cls.kind}"), file)
        return made.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the network, the settings and, in a subfolder, the base."""
        (Path(folder) / BASE).mkdir(parents=True, exist_ok=True)
        self.base.save_pretrained(Path(folder) / BASE)
        weights = {name: weight.cpu().contiguous() for name, weight in self.network.state_dict().items()}
        save_file(weights, Path(folder) / f"{self.kind}.safetensors")
        write_settings(folder, self.kind, **self.settings())

    def to(self, device: torch.device | str) -> Self:  # type: ignore[override]
        """Move the weights, also of a base that is no module."""
        self.base.to(device)
        return super().to(device)

    @property
    def sample_rate(self) -> int:
        return self.base.sample_rate

    @property
    def frame_rate(self) -> float:
        return self.base.frame_rate

    @property
    def batched(self) -> bool:
        """Whether the base takes several utterances in less time than one after the other."""
        return getattr(self.base, "batched", False)

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def _recode_each(self, speech: Codes | Features, **options: Any) -> list[Tensor]:
        """`recode` of every utterance that the base has encoded, with these options."""
        return [self.recode(speech.utterance(index), **options) for index in range(len(speech.lengths))]
