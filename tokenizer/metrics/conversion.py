"""Voice conversion without training: replaces some layers of one speaker's codes by those of another."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenizer.errors import InputError
from tokenizer.interface import Codec, Codes

MATCHINGS = ("position", "content")
ROWS = 1000  # frames compared with all of the target at a time, to bound memory


def convert_voice(codec: Codec, source: Tensor, target: Tensor, layers: Sequence[int], matching: str) -> Tensor:
    """Convert the source float [N] to the voice of the target float [M] by `swap_layers`: float [N] on the CPU."""
    source_codes, target_codes = (codec.encode(waveform[None].to(codec.device)) for waveform in (source, target))
    return codec.decode(swap_layers(source_codes, target_codes, layers, matching, codec.codebooks))[0].cpu()


def swap_layers(source: Codes, target: Codes, layers: Sequence[int], matching: str, codebooks: Tensor) -> Codes:
    """Take the codes of `layers` (0 is the first) from the target, the others from the source, utterance by utterance.

    matching determines the target frame for each source frame:
    "position": the frame with the same index; a shorter target is repeated from its start (the paper, eq. 8, does not
        specify how to treat different lengths);
    "content": the frame with the nearest code vector of layer 0 (Euclidean, nearest neighbours as in kNN-VC), of equal
        ones the nearest in time, then the earlier.
    codebooks: code vectors float [Q, K, D]. The result is as long as the source. It ends with the last swapped layer,
    because higher ones refine a residual that the swap has changed: [1] is decoded from two layers, as in the paper.
    Raises InputError for layers out of range or an unknown matching, ValueError for unequal numbers of utterances.
    """
    depth = min(source.ids.shape[1], target.ids.shape[1])
    if not layers or not all(0 <= layer < depth for layer in layers):
        raise InputError(f"layers must be numbers from 0 to {depth - 1}, the layers of these codes; got {list(layers)}")
    if matching not in MATCHINGS:
        raise InputError(f"unknown matching {matching!r}: choose one of {', '.join(MATCHINGS)}")
    if len(source) != len(target):
        raise ValueError(f"{len(source)} sources but {len(target)} targets: they must match one to one")
    ids = source.ids[:, : max(layers) + 1].clone()
    for index, swapped in enumerate(ids):
        source_ids, target_ids = source.utterance(index), target.utterance(index)
        length = source_ids.shape[1]
        if matching == "position":
            frames = torch.arange(length, device=ids.device) % target_ids.shape[1]
        else:
            frames = _nearest_frames(source_ids[0], target_ids[0], codebooks[0].to(ids.device))
        for layer in layers:
            swapped[layer, :length] = target_ids[layer, frames]
    return Codes(ids, source.lengths, source.samples)


def _nearest_frames(source: Tensor, target: Tensor, codebook: Tensor) -> Tensor:
    """For each source code, long [T], the frame of the nearest target code, long [T']: long [T], below T'."""
    time = torch.arange(max(len(source), len(target)), device=source.device)
    found = []
    for part, now in zip(source.split(ROWS), time[: len(source)].split(ROWS), strict=True):
        # exact, because with the rounding of a matrix product equal codes would no longer be equally near
        distance = torch.cdist(codebook[part], codebook[target], compute_mode="donot_use_mm_for_euclid_dist")
        apart = (now[:, None] - time[: len(target)]).abs().float()
        found.append(apart.masked_fill(distance > distance.amin(1, keepdim=True), torch.inf).argmin(1))
    return torch.cat(found)
