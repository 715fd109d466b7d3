"""How an utterance becomes a training example: [prompt][audio][transcript][end], loss on the transcript only."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from speechllm.encoding import Speech
from speechllm.vocabulary import AudioVocabulary, text_token_ids
from tokenizer.interface import Codes

PROMPT = "Transcribe this speech"  # paper, section 3.4; the same in training and evaluation
IGNORED = -100


@dataclass(frozen=True)
class Example:
    """input_ids long [S]; labels long [S], -100 wherever nothing is to be learnt.

    features: float [P, C], what the P placeholders among the ids stand for, None where there are none.
    """

    input_ids: Tensor
    labels: Tensor
    features: Tensor | None = None

    def __len__(self) -> int:
        return len(self.input_ids)


def transcription_prompt(
    speech: Codes | Speech, vocabulary: AudioVocabulary, text_tokenizer: PreTrainedTokenizerBase
) -> Example:
    """What the model reads before it answers: the prompt and one utterance; nothing of it is learnt."""
    prompt = torch.tensor(text_token_ids(text_tokenizer, [PROMPT])[0])
    ids = torch.cat([prompt, vocabulary.token_ids(speech, text_tokenizer)])
    return Example(ids, torch.full_like(ids, IGNORED), vocabulary.features(speech))


def transcription_example(
    speech: Codes | Speech,
    text: str,
    vocabulary: AudioVocabulary,
    text_tokenizer: PreTrainedTokenizerBase,
    learn_speech: bool = False,
) -> Example:
    """One example of an utterance and its transcript, which ends with the tokenizer's end token.

    learn_speech: codes are labels, too.
    """
    prompt = transcription_prompt(speech, vocabulary, text_tokenizer)
    answer = torch.tensor([*text_token_ids(text_tokenizer, [text])[0], text_tokenizer.eos_token_id])
    learnt = vocabulary.is_code(prompt.input_ids) & learn_speech
    labels = torch.cat([prompt.input_ids.where(learnt, IGNORED), answer])
    return replace(prompt, input_ids=torch.cat([prompt.input_ids, answer]), labels=labels)


def label_counts(examples: Sequence[Example], vocabulary: AudioVocabulary) -> Tensor:
    """float [2]: labels of text and labels of speech; the first token of an example is predicted by nothing."""
    labels = torch.cat([example.labels[1:] for example in examples])
    speech = int(vocabulary.is_code(labels).sum())
    return torch.tensor([float((labels != IGNORED).sum()) - speech, float(speech)])


def text_example(text: str, text_tokenizer: PreTrainedTokenizerBase) -> Example:
    """A sentence alone, every token learnt: for teaching a new language model its language."""
    ids = torch.tensor([*text_token_ids(text_tokenizer, [text])[0], text_tokenizer.eos_token_id])
    return Example(ids, ids.clone())


def join_features(examples: Sequence[Example]) -> Tensor | None:
    """The features of all examples, one after the other."""
    parts = [example.features for example in examples if example.features is not None]
    return torch.cat(parts) if parts else None


def collate_prompts(prompts: Sequence[Example], pad_id: int) -> dict[str, Tensor]:
    """Pad on the left, as generation needs it: input_ids and attention_mask, long [B, S]."""
    size = max(map(len, prompts))
    input_ids = torch.full((len(prompts), size), pad_id)
    mask = torch.zeros(len(prompts), size, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        input_ids[row, size - len(prompt) :] = prompt.input_ids
        mask[row, size - len(prompt) :] = 1
    return {"input_ids": input_ids, "attention_mask": mask}
