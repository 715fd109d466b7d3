"""Rows of training data as examples that are made when they are asked for, and the steps planned from their lengths."""

import itertools
from collections.abc import Callable
from dataclasses import asdict

import numpy as np
import pyarrow as pa
import pytest
import torch

from speechllm import AudioVocabulary, Encoding, transcription_example
from speechllm.data.augmentation import Augmentation
from speechllm.data.config import AugmentationConfig
from speechllm.data.conversations import Conversations, step_examples, transcription_rows
from speechllm.data.encoded import EncodedSpeech
from speechllm.data.shards import SCHEMA, SPEECH
from speechllm.messages import ConversationWriter
from speechllm.prompt import Example
from speechllm.small_model import small_text_tokenizer

ENCODINGS = {
    "codes": Encoding("f" * 16, 16_000, 50.0, 2, 16),
    "features": Encoding("f" * 16, 16_000, 50.0, 1, 1, "features", 3),
    "text": Encoding("f" * 16, 16_000, 0.0, 0, 0, "text"),
}
TEXTS = ["ON", "", "RED LAMP", "TURN <|im_end|> ON"]


def speech_as(kind: str, count: int = 12) -> EncodedSpeech:
    draw, rows = np.random.default_rng(0), []
    for i in range(count):
        frames = int(draw.integers(1, 20))
        stored = {
            "codes": draw.integers(0, 16, 2 * frames),
            "features": draw.normal(size=3 * frames).astype(np.float16),
            "text": TEXTS[i % 4] * 2,
        }[kind]
        row = {"id": f"u{i}", "split": "train", "text": TEXTS[i % 4], "duration_s": frames / 50}
        rows.append(row | {SPEECH[kind].name: stored})
    table = pa.Table.from_pylist(rows, SCHEMA.append(SPEECH[kind]))
    return EncodedSpeech(table.select(SCHEMA.names), table[SPEECH[kind].name], np.arange(count), ENCODINGS[kind])


@pytest.fixture
def make(request: pytest.FixtureRequest) -> Callable[..., Conversations]:
    text_tokenizer = small_text_tokenizer([], 259)

    def made(kind: str = "codes", learn_speech: bool = False, speech: EncodedSpeech | None = None) -> Conversations:
        vocabulary = AudioVocabulary(ENCODINGS[kind], 300, 332, 333, 334, stack=2 if kind == "features" else 1)
        speech = speech_as(kind) if speech is None else speech
        return Conversations(
            transcription_rows(speech), speech, ConversationWriter(vocabulary, text_tokenizer), learn_speech
        )

    return made


def assert_equal(found: Example, expected: Example) -> None:
    assert torch.equal(found.input_ids, expected.input_ids) and torch.equal(found.labels, expected.labels)
    assert (found.features is None) == (expected.features is None)
    assert found.features is None or torch.equal(found.features, expected.features)


@pytest.mark.parametrize("learn_speech", [False, True])
@pytest.mark.parametrize("kind", ENCODINGS)
def test_an_example_is_that_of_its_utterance_and_its_size_is_known_before(
    make: Callable, kind: str, learn_speech: bool
) -> None:
    found = make(kind, learn_speech)
    sizes = found.sizes([3, *range(12), 3])
    assert sizes[0].tolist() == sizes[4].tolist() == sizes[-1].tolist()
    for i, (length, labels) in enumerate(sizes[1:-1].tolist()):
        parts = found.writer.vocabulary, found.writer.text_tokenizer
        assert_equal(found[i], transcription_example(found.speech.speech(i), TEXTS[i % 4], *parts, learn_speech))
        learnt = found[i].labels[found[i].labels >= 0]
        assert length == len(found[i]) and labels == int((~parts[0].is_code(learnt)).sum())


def test_chosen_utterances_keep_their_speech_and_numbers(make: Callable) -> None:
    speech = speech_as("codes")
    chosen = speech.select([5, 2, 7])
    assert chosen["id"] == ["u5", "u2", "u7"] and chosen[1]["text"] == TEXTS[2]
    assert (
        [len(chosen[i]["codes"]) // 2 for i in range(3)] == chosen.frames.tolist() == speech.frames[[5, 2, 7]].tolist()
    )
    assert chosen[-1]["codes"].tolist() == speech[7]["codes"].tolist() and [*chosen[1:]][0]["id"] == "u2"
    whole = make(speech=speech)
    part = Conversations(transcription_rows(chosen, [5, 2, 7]), speech, whole.writer)  # named among the others
    for i, number in enumerate((5, 2, 7)):
        assert_equal(part[i], whole[number])
        assert_equal(make(speech=chosen)[i], whole[number])


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_all_processes_together_compute_the_batch_and_a_resumed_one_goes_on(make: Callable, processes: int) -> None:
    def steps(process: int, start: int = 0) -> list:
        every = step_examples(make(), 150, 40, 0, start, process, processes)
        return [*itertools.islice(every, 9 - start)]

    conversations = make()
    shares = [steps(process) for process in range(processes)]
    stream = [int(i) for step in shares[0] for i in step.rows]
    assert sorted(stream[:12]) == sorted(stream[12:24]) == list(range(12))  # each once in an epoch
    for number, of_step in enumerate(zip(*shares, strict=True)):
        assert len({len(step.parts) for step in of_step}) == 1  # processes stay in step
        examples = [one for step in of_step for part in step.parts for one in part if (one.labels >= 0).any()]
        expected = [conversations[int(i)] for i in of_step[0].rows]
        key = lambda one: one.input_ids.tolist()  # noqa: E731
        for one, other in zip(sorted(examples, key=key), sorted(expected, key=key), strict=True):
            assert_equal(one, other)
        assert sum(map(len, expected)) == of_step[0].tokens <= 150, number
    for process in range(processes):
        for one, other in zip(steps(process, 4), shares[process][4:], strict=True):
            assert one.rows.tolist() == other.rows.tolist() and one.tokens == other.tokens
            for a, b in zip(sum(one.parts, []), sum(other.parts, []), strict=True):
                assert_equal(a, b)


def test_augmentation_is_that_of_the_example_in_every_division(make: Callable) -> None:
    conversations = make(speech=speech_as("codes", 5))
    settings = AugmentationConfig(tempo=0.5, mask=0.2, spans=1)
    seen: list[tuple[int, ...]] = []

    class Counting(Augmentation):
        def __call__(self, example: Example, seed: tuple[int, ...]) -> Example:
            seen.append(seed)
            return super().__call__(example, seed)

    augmentation = Counting(settings, conversations.writer.vocabulary, None)

    def third(process: int, processes: int) -> list[Example]:
        steps = step_examples(conversations, 1000, 60, 7, 3, process, processes, augmentation)
        return sum(next(steps).parts, [])

    alone, drawn = third(0, 1), sorted(seen)
    seen.clear()
    both = third(0, 2) + third(1, 2)
    assert sorted(seen) == drawn and len(set(drawn)) == len(drawn)  # only its own share in each process
    key = lambda one: one.input_ids.tolist()  # noqa: E731
    for one, other in zip(sorted(alone, key=key), sorted(both, key=key), strict=True):
        assert_equal(one, other)
    assert asdict(settings)["tempo"] and any(len(one) != conversations.lengths([0])[0] for one in alone)
