"""SoundStream as Google published it with Lyra V2: 16 kHz, 50 frames a second, 46 codebooks of 16 codes.

Zeghidour et al., arXiv 2107.03312. Its three TensorFlow Lite files are in the folder `lyra/model_coeffs` of Lyra's
repository.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from tokenizer.audio import fit_length, pad_waveforms
from tokenizer.frames import frame_count, split_utterances
from tokenizer.interface import Codes, require_layers
from tokenizer.pretrained import check_folder
from tokenizer.rates import HOP_LENGTH, SAMPLE_RATE
from tokenizer.reading import reading

ENCODER, QUANTIZER, DECODER = FILES = ("soundstream_encoder.tflite", "quantizer.tflite", "lyragan.tflite")
CODES = 16  # of a codebook: 4 bits
UNUSED = -1  # in place of a code: its codebook adds nothing


class SoundStream:
    """Lyra V2's SoundStream as a `Codec`, 0.2 kbit/s for each codebook; on the CPU alone, frame by frame.

    Encoder and decoder are causal and begin anew with every utterance.
    """

    sample_rate = SAMPLE_RATE
    frame_rate = SAMPLE_RATE / HOP_LENGTH
    codebook_size = CODES
    device = torch.device("cpu")

    def __init__(self, models: dict[str, bytes]):
        """models: the content of `FILES`. Raises ImportError without the package that runs them."""
        self.models = models
        parts = {file: _interpreter(models[file]) for file in FILES}  # all, so that a damaged one is noticed here
        self.codebooks = _read_codebooks(parts[QUANTIZER].get_signature_runner("decode"))
        self.num_codebooks = len(self.codebooks)

    @classmethod
    def from_pretrained(cls, name: str | Path) -> Self:
        """Load a folder with Lyra's three files."""
        folder = Path(check_folder(name, FILES, "Lyra V2's SoundStream"))
        with reading(folder, "the files of Lyra V2's SoundStream"):
            return cls({file: (folder / file).read_bytes() for file in FILES})

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the three files."""
        for name, content in self.models.items():
            (Path(folder) / name).write_bytes(content)

    @property
    def fingerprint(self) -> str:
        """Hash of the files."""
        return hashlib.sha256(b"".join(self.models[file] for file in FILES)).hexdigest()[:16]

    def to(self, device: torch.device | str) -> Self:
        """Itself: it works on the CPU alone."""
        return self

    def parameters(self) -> Iterator[nn.Parameter]:
        """None: its weights are in its files."""
        return iter(())

    def encode(self, waveform: Tensor, lengths: Tensor | None = None, layers: int | None = None) -> Codes:
        """Waveforms float [B, N] -> codes, T = ceil(n / 320) frames for an utterance of n samples."""
        require_layers(layers, self.num_codebooks)
        utterances = split_utterances(waveform.cpu(), lengths)
        codes = [self._encode(samples, layers) for samples in utterances]
        return Codes.from_utterances(codes, samples=torch.tensor([len(samples) for samples in utterances]))

    def decode(self, codes: Codes) -> Tensor:
        """Codes with Q' <= Q layers -> waveforms float [B, N], as many samples as were encoded; zero-padded.

        Raises InputError for codes that this codec cannot have made.
        """
        codes.require(self.num_codebooks, self.codebook_size, HOP_LENGTH)
        sizes = enumerate(codes.sizes(HOP_LENGTH).tolist())
        return pad_waveforms([fit_length(self._decode(codes.utterance(index)), size) for index, size in sizes])[0]

    def _encode(self, samples: Tensor, layers: int | None) -> Tensor:
        """One utterance float [N] -> codes long [layers, T]."""
        frames = np.zeros((frame_count(len(samples)), 1, HOP_LENGTH), np.float32)
        frames.reshape(-1)[: len(samples)] = samples.numpy()
        rest = _stream(self.models[ENCODER], frames)
        ids = []
        for codebook in self.codebooks[:layers]:  # finds the codes that the quantiser's own search finds
            ids.append(torch.cdist(rest, codebook).argmin(1))
            rest = rest - codebook[ids[-1]]
        return torch.stack(ids)

    def _decode(self, ids: Tensor) -> Tensor:
        """Codes of one utterance long [Q', T] -> speech float [T * 320]."""
        vectors = [codebook[layer] for codebook, layer in zip(self.codebooks, ids.cpu(), strict=False)]
        latents = torch.stack(vectors).sum(0).numpy()
        return _stream(self.models[DECODER], latents[:, None, None]).flatten()


def _interpreter(model: bytes) -> Any:
    """A model in the memory of a stream that begins."""
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError as error:
        raise ImportError(f'{error.name} is needed for SoundStream: pip install "speechllm[soundstream]"') from error
    interpreter = Interpreter(model_content=model, num_threads=1)
    interpreter.allocate_tensors()
    return interpreter


def _stream(model: bytes, frames: np.ndarray) -> Tensor:
    """What a model with a memory makes of the frames of one utterance, [T, ...] -> float [T, D]."""
    interpreter = _interpreter(model)  # a new one: its reset_all_variables leaves traces of the utterance before
    source, target = (
        details()[0]["index"] for details in (interpreter.get_input_details, interpreter.get_output_details)
    )
    found = []
    for frame in frames:
        interpreter.set_tensor(source, frame)
        interpreter.invoke()
        found.append(torch.from_numpy(interpreter.get_tensor(target).reshape(-1)))
    return torch.stack(found)


def _read_codebooks(decode: Any) -> Tensor:
    """All code vectors float [Q, K, D], of which the quantiser's decoder returns sums."""
    ids = np.full(decode.get_input_details()["encoding_indices"]["shape"], UNUSED, np.int32)
    codebooks = []
    for layer in range(len(ids)):
        vectors = []
        for code in range(CODES):
            ids[layer] = code
            vectors.append(torch.from_numpy(decode(encoding_indices=ids)["output_0"].reshape(-1).copy()))
        ids[layer] = UNUSED
        codebooks.append(torch.stack(vectors))
    return torch.stack(codebooks)
