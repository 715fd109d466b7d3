"""Encoding and decoding in chunks: live speech with a causal codec, and hours of speech in bounded memory with any.

The trained layers are used unchanged; each stream keeps the state that they need from one chunk to the next. A layer
that looks ahead waits for the inputs that its outputs depend on.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tokenizer.codec.batch_norm import BatchNorm1d
from tokenizer.codec.config import SpeechCodecConfig
from tokenizer.codec.convnext import (
    SUBFRAMES,
    ConvNeXtBlock,
    InverseSTFT,
    Layer,
    LocalAttention,
    LogMelSpectra,
    Neighbours,
)
from tokenizer.codec.log_mel import BANDS, MEL_HOP, LogMel, Residual
from tokenizer.codec.quantizer import ResidualVectorQuantizer
from tokenizer.codec.seanet import LSTM, Conv1d, ConvTranspose1d, ResidualUnit
from tokenizer.errors import InputError
from tokenizer.frames import frame_count
from tokenizer.interface import Codes, require_layers
from tokenizer.rates import HOP_LENGTH

Stage = Callable[[Tensor, bool], Tensor]  # new inputs [1, C, n], whether they are the last ones -> new outputs


class StreamableCodec(Protocol):
    """The parts of a `SpeechCodec` that a stream needs; that module imports this one."""

    config: SpeechCodecConfig
    training: bool
    encoder: Any  # a module whose `stages` are its layers, from the first to the last; so is the decoder
    decoder: Any
    latent_norm: BatchNorm1d | None
    quantizer: ResidualVectorQuantizer


class _Windowed:
    """A layer whose outputs depend on `past` inputs before and `ahead` inputs after, run on these with the new inputs.

    Padding has the same effect as offline. On the left it affects only past outputs, which are dropped, except at the
    beginning of the stream; on the right only outputs that are dropped and computed again with the inputs to come,
    except at the end of the stream.
    """

    def __init__(
        self,
        layer: Layer,
        past: int,
        ahead: int,
        out_channels: int,
        reflect: bool,
        down: int = 1,
        up: int = 1,
    ) -> None:
        self.layer = layer
        self.down = down  # inputs per output
        self.up = up  # outputs per input
        self.out_channels = out_channels
        if reflect:  # at the end, the right padding mirrors past inputs
            past = max(past, ahead + down)
        self.memory, self.ahead = (frame_count(inputs, down) * down for inputs in (past, ahead))
        # inputs needed for the first output: the left padding mirrors them
        self.begin = max(self.memory, self.ahead) + 1 if reflect else 1
        self.inputs: Tensor | None = None  # past inputs, then those not yet used
        self.past = 0

    def __call__(self, x: Tensor, last: bool) -> Tensor:
        if self.inputs is not None:
            x = torch.cat([self.inputs, x], -1)
        end = x.shape[-1] if last else x.shape[-1] - x.shape[-1] % self.down
        done = end if last else max(self.past, end - self.ahead)  # inputs whose outputs will not change
        if done == self.past or (end < self.begin and not last):
            self.inputs = x.clone()  # x may be the caller's buffer
            return x.new_zeros(1, self.out_channels, 0)
        first, stop = self.past // self.down * self.up, frame_count(done, self.down) * self.up
        # contiguous, because torch's ELU rounds some elements of a view differently
        y = self.layer(x[..., :end])[..., first:stop].contiguous()
        self.past = min(done, self.memory)
        self.inputs = x[..., done - self.past :].clone()  # a view would keep the whole chunk in memory
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


class _Gathered:
    """A layer whose outputs all depend on all inputs: it runs once, at the end of the stream."""

    def __init__(self, layer: LSTM) -> None:
        self.layer = layer
        self.inputs: list[Tensor] = []

    def __call__(self, x: Tensor, last: bool) -> Tensor:
        self.inputs.append(x)
        if not last:
            return x.new_zeros(1, 2 * x.shape[1], 0)
        x, self.inputs = torch.cat(self.inputs, -1), []
        return self.layer(x)


def _stage(layer: Layer, reflect: bool) -> Stage:
    match layer:
        case LSTM():
            return _Gathered(layer) if layer.lstm.bidirectional else _Recurrent(layer)
        case Conv1d():
            return _Windowed(layer, layer.past, layer.ahead, layer.out_channels, reflect, down=layer.stride)
        case ConvTranspose1d():
            return _Windowed(layer, layer.past, layer.ahead, layer.out_channels, reflect, up=layer.stride)
        case ResidualUnit() | Residual():
            return _Windowed(layer, layer.past, layer.ahead, layer.out_channels, reflect)
        case LogMel():
            frames = HOP_LENGTH // MEL_HOP
            return _Windowed(lambda x: layer(x[:, 0]), layer.margin, layer.margin, BANDS, False, HOP_LENGTH, frames)
        case LogMelSpectra():
            return _Windowed(layer, layer.past, layer.ahead, layer.channels, False, down=layer.hop_length)
        case ConvNeXtBlock() | LocalAttention():
            return _Windowed(layer, layer.past, layer.ahead, layer.channels, False)
        case Neighbours():
            return _Windowed(layer, layer.past, layer.ahead, layer.out_channels, False)
        case InverseSTFT():
            return _Windowed(layer, layer.past, layer.ahead, 1, False, up=SUBFRAMES * layer.step)
        case nn.Conv1d():  # of kernel 1, which takes no empty input
            return _Windowed(layer, 0, 0, layer.out_channels, False)
    return lambda x, last: layer(x)  # processes each frame separately


class _Stream:
    """A chain of stages that processes one utterance, from its first chunk to its last."""

    def __init__(self, codec: StreamableCodec, layers: Sequence[Layer]) -> None:
        self._quantizer = codec.quantizer
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


class ChunkedEncoder(_Stream):
    """Encodes an utterance chunk by chunk, which may stay without codes until the next one.

    first: long [T], the codes of layer 0, of a codec that has them from elsewhere.
    """

    def __init__(self, codec: StreamableCodec, layers: int | None = None, first: Tensor | None = None) -> None:
        norm = [] if codec.latent_norm is None else [codec.latent_norm]
        super().__init__(codec, [*codec.encoder.stages, *norm])
        self._layers, self._first = layers, first

    @torch.no_grad()
    def _step(self, samples: Tensor, last: bool) -> Tensor:
        new = samples[None, None].to(self._quantizer.codebooks.device)
        latents, first = self._run(new, last), None
        if self._first is not None:
            first, self._first = self._first.tensor_split([latents.shape[2]])
        return self._quantizer.encode(latents, self._layers, first)[0]


class StreamingEncoder(ChunkedEncoder):
    """Encodes an utterance incrementally; the concatenated codes equal `codec.encode` up to rounding.

    Each frame is returned as soon as its samples are complete; with SEANet's pad_mode reflect the first seven are
    returned together, because the beginning is mirrored. Only the first `layers` codebooks are searched (all when
    None). Latents differ from `codec.encode` in the last bits only, because torch's kernels sum in another order for
    fewer frames; so the codes differ only in frames that are equally close to two codes within that rounding, and in
    later layers there.
    Raises InputError for a codec that is not causal or `layers` out of range, ValueError in training mode.

    >>> encoder = StreamingEncoder(codec)
    >>> ids = [encoder.push(samples) for samples in microphone] + [encoder.finish()]
    """

    def __init__(self, codec: StreamableCodec, layers: int | None = None) -> None:
        _check(codec)
        require_layers(layers, codec.config.num_codebooks)
        super().__init__(codec, layers)

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
        return self._step(self._quantizer.codebooks.new_zeros(0), last=True)


class ChunkedDecoder(_Stream):
    """Decodes an utterance chunk by chunk, which may stay without samples until the next one."""

    def __init__(self, codec: StreamableCodec) -> None:
        super().__init__(codec, codec.decoder.stages)

    @torch.no_grad()
    def _step(self, ids: Tensor, last: bool) -> Tensor:
        latents = self._quantizer.decode(ids[None].to(self._quantizer.codebooks.device))
        return self._run(latents, last)[0, 0]


class StreamingDecoder(ChunkedDecoder):
    """Decodes an utterance incrementally; the concatenated samples equal `codec.decode` up to rounding.

    The samples of a frame are returned at once; with SEANet's pad_mode reflect, those of the first seven together.
    Raises InputError for a codec that is not causal, ValueError in training mode.
    """

    def __init__(self, codec: StreamableCodec) -> None:
        _check(codec)
        super().__init__(codec)

    def push(self, ids: Tensor) -> Tensor:
        """The next frames, long [Q', t] with Q' <= Q layers and any t >= 0 -> the samples complete now, float [n].

        Raises ValueError if the shape is not [Q', t], and after `finish`; InputError for codes beyond the codebooks.
        """
        layers, size, _ = self._quantizer.codebooks.shape
        if ids.ndim != 2 or not 1 <= len(ids) <= layers:
            raise ValueError(f"expected ids long [1..{layers}, t] of one utterance, got shape {tuple(ids.shape)}")
        Codes(ids[None], torch.tensor([ids.shape[1]])).require(layers, size)
        return self._step(ids, last=False)

    def finish(self) -> Tensor:
        """The remaining samples, float [n]; the decoder cannot be used afterwards."""
        return self._step(torch.zeros(1, 0, dtype=torch.long), last=True)


def in_chunks(stream: ChunkedEncoder | ChunkedDecoder, x: Tensor, frames: int, hop: int = 1) -> Tensor:
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
