"""Voice conversion without training: some layers of one speaker's codes go into the codes of another."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenizer.interface import Codec, Codes

MATCHINGS = ("position", "content")


def convert_voice(codec: Codec, source: Tensor, target: Tensor, layers: Sequence[int], matching: str) -> Tensor:
    """What the source float [N] says in the voice of the target float [M], by `swap_layers`: float [N] on the CPU."""
    spoken, voice = (codec.encode(waveform[None].to(codec.device)) for waveform in (source, target))
    return codec.decode(swap_layers(spoken, voice, layers, matching, codec.codebooks))[0].cpu()


def swap_layers(source: Codes, target: Codes, layers: Sequence[int], matching: str, codebooks: Tensor) -> Codes:
    """Take the codes of `layers` (0 is the first) from the target, the others from the source; utterances in pairs.

    matching says which target frame a source frame takes them from:
    "position": the frame of the same number, the target repeated from its start where it is the shorter (the paper,
        eq. 8, which leaves open what becomes of different lengths);
    "content": the frame whose code vector of layer 0 is nearest (Euclidean; the nearest-neighbour idea of kNN-VC),
        among equals the nearest in time, then the earlier.
    codebooks: code vectors float [Q, K, D]. The result is as long as the source, and its last layer is the last one
    swapped, because layers above describe what the swap has changed: [1] is decoded from two layers, as in the paper.
    Raises ValueError for layers that are not there, another matching or an unequal number of utterances.
    """
    depth = min(source.ids.shape[1], target.ids.shape[1])
    if not layers or not all(0 <= layer < depth for layer in layers):
        raise ValueError(f"layers must be numbers from 0 to {depth - 1}, the layers of these codes; got {list(layers)}")
    if matching not in MATCHINGS:
        raise ValueError(f"unknown matching {matching!r}: choose one of {', '.join(MATCHINGS)}")
    if len(source) != len(target):
        raise ValueError(f"{len(source)} sources but {len(target)} targets: they must match one to one")
    ids = source.ids[:, : max(layers) + 1].clone()
    for index, swapped in enumerate(ids):
        spoken, voice = source.utterance(index), target.utterance(index)
        if matching == "position":
            frames = torch.arange(spoken.shape[1], device=ids.device) % voice.shape[1]
        else:
            frames = _nearest_frames(spoken[0], voice[0], codebooks[0].to(ids.device))
        for layer in layers:
            swapped[layer, : spoken.shape[1]] = voice[layer, frames]
    return Codes(ids, source.lengths, source.samples)


def _nearest_frames(source: Tensor, target: Tensor, codebook: Tensor) -> Tensor:
    """For each of the codes long [T] the frame, below T', of the nearest of the codes long [T']: long [T]."""
    # the usual shortcut by a matrix product rounds, and equal codes would no longer be equally near
    distance = torch.cdist(codebook[source], codebook[target], compute_mode="donot_use_mm_for_euclid_dist")
    time = torch.arange(max(len(source), len(target)), device=distance.device)
    apart = (time[: len(source), None] - time[: len(target)]).abs().float()
    return apart.masked_fill(distance > distance.amin(1, keepdim=True), torch.inf).argmin(1)
