"""Conversations of text and speech, and how they are written as tokens."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any, Literal, cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from speechllm.vocabulary import AudioVocabulary, opening_token_ids, template_token_ids, text_token_ids
from tokenizer.errors import InputError

Role = Literal["system", "user", "assistant"]
MARK = re.compile("\ue000(\\d+)\ue001")  # stands for a part while a chat template is filled in: characters of no script
TODAY = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")  # in a chat template
DATE = date(2024, 7, 26)  # Llama-3.2's own, where it does not know today's


class ConversationError(InputError):
    """A conversation that cannot be written, or a chat template that cannot be used."""


@dataclass(frozen=True)
class Audio:
    """Speech within a message: `Codes`, one encoded utterance, or whatever stands for it until it is needed."""

    speech: Any


@dataclass(frozen=True)
class Message:
    """What one side says: texts and speech, in their order."""

    role: Role
    parts: tuple[str | Audio, ...]


Conversation = Sequence[Message]


@dataclass(frozen=True)
class Piece:
    """A stretch of a conversation as it is written: token ids, or speech. learnt: a part of an answer, or its end."""

    content: list[int] | Audio
    learnt: bool


def fixed_template(text_tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template of a text tokenizer, with every prompt as it will be tomorrow, and without thinking.

    Llama-3.2's writes today's date. Qwen3's, SmolLM3's and Qwen3.5's would have the model think before it answers.
    """
    written = TODAY.sub(lambda found: repr(DATE.strftime(found[2])), text_tokenizer.get_chat_template())
    return "{%- set enable_thinking = false %}\n" + written  # the first line end behind a block is not written


class ConversationWriter:
    """Writes conversations as the tokens of a language model, by the template of its audio vocabulary.

    plain: what is said, one after the other, after the tokens with which the tokenizer begins a text, and an end token
    after each answer: the paper's form. chat: the text tokenizer's own chat template (`fixed_template`), whose
    special tokens frame the messages. In both, what is said is tokenized by itself and never becomes a special token.
    """

    def __init__(self, vocabulary: AudioVocabulary, text_tokenizer: PreTrainedTokenizerBase):
        self.vocabulary, self.text_tokenizer = vocabulary, text_tokenizer
        self._layouts: dict[Any, list[tuple[list[int] | None, bool]]] = {}

    def pieces(self, conversations: Sequence[Conversation], answering: bool = False) -> list[list[Piece]]:
        """Every conversation in its pieces; all texts are tokenized at once.

        answering: up to where the answer to the last message begins. Raises ConversationError for a chat template that
        cannot write them.
        """
        texts = [part for turns in conversations for turn in turns for part in turn.parts if isinstance(part, str)]
        ids = iter(text_token_ids(self.text_tokenizer, texts))
        return [self._filled(turns, ids, answering) for turns in conversations]

    def _filled(self, turns: Conversation, ids: Iterator[list[int]], answering: bool) -> list[Piece]:
        shape = tuple((turn.role, len(turn.parts)) for turn in turns), answering
        if shape not in self._layouts:
            self._layouts[shape] = self._plain(*shape) if self.vocabulary.template == "plain" else self._chat(*shape)
        parts = (part for turn in turns for part in turn.parts)
        pieces = []
        for fixed, learnt in self._layouts[shape]:
            if fixed is None:  # what is said comes here
                part = next(parts)
                pieces.append(Piece(part if isinstance(part, Audio) else next(ids), learnt))
            else:
                pieces.append(Piece(fixed, learnt))
        return pieces

    def _plain(self, turns: tuple[tuple[Role, int], ...], answering: bool) -> list[tuple[list[int] | None, bool]]:
        layout: list[tuple[list[int] | None, bool]] = [(opening_token_ids(self.text_tokenizer, ""), False)]
        for role, parts in turns:
            layout += [(None, role == "assistant")] * parts
            if role == "assistant":
                layout.append(([cast(int, self.text_tokenizer.eos_token_id)], True))
        return layout

    def _chat(self, turns: tuple[tuple[Role, int], ...], answering: bool) -> list[tuple[list[int] | None, bool]]:
        written = self._fill_template(turns, answering)
        first, *rest = MARK.split(written)
        learnt = [role == "assistant" for role, parts in turns for _ in range(parts)]
        last = [place == parts - 1 for _, parts in turns for place in range(parts)]  # of its message
        if rest[::2] != [str(place) for place in range(len(learnt))]:
            raise ConversationError("the chat template leaves out or moves what a message says: set template=plain")
        layout: list[tuple[list[int] | None, bool]] = [(template_token_ids(self.text_tokenizer, first), False)]
        for answers, ends, text in zip(learnt, last, rest[1::2], strict=True):
            ids = template_token_ids(self.text_tokenizer, text)
            layout.append((None, answers))
            if answers and ends:
                if ids[:1] != [self.text_tokenizer.eos_token_id]:
                    raise ConversationError(
                        f"the chat template goes on after an answer with {text[:20]!r}, but the end token (eos_token) "
                        f"is {self.text_tokenizer.eos_token!r}: set that in tokenizer_config.json, or template=plain"
                    )
                layout.append((ids[:1], True))
                ids = ids[1:]
            layout.append((ids, False))
        return layout

    def _fill_template(self, turns: tuple[tuple[Role, int], ...], answering: bool) -> str:
        """The chat template with a MARK for every part. An answer begins where the template asks for one."""
        if self.text_tokenizer.chat_template is None:
            raise ConversationError(
                "template: chat needs a text tokenizer with a chat template, as instruct models have, and this one "
                "has none: set template=plain"
            )
        messages, number = [], 0
        for role, parts in turns:
            content = "".join(f"\ue000{place}\ue001" for place in range(number, number + parts))
            messages.append({"role": role, "content": content})
            number += parts
        try:
            written = self._apply(messages, answering)
            answers = [place for place, (role, _) in enumerate(turns) if role == "assistant" and place]
            # of a prompt nothing is learnt, and Qwen3's template writes earlier answers without the empty thought
            asked = {} if answering else {place: self._apply(messages[:place], True) for place in answers}
        except TemplateError as error:
            roles = ", ".join(role for role, _ in turns)
            raise ConversationError(f"the chat template refuses messages by {roles}: {error}") from error
        if not all(written.startswith(prompt + messages[place]["content"]) for place, prompt in asked.items()):
            raise ConversationError(
                "the chat template begins an answer within a conversation otherwise than it asks for one: set "
                "template=plain"
            )
        return written

    def _apply(self, messages: list[dict[str, str]], answering: bool) -> str:
        template = fixed_template(self.text_tokenizer)
        written = self.text_tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=answering
        )
        return cast(str, written)
