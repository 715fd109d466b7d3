"""How an utterance becomes a training example: [prompt][audio][transcript][end], loss on the transcript only."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from speechllm.vocabulary import AudioVocabulary, text_token_ids
from tokenizer import Codes

PROMPT = "Transcribe this speech"  # paper, section 3.4; the same in training and evaluation
IGNORED = -100


@dataclass(frozen=True)
class Example:
    """input_ids long [S]; labels long [S], -100 wherever nothing is to be learnt (all but transcript and end)."""

    input_ids: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.input_ids)


def transcription_prompt(
    codes: Codes | Tensor, vocabulary: AudioVocabulary, text_tokenizer: PreTrainedTokenizerBase
) -> Tensor:
    """What the model reads before it answers: prompt and audio of codes long [Q, T], long [S]."""
    prompt = text_token_ids(text_tokenizer, [PROMPT])[0]
    return torch.cat([torch.tensor(prompt), vocabulary.token_ids(codes)])


def transcription_example(
    codes: Tensor, text: str, vocabulary: AudioVocabulary, text_tokenizer: PreTrainedTokenizerBase
) -> Example:
    """One example of codes long [Q, T] and their transcript, which ends with the tokenizer's end token."""
    prompt = transcription_prompt(codes, vocabulary, text_tokenizer)
    answer = torch.tensor([*text_token_ids(text_tokenizer, [text])[0], text_tokenizer.eos_token_id])
    labels = torch.cat([torch.full_like(prompt, IGNORED), answer])
    return Example(torch.cat([prompt, answer]), labels)


def text_example(text: str, text_tokenizer: PreTrainedTokenizerBase) -> Example:
    """A sentence alone, every token learnt: for teaching a new language model its language."""
    ids = torch.tensor([*text_token_ids(text_tokenizer, [text])[0], text_tokenizer.eos_token_id])
    return Example(ids, ids.clone())


def collate(examples: Sequence[Example], pad_id: int) -> dict[str, Tensor]:
    """Pad on the right: input_ids, labels and attention_mask, long [B, S]."""
    size = max(map(len, examples))
    batch = {
        "input_ids": torch.full((len(examples), size), pad_id),
        "labels": torch.full((len(examples), size), IGNORED),
        "attention_mask": torch.zeros(len(examples), size, dtype=torch.long),
    }
    for row, example in enumerate(examples):
        batch["input_ids"][row, : len(example)] = example.input_ids
        batch["labels"][row, : len(example)] = example.labels
        batch["attention_mask"][row, : len(example)] = 1
    return batch


def substitute_neighbours(input_ids: Tensor, neighbours: Tensor, share: float) -> Tensor:
    """Augmentation for training: a random `share` of the codes is replaced by close ones; text stays as it is.

    input_ids long [B, S]; neighbours long [rows, count] of `AudioVocabulary.neighbours`. Another voice turns sounds
    into neighbouring codes: a model that has seen them swapped depends less on the voices it was trained with.
    """
    chosen = torch.rand(input_ids.shape) < share
    pick = torch.randint(neighbours.shape[1], input_ids.shape)
    return torch.where(chosen, neighbours[input_ids, pick], input_ids)


def collate_prompts(prompts: Sequence[Tensor], pad_id: int) -> dict[str, Tensor]:
    """Pad on the left, as generation needs it: input_ids and attention_mask, long [B, S]."""
    size = max(map(len, prompts))
    input_ids = torch.full((len(prompts), size), pad_id)
    mask = torch.zeros(len(prompts), size, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        input_ids[row, size - len(prompt) :] = prompt
        mask[row, size - len(prompt) :] = 1
    return {"input_ids": input_ids, "attention_mask": mask}
