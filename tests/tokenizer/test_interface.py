"""The interface's protocols: which tokenizers have them, asked without computing anything."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tokenizer.interface import AudioTokenizer, Codec, DiscreteTokenizer, FeatureTokenizer


class Own(nn.Module):
    """A tokenizer of features with an attribute, a buffer, and properties that fail when they are computed."""

    frame_rate = 50.0

    def __init__(self) -> None:
        super().__init__()
        self.sample_rate = 16_000
        self.register_buffer("device", torch.zeros(1))

    @property
    def fingerprint(self) -> str:
        raise AssertionError("computed")

    @property
    def width(self) -> int:
        raise AssertionError("computed")

    def encode(self, waveform: Tensor, lengths: Tensor | None = None) -> None: ...

    def save_pretrained(self, folder: str) -> None: ...


def test_a_protocol_asks_for_names_and_computes_nothing() -> None:
    own = Own()
    assert isinstance(own, AudioTokenizer) and isinstance(own, FeatureTokenizer)
    assert not isinstance(own, DiscreteTokenizer) and not isinstance(own, Codec)
    assert isinstance(own, DiscreteTokenizer | FeatureTokenizer)
    for wrong in (None, "text", nn.Linear(1, 1), torch.zeros(1)):
        assert not isinstance(wrong, AudioTokenizer)


def test_a_codec_is_known_without_hashing_its_weights(make_codec: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    codec = make_codec(num_codebooks=2, codebook_size=16)
    monkeypatch.setattr("tokenizer.codec.speech_codec.module_fingerprint", lambda *_: pytest.fail("computed"))
    assert isinstance(codec, Codec) and isinstance(codec, DiscreteTokenizer) and not isinstance(codec, FeatureTokenizer)


def test_a_class_that_names_a_protocol_as_its_base_is_checked_as_any_class() -> None:
    class Derived(AudioTokenizer):
        pass

    assert isinstance(Derived(), Derived) and not isinstance(Own(), Derived)
