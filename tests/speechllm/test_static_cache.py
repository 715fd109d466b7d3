"""Greedy decoding with a cache that does not grow: the same answers, few shapes, and families that have none."""

from collections.abc import Callable

import pytest
import torch
import transformers
from peft import PeftModel
from torch import Tensor, nn

from speechllm import SpeechCodec, SpeechLLM, extend_vocabulary, prepare_adapter, transcribe, transcribe_codes
from speechllm.decoding import answer, answer_batches, recognize, static_size
from speechllm.prompt import transcription_prompt
from tokenizer.errors import InputError
from tokenizer.schemes.features import FeatureEncoder
from tokenizer.training.small_teachers import small_hubert
from tokenizer.training.teachers import SemanticTeacher

pytestmark = pytest.mark.numeric

LENGTHS = (30, 4, 55, 0, 11, 200, 1, 17, 90, 30)
BUDGETS = (300, 1100, 32_768)  # tokens: rows of their own, batches that are not full, and all of a size together


def random_codes(*frames: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(16, (2, count), generator=generator) for count in frames]


def assert_same_answers(speech: list[Tensor], speech_llm: SpeechLLM) -> None:
    expected = recognize(speech, speech_llm)
    assert len({found.text for found in expected}) > len(speech) / 2  # this model answers differently
    for tokens in BUDGETS:
        assert recognize(speech, speech_llm, tokens, static_cache=True) == expected


@pytest.fixture
def with_codes(text_tokenizer: object, small_codec: SpeechCodec) -> Callable[..., SpeechLLM]:
    def make(model: object, **settings: bool) -> SpeechLLM:
        vocabulary = extend_vocabulary(model, text_tokenizer, small_codec, 2, **settings)
        return SpeechLLM(model, text_tokenizer, vocabulary, small_codec)

    return make


@pytest.mark.parametrize("family", ["Llama", "Gemma", "Gemma3Text", "Lfm2", "Qwen3Next"])
def test_answers_are_those_without_it(
    family: str, with_codes: Callable[..., SpeechLLM], make_language_model: Callable, text_tokenizer: object
) -> None:
    """Also where windows slide and states pass along the sequence."""
    assert_same_answers(random_codes(*LENGTHS), with_codes(make_language_model(family, text_tokenizer)))


@pytest.mark.parametrize("family", ["Llama", "Gemma3Text"])
def test_audio_attends_in_both_directions(
    family: str, with_codes: Callable[..., SpeechLLM], make_language_model: Callable, text_tokenizer: object
) -> None:
    model = make_language_model(family, text_tokenizer)
    assert_same_answers(random_codes(*LENGTHS), with_codes(model, prefix_attention=True))


@pytest.mark.parametrize("both_ways", [False, True])
def test_adapters_answer_with_it(
    both_ways: bool, with_codes: Callable[..., SpeechLLM], make_qwen2: Callable, text_tokenizer: object
) -> None:
    model = make_qwen2(text_tokenizer)
    model.name_or_path = "as if loaded"
    speech_llm = with_codes(model, prefix_attention=both_ways)
    speech_llm.model = prepare_adapter(model, speech_llm.vocabulary, "lora", 4, 8)
    assert isinstance(speech_llm.model, PeftModel)
    codes = random_codes(*LENGTHS)
    before = transcribe_codes(codes, speech_llm)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        for name, parameter in speech_llm.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    assert transcribe_codes(codes, speech_llm) != before
    assert_same_answers(codes, speech_llm)


def test_soft_tokens_are_read_with_it(make_qwen2: Callable, text_tokenizer: object, noise: Callable) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        codec = FeatureEncoder(SemanticTeacher(small_hubert(hidden_size=16, layers=1), 1))
        model = make_qwen2(text_tokenizer)
        speech_llm = SpeechLLM(model, text_tokenizer, extend_vocabulary(model, text_tokenizer, codec), codec)
        features = [torch.randn(count, codec.width) for count in LENGTHS]
    assert_same_answers(features, speech_llm)
    waveforms = [*noise(9_000), *noise(4_000)]
    assert transcribe(waveforms, speech_llm, static_cache=True) == transcribe(waveforms, speech_llm)


def test_the_steps_of_ten_lengths_have_a_shape_for_each_size_of_the_cache(
    make_speech_llm: Callable[..., SpeechLLM],
) -> None:
    speech_llm, steps = make_speech_llm(), []

    def listen(_: nn.Module, inputs: tuple, named: dict) -> None:
        if named["input_ids"].shape[1] == 1:
            (mask,) = named["attention_mask"].values()
            cache = named["past_key_values"]
            steps.append((*named["input_ids"].shape, *mask.shape, *cache.layers[0].keys.shape, id(cache)))

    hook = speech_llm.model.register_forward_pre_hook(listen, with_kwargs=True)
    texts = transcribe_codes(
        codes := random_codes(*range(1, 301, 30)), speech_llm, 1024, fallback=False, static_cache=True
    )
    hook.remove()
    assert {step[:-1] for step in steps} == {
        (2, 1, 2, 1, 1, 512, 2, 1, 512, 8),
        (4, 1, 4, 1, 1, 256, 4, 1, 256, 8),
    }
    assert len(set(steps)) == 2  # the cache is kept, because graphs of a GPU belong to its place in memory
    assert texts == transcribe_codes(codes, speech_llm, fallback=False)


def test_batches_fit_with_the_size_of_their_cache() -> None:
    assert [*map(static_size, (1, 256, 257, 512, 513))] == [256, 256, 512, 512, 1024]
    lengths, bounds = [250, 240, 100, 90, 20], [20, 20, 20, 20, 20]
    assert answer_batches(lengths, bounds, 1024, True) == [[0, 1], [2, 3, 4]]
    assert answer_batches(lengths, bounds, 100, True) == [[0], [1], [2], [3], [4]]


@pytest.mark.parametrize("room", [0, 1])
def test_an_answer_may_fill_the_cache(room: int, make_speech_llm: Callable[..., SpeechLLM]) -> None:
    speech_llm = make_speech_llm(tied=False)
    (codes,) = random_codes(3)
    head = speech_llm.model.lm_head
    letter = speech_llm.text_tokenizer.convert_tokens_to_ids("x")
    speech_llm.model.lm_head = nn.Linear(head.in_features, head.out_features)
    with torch.no_grad():
        speech_llm.model.lm_head.bias[letter] = 1000.0
    prompt = transcription_prompt(codes, speech_llm.vocabulary, speech_llm.text_tokenizer)
    bound = 256 - len(prompt) - room
    (found,) = answer([prompt], [bound], speech_llm, static_cache=True)
    assert found.text == "x" * bound


def test_beams_and_the_fallback_do_without(make_speech_llm: Callable[..., SpeechLLM]) -> None:
    speech_llm, codes = make_speech_llm(), random_codes(30, 4)
    for settings in ({"beams": 2}, {"fallback": True}):
        assert recognize(codes, speech_llm, static_cache=True, **settings) == recognize(codes, speech_llm, **settings)
    assert transcribe_codes([], speech_llm, static_cache=True) == []


@pytest.mark.parametrize("family", ["Mamba", "Mamba2"])
def test_a_family_without_such_a_cache_is_refused(
    family: str, with_codes: Callable[..., SpeechLLM], text_tokenizer: object
) -> None:
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 8}
    shape |= {"num_heads": 4, "head_dim": 8, "n_groups": 1} if family == "Mamba2" else {}
    config = getattr(transformers, f"{family}Config")(vocab_size=len(text_tokenizer), **shape)
    speech_llm = with_codes(transformers.AutoModelForCausalLM.from_config(config).eval())
    with pytest.raises(InputError, match=f"{family.lower()}: .* set static_cache=false"):
        transcribe_codes(random_codes(3), speech_llm, static_cache=True)
