"""Voice conversion without training: replaces some layers of one speaker's codes by those of another."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenizer.errors import InputError
from tokenizer.interface import Codec, Codes

MATCHINGS = ("position", "content", "mean")
ROWS = 1000  # frames compared with all of the target at a time, to bound memory
KINDS = 6  # of contents, whose means are compared: with more, a short recording lacks some
PRIOR = 3.0  # frames with the mean of all that count in each of these means
EMPHASIS = 1.5  # of the difference of the means; at 1 it still sounds more like the source


def convert_voice(codec: Codec, source: Tensor, target: Tensor, layers: Sequence[int], matching: str) -> Tensor:
    """Convert the source float [N] to the voice of the target float [M] by `swap_layers`: float [N] on the CPU.

    Raises InputError as that, and for a matching that is not one of `matchings_of` the codec.
    """
    if matching in MATCHINGS and matching not in matchings_of(codec):
        raise InputError(
            f"matching {matching} adds up the vectors of layers, which are of different spaces in this codec"
        )
    source_codes, target_codes = (codec.encode(waveform[None].to(codec.device)) for waveform in (source, target))
    swapped = swap_layers(source_codes, target_codes, layers, matching, codec.codebooks, branches_of(codec))
    return codec.decode(swapped)[0].cpu()


def matchings_of(codec: Codec) -> tuple[str, ...]:
    """The matchings that a codec allows: the mean needs layers whose vectors add up."""
    return MATCHINGS if getattr(codec, "additive", True) else MATCHINGS[:-1]


def branches_of(codec: Codec) -> Sequence[range] | None:
    """The layers whose vectors add up, of a codec whose first codebook may have a space of its own; None: all."""
    return getattr(codec, "branches", None)


def swap_layers(
    source: Codes,
    target: Codes,
    layers: Sequence[int],
    matching: str,
    codebooks: Tensor,
    branches: Sequence[range] | None = None,
) -> Codes:
    """Take the codes of `layers` (0 is the first) from the target, the others from the source, utterance by utterance.

    matching determines the target frame for each source frame:
    "position": the frame with the same index; a shorter target is repeated from its start (the paper, eq. 8, does not
        specify how to treat different lengths);
    "content": the frame with the nearest code vector of layer 0 (Euclidean, nearest neighbours as in kNN-VC), of equal
        ones the nearest in time, then the earlier;
    "mean": none. What the layers stand for is shifted by the difference between target and source in the mean of each
        kind of content (k-means of layer 0's code vectors), and searched for again: the voice changes, and what happens
        from frame to frame, the words, stays.
    codebooks: code vectors float [Q, K, D]. branches: layers whose vectors add up, see `branches_of`; None: all.
    The result is as long as the source. It ends with the last swapped layer, because higher ones refine a residual that
    the swap has changed: [1] is decoded from two layers, as in the paper.
    Raises InputError for layers out of range or an unknown matching, ValueError for unequal numbers of utterances.
    """
    depth = min(source.ids.shape[1], target.ids.shape[1])
    if not layers or not all(0 <= layer < depth for layer in layers):
        raise InputError(f"layers must be numbers from 0 to {depth - 1}, the layers of these codes; got {list(layers)}")
    if matching not in MATCHINGS:
        raise InputError(f"unknown matching {matching!r}: choose one of {', '.join(MATCHINGS)}")
    if len(source) != len(target):
        raise ValueError(f"{len(source)} sources but {len(target)} targets: they must match one to one")
    layers = sorted(set(layers))
    ids, codebooks = source.ids[:, : max(layers) + 1].clone(), codebooks.to(source.ids.device)
    kinds = _kinds(codebooks[0]) if matching == "mean" else None
    for index, swapped in enumerate(ids):
        source_ids, target_ids = source.utterance(index), target.utterance(index)
        length = source_ids.shape[1]
        if kinds is not None:
            for branch in branches or [range(depth)]:
                if together := [layer for layer in layers if layer in branch]:
                    swapped[together, :length] = _shifted(source_ids, target_ids, together, codebooks, kinds)
            continue
        if matching == "position":
            frames = torch.arange(length, device=ids.device) % target_ids.shape[1]
        else:
            frames = _nearest_frames(source_ids[0], target_ids[0], codebooks[0])
        for layer in layers:
            swapped[layer, :length] = target_ids[layer, frames]
    return Codes(ids, source.lengths, source.samples)


def _kinds(codebook: Tensor) -> Tensor:
    """The kind of content of each code vector, float [K, D] -> long [K], below KINDS."""
    from sklearn.cluster import KMeans

    found = KMeans(min(KINDS, len(codebook)), n_init=3, random_state=0).fit_predict(codebook.cpu().numpy())
    return torch.from_numpy(found).long().to(codebook.device)


def _shifted(source: Tensor, target: Tensor, layers: Sequence[int], codebooks: Tensor, kinds: Tensor) -> Tensor:
    """Codes long [layers, T] of the source's vectors [T, D], shifted to the target's means of each kind of content."""
    own, other = (torch.stack([codebooks[layer, ids[layer]] for layer in layers]).sum(0) for ids in (source, target))
    here = kinds[source[0]]
    shift = _means(other, kinds[target[0]]) - _means(own, here)
    rest, chosen = own + EMPHASIS * shift[here], []
    for layer in layers:
        chosen.append(torch.cdist(rest, codebooks[layer]).argmin(1))
        rest = rest - codebooks[layer, chosen[-1]]
    return torch.stack(chosen)


def _means(vectors: Tensor, kinds: Tensor) -> Tensor:
    """Means of the vectors float [T, D] of each kind long [T], float [KINDS, D]; of few frames nearer to the whole."""
    counts = torch.zeros(KINDS).to(vectors).index_add_(0, kinds, torch.ones_like(vectors[:, 0]))
    sums = vectors.new_zeros(KINDS, vectors.shape[1]).index_add_(0, kinds, vectors)
    return (sums + PRIOR * vectors.mean(0)) / (counts + PRIOR)[:, None]


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
