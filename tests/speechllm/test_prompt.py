"""Training examples and prompts, written out by hand, and how they are padded."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, LlamaTokenizer

from speechllm import (
    AudioVocabulary,
    Codes,
    Encoding,
    Example,
    SpeechLLM,
    VocabularyError,
    transcription_example,
    transcription_prompt,
)
from speechllm.messages import ConversationWriter
from speechllm.prompt import collate_prompts, conversation_example, join_features, label_counts, sentence
from speechllm.small_model import small_text_tokenizer

END = 2  # <|im_end|>
# "Transcribe this speech", one token per character: 3 special tokens first, then the bytes from "!" on; a space is 223
PROMPT = [54, 84, 67, 80, 85, 69, 84, 75, 68, 71, 223, 86, 74, 75, 85, 223, 85, 82, 71, 71, 69, 74]
VOCABULARY = AudioVocabulary(Encoding("f" * 16, 16_000, 50.0, 2, 16), 300, 332, 333, 334)
CODES = torch.tensor([[3, 0], [1, 2]])
AUDIO = [332, 303, 317, 300, 318, 333]


@pytest.fixture(scope="module")
def characters() -> object:
    """A text tokenizer that has learnt no pairs: every character is one token."""
    return small_text_tokenizer([], 259)


def test_an_example_is_prompt_audio_transcript_end_with_labels_on_the_last_two(characters) -> None:
    example = transcription_example(CODES, "ON A", VOCABULARY, characters)
    answer = [49, 48, 223, 35, END]
    assert example.input_ids.tolist() == PROMPT + AUDIO + answer
    assert example.labels.tolist() == [-100] * (len(PROMPT) + len(AUDIO)) + answer
    assert example.input_ids.dtype == example.labels.dtype == torch.long
    assert len(example) == len(PROMPT) + len(AUDIO) + 5


def text_example(text: str, *parts: Any) -> Example:
    return conversation_example(sentence(text), ConversationWriter(*parts))


def llama_2() -> object:
    words = ["<unk>", "<s>", "</s>", "\u2581", *map(chr, range(33, 127))]
    return LlamaTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[], add_bos_token=True)


def llama_3(ends: str = "") -> object:
    made = small_text_tokenizer([], 259)
    made.add_special_tokens({"bos_token": "<|begin_of_text|>"})
    specials = [(word, made.convert_tokens_to_ids(word)) for word in ("<|begin_of_text|>", "<|im_end|>")]
    template = TemplateProcessing(single=f"<|begin_of_text|> $A {ends}".strip(), special_tokens=specials)
    made.backend_tokenizer.post_processor = template
    return made


@pytest.mark.parametrize("make", [llama_2, llama_3, lambda: llama_3("<|im_end|>")], ids=["Llama-2", "Llama-3", "both"])
def test_an_example_begins_as_its_text_tokenizer_begins_a_text(make: Callable, tmp_path: Path) -> None:
    text_tokenizer = make()
    names = [f"<|audio_{code}|>" for code in range(32)] + ["<|audio_start|>", "<|audio_end|>"]
    text_tokenizer.add_tokens(names, special_tokens=True)
    start = text_tokenizer.convert_tokens_to_ids(names[0])
    vocabulary = replace(VOCABULARY, offset=start, start_id=start + 32, end_id=start + 33, size=start + 34)
    example = transcription_example(CODES, "ON A", vocabulary, text_tokenizer)
    prompt = transcription_prompt(CODES, vocabulary, text_tokenizer).input_ids.tolist()
    bos, end = text_tokenizer.bos_token_id, text_tokenizer.eos_token_id
    for ids in (example.input_ids.tolist(), text_example("ON A", vocabulary, text_tokenizer).input_ids.tolist()):
        assert ids[0] == bos and ids.count(bos) == ids.count(end) == 1 and ids[-1] == end
    assert example.input_ids.tolist()[: len(prompt)] == prompt
    text_tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    written = "Transcribe this speech<|audio_start|><|audio_3|><|audio_17|><|audio_0|><|audio_18|><|audio_end|>"
    found = AutoTokenizer.from_pretrained(tmp_path)(written)["input_ids"]
    assert found[: len(prompt)] == prompt and found[len(prompt) :] in ([], [end])


def test_codes_are_labels_with_learn_speech_but_markers_are_not(characters) -> None:
    example = transcription_example(CODES, "ON", VOCABULARY, characters, learn_speech=True)
    answer = [49, 48, END]
    assert example.input_ids.tolist() == PROMPT + AUDIO + answer
    assert example.labels.tolist() == [-100] * (len(PROMPT) + 1) + AUDIO[1:-1] + [-100] + answer


def test_labels_are_counted_by_kind_without_the_first_token(characters) -> None:
    both = transcription_example(CODES, "ON A", VOCABULARY, characters, learn_speech=True)
    one = transcription_example(CODES, "ON A", VOCABULARY, characters)
    alone = text_example("ON", VOCABULARY, characters)
    assert label_counts([both, one, alone, alone], VOCABULARY).tolist() == [5 + 5 + 2 + 2, 4]
    assert label_counts([one], VOCABULARY).tolist() == [5, 0]


def test_an_empty_transcript_is_the_end_token(characters) -> None:
    example = transcription_example(CODES, "", VOCABULARY, characters)
    assert example.input_ids.tolist() == PROMPT + AUDIO + [END]
    assert example.labels.tolist() == [-100] * (len(PROMPT) + len(AUDIO)) + [END]


def test_every_token_of_a_sentence_is_a_label(characters) -> None:
    example = text_example("ON", VOCABULARY, characters)
    assert example.input_ids.tolist() == example.labels.tolist() == [49, 48, END]
    assert example.input_ids is not example.labels


def test_the_evaluation_prompt_is_a_prefix_of_the_training_example(make_speech_llm: Callable) -> None:
    speech_llm: SpeechLLM = make_speech_llm(layers=2)
    parts = speech_llm.vocabulary, speech_llm.text_tokenizer
    generator = torch.Generator().manual_seed(0)
    for text, frames in (("TURN ON", 7), ("", 1), ("<|audio_5|> <|im_end|>", 3), ("é 😀", 0)):
        codes = torch.randint(16, (2, frames), generator=generator)
        example, prompt = transcription_example(codes, text, *parts), transcription_prompt(codes, *parts)
        size = len(prompt)
        assert torch.equal(example.input_ids[:size], prompt.input_ids)
        assert (prompt.labels == -100).all()
        assert (example.labels[:size] == -100).all()
        assert torch.equal(example.labels[size:], example.input_ids[size:])
        assert example.labels[-1] == speech_llm.text_tokenizer.eos_token_id
        assert speech_llm.text_tokenizer.decode(example.input_ids[size:-1]) == text


def test_codes_from_a_codec_and_their_tensor_give_the_same_prompt(characters) -> None:
    codes = Codes(CODES[None], lengths=torch.tensor([2]))
    assert transcription_prompt(codes, VOCABULARY, characters).input_ids.tolist() == PROMPT + AUDIO


def test_an_example_of_impossible_codes_is_refused(characters) -> None:
    with pytest.raises(VocabularyError):
        transcription_example(torch.tensor([[3, 16], [1, 2]]), "ON", VOCABULARY, characters)


def test_stored_features_are_joined_also_where_precision_is_lowered() -> None:
    ids, parts = torch.zeros(4, dtype=torch.long), [torch.randn(2, 3).half(), torch.randn(1, 3).half()]
    examples = [Example(ids, ids, parts[0]), Example(ids, ids), Example(ids, ids, parts[1])]
    with torch.autocast("cpu", torch.bfloat16):
        joined = join_features(examples)
    assert torch.equal(joined, torch.cat(parts).float()) and join_features(examples[1:2]) is None


def test_prompts_are_padded_on_the_left() -> None:
    prompts = [Example(torch.tensor(ids), torch.tensor(ids)) for ids in ([5, 6], [7, 8, 9])]
    batch = collate_prompts(prompts, pad_id=1)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[1, 5, 6], [7, 8, 9]],
        "attention_mask": [[0, 1, 1], [1, 1, 1]],
    }
