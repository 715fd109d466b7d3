"""What tests share. Fixtures here build tiny models and recordings in process; nothing may reach the network."""

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before any hub library is imported: a wrong name fails at once, not after retries

import pytest
import torch
from torch import Tensor

from tokenizer import SpeechCodec, SpeechCodecConfig


@pytest.fixture(scope="session", autouse=True)
def _no_network() -> Iterator[None]:
    """A test that reaches for another machine fails, also where there is a network."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: object) -> None:
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise AssertionError(f"a test wanted to connect to {address}")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded)
        yield


def _noise(samples: int, batch: int = 1, seed: int = 0) -> Tensor:
    """Noise float [B, N] whose level rises and falls, so that frames differ from each other."""
    generator = torch.Generator().manual_seed(seed)
    level = torch.rand(batch, samples // 400 + 2, generator=generator).repeat_interleave(400, 1)[:, :samples]
    return 0.3 * level * torch.randn(batch, samples, generator=generator)


@pytest.fixture(scope="session")
def noise() -> Callable[..., Tensor]:
    return _noise


@pytest.fixture(scope="session")
def make_codec() -> Callable[..., SpeechCodec]:
    """Tiny codecs in eval mode: 3 codebooks of 8, placed on the latents of noise so that several codes are in use."""

    def make(**settings: object) -> SpeechCodec:
        tiny = {"n_filters": 4, "dimension": 8, "num_codebooks": 3, "codebook_size": 8}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            codec = SpeechCodec(SpeechCodecConfig(**{**tiny, **settings})).eval()
            with torch.no_grad():
                latents = codec.latents(_noise(codec.hop_length * 20 * codec.codebook_size))[0].T
        codec.quantizer.initialize(latents)
        return codec

    return make


@pytest.fixture(scope="session")
def codec(make_codec: Callable[..., SpeechCodec]) -> SpeechCodec:
    """One tiny codec for tests that only look at it."""
    return make_codec()


@pytest.fixture(scope="session")
def codec_folder(codec: SpeechCodec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny codec as `save_pretrained` writes it."""
    folder = tmp_path_factory.mktemp("codec")
    codec.save_pretrained(folder)
    return folder
