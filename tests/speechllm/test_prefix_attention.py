"""Audio whose tokens attend to each other in both directions, against masks that are written out here."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from speechllm import (
    AudioVocabulary,
    LabelledLoss,
    SpeechCodec,
    SpeechLLM,
    VocabularyError,
    export_model,
    extend_vocabulary,
    load_language_model,
    load_speech_llm,
    transcribe_codes,
    transcription_example,
    transcription_prompt,
)
from speechllm.confidence import word_confidences
from speechllm.data.augmentation import Augmentation
from speechllm.data.config import AugmentationConfig
from speechllm.data.packing import PackingError, require_attention
from speechllm.decoding import _generate, forbidden_ids
from speechllm.greedy import greedy_answers
from speechllm.messages import Audio, ConversationWriter, Message
from speechllm.prompt import Example, conversation_example
from speechllm.training.loss import check_loss
from tokenizer.errors import InputError

SENTENCE = "TURN ON THE RED LAMP"


@pytest.fixture
def make(make_qwen2: Callable, make_text_tokenizer: Callable, small_codec: SpeechCodec) -> Callable[..., SpeechLLM]:
    def make(both_ways: bool = True, model: object = None) -> SpeechLLM:
        text_tokenizer = make_text_tokenizer()
        model = make_qwen2(text_tokenizer) if model is None else model
        vocabulary = extend_vocabulary(model, text_tokenizer, small_codec, 2, prefix_attention=both_ways)
        return SpeechLLM(model, text_tokenizer, vocabulary, small_codec)

    return make


def random_codes(*frames: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(16, (2, count), generator=generator) for count in frames]


def examples_of(speech_llm: SpeechLLM) -> list[Example]:
    """Of one utterance, of two in a message, and of none."""
    parts = speech_llm.vocabulary, speech_llm.text_tokenizer
    long, short, other = random_codes(20, 3, 7)
    both = [Message("user", ("CALL", Audio(short), Audio(other), "ON")), Message("assistant", ("MONDAY",))]
    text = [Message("user", ("OPEN",)), Message("assistant", ("THE DOOR",))]
    writer = ConversationWriter(*parts)
    first = transcription_example(long, SENTENCE, *parts)
    return [first, conversation_example(both, writer), conversation_example(text, writer)]


def mask_of(ids: list[int], vocabulary: AudioVocabulary, window: int | None = None) -> Tensor:
    """bool [1, 1, S, S]: the tokens before, and those of the same audio."""
    mask = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    mask = mask if window is None else mask.triu(1 - window)
    starts = [place for place, token in enumerate(ids) if token == vocabulary.start_id]
    ends = [place for place, token in enumerate(ids) if token == vocabulary.end_id]
    for start, end in zip(starts, ends, strict=True):
        mask[start : end + 1, start : end + 1] = True
    return mask[None, None]


@torch.no_grad()
def logits_of(ids: Tensor, speech_llm: SpeechLLM) -> Tensor:
    """By the model as transformers makes it, with the mask."""
    model, config = speech_llm.model, speech_llm.model.config
    attention, kinds = config._attn_implementation, getattr(config, "layer_types", ["full_attention"])
    windows = {"full_attention": None, "sliding_attention": config.sliding_window}
    masks = {kind: mask_of(ids.tolist(), speech_llm.vocabulary, windows[kind]) for kind in {*kinds}}
    model.set_attn_implementation("sdpa")
    logits = model(ids[None], attention_mask=masks).logits[0]
    model.set_attn_implementation(attention)
    return logits


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("family", ["Qwen2", "Gemma3Text"])
@torch.no_grad()
def test_together_examples_lose_what_each_loses_alone_by_the_mask(
    make: Callable[..., SpeechLLM], family: str, packing: bool, make_language_model: Callable, text_tokenizer: object
) -> None:
    speech_llm = make(model=None if family == "Qwen2" else make_language_model(family, text_tokenizer))
    examples = examples_of(speech_llm)  # of more tokens than Gemma's window
    expected = torch.zeros(2)
    for example in examples:
        chances = logits_of(example.input_ids, speech_llm)[:-1].log_softmax(1)
        labels = example.labels[1:]
        expected[0] -= chances[labels >= 0].gather(1, labels[labels >= 0, None]).sum()
    loss_of = LabelledLoss(speech_llm.model, speech_llm.vocabulary, packing)
    assert loss_of.packing is packing
    torch.testing.assert_close(loss_of(examples), expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(sum(map(loss_of.alone, examples)), expected, rtol=1e-4, atol=0)
    check_loss(loss_of, examples)


@torch.no_grad()
@pytest.mark.parametrize("both_ways", [True, False])
def test_only_audio_sees_what_comes_later_and_only_of_its_own(make: Callable[..., SpeechLLM], both_ways: bool) -> None:
    speech_llm = make(both_ways)
    vocabulary, (_, example, _) = speech_llm.vocabulary, examples_of(speech_llm)
    ids = example.input_ids
    parts = vocabulary.audio_parts(ids)
    second = (parts == 2).nonzero().flatten()
    changed = [second[-2], len(ids) - 1]  # the last code of the second audio, and the last text
    speech_llm.model.set_attn_implementation("sdpa")
    loss_of = LabelledLoss(speech_llm.model, vocabulary, packing=False)
    hidden = []

    def listen(module: object, inputs: tuple[Tensor], output: Tensor) -> None:
        hidden.append(output[0])

    loss_of.model.model.norm.register_forward_hook(listen)
    loss_of([example])
    for place in changed:
        other = ids.clone()
        other[place] -= 1
        loss_of([Example(other, example.labels)])
    moved = [(found - hidden[0]).abs().amax(1) > 1e-5 for found in hidden[1:]]
    expected = torch.arange(len(ids)) >= changed[0]
    if both_ways:
        expected |= parts == 2
    assert torch.equal(moved[0], expected)
    assert torch.equal(moved[1], torch.arange(len(ids)) >= changed[1])


@torch.no_grad()
@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_masked_tokens_open_no_audio(make: Callable[..., SpeechLLM], packing: bool) -> None:
    """They become the marker that begins an audio; of an answer, no token may see a later one for that."""
    speech_llm = make()
    example = examples_of(speech_llm)[0]
    answer = int((example.labels >= 0).nonzero()[0])
    masked = Augmentation(AugmentationConfig(mask=0.9, spans=2), speech_llm.vocabulary, None)(example, (0,))
    assert (masked.input_ids[answer:-1] == speech_llm.vocabulary.start_id).any()
    assert torch.equal(masked.parts, speech_llm.vocabulary.audio_parts(example.input_ids))
    ids, loss_of = masked.input_ids.clone(), LabelledLoss(speech_llm.model, speech_llm.vocabulary, packing)
    ids[-1] -= 1  # the last token of the answer
    labels = example.labels.clone()
    labels[answer + 1 :] = -100  # the loss of the first one alone
    losses = [loss_of([Example(one, labels, None, masked.parts)]) for one in (masked.input_ids, ids)]
    assert torch.equal(*losses)


def test_answers_are_those_of_teacher_forcing(make: Callable[..., SpeechLLM], tmp_path: Path) -> None:
    speech_llm, codes = make(), random_codes(12, 3, 6)
    vocabulary, text_tokenizer = speech_llm.vocabulary, speech_llm.text_tokenizer
    prompts = [transcription_prompt(one, vocabulary, text_tokenizer) for one in codes]
    bounds, forbidden, end = [6, 9, 4], forbidden_ids(text_tokenizer, vocabulary), text_tokenizer.eos_token_id
    expected = []
    for prompt, bound in zip(prompts, bounds, strict=True):
        ids = prompt.input_ids
        while len(ids) < len(prompt) + bound and (len(ids) == len(prompt) or ids[-1] != end):
            best = logits_of(ids, speech_llm)[-1].masked_fill(forbidden, -torch.inf).argmax()
            ids = torch.cat([ids, best[None]])
        expected.append([token for token in ids[len(prompt) :].tolist() if token != end])
    assert any(len(answer) > 2 for answer in expected)
    speech_llm.save(tmp_path)
    loaded = load_speech_llm(tmp_path)
    assert loaded.vocabulary == vocabulary
    beams = [transcribe_codes([one], loaded, beams=2)[0] for one in codes]  # the first thing that it does
    assert transcribe_codes(codes, loaded, beams=2) == beams
    assert _generate(prompts, bounds, loaded, forbidden, 1, 0) == expected  # padded
    require_attention(speech_llm.model, vocabulary)
    assert greedy_answers(prompts, bounds, speech_llm.model, vocabulary, forbidden, end) == expected


@torch.no_grad()
def test_words_are_as_sure_as_by_the_mask(make: Callable[..., SpeechLLM]) -> None:
    speech_llm, (codes,) = make(), random_codes(12)
    example = transcription_example(codes, SENTENCE, speech_llm.vocabulary, speech_llm.text_tokenizer)
    learnt = (example.labels[1:] >= 0).nonzero().flatten()[:-1]  # without the end token
    chances = logits_of(example.input_ids, speech_llm).log_softmax(1)[learnt, example.input_ids[learnt + 1]]
    found = [chance for _, chance in word_confidences(codes, SENTENCE, speech_llm)]
    assert len(found) == 5
    assert float(torch.tensor(found).log().sum()) == pytest.approx(float(chances.sum()), rel=1e-4)


def test_the_setting_belongs_to_the_model(make: Callable[..., SpeechLLM], tmp_path: Path) -> None:
    speech_llm = make()
    with pytest.raises(InputError, match="audio attends in both directions"):
        export_model(speech_llm, tmp_path / "served")
    speech_llm.save(tmp_path / "model")
    again = {"layers": 2, "prefix_attention": True}
    assert load_language_model(tmp_path / "model", speech_llm.codec, **again).vocabulary == speech_llm.vocabulary
    with pytest.raises(VocabularyError, match="set prefix_attention=true"):
        load_language_model(tmp_path / "model", speech_llm.codec, layers=2)
    file = tmp_path / "model" / "audio_vocabulary.json"
    older = json.loads(file.read_text())
    del older["prefix_attention"]
    file.write_text(json.dumps(older))
    assert not load_speech_llm(tmp_path / "model").vocabulary.prefix_attention


@pytest.mark.parametrize("family", ["Gemma2", "GPTJ", "Lfm2", "Qwen3Next"])
def test_a_model_that_cannot_be_told_is_refused(
    make: Callable[..., SpeechLLM], family: str, make_language_model: Callable, text_tokenizer: object
) -> None:
    speech_llm = make(model=make_language_model(family, text_tokenizer))
    with pytest.raises(PackingError, match="set prefix_attention=false"):
        LabelledLoss(speech_llm.model, speech_llm.vocabulary, packing=False)
    with pytest.raises(PackingError, match="set prefix_attention=false"):
        transcribe_codes(random_codes(3), speech_llm)
