"""What augmentation changes, how much of it, and what it leaves alone."""

from dataclasses import replace

import pytest
import torch

from speechllm import AudioVocabulary, Encoding, Example, transcription_example
from speechllm.data.augmentation import Augmentation
from speechllm.data.config import AugmentationConfig
from speechllm.messages import Audio, ConversationWriter, Message
from speechllm.prompt import conversation_example, sentence
from speechllm.small_model import small_text_tokenizer

VOCABULARY = AudioVocabulary(Encoding("f" * 16, 16_000, 50.0, 2, 16), 300, 332, 333, 334)
CODEBOOKS = torch.randn(2, 16, 3, generator=torch.Generator().manual_seed(0))
FRAMES = 200


@pytest.fixture(scope="module")
def example() -> Example:
    """200 frames of two layers, and a long transcript; the codes are labels, too."""
    codes = torch.randint(16, (2, FRAMES), generator=torch.Generator().manual_seed(0))
    return transcription_example(codes, "ON A " * 20, VOCABULARY, small_text_tokenizer([], 259), learn_speech=True)


def augment(example: Example, seed: int = 0, **settings: float) -> Example:
    return Augmentation(AugmentationConfig(**settings), VOCABULARY, CODEBOOKS)(example, (seed,))


def audio(example: Example) -> torch.Tensor:
    """Codes long [T, 2] between the markers."""
    places = (example.input_ids == 333).nonzero()
    return example.input_ids[(example.input_ids == 332).nonzero()[0] + 1 : places[0]].view(-1, 2)


def parts(example: Example) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """bool [S]: codes, transcript, and the rest, of an example of which nothing is hidden."""
    codes = (example.input_ids >= 300) & (example.input_ids < 332)
    text = (example.labels >= 0) & ~codes
    return codes, text, ~codes & ~text


def test_nothing_is_the_default(example: Example) -> None:
    found = augment(example)
    assert torch.equal(found.input_ids, example.input_ids) and torch.equal(found.labels, example.labels)


def test_it_is_a_pure_function_of_example_and_seed(example: Example) -> None:
    before = example.input_ids.clone(), example.labels.clone()
    settings = {"tempo": 0.2, "substitute": 0.2, "mask": 0.1, "spans": 3}
    augmentation = Augmentation(AugmentationConfig(**settings), VOCABULARY, CODEBOOKS)
    torch.manual_seed(0)
    first = augmentation(example, (0, 7))
    torch.manual_seed(1)  # the global state must not matter
    again, different = (
        augmentation(example, (0, 7)),
        [augmentation(example, seed).input_ids for seed in ((0, 7), (0, 8), (1, 7))],
    )
    assert torch.equal(first.input_ids, again.input_ids) and torch.equal(first.input_ids, different[0])
    assert all(not torch.equal(a, b) for i, a in enumerate(different) for b in different[:i])
    assert torch.equal(example.input_ids, before[0]) and torch.equal(example.labels, before[1])


def test_the_configured_share_of_codes_is_substituted_by_close_codes(example: Example) -> None:
    found = augment(example, substitute=0.3)
    codes, _, _ = parts(example)
    changed = found.input_ids != example.input_ids
    assert not changed[~codes].any() and torch.equal(found.labels, example.labels)
    assert float(changed[codes].float().mean()) == pytest.approx(0.3, abs=0.06)
    distance = torch.cdist(CODEBOOKS, CODEBOOKS)
    for layer in range(2):
        old, new = (ids[codes].view(-1, 2)[:, layer] - 300 - 16 * layer for ids in (example.input_ids, found.input_ids))
        closer = (distance[layer][old] < distance[layer][old, new][:, None]).sum(1)  # itself, and closer ones
        assert (closer[old != new] <= 8).all() and (new[old != new] >= 0).all() and (new < 16).all()


def test_the_configured_share_of_codes_and_transcript_is_masked(example: Example) -> None:
    found = augment(example, mask=0.3)
    codes, text, rest = parts(example)
    changed = found.input_ids != example.input_ids
    assert (found.input_ids[changed] == VOCABULARY.start_id).all()
    assert not changed[rest].any() and torch.equal(found.labels, example.labels)
    for part in (codes, text):
        assert float(changed[part].float().mean()) == pytest.approx(0.3, abs=0.1)


def test_spans_are_contiguous_and_not_longer_than_their_share(example: Example) -> None:
    codes, _, _ = parts(example)
    sizes = set()
    for seed in range(200):
        found = augment(example, seed=seed, spans=1, span=0.1)
        hidden = (found.input_ids != example.input_ids).nonzero().flatten()
        sizes.add(len(hidden))
        assert codes[hidden].all() and (found.input_ids[hidden] == VOCABULARY.start_id).all()
        if len(hidden):
            assert int(hidden[-1] - hidden[0]) == len(hidden) - 1
    assert min(sizes) <= 2 and 36 <= max(sizes) < 40  # of 400 codes
    many = augment(example, spans=10, span=0.05)
    assert 20 < int((many.input_ids != example.input_ids).sum()) <= 200


def test_tempo_drops_or_repeats_frames_evenly(example: Example) -> None:
    frames = audio(example)
    counts = []
    for seed in range(60):
        found = augment(example, seed=seed, tempo=0.2)
        warped = audio(found)
        counts.append(len(warped))
        expected = frames[[int((i + 0.5) * FRAMES / len(warped)) for i in range(len(warped))]]
        assert torch.equal(warped, expected)
        size = len(example) - 2 * FRAMES  # prompt, markers, transcript
        assert len(found) == len(found.labels) == size + 2 * len(warped)
        end = len(example) - int((example.input_ids == 333).nonzero()[0])
        assert torch.equal(found.input_ids[-end:], example.input_ids[-end:])
        learnt = found.labels >= 0
        assert torch.equal(found.labels[learnt], found.input_ids[learnt])
    assert 160 <= min(counts) < 170 and 230 < max(counts) <= 240
    assert abs(sum(counts) / len(counts) - FRAMES) < 10


def test_speech_labels_are_the_original_codes(example: Example) -> None:
    found = augment(example, tempo=0.2, substitute=0.3, mask=0.3, spans=5)
    alone = augment(example, tempo=0.2)  # the same draw: tempo comes first
    assert torch.equal(found.labels, alone.labels)


def test_examples_without_audio_or_with_one_frame_are_supported() -> None:
    characters = small_text_tokenizer([], 259)
    settings = {"tempo": 0.9, "substitute": 0.5, "spans": 3, "span": 0.9}
    text = conversation_example(sentence("ON"), ConversationWriter(VOCABULARY, characters))
    assert torch.equal(augment(text, **settings).input_ids, text.input_ids)
    for frames in (0, 1):
        short = transcription_example(torch.zeros(2, frames, dtype=torch.long), "ON", VOCABULARY, characters)
        for seed in range(20):
            found = augment(short, seed=seed, tempo=0.9)
            assert bool(len(audio(found))) == bool(frames)
            augment(short, seed=seed, **settings)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"mask": 1.0}, "mask must be at least 0 and below 1, got 1.0"),
        ({"tempo": -0.1, "spans": -1}, "tempo must be .*; spans must be at least 0, got -1"),
    ],
)
def test_impossible_settings_are_named(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AugmentationConfig(**settings)


def test_several_recordings_keep_their_places_and_what_is_said_between_them() -> None:
    writer = ConversationWriter(VOCABULARY, small_text_tokenizer([], 259))
    one, two = (torch.randint(16, (2, frames), generator=torch.Generator().manual_seed(frames)) for frames in (20, 30))

    def example_of(first: torch.Tensor, second: torch.Tensor) -> Example:
        asked = Message("user", (Audio(first), " or ", Audio(second), "?"))
        return conversation_example([asked, Message("assistant", ("ON",))], writer)

    for factor in (0.7, 1.0, 1.3):
        changed = []
        for codes in (one, two):
            size, count = codes.shape[1], round(factor * codes.shape[1])
            changed.append(codes[:, ((torch.arange(count) + 0.5) * size / count).long()])
        found = Augmentation(AugmentationConfig(tempo=0.3), VOCABULARY, CODEBOOKS).change_tempo(
            example_of(one, two), factor
        )
        expected = example_of(*changed)
        assert torch.equal(found.input_ids, expected.input_ids) and torch.equal(found.labels, expected.labels)


@pytest.mark.parametrize("order", ["frame", "layer", "delay", "semantic"])
def test_tempo_keeps_the_order_in_which_layers_are_read(order: str) -> None:
    vocabulary = replace(VOCABULARY, order=order)
    text_tokenizer = small_text_tokenizer([], 259)
    codes = torch.randint(16, (2, 40), generator=torch.Generator().manual_seed(0))
    changed = Augmentation(AugmentationConfig(tempo=0.3), vocabulary, CODEBOOKS)
    example = transcription_example(codes, "ON", vocabulary, text_tokenizer)
    for factor in (0.7, 1.0, 1.3):
        count = round(factor * 40)
        frames = ((torch.arange(count) + 0.5) * 40 / count).long()
        expected = transcription_example(codes[:, frames], "ON", vocabulary, text_tokenizer)
        found = changed.change_tempo(example, factor)
        assert torch.equal(found.input_ids, expected.input_ids) and torch.equal(found.labels, expected.labels)


def test_features_follow_their_placeholders() -> None:
    vocabulary = AudioVocabulary(Encoding("f" * 16, 16_000, 50.0, 1, 1, "features", width=3), 300, 301, 302, 303)
    features = torch.arange(60.0).view(20, 3)
    example = transcription_example(features, "ON", vocabulary, small_text_tokenizer([], 259))
    settings = AugmentationConfig(tempo=0.2, mask=0.3, spans=1, span=0.2)
    found = Augmentation(settings, vocabulary, None)(example, (0, 3))
    assert int((found.input_ids == 300).sum()) == len(found.features) < 24
    rows = (found.features[:, 0] / 3).long()
    assert torch.equal(found.features, features[rows]) and bool((rows.diff() >= 0).all())


def test_substitution_requires_codes() -> None:
    with pytest.raises(ValueError, match="substitute replaces codes by close ones, but this speech has no codes"):
        Augmentation(AugmentationConfig(substitute=0.1), VOCABULARY, None)
