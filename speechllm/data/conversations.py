"""Rows of training data as examples, each of which is made when it is asked for."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import overload

import numpy as np

from speechllm.data.augmentation import Augmentation
from speechllm.data.batches import token_batches
from speechllm.data.encoded import EncodedSpeech
from speechllm.data.packing import micro_batches, unlabelled
from speechllm.messages import Audio, Conversation, ConversationWriter, Message
from speechllm.prompt import Example, conversation_example, transcription
from tokenizer.prefetch import prefetch

STEPS_AHEAD = 2  # whose examples wait in memory


@dataclass(frozen=True)
class Row:
    """A conversation for training or evaluation; its `Audio` holds the number of an encoded utterance.

    name: where it comes from; weight: how often it is read in an epoch.
    """

    turns: Conversation
    name: str
    task: str = "transcription"
    weight: float = 1.0

    @property
    def answered(self) -> bool:
        """Whether the last message is an answer."""
        return self.turns[-1].role == "assistant"

    @property
    def answers(self) -> list[str]:
        """What the assistant says, one text per message."""
        return ["".join(map(str, turn.parts)) for turn in self.turns if turn.role == "assistant"]


class LazyRows(Sequence[Row]):
    """`size` rows of which each is made, by its place, when it is asked for."""

    def __init__(self, size: int, make: Callable[[int], Row]):
        self.size, self.make = size, make

    def __len__(self) -> int:
        return self.size

    @overload
    def __getitem__(self, place: int) -> Row: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Row]: ...

    def __getitem__(self, place: int | slice) -> Row | Sequence[Row]:
        places = range(self.size)[place]
        return self.make(places) if isinstance(places, int) else [*map(self.make, places)]


def transcription_rows(speech: EncodedSpeech, numbers: Sequence[int] | np.ndarray | None = None) -> Sequence[Row]:
    """The paper's rows: every utterance is to be transcribed. numbers: by which rows name them, if not their places."""
    texts, ids = speech["text"], speech["id"]
    known = range(len(speech)) if numbers is None else numbers
    return LazyRows(len(speech), lambda place: Row(transcription(int(known[place]), texts[place]), ids[place]))


class Conversations:
    """The examples of rows, each made when it is asked for: `conversations[3]`.

    Until then only the texts of the rows are in memory. `sizes` tells lengths, for which only texts and a
    compressor's vectors are read.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        speech: EncodedSpeech | None,
        writer: ConversationWriter,
        learn_speech: bool = False,
        weights: np.ndarray | None = None,
    ):
        """speech: whose utterances the rows name by their numbers; may be None without any.

        weights: float [rows], how often each is read in an epoch; once when None.
        """
        self.rows, self.speech, self.writer = rows, speech, writer
        self.learn_speech, self.weights = learn_speech, weights
        spelled = speech is not None and (speech.encoding.kind == "text" or speech.encoding.labels)
        self._frames = None if speech is None or spelled else speech.frames
        self._sizes = np.zeros((len(rows), 2), np.int64)  # tokens and text labels; no tokens: not counted yet

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> Example:
        return conversation_example(self._turns(place), self.writer, self.learn_speech)

    def prompt(self, place: int) -> Example:
        """The model's input before the answer that a row ends with, or after a row without one."""
        turns = self._turns(place)
        return conversation_example(turns[: len(turns) - self.rows[place].answered], self.writer, answering=True)

    def _turns(self, place: int) -> list[Message]:
        return [replace(turn, parts=tuple(map(self._heard, turn.parts))) for turn in self.rows[place].turns]

    def _heard(self, part: str | Audio) -> str | Audio:
        if isinstance(part, str):
            return part
        assert self.speech is not None
        return Audio(self.speech.speech(part.speech))

    def sizes(self, places: Sequence[int] | np.ndarray) -> np.ndarray:
        """Number of tokens, and of text labels among them, of these rows: long [N, 2].

        Counted by tokenizing the texts, many at once, and remembered.
        """
        places = np.asarray(places)
        new = np.unique(places[self._sizes[places, 0] == 0])
        for place, pieces in zip(new, self.writer.pieces([self.rows[i].turns for i in new.tolist()]), strict=True):
            for piece in pieces:
                count = self._audio_tokens(piece.content) if isinstance(piece.content, Audio) else len(piece.content)
                self._sizes[place] += count, count * piece.learnt
        return self._sizes[places]

    def lengths(self, places: Sequence[int] | np.ndarray) -> np.ndarray:
        """Number of tokens of these rows, long [N]."""
        return self.sizes(places)[:, 0]

    def names(self, places: Iterable[int]) -> list[str]:
        """Where these rows come from."""
        return [self.rows[place].name for place in places]

    def _audio_tokens(self, audio: Audio) -> int:
        vocabulary = self.writer.vocabulary
        if self._frames is not None:
            return vocabulary.token_count(int(self._frames[audio.speech]))
        assert self.speech is not None
        return len(vocabulary.token_ids(self.speech.speech(audio.speech), self.writer.text_tokenizer))


@dataclass(frozen=True)
class StepExamples:
    """What one process computes in an optimizer step: examples in micro-batches.

    rows: of the whole batch, over all processes; tokens: of these rows, before augmentation.
    """

    parts: list[list[Example]]
    rows: np.ndarray
    tokens: int


def step_examples(
    conversations: Conversations,
    batch_tokens: int,
    micro_batch_tokens: int,
    seed: int,
    start: int = 0,
    process: int = 0,
    processes: int = 1,
    augmentation: Augmentation | None = None,
) -> Iterator[StepExamples]:
    """The shares of one process of successive optimizer steps, from step number `start` on; endless.

    They are made in a thread while the caller works. Batches are planned from lengths, so that only a process's own
    share is made and augmented. A pure function of its arguments, so that a resumed run continues at the same place;
    augmentation is drawn from seed, step and example.
    """
    steps = _steps(conversations, batch_tokens, micro_batch_tokens, seed, start, process, processes, augmentation)
    return prefetch(lambda _: next(steps), itertools.count(), ahead=STEPS_AHEAD, threads=1)


def _steps(
    conversations: Conversations,
    batch_tokens: int,
    micro_batch_tokens: int,
    seed: int,
    start: int,
    process: int,
    processes: int,
    augmentation: Augmentation | None,
) -> Iterator[StepExamples]:
    count, weights = len(conversations), conversations.weights
    for step, rows in enumerate(token_batches(count, conversations.lengths, batch_tokens, seed, start, weights), start):
        sizes = conversations.lengths(rows)
        parts = []
        for share in micro_batches(sizes.tolist(), micro_batch_tokens, process, processes):
            examples = [conversations[rows[i]] for i in share]
            if augmentation is not None:
                examples = [augmentation(one, (seed, step, i)) for one, i in zip(examples, share, strict=True)]
            parts.append(examples or [unlabelled(conversations[rows[0]])])
        yield StepExamples(parts, rows, int(sizes.sum()))
