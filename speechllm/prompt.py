"""Training examples: [prompt][audio][transcript][end], with the loss on the transcript only."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from speechllm.encoding import Speech
from speechllm.vocabulary import AudioVocabulary, opening_token_ids, text_token_ids
from tokenizer.interface import Codes

PROMPT = "Transcribe this speech"  # paper, section 3.4; the same in training and evaluation
IGNORED = -100


@dataclass(frozen=True)
class Example:
    """input_ids long [S]; labels long [S], -100 at positions without a loss.

    features: float [P, C], those of the P placeholders among the ids; None without placeholders.
    """

    input_ids: Tensor
    labels: Tensor
    features: Tensor | None = None

    def __len__(self) -> int:
        return len(self.input_ids)


def transcription_prompt(
    speech: Codes | Speech, vocabulary: AudioVocabulary, text_tokenizer: PreTrainedTokenizerBase
) -> Example:
    """The model's input before its answer: the prompt and one utterance, without labels."""
    prompt = torch.tensor(opening_token_ids(text_tokenizer, PROMPT))
    ids = torch.cat([prompt, vocabulary.token_ids(speech, text_tokenizer)])
    return Example(ids, torch.full_like(ids, IGNORED), vocabulary.features(speech))


def transcription_example(
    speech: Codes | Speech,
    text: str,
    vocabulary: AudioVocabulary,
    text_tokenizer: PreTrainedTokenizerBase,
    learn_speech: bool = False,
) -> Example:
    """The example of an utterance and its transcript, which ends with the tokenizer's end token.

    learn_speech: codes are labels, too.
    """
    prompt = transcription_prompt(speech, vocabulary, text_tokenizer)
    answer = torch.tensor([*text_token_ids(text_tokenizer, [text])[0], text_tokenizer.eos_token_id])
    learnt = vocabulary.is_code(prompt.input_ids) & learn_speech
    labels = torch.cat([prompt.input_ids.where(learnt, IGNORED), answer])
    return replace(prompt, input_ids=torch.cat([prompt.input_ids, answer]), labels=labels)


def label_counts(examples: Sequence[Example], vocabulary: AudioVocabulary) -> Tensor:
    """float [2]: number of text labels and of speech labels; the first token of an example is never predicted."""
    labels = torch.cat([example.labels[1:] for example in examples])
    speech = int(vocabulary.is_code(labels).sum())
    return torch.tensor([float((labels != IGNORED).sum()) - speech, float(speech)])


def text_example(text: str, text_tokenizer: PreTrainedTokenizerBase) -> Example:
    """A sentence without audio, every token a label: teaches a new language model its language."""
    ids = torch.tensor([*opening_token_ids(text_tokenizer, text), text_tokenizer.eos_token_id])
    return Example(ids, ids.clone())


def join_features(examples: Sequence[Example]) -> Tensor | None:
    """The concatenated features of all examples; None if there are none."""
    parts = [example.features for example in examples if example.features is not None]
    return torch.cat(parts) if parts else None


def collate_prompts(prompts: Sequence[Example], pad_id: int) -> dict[str, Tensor]:
    """Left-padded prompts for generation: input_ids and attention_mask, long [B, S]."""
    size = max(map(len, prompts))
    input_ids = torch.full((len(prompts), size), pad_id)
    mask = torch.zeros(len(prompts), size, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        input_ids[row, size - len(prompt) :] = prompt.input_ids
        mask[row, size - len(prompt) :] = 1
    return {"input_ids": input_ids, "attention_mask": mask}
