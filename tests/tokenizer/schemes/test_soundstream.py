"""SoundStream of Lyra V2, with models of the same form in place of TensorFlow Lite's: they have a memory, too."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from speechllm import Codec, Codes, InputError, load_tokenizer
from tokenizer.audio import pad_waveforms
from tokenizer.schemes.soundstream import FILES, SoundStream

LAYERS, CODES, WIDTH, HOP = 5, 16, 64, 320
CODEBOOKS = np.random.default_rng(0).normal(size=(LAYERS, CODES, WIDTH)).astype(np.float32)
CODEBOOKS *= 2.0 ** -np.arange(LAYERS, dtype=np.float32)[:, None, None]
MIX = np.random.default_rng(1).normal(size=(HOP, WIDTH)).astype(np.float32) / 8


class Interpreter:
    """Encoder: a frame and half of the one before, mixed. Decoder: the same back. Quantiser: sums of code vectors."""

    def __init__(self, model_content: bytes, num_threads: int):
        assert num_threads == 1
        if not model_content.startswith(b"TFL3"):
            raise ValueError("Model provided has model identifier '....', should be 'TFL3'")
        self.kind = model_content[4:].decode()

    def allocate_tensors(self) -> None:
        self.memory = 0.0

    def get_input_details(self) -> list[dict]:
        return [{"index": 3}]

    def get_output_details(self) -> list[dict]:
        return [{"index": 7}]

    def set_tensor(self, index: int, value: np.ndarray) -> None:
        assert index == 3 and value.dtype == np.float32
        assert value.shape == ((1, HOP) if self.kind == FILES[0] else (1, 1, WIDTH))
        self.value = value

    def invoke(self) -> None:
        mixed = self.value.reshape(1, -1) @ (MIX if self.kind == FILES[0] else MIX.T) + 0.5 * self.memory
        self.memory = mixed
        self.output = mixed[:, None] if self.kind == FILES[0] else mixed

    def get_tensor(self, index: int) -> np.ndarray:
        assert index == 7
        return self.output.copy()

    def get_signature_runner(self, name: str) -> object:
        assert (self.kind, name) == (FILES[1], "decode")

        def run(encoding_indices: np.ndarray) -> dict[str, np.ndarray]:
            assert encoding_indices.shape == (LAYERS, 1, 1) and encoding_indices.dtype == np.int32
            vectors = [CODEBOOKS[layer, code] for layer, code in enumerate(encoding_indices.flat) if code >= 0]
            return {"output_0": np.sum(vectors, 0)[None, None]}

        details = {"encoding_indices": {"shape": np.array([LAYERS, 1, 1])}}
        return type("Runner", (), {"__call__": staticmethod(run), "get_input_details": lambda self: details})()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    package = ModuleType("ai_edge_litert")
    monkeypatch.setitem(sys.modules, "ai_edge_litert", package)
    monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", SimpleNamespace(Interpreter=Interpreter))
    for file in FILES:
        (tmp_path / file).write_bytes(b"TFL3" + file.encode())
    return tmp_path


def speech(*sizes: int) -> list[torch.Tensor]:
    return [torch.randn(size, generator=torch.Generator().manual_seed(size)) for size in sizes]


def test_it_is_a_codec_of_the_codebooks_in_its_files(folder: Path) -> None:
    codec = load_tokenizer(folder)
    assert isinstance(codec, SoundStream) and isinstance(codec, Codec)
    assert (codec.sample_rate, codec.frame_rate, codec.num_codebooks, codec.codebook_size) == (16_000, 50.0, LAYERS, 16)
    assert torch.equal(codec.codebooks, torch.from_numpy(CODEBOOKS))
    assert codec.to("cuda") is codec and codec.device.type == "cpu" and not list(codec.parameters())


def test_codes_are_the_nearest_of_each_residual(folder: Path) -> None:
    (samples,) = speech(3 * HOP + 1)
    ids = load_tokenizer(folder).encode(samples[None]).utterance(0)
    assert ids.shape == (LAYERS, 4) and ids.dtype == torch.long
    memory = np.zeros(WIDTH)
    for place, frame in enumerate(np.pad(samples.numpy(), (0, HOP - 1)).reshape(4, HOP)):
        rest = memory = frame @ MIX + 0.5 * memory
        for layer, codebook in enumerate(CODEBOOKS):
            assert ids[layer, place] == np.square(codebook - rest).sum(1).argmin()
            rest = rest - codebook[ids[layer, place]]


def test_an_utterance_has_the_same_codes_and_sound_in_every_batch(folder: Path) -> None:
    codec, utterances = load_tokenizer(folder), speech(1000, 321, 640, 1)
    waveforms, lengths = pad_waveforms(utterances)
    together = codec.encode(waveforms, lengths, layers=3)
    assert together.lengths.tolist() == [4, 2, 2, 1] and together.samples.tolist() == lengths.tolist()
    sound = codec.decode(together)
    assert sound.shape == waveforms.shape
    for place, samples in enumerate(utterances):
        alone = codec.encode(samples[None], layers=3)
        assert torch.equal(alone.ids[0], together.utterance(place))
        assert torch.equal(codec.encode(samples[None]).ids[:, :3], alone.ids)
        assert torch.equal(codec.decode(alone)[0], sound[place, : len(samples)])
        assert not sound[place, len(samples) :].any()


def test_sound_is_made_of_the_sum_of_the_code_vectors(folder: Path) -> None:
    codec = load_tokenizer(folder)
    ids = torch.randint(CODES, (1, 2, 3), generator=torch.Generator().manual_seed(0))
    sound = codec.decode(Codes(ids, torch.tensor([3])))
    assert sound.shape == (1, 3 * HOP)
    memory = np.zeros(HOP)
    for place in range(3):
        memory = (CODEBOOKS[0, ids[0, 0, place]] + CODEBOOKS[1, ids[0, 1, place]]) @ MIX.T + 0.5 * memory
        assert np.allclose(sound[0, place * HOP : (place + 1) * HOP].numpy(), memory, atol=1e-5)


def test_what_is_saved_is_what_is_loaded(folder: Path) -> None:
    codec = load_tokenizer(folder)
    (saved := folder / "saved").mkdir()
    codec.save_pretrained(saved)
    again = load_tokenizer(saved)
    assert again.fingerprint == codec.fingerprint and again.models == codec.models
    (saved / FILES[2]).write_bytes(b"TFL3" + FILES[2].encode() + b" ")
    assert load_tokenizer(saved).fingerprint != codec.fingerprint


def test_mistakes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codec = load_tokenizer(folder)
    for layers in (0, LAYERS + 1):
        with pytest.raises(InputError, match=f"layers must be 1..{LAYERS}, got {layers}"):
            codec.encode(torch.zeros(1, HOP), layers=layers)
    with pytest.raises(InputError, match="codes must be 0..15, got 16..16"):
        codec.decode(Codes(torch.full((1, 2, 3), 16), torch.tensor([3])))
    (folder / FILES[2]).write_bytes(b"<html>")
    with pytest.raises(InputError, match="is not the files of Lyra V2's SoundStream, or is damaged .*identifier"):
        load_tokenizer(folder)
    (folder / FILES[2]).unlink()
    with pytest.raises(
        FileNotFoundError, match=r"is not the folder of Lyra V2's SoundStream: it lacks lyragan\.tflite"
    ):
        load_tokenizer(folder)
    (folder / FILES[2]).write_bytes(b"TFL3" + FILES[2].encode())
    monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", None)
    with pytest.raises(ImportError, match=r"needed for SoundStream: pip install \"speechllm\[soundstream\]\""):
        load_tokenizer(folder)
