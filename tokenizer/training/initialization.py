"""How a codec begins: codebooks by k-means, and a body at the frame rate as the best linear code of its spectra.

From random weights, a codec spends most of a short training on learning that spectra of speech have few dimensions.
That much is known without any step: principal components of the spectra are the latents, k-means finds their codebooks,
and least squares give the levels that the decoder predicts from the codes. What follows learns what is not linear.
"""

import functools
import json
from dataclasses import asdict

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import default_collate

from tokenizer.codec.convnext import ConvNeXtDecoder, ConvNeXtEncoder
from tokenizer.codec.speech_codec import UNITS, SpeechCodec
from tokenizer.errors import InputError
from tokenizer.frames import frame_mask
from tokenizer.interface import Codec
from tokenizer.progress import progress_bar
from tokenizer.training.crops import Crops, units_of
from tokenizer.training.distributed import is_first_process

FRAMES_PER_CODE = 20  # that k-means needs
LINEAR_FRAMES_PER_CODE = 60
LEAST_VARIANCE = 1e-4  # of a component, relative to the largest

# waveforms float [B, N], their lengths long [B] in samples, and the codes of layer 0, long [B, T], if they are given
Batch = tuple[Tensor, Tensor, Tensor | None]


@torch.no_grad()
def initialize_codec(codec: SpeechCodec, crops: Crops, batch_size: int, seed: int = 0, linear: bool = False) -> None:
    """Initialise the codebooks by k-means on the latents of as many crops as necessary; one process does it for all.

    linear: first set the encoder, and then the decoder, to the linear code of the module's text; needs body convnext.
    """
    codec.train()
    if is_first_process():
        batches = _first_speech(codec, crops, batch_size, LINEAR_FRAMES_PER_CODE if linear else FRAMES_PER_CODE)
        if linear:
            _begin_encoder(codec, torch.cat([_spectra(codec, batch) for batch in batches]))
        latents = [codec.latents(waveform.to(codec.device)) for waveform, *_ in batches]
        rows = torch.cat([*map(functools.partial(_of_speech, codec), batches, latents)])
        first = [_of_speech(codec, batch, batch[2][:, None])[:, 0] for batch in batches if batch[2] is not None]
        codec.quantizer.initialize(rows, seed, torch.cat(first) if first else None)
        if linear:
            _begin_decoder(codec, batches, latents)
    else:
        codec.quantizer.initialize(None)
    if linear and dist.is_initialized():
        for parameter in codec.parameters():
            dist.broadcast(parameter.data, src=0)


def start_from(codec: SpeechCodec, trained: Codec) -> None:
    """Give the codec the weights and codebooks of a trained one; InputError if that is of another kind or shape."""
    if not isinstance(trained, SpeechCodec):
        raise InputError("start: this is no codec of this package, and only such a one can be trained on")
    own, other = asdict(codec.config), asdict(trained.config)
    unlike = [f"codec.{key}={json.dumps(other[key])}" for key in own if own[key] != other[key]]
    if unlike:
        raise InputError(f"start: this codec has {' '.join(unlike)}: give the same to train on it")
    if codec.units and trained.units and codec.units.fingerprint != trained.units.fingerprint:
        raise InputError(f"start: this codec has other units, which are in its folder {UNITS}: give units.tokenizer")
    codec.load_state_dict(trained.state_dict())


def _first_speech(codec: SpeechCodec, crops: Crops, batch_size: int, frames_per_code: int) -> list[Batch]:
    """The first crops, as many as have so many frames for every code."""
    batches: list[Batch] = []
    found, wanted = 0, frames_per_code * codec.codebook_size
    bar = progress_bar(None, "speech for the codebooks", total=wanted, unit="frames")
    while found < wanted:
        items = [crops[len(batches) * batch_size + i] for i in range(batch_size)]
        batch = default_collate(items)
        batches.append((batch["waveform"], batch["length"], units_of(codec, batch)))
        found += int(batch["length"].sum()) // codec.hop_length
        bar.update(min(found, wanted) - bar.n)
    bar.close()
    return batches


def _of_speech(codec: SpeechCodec, batch: Batch, x: Tensor) -> Tensor:
    """The frames of speech of x float [B, C, T], float [M, C]."""
    return x.transpose(1, 2)[frame_mask(batch[1].to(x.device), x.shape[2], codec.hop_length)]


def _spectra(codec: SpeechCodec, batch: Batch) -> Tensor:
    return _of_speech(codec, batch, codec.encoder.spectra(batch[0][:, None].to(codec.device))).cpu()


def _begin_encoder(codec: SpeechCodec, spectra: Tensor) -> None:
    """Latents become the principal components of spectra float [M, C], of a variance of 1 on average.

    Between input and output the components all have a variance of 1, as the blocks like their inputs. The last branch
    of the quantiser, which codes the sound, reads its own channels, to which the blocks add nothing yet: what they
    learn for the content of the first branch would otherwise move what the codebooks were made for.
    """
    encoder: ConvNeXtEncoder = codec.encoder
    mean, covariance = _moments(spectra)
    variances, directions = torch.linalg.eigh(covariance)
    variances, directions = variances.flip(0), directions.flip(1)
    deviations = variances.clamp(min=LEAST_VARIANCE * variances[0]).sqrt()
    kept = min(len(variances), codec.quantizer.dimension, encoder.input.out_channels)
    white = (directions / deviations).T
    white = torch.cat([white[:kept], white])[: encoder.input.out_channels]
    _begin(encoder.input, slice(len(white)), white[..., None], -white @ mean)
    scales = (deviations / variances[:kept].mean().sqrt())[:kept].to(encoder.output.weight)
    encoder.output.weight.zero_()
    *others, last = encoder.output.weight[..., 0].split(codec.quantizer.dimension)
    last[:kept, :kept] = scales.diag()
    for other in others:
        width = min(kept, len(white) - kept)
        other[:width, kept : kept + width] = scales[:width].diag()
    for name, parameter in encoder.blocks.named_parameters():
        if name.endswith("gain"):
            parameter[:kept] = 0.0


def _begin_decoder(codec: SpeechCodec, batches: list[Batch], latents: list[Tensor]) -> None:
    """The decoder's levels become those that a linear map of the codes of neighbouring frames predicts best.

    Of that map the `width` most important directions are kept (reduced-rank regression), again of variance 1.
    """
    decoder: ConvNeXtDecoder = codec.decoder
    size = decoder.input.weight[0].numel()
    rows = torch.cat([*map(functools.partial(_neighbours_and_levels, codec), batches, latents)])
    means, covariance = _moments(rows)
    variances, directions = torch.linalg.eigh(covariance[:size, :size])
    white = (directions / variances.clamp(min=LEAST_VARIANCE * variances[-1]).sqrt()).T
    chosen, strengths, levels = torch.linalg.svd(white @ covariance[:size, size:], full_matrices=False)
    width = min(len(strengths), decoder.input.out_channels)
    inward = chosen.T[:width] @ white
    windows = inward.unflatten(1, decoder.input.weight.shape[1:])
    _begin(decoder.input, slice(width), windows, -inward @ means[:size])
    outward = F.pad((strengths[:, None] * levels)[:width].T, (0, decoder.output.in_channels - width))
    _begin(decoder.output, decoder.inverse.level_channels, outward[..., None], means[size:])


def _neighbours_and_levels(codec: SpeechCodec, batch: Batch, latents: Tensor) -> Tensor:
    """Of each frame of speech what the codes of it and its neighbours stand for, and its levels: float [M, 3 D + L]."""
    ids = codec.quantizer.encode(latents, first=batch[2])
    windows = codec.decoder.input.windows(codec.quantizer.decode(ids)).flatten(1, 2)
    levels = codec.decoder.inverse.levels(batch[0].to(codec.device))
    return _of_speech(codec, batch, torch.cat([windows, levels], 1)).cpu()


def _moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Means [C] and covariance [C, C] in float64 of rows float [M, C], which need not fit into memory as float64."""
    means = rows.mean(0, dtype=torch.float64)
    products = ((part - means).T @ (part - means) for part in map(Tensor.double, rows.split(4096)))
    return means, sum(products, torch.zeros(())) / (len(rows) - 1)


def _begin(layer: nn.Conv1d, rows: Tensor | slice, weight: Tensor, bias: Tensor) -> None:
    """Set the weights and the bias of these output channels."""
    assert layer.bias is not None
    layer.weight[rows] = weight.to(layer.weight)
    layer.bias[rows] = bias.to(layer.bias)
