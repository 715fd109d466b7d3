"""Greedy decoding of many prompts at once: they are read without padding, and a row leaves when its answer ends."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from speechllm.data.packing import can_pack, pack
from speechllm.projector import model_inputs
from speechllm.prompt import Example
from speechllm.vocabulary import AudioVocabulary

ROOM = 64  # tokens by which the cache grows
CHECKED = 32, 8  # tokens of the sequences in `reads_packed`
TOLERANCE = 0.05  # of the spread of the logits; bfloat16 differs by a hundredth, a look across a border by far more

_READS_PACKED: WeakKeyDictionary[PreTrainedModel | PeftModel, bool] = WeakKeyDictionary()


@torch.no_grad()
def greedy_answers(
    prompts: Sequence[Example],
    bounds: Sequence[int],
    model: PreTrainedModel | PeftModel,
    vocabulary: AudioVocabulary,
    forbidden: Tensor,
    end_id: int,
) -> list[list[int]]:
    """The likeliest next tokens after each prompt, one after the other, up to the end token, which is not returned.

    bounds: largest number of tokens of each answer; forbidden: bool [rows], the tokens in none. For a model that
    `reads_packed`. An answer that has ended costs nothing more, however long the others become.
    """
    batch = pack(prompts, model.device, vocabulary)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    inputs = model_inputs(model, vocabulary, batch.input_ids, batch.features)
    cache = DynamicCache()
    last = lengths.cumsum(0) - 1
    read = model(**inputs, **batch.arguments, past_key_values=cache, use_cache=True, logits_to_keep=last)
    logits, positions = read.logits[0], lengths
    cache.layers = [_Rows(layer, lengths) for layer in cache.layers]
    answers: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))
    while True:
        tokens = logits.masked_fill(forbidden, -torch.inf).argmax(-1)
        staying = []
        for place, (row, token) in enumerate(zip(rows, tokens.tolist(), strict=True)):
            if token != end_id:
                answers[row].append(token)
                if len(answers[row]) < bounds[row]:
                    staying.append(place)
        if not staying:
            return answers
        if len(staying) < len(rows):
            rows = [rows[place] for place in staying]
            kept = torch.tensor(staying, device=model.device)
            tokens, positions = tokens[kept], positions[kept]
            for layer in cache.layers:
                layer.keep(kept, int(positions.max()))
        size = int(cache.get_seq_length()) + 1
        mask = torch.arange(size, device=model.device) >= size - 1 - positions[:, None]
        logits = model(
            input_ids=tokens[:, None],
            attention_mask=mask.long(),
            position_ids=positions[:, None],
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]
        positions = positions + 1


class _Rows(DynamicLayer):
    """Keys and values [B, heads, S, D] of rows that end together, with room behind: a step copies only its token."""

    def __init__(self, packed: DynamicLayer, lengths: Tensor):
        """packed: the layer after reading sequences of these lengths in one row; it is emptied."""
        super().__init__()
        self.lazy_initialization(packed.keys, packed.values)
        size = int(lengths.max())
        starts = lengths.cumsum(0) - size  # where a row would begin if those before it ended there
        places = (starts[:, None] + torch.arange(size, device=lengths.device)).clamp(min=0)
        self.keys = packed.keys[0][:, places].transpose(0, 1)
        self.values = packed.values[0][:, places].transpose(0, 1)
        packed.keys = packed.values = None
        self._room = self.keys, self.values

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        start = self.keys.shape[2]
        size = start + key_states.shape[2]
        if size > self._room[0].shape[2]:
            keys, values = (F.pad(x, (0, 0, 0, ROOM)) for x in (self.keys, self.values))
            self._room = keys, values
        for held, new in zip(self._room, (key_states, value_states), strict=True):
            held[:, :, start:size] = new
        self.keys, self.values = (held[:, :, :size] for held in self._room)
        return self.keys, self.values

    def keep(self, kept: Tensor, size: int) -> None:
        """Only these rows, and of each the last `size` tokens."""
        self.keys, self.values = (x[:, :, -size:][kept] for x in (self.keys, self.values))
        self._room = self.keys, self.values


@torch.no_grad()
def reads_packed(model: PreTrainedModel | PeftModel) -> bool:
    """Whether packed prompts are independent in a language model, which then has the attention for them (`can_pack`).

    Checked once per model with 40 tokens, because a family may look across the borders in a way nobody knew.
    """
    attention = model.config.get_text_config()._attn_implementation
    if not can_pack(model):
        return False
    if model not in _READS_PACKED:
        _READS_PACKED[model] = _independent(model)
    if not _READS_PACKED[model]:
        model.set_attn_implementation(attention)
    return _READS_PACKED[model]


def _independent(model: PreTrainedModel | PeftModel) -> bool:
    """Whether the last logits of two packed sequences are those of each alone."""
    parts = torch.arange(sum(CHECKED)).split([*CHECKED])
    batch = pack([Example(part, part) for part in parts], model.device)
    last = torch.tensor(CHECKED, device=model.device).cumsum(0) - 1
    try:
        found = model(input_ids=batch.input_ids, **batch.arguments, use_cache=False, logits_to_keep=last).logits[0]
    except Exception:  # whatever the code of a family makes of what it does not know
        return False
    alone = [model(input_ids=part[None].to(model.device), use_cache=False).logits[0, -1] for part in parts]
    expected = torch.stack(alone).float()
    spread = (expected - expected.mean(1, keepdim=True)).norm(dim=1)
    return bool(((found.float() - expected).norm(dim=1) <= TOLERANCE * spread).all())


@contextmanager
def contiguous_states(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """While active, the output layer gets contiguous states.

    `generate` cuts the last one out of each prompt's, for which torch on a CPU copies that layer once a row.
    """
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
    try:
        yield
    finally:
        hook.remove()
