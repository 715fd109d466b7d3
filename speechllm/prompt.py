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
    """input_ids long [S]; labels long [S], -100 wherever nothing is to be learnt."""

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
    codes: Tensor,
    text: str,
    vocabulary: AudioVocabulary,
    text_tokenizer: PreTrainedTokenizerBase,
    learn_speech: bool = False,
) -> Example:
    """One example of codes long [Q, T] and their transcript, which ends with the tokenizer's end token.

    learn_speech: the codes are labels, too.
    """
    prompt = transcription_prompt(codes, vocabulary, text_tokenizer)
    answer = torch.tensor([*text_token_ids(text_tokenizer, [text])[0], text_tokenizer.eos_token_id])
    learnt = is_code(prompt, vocabulary) & learn_speech
    labels = torch.cat([prompt.where(learnt, IGNORED), answer])
    return Example(torch.cat([prompt, answer]), labels)


def is_code(ids: Tensor, vocabulary: AudioVocabulary) -> Tensor:
    """bool, like ids: which are audio codes (not markers, not text)."""
    return (ids >= vocabulary.offset) & (ids < vocabulary.start_id)


def label_counts(examples: Sequence[Example], vocabulary: AudioVocabulary) -> Tensor:
    """float [2]: labels of text and labels of speech; the first token of an example is predicted by nothing."""
    labels = torch.cat([example.labels[1:] for example in examples])
    speech = int(is_code(labels, vocabulary).sum())
    return torch.tensor([float((labels != IGNORED).sum()) - speech, float(speech)])


def text_example(text: str, text_tokenizer: PreTrainedTokenizerBase) -> Example:
    """A sentence alone, every token learnt: for teaching a new language model its language."""
    ids = torch.tensor([*text_token_ids(text_tokenizer, [text])[0], text_tokenizer.eos_token_id])
    return Example(ids, ids.clone())


def collate_prompts(prompts: Sequence[Tensor], pad_id: int) -> dict[str, Tensor]:
    """Pad on the left, as generation needs it: input_ids and attention_mask, long [B, S]."""
    size = max(map(len, prompts))
    input_ids = torch.full((len(prompts), size), pad_id)
    mask = torch.zeros(len(prompts), size, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        input_ids[row, size - len(prompt) :] = prompt
        mask[row, size - len(prompt) :] = 1
    return {"input_ids": input_ids, "attention_mask": mask}
