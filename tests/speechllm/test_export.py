"""The exported folder as somebody finds it who has transformers and nothing of this package."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

from speechllm import (
    LabelledLoss,
    SpeechCodec,
    SpeechLLM,
    export_model,
    extend_vocabulary,
    load_speech_llm,
    prepare_adapter,
    transcribe_codes,
    transcription_prompt,
)
from speechllm.decoding import answer_bound
from tokenizer.locks import OutputError

PLAIN = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer

found = {}
for folder, prompts in json.load(sys.stdin).items():
    text_tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert len(text_tokenizer) <= model.config.vocab_size
    answers = []
    for prompt, bound in prompts:
        inputs = text_tokenizer(prompt, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=bound)[0, inputs["input_ids"].shape[1] :]
        text = text_tokenizer.decode(ids, skip_special_tokens=True).strip()
        answers.append([inputs["input_ids"][0].tolist(), text])
    found[folder] = [type(model).__name__, answers]
assert not {"speechllm", "tokenizer", "peft"} & set(sys.modules)
json.dump(found, sys.stdout)
"""
KINDS = {
    "lora, tied": {"form": "lora", "tied": True, "spare": 0},
    "rows, untied, spare rows": {"form": "rows", "tied": False, "spare": 60},
    "no adapter, two layers": {"form": None, "tied": True, "spare": 60, "layers": 2},
}
MakeTrained = Callable[..., SpeechLLM]


@pytest.fixture(scope="module")
def make_trained(
    tmp_path_factory: pytest.TempPathFactory,
    make_qwen2: Callable,
    make_text_tokenizer: Callable,
    small_codec: SpeechCodec,
) -> MakeTrained:
    """A tiny SpeechLLM that was trained a little: everything that trains was moved at random."""

    def make(form: str | None = "lora", tied: bool = True, spare: int = 0, layers: int = 1, **settings) -> SpeechLLM:
        text_tokenizer, folder = make_text_tokenizer(), tmp_path_factory.mktemp("base")
        made = make_qwen2(text_tokenizer, tied, spare)
        made.config.rope_parameters["rope_theta"] = 1_000_000.0  # Qwen2's
        made.config.update(settings)
        made.save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder)
        vocabulary = extend_vocabulary(model, text_tokenizer, small_codec, layers)
        if form is not None:
            model = prepare_adapter(model, vocabulary, form, rank=4, alpha=8)
        LabelledLoss(model, vocabulary)  # as training does: it changes the model's attention
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        return SpeechLLM(model.eval(), text_tokenizer, vocabulary, small_codec)

    return make


def random_codes(*frames: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(16, (2, count), generator=generator) for count in frames]


def as_text(codes: Tensor, speech_llm: SpeechLLM) -> str:
    """What a user of another engine writes: the prompt and the audio in one string."""
    encoding = speech_llm.vocabulary.encoding
    numbers = [
        layer * encoding.codebook_size + int(codes[layer, frame])
        for frame in range(codes.shape[1])
        for layer in range(encoding.layers)
    ]
    audio = "".join(f"<|audio_{number}|>" for number in numbers)
    return f"Transcribe this speech<|audio_start|>{audio}<|audio_end|>"


def test_plain_transformers_gives_the_same_answer(tmp_path: Path, make_trained: MakeTrained) -> None:
    codes = random_codes(30, 4, 11, 0)
    questions, expected = {}, {}
    for name, kind in KINDS.items():
        speech_llm = make_trained(**kind)
        folder = str(tmp_path / name)
        texts = transcribe_codes(codes, speech_llm, batch_tokens=1)
        assert len(set(texts)) == 4
        parts = speech_llm.vocabulary, speech_llm.text_tokenizer
        ids = [transcription_prompt(part, *parts).input_ids.tolist() for part in codes]
        questions[folder] = [[as_text(part, speech_llm), answer_bound(part.shape[1] / 50)] for part in codes]
        expected[folder] = ["Qwen2ForCausalLM", [list(pair) for pair in zip(ids, texts, strict=True)]]
        export_model(speech_llm, folder)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-W", "ignore", "-c", PLAIN]
    found = subprocess.run(
        command, input=json.dumps(questions), capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout) == expected


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_the_folder_has_the_settings_that_engines_use(tmp_path: Path, make_trained: MakeTrained, kind: dict) -> None:
    speech_llm = make_trained(**kind)
    end = speech_llm.text_tokenizer.eos_token_id
    export_model(speech_llm, tmp_path / "served")
    config = json.loads((tmp_path / "served" / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    assert config["eos_token_id"] == end
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 1_000_000.0
    weights = load_file(tmp_path / "served" / "model.safetensors")
    rows = len(weights["model.embed_tokens.weight"])
    assert rows == config["vocab_size"] == speech_llm.vocabulary.size
    assert ("lm_head.weight" in weights) is not kind["tied"]
    assert not any("lora" in name or "trainable" in name for name in weights)
    assert {path.name for path in (tmp_path / "served").iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors", "audio_vocabulary.json", "codec"),
        *("tokenizer.json", "tokenizer_config.json"),
    }


def test_generation_settings_of_a_chat_model_are_replaced(tmp_path: Path, make_trained: MakeTrained) -> None:
    speech_llm = make_trained(eos_token_id=[0, 1])
    base = speech_llm.model.get_base_model()
    base.generation_config = GenerationConfig(do_sample=True, repetition_penalty=1.1, eos_token_id=[0, 1])
    export_model(speech_llm, tmp_path / "served")
    asked = GenerationConfig.from_pretrained(tmp_path / "served")
    assert not asked.do_sample and asked.repetition_penalty in (None, 1.0)
    assert asked.eos_token_id == speech_llm.text_tokenizer.eos_token_id == 2
    assert json.loads((tmp_path / "served" / "config.json").read_text())["eos_token_id"] == 2
    assert asked.pad_token_id == speech_llm.text_tokenizer.pad_token_id
    assert set(speech_llm.vocabulary.new_ids.tolist()) < set(asked.suppress_tokens)


def test_the_folder_is_still_a_speech_language_model(tmp_path: Path, make_trained: MakeTrained) -> None:
    speech_llm, codes = make_trained(), random_codes(30, 4, 11)
    texts = transcribe_codes(codes, speech_llm)
    export_model(speech_llm, tmp_path / "served")
    loaded = load_speech_llm(tmp_path / "served")
    assert transcribe_codes(codes, loaded) == texts
    assert loaded.vocabulary == speech_llm.vocabulary
    assert loaded.codec.fingerprint == speech_llm.codec.fingerprint


def test_an_existing_output_is_refused_and_not_changed(tmp_path: Path, make_trained: MakeTrained) -> None:
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "thesis.txt").write_text("mine")
    speech_llm = make_trained()
    with pytest.raises(OutputError, match="served already exists: choose another folder"):
        export_model(speech_llm, tmp_path / "served")
    assert (tmp_path / "served" / "thesis.txt").read_text() == "mine"
