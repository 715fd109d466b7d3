"""Language models of other families than Qwen2: what a SpeechLLM needs of each."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from speechllm import (
    Example,
    LabelledLoss,
    SpeechCodec,
    SpeechLLM,
    extend_vocabulary,
    load_language_model,
    load_speech_llm,
    prepare_adapter,
    transcribe_codes,
    transcription_example,
)
from speechllm.data.packing import PACKED, PackingError
from speechllm.greedy import reads_packed
from speechllm.training.loss import check_loss

SENTENCE = "TURN ON THE RED LAMP"
PADDING = ("Gemma2", "GPTJ", "Lfm2", "Qwen3Next", "Qwen3_5Text")  # examples cannot be packed in these


@pytest.fixture
def speech_llm(language_model, text_tokenizer, small_codec: SpeechCodec) -> SpeechLLM:
    vocabulary = extend_vocabulary(language_model, text_tokenizer, small_codec, 2)
    return SpeechLLM(language_model, text_tokenizer, vocabulary, small_codec)


def random_codes(frames: int) -> torch.Tensor:
    return torch.randint(16, (2, frames), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_what_the_model_says_about_text_stays(language_model, text_tokenizer, small_codec: SpeechCodec) -> None:
    texts = len(text_tokenizer)
    ids = torch.tensor([text_tokenizer(SENTENCE)["input_ids"]])
    before = language_model(ids).logits
    vocabulary = extend_vocabulary(language_model, text_tokenizer, small_codec, 2)
    after = language_model(ids).logits
    assert before.shape[-1] == texts and before.std() > 1e-2
    assert after.shape[-1] == vocabulary.size == language_model.config.vocab_size == texts + 34
    torch.testing.assert_close(after[..., :texts], before, rtol=1e-5, atol=1e-5)


def test_its_rows_stay_tied_or_untied_as_they_were(speech_llm: SpeechLLM) -> None:
    first, second = speech_llm.model.get_input_embeddings().weight, speech_llm.model.get_output_embeddings().weight
    assert (first is second) is speech_llm.model.config.tie_word_embeddings
    assert first.shape == second.shape == (speech_llm.vocabulary.size, 16)


def test_a_saved_model_is_loaded_equal(speech_llm: SpeechLLM, tmp_path: Path) -> None:
    speech_llm.save(tmp_path)
    loaded = load_speech_llm(tmp_path)
    assert type(loaded.model) is type(speech_llm.model) and not loaded.model.training
    assert loaded.vocabulary == speech_llm.vocabulary
    prompt = transcription_example(random_codes(9), SENTENCE, speech_llm.vocabulary, speech_llm.text_tokenizer)
    with torch.no_grad():
        expected = speech_llm.model(prompt.input_ids[None]).logits
        assert torch.equal(loaded.model(prompt.input_ids[None]).logits, expected)
    (text,) = transcribe_codes([random_codes(9)], speech_llm)
    assert transcribe_codes([random_codes(9)], loaded) == [text]


def test_packed_prompts_are_answered_as_transformers_answers_each_alone(
    speech_llm: SpeechLLM, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = [random_codes(frames) for frames in (40, 3, 17)]
    texts = transcribe_codes(codes, speech_llm)
    assert reads_packed(speech_llm.model) is (request.node.callspec.params["language_model"] not in PADDING)
    monkeypatch.setattr("speechllm.decoding.reads_packed", lambda model: False)
    assert [transcribe_codes([each], speech_llm)[0] for each in codes] == texts and any(texts)


def test_a_family_of_which_nobody_knew_that_it_looks_across_borders_is_not_packed(
    make_language_model: Callable, text_tokenizer: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_language_model("Lfm2", text_tokenizer)
    monkeypatch.setattr("speechllm.greedy.can_pack", lambda model: model.set_attn_implementation(PACKED) or True)
    assert not reads_packed(model) and model.config._attn_implementation == "sdpa"


def some_examples(speech_llm: SpeechLLM) -> list[Example]:
    parts = speech_llm.vocabulary, speech_llm.text_tokenizer
    texts = {12: SENTENCE, 1: "", 30: "OPEN THE BLUE DOOR"}
    return [transcription_example(random_codes(n), text, *parts, learn_speech=True) for n, text in texts.items()]


@torch.no_grad()
@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_together_examples_lose_what_each_loses_alone_by_the_models_own_logits(
    speech_llm: SpeechLLM, packing: bool, request: pytest.FixtureRequest
) -> None:
    model, vocabulary, examples = speech_llm.model, speech_llm.vocabulary, some_examples(speech_llm)
    expected = torch.zeros(2)  # before the model gets another attention
    for example in examples:
        logits = model(example.input_ids[None]).logits[0]
        for position, label in enumerate(example.labels[1:].tolist()):
            if vocabulary.offset <= label < vocabulary.start_id:
                chances = logits[position, vocabulary.offset : vocabulary.start_id].log_softmax(0)
                expected[1] -= 0.9 * chances[label - vocabulary.offset] + 0.1 * chances.mean()
            elif label >= 0:
                expected[0] -= logits[position].log_softmax(0)[label]
    loss_of = LabelledLoss(model, vocabulary, packing)
    assert loss_of.packing is (packing and request.node.callspec.params["language_model"] not in PADDING)
    torch.testing.assert_close(loss_of(examples), expected, rtol=1e-4, atol=0)
    check_loss(loss_of, examples)


@pytest.fixture(params=["Gemma3", "Qwen3_5"])
def with_eyes(
    request: pytest.FixtureRequest, make_language_model: Callable, text_tokenizer: object, tmp_path: Path
) -> Path:
    """The folder of a tiny multimodal model, such as Gemma-3 4B and Qwen3.5 are published as."""
    words = make_language_model(f"{request.param}Text", text_tokenizer).config
    eyes = {"hidden_size": 16, "intermediate_size": 16, "out_hidden_size": 16}
    eyes |= {"num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 28, "depth": 1, "num_heads": 1}
    config = getattr(transformers, f"{request.param}Config")(text_config=words, vision_config=eyes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        getattr(transformers, f"{request.param}ForConditionalGeneration")(config).save_pretrained(tmp_path / "base")
    text_tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("form", ["full", "lora"])
def test_of_a_multimodal_model_the_language_model_is_trained(
    with_eyes: Path, form: str, small_codec: SpeechCodec, tmp_path: Path
) -> None:
    speech_llm = load_language_model(with_eyes, small_codec, layers=2)
    if form == "lora":
        speech_llm.model = prepare_adapter(speech_llm.model, speech_llm.vocabulary, rank=2, alpha=4)
    loss_of = LabelledLoss(speech_llm.model, speech_llm.vocabulary)
    check_loss(loss_of, some_examples(speech_llm))
    loss_of(some_examples(speech_llm)).sum().backward()
    trained = {name: p for name, p in speech_llm.model.named_parameters() if p.requires_grad}
    assert len(trained) > 10 and all(p.grad is not None for p in trained.values())  # or processes would wait for it
    assert not any("vision" in name or "visual" in name or "multi_modal" in name for name in trained)
    (text,) = transcribe_codes([random_codes(9)], speech_llm)
    speech_llm.save(tmp_path / "saved")
    assert transcribe_codes([random_codes(9)], load_speech_llm(tmp_path / "saved")) == [text]


def test_what_fsdp_cuts_is_the_decoder_layer_of_the_family(speech_llm: SpeechLLM) -> None:
    (layer,) = LabelledLoss(speech_llm.model, speech_llm.vocabulary)._no_split_modules  # as Accelerate asks for it
    found = [name for name, part in speech_llm.model.named_modules() if type(part).__name__ == layer]
    assert [name.rpartition(".")[2] for name in found] == ["0", "1"]


@pytest.mark.parametrize("family", PADDING[1:])  # to Gemma-2 transformers itself refuses SDPA
def test_where_packed_examples_are_not_what_they_are_alone_training_is_refused(
    family: str, make_language_model: Callable, text_tokenizer: object, small_codec: SpeechCodec
) -> None:
    model = make_language_model(family, text_tokenizer)
    vocabulary = extend_vocabulary(model, text_tokenizer, small_codec, 2)
    loss_of = LabelledLoss(model, vocabulary)
    loss_of.packing = True  # as if nobody knew the family
    model.set_attn_implementation(PACKED)
    with pytest.raises((PackingError, ValueError), match=r"set packing=false|packed sequences"):
        check_loss(loss_of, some_examples(SpeechLLM(model, text_tokenizer, vocabulary, small_codec)))


def test_a_labelled_example_teaches_the_new_rows(speech_llm: SpeechLLM) -> None:
    vocabulary = speech_llm.vocabulary
    example = transcription_example(random_codes(9), SENTENCE, vocabulary, speech_llm.text_tokenizer)
    loss = LabelledLoss(speech_llm.model, vocabulary)([example])
    assert loss.isfinite().all() and loss[0] > 0
    loss.sum().backward()
    gradient = speech_llm.model.get_input_embeddings().weight.grad
    heard = example.input_ids[vocabulary.is_code(example.input_ids)].unique()
    assert len(heard) > 10 and gradient.isfinite().all()
    assert (gradient[heard] != 0).any(1).all()
