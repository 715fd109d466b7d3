"""The loss of a language model on examples, with logits only at labelled positions."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from speechllm.data.packing import PACKED, pack
from speechllm.projector import model_inputs
from speechllm.prompt import IGNORED, Example
from speechllm.vocabulary import AudioVocabulary

SMOOTHING = 0.1  # of speech labels


class LabelledLoss(nn.Module):
    """A language model as a function from examples to their summed loss, with logits only at labelled positions.

    Most of every sequence is speech without labels, so this saves nearly all of the head's time and memory. Examples
    are packed: without padding and without attention to each other. Changes the model's attention implementation.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, vocabulary: AudioVocabulary):
        super().__init__()
        self.model = model
        self.vocabulary = vocabulary
        model.set_attn_implementation(PACKED)

    def forward(self, examples: Sequence[Example]) -> Tensor:
        """Float [2]: cross entropy summed over the text labels, and over the speech labels.

        The cross entropy of speech is over codes only, with label smoothing: up to constants this is the sum of cross
        entropy and Kullback-Leibler divergence (Chen et al. 2023, arXiv 2311.04534).
        """
        packed = pack(examples, self.model.device)
        hidden = self.model.get_decoder()(
            **model_inputs(self.model, self.vocabulary, packed.input_ids, packed.features),
            position_ids=packed.position_ids,
            attention_mask=packed.input_ids.new_empty(1, 1, 1, 1),  # a four-dimensional mask is used as it is
            lengths=packed.lengths,
            borders=packed.borders,
            use_cache=False,
        ).last_hidden_state[0]
        head = self.model.get_output_embeddings()
        speech = self.vocabulary.is_code(packed.targets)
        text = (packed.targets != IGNORED) & ~speech
        text_loss = F.cross_entropy(head(hidden[text]).float(), packed.targets[text], reduction="sum")
        if not speech.any():
            return torch.stack([text_loss, torch.zeros_like(text_loss)])
        codes = slice(self.vocabulary.offset, self.vocabulary.start_id)
        bias = None if getattr(head, "bias", None) is None else head.bias[codes]
        choice = F.linear(hidden[speech], head.weight[codes], bias).float()  # one hundredth of all logits of Qwen2
        targets = packed.targets[speech] - codes.start
        speech_loss = F.cross_entropy(choice, targets, reduction="sum", label_smoothing=SMOOTHING)
        return torch.stack([text_loss, speech_loss])
