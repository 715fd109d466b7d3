"""Encoding and decoding in chunks with a causal codec: live speech, and hours of speech in bounded memory.

The trained layers are used unchanged; each stream keeps the state that they need from one chunk to the next.
"""

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from tokenizer.codec.config import SpeechCodecConfig
from tokenizer.codec.quantizer import ResidualVectorQuantizer
from tokenizer.codec.seanet import (
    LSTM,
    RESIDUAL_KERNEL,
    Conv1d,
    ConvTranspose1d,
    ResidualUnit,
    SEANetDecoder,
    SEANetEncoder,
)
from tokenizer.errors import InputError
from tokenizer.interface import Codes

Stage = Callable[[Tensor, bool], Tensor]  # new inputs [1, C, n], whether they are the last ones -> new outputs


class StreamableCodec(Protocol):
    """The parts of a `SpeechCodec` that a stream needs; that module imports this one."""

    config: SpeechCodecConfig
    training: bool

    @property
    def encoder(self) -> nn.Module: ...

    @property
    def decoder(self) -> SEANetDecoder: ...

    @property
    def latent_norm(self) -> nn.Module | None: ...

    @property
    def quantizer(self) -> ResidualVectorQuantizer: ...

    @property
    def codebooks(self) -> Tensor: ...

    @property
    def num_codebooks(self) -> int: ...

    @property
    def device(self) -> torch.device: ...


class _Windowed:
    """A layer whose outputs depend on `memory` past inputs, run on these together with the new inputs.

    Padding has the same effect as offline. On the left it affects only past outputs, which are dropped, except at the
    beginning of the stream. On the right there is none before the end, because the layer receives whole strides.
    """

    def __init__(
        self, layer: nn.Module, memory: int, out_channels: int, reflect: bool, down: int = 1, up: int = 1
    ) -> None:
        self.layer = layer
        self.memory = memory
        self.out_channels = out_channels
        self.down = down  # inputs per output
        self.up = up  # outputs per input
        self.begin = memory + 1 if reflect else 1  # inputs needed for the first output: the left padding mirrors them
        self.inputs: Tensor | None = None  # past inputs, then those not yet used
        self.past = 0

    def __call__(self, x: Tensor, last: bool) -> Tensor:
        if self.inputs is not None:
            x = torch.cat([self.inputs, x], -1)
        end = x.shape[-1] if last else x.shape[-1] - x.shape[-1] % self.down
        if end == self.past or (end < self.begin and not last):
            self.inputs = x.clone()  # x may be the caller's buffer
            return x.new_zeros(1, self.out_channels, 0)
        # contiguous, because torch's ELU rounds some elements of a view differently
        y = self.layer(x[..., :end])[..., self.past // self.down * self.up :].contiguous()
        self.past = min(end, self.memory)
        self.inputs = x[..., end - self.past :].clone()  # a view would keep the whole chunk in memory
        return y


class _Recurrent:
    """An LSTM that continues from its last state."""

    def __init__(self, layer: LSTM) -> None:
        self.layer = layer
        self.state: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor, last: bool) -> Tensor:
        if x.shape[-1]:
            x, self.state = self.layer.advance(x, self.state)
        return x


def _stage(layer: nn.Module, reflect: bool) -> Stage:
    match layer:
        case LSTM():
            return _Recurrent(layer)
        case Conv1d():  # the kernel is 1, 3 or 7 at stride 1, otherwise two strides: the memory is whole strides
            memory = layer.kernel - layer.stride
            return _Windowed(layer, memory, layer.out_channels, reflect, down=layer.stride)
        case ConvTranspose1d():
            memory = (layer.kernel - 1) // layer.stride
            return _Windowed(layer, memory, layer.out_channels, reflect, up=layer.stride)
        case ResidualUnit():
            return _Windowed(layer, RESIDUAL_KERNEL - 1, layer.shortcut.out_channels, reflect)
    return lambda x, last: layer(x)  # processes each frame separately


class _Stream:
    """A chain of stages that processes one utterance, from its first chunk to its last."""

    def __init__(self, codec: StreamableCodec, layers: list[nn.Module]) -> None:
        self._codec = codec
        self._stages = [_stage(layer, codec.config.pad_mode == "reflect") for layer in layers]
        self._finished = False

    def _run(self, x: Tensor, last: bool) -> Tensor:
        if self._finished:
            name = type(self).__name__
            raise ValueError(f"this {name} is finished: make a new {name}(codec) for the next utterance")
        self._finished = last
        for stage in self._stages:
            x = stage(x, last)
        return x


def _check(codec: StreamableCodec) -> None:
    if not codec.config.causal:
        raise InputError(
            "this codec looks ahead, so it cannot work on a stream: use codec.encode and codec.decode on whole "
            "utterances, or train a codec with causal: true"
        )
    if codec.training:
        raise ValueError("the codec is in training mode: call codec.eval() before streaming")


class StreamingEncoder(_Stream):
    """Encodes an utterance incrementally; the concatenated codes equal `codec.encode` up to rounding.

    Each frame is returned as soon as its samples are complete; with pad_mode reflect the first seven are returned
    together, because the beginning is mirrored. Only the first `layers` codebooks are searched (all when None). Latents
    differ from `codec.encode` in the last bits only, because torch's kernels sum in another order for fewer frames; so
    the codes differ only in frames that are equally close to two codes within that rounding, and in later layers there.
    Raises InputError for a codec that is not causal or `layers` out of range, ValueError in training mode.

    >>> encoder = StreamingEncoder(codec)
    >>> ids = [encoder.push(samples) for samples in microphone] + [encoder.finish()]
    """

    def __init__(self, codec: StreamableCodec, layers: int | None = None) -> None:
        _check(codec)
        if layers is not None and not 1 <= layers <= codec.num_codebooks:
            raise InputError(f"layers must be 1..{codec.num_codebooks}, got {layers}")
        assert isinstance(codec.encoder, SEANetEncoder)  # the only causal one
        stages = list(codec.encoder.layers)
        if codec.latent_norm is not None:
            stages.append(codec.latent_norm)
        super().__init__(codec, stages)
        self._layers = layers

    def push(self, samples: Tensor) -> Tensor:
        """The next samples float [n], any n >= 0 -> the frames that are complete now, long [Q, t].

        Raises ValueError if the shape is not [n], for NaN or infinite samples, and after `finish`.
        """
        if samples.ndim != 1:
            raise ValueError(f"expected samples float [n] of one utterance, got shape {tuple(samples.shape)}")
        if not torch.isfinite(samples).all():
            raise ValueError("the samples contain NaN or infinite values")
        return self._step(samples, last=False)

    def finish(self) -> Tensor:
        """The remaining frames, long [Q, t]; the encoder cannot be used afterwards."""
        return self._step(self._codec.codebooks.new_zeros(0), last=True)

    @torch.no_grad()
    def _step(self, samples: Tensor, last: bool) -> Tensor:
        new = samples[None, None].to(self._codec.device)
        return self._codec.quantizer.encode(self._run(new, last), self._layers)[0]


class StreamingDecoder(_Stream):
    """Decodes an utterance incrementally; the concatenated samples equal `codec.decode` up to rounding.

    The samples of a frame are returned at once; with pad_mode reflect those of the first seven frames together.
    Raises InputError for a codec that is not causal, ValueError in training mode.
    """

    def __init__(self, codec: StreamableCodec) -> None:
        _check(codec)
        super().__init__(codec, [*codec.decoder.layers])

    def push(self, ids: Tensor) -> Tensor:
        """The next frames, long [Q', t] with Q' <= Q layers and any t >= 0 -> the samples complete now, float [n].

        Raises ValueError if the shape is not [Q', t], and after `finish`; InputError for codes beyond the codebooks.
        """
        if ids.ndim != 2 or not 1 <= len(ids) <= self._codec.num_codebooks:
            expected = f"ids long [1..{self._codec.num_codebooks}, t] of one utterance"
            raise ValueError(f"expected {expected}, got shape {tuple(ids.shape)}")
        layers, size, _ = self._codec.codebooks.shape
        Codes(ids[None], torch.tensor([ids.shape[1]])).require(layers, size)
        return self._step(ids, last=False)

    def finish(self) -> Tensor:
        """The remaining samples, float [n]; the decoder cannot be used afterwards."""
        return self._step(torch.zeros(1, 0, dtype=torch.long), last=True)

    @torch.no_grad()
    def _step(self, ids: Tensor, last: bool) -> Tensor:
        latents = self._codec.quantizer.decode(ids[None].to(self._codec.codebooks.device))
        return self._run(latents, last)[0, 0]


def in_chunks(stream: StreamingEncoder | StreamingDecoder, x: Tensor, frames: int, hop: int = 1) -> Tensor:
    """Run all of x through a new stream, at most `frames` frames of `hop` elements at a time; the concatenated output.

    The chunks are whole frames of about equal length, because torch's kernels round short and odd ones differently. The
    output equals that of a single pass up to rounding, see `StreamingEncoder`.
    """
    total = math.ceil(x.shape[-1] / hop)
    length = math.ceil(total / math.ceil(total / frames)) * hop
    *chunks, last = x.split(length, -1)
    outputs = [stream._step(chunk, last=False) for chunk in chunks]
    outputs.append(stream._step(last, last=True))
    return torch.cat(outputs, -1)
