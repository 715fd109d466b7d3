"""Several examples in one row, without padding and without seeing each other."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from speechllm.encoding import DataError
from speechllm.prompt import IGNORED, Example, join_features

PACKED = "packed_sdpa"  # name of the attention below among transformers' implementations


@dataclass(frozen=True)
class Packed:
    """Examples end to end, S tokens in all: input_ids and position_ids long [1, S], targets long [S], lengths.

    A target is the label of the next token of the same example: nothing is predicted across a border.
    features: float [P, C] of all examples, None where there are none. borders: int32 [examples + 1], where they begin
    and the last one ends.
    """

    input_ids: Tensor
    position_ids: Tensor
    targets: Tensor
    lengths: list[int]
    features: Tensor | None
    borders: Tensor


def pack(examples: Sequence[Example], device: torch.device | str = "cpu") -> Packed:
    """Put examples into one row on `device`."""
    lengths = [len(example) for example in examples]
    return Packed(
        torch.cat([example.input_ids for example in examples])[None].to(device),
        torch.cat([torch.arange(length) for length in lengths])[None].to(device),
        torch.cat([F.pad(example.labels[1:], (0, 1), value=IGNORED) for example in examples]).to(device),
        lengths,
        join_features(examples),
        torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device),
    )


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    lengths: Sequence[int] | None = None,
    borders: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' SDPA attention, causal within each of the examples of these lengths; its usual one without lengths.

    query, key, value: [1, heads, S, D]; borders: of `Packed`. On a GPU, in half precision, one call of PyTorch's
    attention over all examples; else one call for each. transformers can also attend within packed examples by a mask
    of S x S, which is exact as well, but computes and stores the whole square.
    Raises DataError where a model's sliding window is shorter than an example.
    """
    if lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    window = kwargs.get("sliding_window")
    if window is not None and max(lengths) > window:
        raise DataError(
            f"an example has {max(lengths)} tokens, the model attends to {window} only: leave long recordings out"
        )
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype
    ampere = query.is_cuda and torch.cuda.get_device_capability(query.device) >= (8, 0)  # the kernel's oldest GPU
    if ampere and dtype != torch.float32 and borders is not None and not kwargs.get("dropout"):
        return _attend_at_once(query, key, value, max(lengths), borders, kwargs.get("scaling"), dtype), None
    parts = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    return torch.cat([sdpa_attention_forward(module, *part, None, **kwargs)[0] for part in parts], 1), None


def _attend_at_once(
    query: Tensor, key: Tensor, value: Tensor, longest: int, borders: Tensor, scale: float | None, dtype: torch.dtype
) -> Tensor:
    """FlashAttention (Dao et al., 2205.14135) within examples of different lengths: [1, S, heads, D]."""
    shared = query.shape[1] // key.shape[1]  # heads of the query for each of key and value
    key, value = (x.repeat_interleave(shared, 1) for x in (key, value))
    q, k, v = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))  # [S, heads, D]
    causal = (-1, 0)  # all before, none after
    attended = cast(Tensor, varlen_attn(q, k, v, borders, borders, longest, longest, scale=scale, window_size=causal))
    return attended[None]


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)  # for generation, which pads


def micro_batches(batch: Sequence[Example], tokens: int, process: int = 0, processes: int = 1) -> list[list[Example]]:
    """The share of one process in a batch, in parts of about `tokens` tokens that are computed one after the other.

    Every process gets the same number of parts, of about the same size: it needs as many steps as the others. Where
    there are fewer examples than parts, the rest are examples in which nothing is to be learnt.
    """
    count = processes * math.ceil(sum(map(len, batch)) / (processes * tokens))
    parts: list[list[Example]] = [[] for _ in range(count)]
    for example in sorted(batch, key=len, reverse=True):  # the longest first, each to the smallest part so far
        min(parts, key=lambda part: sum(map(len, part))).append(example)
    blank = replace(batch[0], labels=torch.full_like(batch[0].labels, IGNORED))
    return [part or [blank] for part in parts[process::processes]]
