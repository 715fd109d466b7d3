"""The loss of a language model on examples, with logits only at labelled positions."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from speechllm.data.packing import PackingError, can_pack, pack, pad, require_attention
from speechllm.projector import model_inputs
from speechllm.prompt import IGNORED, Example
from speechllm.vocabulary import AudioVocabulary

SMOOTHING = 0.1  # of speech labels
CHECKED = 32, 8  # tokens of the examples in `check_loss`
TOLERANCE = 1e-4  # relative, in float32


class Examples(Protocol):
    """Examples by their places."""

    def __len__(self) -> int: ...
    def __getitem__(self, place: int, /) -> Example: ...


class LabelledLoss(nn.Module):
    """A language model as a function from examples to their summed loss, with logits only at labelled positions.

    Most of every sequence is speech without labels, so this saves nearly all of the head's time and memory. Examples
    are packed: without padding and without attention to each other, which changes the model's attention
    implementation; without `packing`, or where the model cannot pack (`can_pack`), they are padded.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, vocabulary: AudioVocabulary, packing: bool = True):
        super().__init__()
        self.model = model
        self.vocabulary = vocabulary
        require_attention(model, vocabulary)
        self.packing = packing and can_pack(model)
        kinds = {type(module).__name__ for module in model.modules()}
        self._no_split_modules = sorted(kinds & set(model._no_split_modules or ()))  # what Accelerate's FSDP cuts

    def forward(self, examples: Sequence[Example]) -> Tensor:
        """Float [2]: cross entropy summed over the text labels, and over the speech labels.

        The cross entropy of speech is over codes only, with label smoothing: up to constants this is the sum of cross
        entropy and Kullback-Leibler divergence (Chen et al. 2023, arXiv 2311.04534).
        """
        batch = (pack if self.packing else pad)(examples, self.model.device, self.vocabulary)
        text, speech, codes = self._learnt(batch.targets)
        inputs = model_inputs(self.model, self.vocabulary, batch.input_ids, batch.features)
        with labelled_logits(self.model, text, speech, codes):
            logits = self.model(**inputs, **batch.arguments, use_cache=False).logits.flatten()
        heard, count = int(speech.sum()), codes.stop - codes.start
        words, choice = logits.split([len(logits) - heard * count, heard * count])
        words, choice = words.view(-1, self.vocabulary.size), choice.view(heard, count)
        return summed_loss(words, batch.targets[text], choice, batch.targets[speech] - codes.start)

    def alone(self, example: Example) -> Tensor:
        """The same of one example through the plain model, with logits at all positions."""
        batch = pad([example], self.model.device, self.vocabulary)
        text, speech, codes = self._learnt(batch.targets)
        inputs = model_inputs(self.model, self.vocabulary, batch.input_ids, batch.features)
        logits = self.model(**inputs, **batch.arguments, use_cache=False).logits[0]
        return summed_loss(
            logits[text], batch.targets[text], logits[speech][:, codes], batch.targets[speech] - codes.start
        )

    def _learnt(self, targets: Tensor) -> tuple[Tensor, Tensor, slice]:
        """Where text and where speech is learnt, bool like targets, and the rows of the codes."""
        speech = self.vocabulary.is_code(targets)
        return (targets != IGNORED) & ~speech, speech, slice(self.vocabulary.offset, self.vocabulary.start_id)


@torch.no_grad()
def check_loss(loss_of: LabelledLoss, examples: Examples) -> None:
    """Raise PackingError unless the beginnings of two examples lose together what they lose alone in the plain model.

    Every token of them is a label. Costs 80 tokens of computation and finds, in whatever family, layers that look
    across the border of packed examples, and logits that a model makes in another way than `labelled_logits` expects.
    """
    pairs = zip((examples[0], examples[len(examples) - 1]), CHECKED, strict=True)
    parts = [_beginning(example, size, loss_of.vocabulary) for example, size in pairs]
    training = loss_of.model.training
    loss_of.eval()
    found, expected = float(loss_of(parts).sum()), float(sum(loss_of.alone(part).sum() for part in parts))
    loss_of.model.train(training)
    if not abs(found - expected) <= TOLERANCE * expected:
        advice = "set packing=false" if loss_of.packing else "it cannot be trained here"
        raise PackingError(
            f"{loss_of.model.config.model_type}: two {'packed' if loss_of.packing else 'padded'} examples should lose "
            f"{expected:.4f}, as each alone in the plain model does, but lose {found:.4f}: {advice}"
        )


def check_loss_once(loss_of: LabelledLoss, examples: Examples, accelerator: Accelerator) -> None:
    """Raise PackingError, in every process, if the first one finds the loss wrong (`check_loss`)."""
    sharded = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    if accelerator.is_main_process or not sharded:
        loss_of.to(accelerator.device)  # where it is going to be, and where some families, and Liger, have kernels
    faults: list[PackingError | None] = [None]
    if accelerator.is_main_process:
        try:
            check_loss(loss_of, examples)
        except PackingError as error:
            faults = [error]
    if sharded:
        loss_of.cpu()
    if fault := broadcast_object_list(faults)[0]:
        raise fault


def _beginning(example: Example, size: int, vocabulary: AudioVocabulary) -> Example:
    """The first `size` tokens, all of them labels."""
    ids = example.input_ids[:size]
    features = None if example.features is None else example.features[: int(vocabulary.is_code(ids).sum())]
    return replace(example, input_ids=ids, labels=ids, features=features)


def summed_loss(words: Tensor, word_targets: Tensor, choice: Tensor, code_targets: Tensor) -> Tensor:
    """Float [2]: what `LabelledLoss` returns, of logits [N, rows] where text and [M, codes] where speech is learnt."""
    text_loss = F.cross_entropy(words.float(), word_targets, reduction="sum")
    if not len(choice):
        return torch.stack([text_loss, torch.zeros_like(text_loss)])
    speech_loss = F.cross_entropy(choice.float(), code_targets, reduction="sum", label_smoothing=SMOOTHING)
    return torch.stack([text_loss, speech_loss])


@contextmanager
def labelled_logits(model: PreTrainedModel | PeftModel, text: Tensor, speech: Tensor, codes: slice) -> Iterator[None]:
    """While active, a model returns the logits of all rows where `text`, then those of `codes` where `speech`.

    text, speech: bool [B * S]. What a model does to logits after its head (Granite and Cohere scale, Gemma-2 caps them)
    it does to each by itself, so that it takes them in one row: logits [1, 1, N * rows + M * codes].
    """
    heard: list[Tensor] = []

    def select(head: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        hidden = inputs[0].flatten(0, 1)
        heard.append(hidden[speech])
        return hidden[text]

    def add_codes(head: Any, inputs: tuple[Tensor], words: Tensor) -> Tensor:
        if not len(states := heard.pop()):  # to cut the codes' rows out costs as much as a copy of all rows
            return words.flatten()[None, None]
        bias = getattr(getattr(head, "original_module", head), "bias", None)  # the first of a head with PEFT's rows
        # one hundredth of all logits of Qwen2
        choice = F.linear(states, head.weight[codes], None if bias is None else bias[codes])
        return torch.cat([words.flatten(), choice.flatten()])[None, None]

    head = model.get_output_embeddings()
    hooks = head.register_forward_pre_hook(select), head.register_forward_hook(add_codes)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
