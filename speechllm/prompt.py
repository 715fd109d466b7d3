"""Training examples: conversations with the loss on the answers only, such as [prompt][audio][transcript][end]."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from speechllm.encoding import Speech
from speechllm.messages import Audio, Conversation, ConversationWriter, Message
from speechllm.vocabulary import AudioVocabulary
from tokenizer.interface import Codes

PROMPT = "Transcribe this speech"  # paper, section 3.4; the same in training and evaluation
IGNORED = -100


@dataclass(frozen=True)
class Example:
    """input_ids long [S]; labels long [S], -100 at positions without a loss.

    features: float [P, C], those of the P placeholders among the ids; None without placeholders.
    parts: long [S], as `AudioVocabulary.audio_parts`, where the ids, of which some are masked, no longer tell.
    """

    input_ids: Tensor
    labels: Tensor
    features: Tensor | None = None
    parts: Tensor | None = None

    def __len__(self) -> int:
        return len(self.input_ids)


def conversation_example(
    turns: Conversation, writer: ConversationWriter, learn_speech: bool = False, answering: bool = False
) -> Example:
    """A conversation with labels on its answers and their ends.

    learn_speech: codes are labels, too; answering: the model's input before its answer to the last message.
    """
    vocabulary = writer.vocabulary
    ids, labels, features = [], [], []
    for piece in writer.pieces([turns], answering)[0]:
        if isinstance(piece.content, Audio):
            tokens = vocabulary.token_ids(piece.content.speech, writer.text_tokenizer)
            learnt = vocabulary.is_code(tokens) & learn_speech
            features.append(vocabulary.features(piece.content.speech))
        else:
            tokens = torch.tensor(piece.content, dtype=torch.long)
            learnt = torch.full_like(tokens, piece.learnt, dtype=torch.bool)
        ids.append(tokens)
        labels.append(tokens.where(learnt, IGNORED))
    found = [one for one in features if one is not None]
    return Example(torch.cat(ids), torch.cat(labels), torch.cat(found) if found else None)


def transcription(speech: object, text: str | None = None) -> list[Message]:
    """The conversation in which an utterance is transcribed; without a text, up to the answer."""
    question = Message("user", (PROMPT, Audio(speech)))
    return [question] if text is None else [question, Message("assistant", (text,))]


def transcription_prompt(
    speech: Codes | Speech, vocabulary: AudioVocabulary, text_tokenizer: PreTrainedTokenizerBase
) -> Example:
    """The model's input before its answer: the prompt and one utterance, without labels."""
    writer = ConversationWriter(vocabulary, text_tokenizer)
    return conversation_example(transcription(speech), writer, answering=True)


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
    return conversation_example(
        transcription(speech, text), ConversationWriter(vocabulary, text_tokenizer), learn_speech
    )


def label_counts(examples: Sequence[Example], vocabulary: AudioVocabulary) -> Tensor:
    """float [2]: number of text labels and of speech labels; the first token of an example is never predicted."""
    labels = torch.cat([example.labels[1:] for example in examples])
    speech = int(vocabulary.is_code(labels).sum())
    return torch.tensor([float((labels != IGNORED).sum()) - speech, float(speech)])


def sentence(text: str) -> list[Message]:
    """A text that answers nothing, every token of it a label: teaches a new language model its language."""
    return [Message("assistant", (text,))]


def join_features(examples: Sequence[Example]) -> Tensor | None:
    """The concatenated features of all examples, float32; None if there are none.

    They are stored in half precision, which autocast on a CPU cannot join.
    """
    parts = [example.features.float() for example in examples if example.features is not None]
    return torch.cat(parts) if parts else None


def collate_prompts(prompts: Sequence[Example], pad_id: int) -> dict[str, Tensor]:
    """Left-padded prompts for generation: input_ids and attention_mask, long [B, S]."""
    ids = [prompt.input_ids for prompt in prompts]
    left: dict[str, Any] = {"batch_first": True, "padding_side": "left"}
    mask = pad_sequence([torch.ones_like(one) for one in ids], **left)
    return {"input_ids": pad_sequence(ids, padding_value=pad_id, **left), "attention_mask": mask}
