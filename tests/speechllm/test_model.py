"""The loss, and a speech language model on disk."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from speechllm import (
    DataError,
    Example,
    InputError,
    LabelledLoss,
    SpeechCodec,
    SpeechLLM,
    VocabularyError,
    load_language_model,
    load_speech_llm,
    transcribe_codes,
    transcription_example,
)
from speechllm.messages import ConversationWriter
from speechllm.prompt import conversation_example, sentence
from speechllm.small_model import small_text_tokenizer
from speechllm.vocabulary import text_token_ids

pytestmark = pytest.mark.numeric

MakeSpeechLLM = Callable[..., SpeechLLM]


def random_codes(*frames: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(16, (2, count), generator=generator) for count in frames]


def examples_of(speech_llm: SpeechLLM, learn_speech: bool = False) -> list[Example]:
    """Three transcription examples of different lengths and a sentence alone."""
    parts = speech_llm.vocabulary, speech_llm.text_tokenizer
    examples = [
        transcription_example(codes, text, *parts, learn_speech=learn_speech)
        for codes, text in zip(random_codes(9, 2, 5), ["TURN ON", "", "OPEN THE BLUE DOOR"], strict=True)
    ]
    return [*examples, conversation_example(sentence("CALL ANNA"), ConversationWriter(*parts))]


def ids_of(speech_llm: SpeechLLM) -> Tensor:
    """long [4, S]: the same examples, padded."""
    return pad_sequence([example.input_ids for example in examples_of(speech_llm)], batch_first=True)


# ---- the loss (against transformers' own: see test_packing.py)


def test_logits_are_computed_only_at_labels(make_speech_llm: MakeSpeechLLM) -> None:
    speech_llm = make_speech_llm(layers=2)
    rows = []
    speech_llm.model.lm_head.register_forward_hook(lambda _, inputs, output: rows.append(output.shape[0]))
    loss_of = LabelledLoss(speech_llm.model, speech_llm.vocabulary)
    loss_of(examples_of(speech_llm))
    assert rows == [3 + 1 + 5 + 2]  # whole words are tokens here; each answer has its end
    loss_of(examples_of(speech_llm, learn_speech=True))
    assert rows[1] == rows[0]  # codes are chosen among codes: that needs a small part of the head only


def test_the_loss_of_speech_is_cross_entropy_among_the_codes_with_smoothed_labels(
    make_speech_llm: MakeSpeechLLM,
) -> None:
    speech_llm = make_speech_llm(layers=2)
    vocabulary, examples = speech_llm.vocabulary, examples_of(speech_llm, learn_speech=True)
    with torch.no_grad():
        found = LabelledLoss(speech_llm.model, vocabulary)(examples)
        expected = torch.zeros(2)
        for example in examples:
            logits = speech_llm.model(example.input_ids[None]).logits[0]
            for position, label in enumerate(example.labels[1:].tolist()):
                if vocabulary.offset <= label < vocabulary.start_id:
                    chances = logits[position, vocabulary.offset : vocabulary.start_id].log_softmax(0)
                    wanted = torch.full_like(chances, 0.1 / len(chances))
                    wanted[label - vocabulary.offset] += 0.9
                    expected[1] -= (wanted * chances).sum()
                elif label >= 0:
                    expected[0] -= logits[position].log_softmax(0)[label]
        plain = LabelledLoss(speech_llm.model, vocabulary)(examples_of(speech_llm))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(plain, torch.tensor([expected[0], 0.0]), rtol=1e-5, atol=0)


def test_without_labels_the_loss_is_zero(make_speech_llm: MakeSpeechLLM) -> None:
    speech_llm = make_speech_llm()
    silent = [Example(e.input_ids, torch.full_like(e.labels, -100)) for e in examples_of(speech_llm)]
    assert LabelledLoss(speech_llm.model, speech_llm.vocabulary)(silent).tolist() == [0, 0]


# ---- on disk


@pytest.mark.parametrize("kind", [{"tied": True}, {"tied": False, "spare": 60}], ids=["tied", "untied with spare rows"])
def test_a_saved_model_is_loaded_equal(tmp_path: Path, make_speech_llm: MakeSpeechLLM, kind: dict) -> None:
    speech_llm = make_speech_llm(layers=2, **kind)
    speech_llm.save(tmp_path)
    loaded = load_speech_llm(tmp_path)
    ids = ids_of(speech_llm)
    with torch.no_grad():
        assert torch.equal(loaded.model(ids).logits, speech_llm.model(ids).logits)
    codes = random_codes(30, 4, 11)
    texts = transcribe_codes(codes, speech_llm)
    assert transcribe_codes(codes, loaded) == texts and len(set(texts)) == 3
    assert loaded.vocabulary == speech_llm.vocabulary
    assert loaded.codec.fingerprint == speech_llm.codec.fingerprint
    assert not loaded.model.training and not loaded.codec.training


def test_the_codec_may_be_moved(tmp_path: Path, make_speech_llm: MakeSpeechLLM) -> None:
    speech_llm = make_speech_llm()
    speech_llm.save(tmp_path / "model")
    shutil.move(tmp_path / "model" / "codec", tmp_path / "elsewhere")
    loaded = load_speech_llm(tmp_path / "model", codec=tmp_path / "elsewhere")
    assert loaded.codec.fingerprint == speech_llm.codec.fingerprint


def test_another_codec_is_refused(tmp_path: Path, make_speech_llm: MakeSpeechLLM, other_codec: SpeechCodec) -> None:
    speech_llm = make_speech_llm()
    speech_llm.save(tmp_path / "model")
    other_codec.save_pretrained(tmp_path / "other")
    with pytest.raises(DataError, match=f"{speech_llm.codec.fingerprint}.*{other_codec.fingerprint}"):
        load_speech_llm(tmp_path / "model", codec=tmp_path / "other")


def test_without_a_codec_only_the_rest_is_saved(tmp_path: Path, make_speech_llm: MakeSpeechLLM) -> None:
    speech_llm = make_speech_llm()
    speech_llm.codec = None
    speech_llm.save(tmp_path)
    assert not (tmp_path / "codec").exists() and (tmp_path / "audio_vocabulary.json").exists()


@pytest.mark.parametrize("kind", [{"tied": True}, {"tied": False, "spare": 60}], ids=["tied", "untied with spare rows"])
def test_the_folder_is_an_ordinary_transformers_model(
    tmp_path: Path, make_speech_llm: MakeSpeechLLM, kind: dict
) -> None:
    speech_llm = make_speech_llm(layers=2, **kind)
    speech_llm.save(tmp_path)
    plain, plain_tokens = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    offset = speech_llm.vocabulary.offset
    for number in (0, 3, 31):
        assert plain_tokens(f"<|audio_{number}|>", add_special_tokens=False)["input_ids"] == [offset + number]
    assert plain_tokens.convert_tokens_to_ids("<|audio_start|>") == speech_llm.vocabulary.start_id
    assert plain_tokens.eos_token == "<|im_end|>" and plain_tokens.pad_token == "<|endoftext|>"
    ids = ids_of(speech_llm)
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, speech_llm.model(ids).logits)
    assert plain.get_input_embeddings().weight.shape[0] == speech_llm.vocabulary.size


READ_OTHERWISE = "bug: small_text_tokenizer splits like GPT-2 and loads as Qwen2's: digits apart, NFC"


@pytest.mark.parametrize(
    "text",
    [
        "TURN ON THE RED LAMP",
        "it's o'clock,  no\n",
        "<|audio_5|><|im_end|>",
        "مرحبا 😀 日本",
        "AT 12345",
        "cafe\u0301",
    ],
)
def test_a_loaded_text_tokenizer_reads_text_like_the_one_trained_with(tmp_path: Path, text: str) -> None:
    made = small_text_tokenizer(["AT 12345 TURN ON THE RED LAMP"] * 3, 320)
    made.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')  # as beside a saved Qwen2
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert text_token_ids(loaded, [text]) == text_token_ids(made, [text])


def test_a_run_is_taken_for_the_model_in_it(tmp_path: Path, make_speech_llm: MakeSpeechLLM) -> None:
    speech_llm = make_speech_llm()
    speech_llm.save(tmp_path / "model")
    assert load_speech_llm(tmp_path).codec.fingerprint == speech_llm.codec.fingerprint
    assert load_language_model(tmp_path, speech_llm.codec).vocabulary == speech_llm.vocabulary


def test_a_model_of_chats_stays_one(tmp_path: Path, make_speech_llm: MakeSpeechLLM) -> None:
    speech_llm = make_speech_llm()
    speech_llm.vocabulary = replace(speech_llm.vocabulary, template="chat")
    speech_llm.save(tmp_path)
    with pytest.raises(VocabularyError, match="was trained with template=chat: set template=chat"):
        load_language_model(tmp_path, speech_llm.codec)
    assert load_language_model(tmp_path, speech_llm.codec, template="chat").vocabulary == speech_llm.vocabulary


# ---- what is missing is named


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        load_speech_llm(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "missing, kind, message",
    [
        ("config.json", FileNotFoundError, "lacks config.json"),
        ("audio_vocabulary.json", VocabularyError, "has no audio_vocabulary.json"),
        ("model.safetensors", OSError, "model.safetensors"),
        ("codec", FileNotFoundError, "codec: no such folder"),
        ("codec/model.safetensors", FileNotFoundError, "codec is not the folder of a speech codec: it lacks model.saf"),
    ],
)
def test_a_missing_file_is_named(
    tmp_path: Path, make_speech_llm: MakeSpeechLLM, missing: str, kind: type[Exception], message: str
) -> None:
    make_speech_llm().save(tmp_path)
    target = tmp_path / missing
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    with pytest.raises(kind, match=message):
        load_speech_llm(tmp_path)


def test_a_missing_codec_is_named_also_in_a_relative_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_speech_llm: MakeSpeechLLM
) -> None:
    speech_llm = make_speech_llm()
    speech_llm.codec = None
    speech_llm.save(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="model/codec: no such folder"):
        load_speech_llm("model")


# ---- the small text tokenizer


def test_a_small_text_tokenizer_has_its_size_and_end_tokens() -> None:
    texts = ["TURN ON THE RED LAMP", "OPEN THE BLUE DOOR"] * 3
    for size in (259, 270):
        assert len(small_text_tokenizer(texts, size)) == size
    tokens = small_text_tokenizer(texts, 1000)
    assert 270 < len(tokens) < 300  # the texts give no more
    assert (tokens.eos_token, tokens.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert tokens.eos_token_id != tokens.pad_token_id


VOCABULARY = {
    "cut": (lambda text: text[:40], "is no JSON"),
    "a list": (lambda text: "[]", "holds a list"),
    "other keys": (lambda text: '{"encoding": {}}', "is not an audio vocabulary"),
    "beyond the rows": (lambda text: json.dumps(json.loads(text) | {"offset": 9_999}), "contradicts itself"),
    "more rows": (lambda text: json.dumps(json.loads(text) | {"size": 9_999}), "the model has .* rows and its vocab"),
    "other ids": (
        lambda text: json.dumps(json.loads(text) | {"start_id": json.loads(text)["start_id"] - 1}),
        "do not belong together",
    ),
}


@pytest.mark.parametrize("kind", VOCABULARY)
def test_a_vocabulary_that_does_not_fit_is_refused(make_speech_llm: MakeSpeechLLM, tmp_path: Path, kind: str) -> None:
    make_speech_llm().save(tmp_path)
    change, message = VOCABULARY[kind]
    file = tmp_path / "audio_vocabulary.json"
    file.write_text(change(file.read_text()))
    with pytest.raises(InputError, match=message):
        load_speech_llm(tmp_path)


def test_a_text_tokenizer_of_another_model_is_refused(
    make_qwen2: Callable, make_text_tokenizer: Callable, small_codec: SpeechCodec, tmp_path: Path
) -> None:
    """Without its files transformers makes an almost empty one."""
    make_qwen2(make_text_tokenizer()).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="text tokenizer"):
        load_language_model(tmp_path, small_codec)
