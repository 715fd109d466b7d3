"""Several examples at once: packed, in one sequence without padding and attention between them, or padded."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from speechllm.prompt import IGNORED, Example, join_features
from speechllm.vocabulary import AudioVocabulary
from tokenizer.errors import InputError

PACKED = "packed_sdpa"  # name under which transformers knows the attention below
PADDING = -1  # in place of the number of an audio


class PackingError(InputError):
    """A language model in which packed examples are not what they are alone."""


@dataclass(frozen=True)
class Batch:
    """Examples as a language model takes them: input_ids long [B, S], targets long [B * S], features.

    A target is the label of the next token of the same example: nothing is predicted across a border.
    features: float [P, C] of all examples, or None. arguments: further ones of the model, by transformers' names.
    """

    input_ids: Tensor
    targets: Tensor
    features: Tensor | None
    arguments: dict[str, Any]


def pack(
    examples: Sequence[Example], device: torch.device | str = "cpu", vocabulary: AudioVocabulary | None = None
) -> Batch:
    """Concatenate examples on `device`, B = 1, for a model that `can_pack` made ready.

    vocabulary: tells which tokens attend to each other in both directions; by default none do.
    """
    lengths = [len(example) for example in examples]
    borders = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    input_ids = torch.cat([example.input_ids for example in examples])[None].to(device)
    parts = _audio_parts(examples, vocabulary, device)
    arguments = {
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None].to(device),
        # a four-dimensional mask is used as it is
        "attention_mask": input_ids.new_empty(1, 1, 1, 1) if parts is None else torch.cat(parts)[None, None, None],
        **dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), borders),
        **dict.fromkeys(("max_length_q", "max_length_k"), max(lengths)),
    }
    return Batch(input_ids, torch.cat(_targets(examples)).to(device), join_features(examples), arguments)


def pad(
    examples: Sequence[Example], device: torch.device | str = "cpu", vocabulary: AudioVocabulary | None = None
) -> Batch:
    """Examples in a row each, B of them, padded on the right: what is before it does not depend on it in any model.

    vocabulary: as in `pack`.
    """
    ids = pad_sequence([example.input_ids for example in examples], batch_first=True)
    targets = pad_sequence(_targets(examples), batch_first=True, padding_value=IGNORED)
    lengths = torch.tensor([len(example) for example in examples])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long().to(device)
    if parts := _audio_parts(examples, vocabulary, device):
        mask = pad_sequence(parts, batch_first=True, padding_value=PADDING)[:, None, None]
    arguments = {"attention_mask": mask}
    return Batch(ids.to(device), targets.flatten().to(device), join_features(examples), arguments)


def _audio_parts(
    examples: Sequence[Example], vocabulary: AudioVocabulary | None, device: torch.device | str
) -> list[Tensor] | None:
    """Of each example the numbers of the audio that its tokens are in, where they attend in both directions."""
    if vocabulary is None or not vocabulary.prefix_attention:
        return None
    parts = (vocabulary.audio_parts(one.input_ids) if one.parts is None else one.parts for one in examples)
    return [part.to(device) for part in parts]


def _targets(examples: Sequence[Example]) -> list[Tensor]:
    return [F.pad(example.labels[1:], (0, 1), value=IGNORED) for example in examples]


def can_pack(model: PreTrainedModel | PeftModel) -> bool:
    """Give a language model the attention for packed examples and return whether they are independent in it.

    They are not where layers pass a state along the sequence (convolutions, linear attention, Mamba), or attend by
    code of their own or in a way that SDPA lacks (GPT-J; soft caps, sinks); then the model stays as it is.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    if not model._supports_sdpa or model._is_stateful or not kinds <= {"full_attention", "sliding_attention"}:
        return False
    model.set_attn_implementation(PACKED)
    return config._attn_implementation == PACKED  # transformers refuses it to some models


def require_attention(model: PreTrainedModel | PeftModel, vocabulary: AudioVocabulary) -> None:
    """Give a language model in which audio attends in both directions the attention that does it.

    Raises PackingError for a model that cannot have it (`can_pack`). Does nothing for other vocabularies.
    """
    if vocabulary.prefix_attention and not can_pack(model):
        raise PackingError(
            f"{model.config.model_type}: its layers or its attention cannot be told that audio attends in both "
            "directions; set prefix_attention=false"
        )


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int = 0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' SDPA attention, causal within each example of a `pack`; without borders, the usual one.

    query, key, value: [1, heads, S, D]; cu_seq_lens_q: int32 [examples + 1], the start of each example and the end of
    the last one; max_length_q: tokens of the longest. On a GPU in half precision this is one call of PyTorch's
    variable-length attention, otherwise one call per example. transformers can also use an S x S mask, which is exact,
    too, but computes and stores the whole square.
    attention_mask: long [B, 1, 1, S], the numbers of the audio that tokens are in (`AudioVocabulary.audio_parts`), in
    which tokens also see later ones; then there is one call per example with a square of its own, on a GPU, too.
    Raises PackingError where a model has not passed the borders on.
    """
    # of `pack` or `pad`, not made by transformers
    given = attention_mask if attention_mask is not None and attention_mask.dtype == torch.long else None
    audio = given if given is not None and given.shape[3] == query.shape[2] > 1 else None
    if cu_seq_lens_q is None and given is not None and audio is None:
        raise PackingError(f"{type(module).__name__} is not told where packed examples end; set packing=false")
    window = kwargs.get("sliding_window") or key.shape[2]  # tokens that one attends to, itself included
    if cu_seq_lens_q is None:
        mask = attention_mask
        if audio is not None:  # in a static cache there is room behind the prompts
            mask = F.pad(_mask(audio, window), (0, key.shape[2] - query.shape[2]))
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype
    ampere = query.is_cuda and torch.cuda.get_device_capability(query.device) >= (8, 0)  # oldest GPU of the kernel
    if audio is None and ampere and dtype != torch.float32 and not kwargs.get("dropout"):
        longest, scale = max_length_q, kwargs.get("scaling")
        return _attend_at_once(query, key, value, longest, cu_seq_lens_q, scale, dtype, window), None
    lengths = cu_seq_lens_q.diff().tolist()
    outside = torch.zeros(1, 1, 1, query.shape[2], dtype=torch.long, device=query.device)
    audios = (outside if audio is None else audio).split(lengths, 3)
    masks = [None if audio is None and part.shape[3] <= window else _mask(part, window) for part in audios]
    parts = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), masks, strict=True)
    return torch.cat([sdpa_attention_forward(module, *part, **kwargs)[0] for part in parts], 1), None


def _mask(audio: Tensor, window: int) -> Tensor:
    """bool [B, 1, S, S]: which tokens (last axis) each one attends to; audio: long [B, 1, 1, S], as above.

    Within an audio the window does not count, as for the pictures of Gemma 3. Padding sees what is before it.
    """
    size = audio.shape[3]
    causal = torch.ones(size, size, dtype=torch.bool, device=audio.device).tril()
    other = audio.transpose(2, 3)
    heard = (audio == other) & (audio > 0)
    # on the left, padding is seen by nobody but itself, since every token must see one
    real = (audio != PADDING) | torch.eye(size, dtype=torch.bool, device=audio.device)
    return (causal.triu(1 - window) | heard) & real


def _attend_at_once(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    longest: int,
    borders: Tensor,
    scale: float | None,
    dtype: torch.dtype,
    window: int,
) -> Tensor:
    """FlashAttention (Dao et al., 2205.14135) within examples of different lengths; returns [1, S, heads, D]."""
    shared = query.shape[1] // key.shape[1]  # query heads per key and value head
    key, value = (x.repeat_interleave(shared, 1) for x in (key, value))
    q, k, v = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))  # [S, heads, D]
    before = window - 1 if window < longest else -1  # all tokens
    attended = varlen_attn(q, k, v, borders, borders, longest, longest, scale=scale, window_size=(before, 0))
    return cast(Tensor, attended)[None]


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)  # used in generation, where batches are padded


def micro_batches(lengths: Sequence[int], tokens: int, process: int = 0, processes: int = 1) -> list[list[int]]:
    """One process's share of a batch of examples with these lengths, split into parts of about `tokens` tokens.

    Parts are computed one after the other; they hold places in the batch. Every process gets the same number of parts
    of about the same size, because processes have to stay in step. If there are fewer examples than parts, the
    remaining parts are empty.
    """
    count = processes * math.ceil(sum(lengths) / (processes * tokens))
    parts: list[list[int]] = [[] for _ in range(count)]
    totals = [0] * count
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):  # each into the smallest part so far
        smallest = totals.index(min(totals))
        parts[smallest].append(place)
        totals[smallest] += lengths[place]
    return parts[process::processes]


def unlabelled(example: Example) -> Example:
    """An example without labels, for a part that would be empty."""
    return replace(example, labels=torch.full_like(example.labels, IGNORED))
