"""Packing: several examples in one sequence, without padding and without attention between them."""

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

PACKED = "packed_sdpa"  # name under which transformers knows the attention below


@dataclass(frozen=True)
class Packed:
    """Concatenated examples of S tokens in total: input_ids and position_ids long [1, S], targets long [S], lengths.

    A target is the label of the next token of the same example: nothing is predicted across a border.
    features: float [P, C] of all examples, or None. borders: int32 [examples + 1], the start of each example and the
    end of the last one.
    """

    input_ids: Tensor
    position_ids: Tensor
    targets: Tensor
    lengths: list[int]
    features: Tensor | None
    borders: Tensor


def pack(examples: Sequence[Example], device: torch.device | str = "cpu") -> Packed:
    """Concatenate examples on `device`."""
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
    """transformers' SDPA attention, causal within each example of the given lengths; without lengths, the usual one.

    query, key, value: [1, heads, S, D]; borders: those of `Packed`. On a GPU in half precision this is one call of
    PyTorch's variable-length attention, otherwise one call per example. transformers can also use an S x S mask, which
    is exact, too, but computes and stores the whole square.
    Raises DataError for an example that is longer than the model's sliding window.
    """
    if lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    window = kwargs.get("sliding_window")
    if window is not None and max(lengths) > window:
        raise DataError(
            f"an example has {max(lengths)} tokens, but the model attends to {window} only: exclude long recordings"
        )
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype
    ampere = query.is_cuda and torch.cuda.get_device_capability(query.device) >= (8, 0)  # oldest GPU of the kernel
    if ampere and dtype != torch.float32 and borders is not None and not kwargs.get("dropout"):
        return _attend_at_once(query, key, value, max(lengths), borders, kwargs.get("scaling"), dtype), None
    parts = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    return torch.cat([sdpa_attention_forward(module, *part, None, **kwargs)[0] for part in parts], 1), None


def _attend_at_once(
    query: Tensor, key: Tensor, value: Tensor, longest: int, borders: Tensor, scale: float | None, dtype: torch.dtype
) -> Tensor:
    """FlashAttention (Dao et al., 2205.14135) within examples of different lengths; returns [1, S, heads, D]."""
    shared = query.shape[1] // key.shape[1]  # query heads per key and value head
    key, value = (x.repeat_interleave(shared, 1) for x in (key, value))
    q, k, v = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))  # [S, heads, D]
    causal = (-1, 0)  # all tokens before, none after
    attended = cast(Tensor, varlen_attn(q, k, v, borders, borders, longest, longest, scale=scale, window_size=causal))
    return attended[None]


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)  # used in generation, where batches are padded


def micro_batches(batch: Sequence[Example], tokens: int, process: int = 0, processes: int = 1) -> list[list[Example]]:
    """One process's share of a batch, split into parts of about `tokens` tokens to be computed one after the other.

    Every process gets the same number of parts of about the same size, because processes have to stay in step. If
    there are fewer examples than parts, the remaining parts hold an example without labels.
    """
    count = processes * math.ceil(sum(map(len, batch)) / (processes * tokens))
    parts: list[list[Example]] = [[] for _ in range(count)]
    for example in sorted(batch, key=len, reverse=True):  # longest first, each into the smallest part so far
        min(parts, key=lambda part: sum(map(len, part))).append(example)
    blank = replace(batch[0], labels=torch.full_like(batch[0].labels, IGNORED))
    return [part or [blank] for part in parts[process::processes]]
