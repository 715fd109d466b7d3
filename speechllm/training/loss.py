"""The loss of a language model on examples, with logits only where there is a label."""

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

SMOOTHING = 0.1  # of the labels of speech


class LabelledLoss(nn.Module):
    """A language model as a function of examples to their summed loss, with logits only where there is a label.

    Speech is most of every sequence and carries no label, so this saves nearly all of the head's work and memory. The
    examples are packed: no padding is computed, and none sees another. Changes the model's attention to that end.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, vocabulary: AudioVocabulary):
        super().__init__()
        self.model = model
        self.vocabulary = vocabulary
        model.set_attn_implementation(PACKED)

    def forward(self, examples: Sequence[Example]) -> Tensor:
        """Float [2]: cross entropy summed over the labels of text, and over those of speech.

        Of speech the choice among the codes alone is judged, against smoothed labels: up to constants that is cross
        entropy and Kullback-Leibler divergence together (Chen et al. 2023, arXiv 2311.04534).
        """
        packed = pack(examples, self.model.device)
        hidden = self.model.get_decoder()(
            **model_inputs(self.model, self.vocabulary, packed.input_ids, packed.features),
            position_ids=packed.position_ids,
            attention_mask=packed.input_ids.new_empty(1, 1, 1, 1),  # one of four dimensions is taken for ready-made
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
        choice = F.linear(hidden[speech], head.weight[codes], bias).float()  # a hundredth of all logits, for Qwen2
        targets = packed.targets[speech] - codes.start
        speech_loss = F.cross_entropy(choice, targets, reduction="sum", label_smoothing=SMOOTHING)
        return torch.stack([text_loss, speech_loss])
