"""The exported folder as somebody finds it who has transformers and nothing of this package."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from jinja2 import TemplateError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaTokenizer

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
from speechllm.messages import ConversationWriter, Message
from speechllm.prompt import conversation_example
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
        questions[folder] = [
            [as_text(part, speech_llm), answer_bound(part.shape[1] / 50, speech_llm.vocabulary)] for part in codes
        ]
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
    assert config["torch_dtype"] == config["dtype"] == "float32"
    weights = load_file(tmp_path / "served" / "model.safetensors")
    rows = len(weights["model.embed_tokens.weight"])
    assert rows == config["vocab_size"] == speech_llm.vocabulary.size
    assert ("lm_head.weight" in weights) is not kind["tied"]
    assert not any("lora" in name or "trainable" in name for name in weights)
    assert {path.name for path in (tmp_path / "served").iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors", "audio_vocabulary.json", "codec"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }


SCALED = {"rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": 16}
SCALED |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
LINEAR, LOCAL = {"rope_type": "linear", "factor": 8.0}, {"rope_type": "default", "rope_theta": 3e3}
POSITIONS = {  # of a family: its settings in transformers 5, and what transformers 4 reads
    "Mistral": ({"rope_type": "default", "rope_theta": 5e5}, {"rope_theta": 5e5}),
    "Llama": (SCALED | {"rope_theta": 5e5}, {"rope_theta": 5e5, "rope_scaling": SCALED}),
    "Phi": (
        {"rope_type": "default", "rope_theta": 2e4, "partial_rotary_factor": 0.25},
        {"rope_theta": 2e4, "partial_rotary_factor": 0.25},
    ),
    "Gemma3Text": (
        {"full_attention": LINEAR | {"rope_theta": 1e6}, "sliding_attention": LOCAL},
        {"rope_theta": 1e6, "rope_scaling": LINEAR, "rope_local_base_freq": 3e3},
    ),
}
OLDER = ("rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor")


@pytest.fixture
def untrained(small_codec: SpeechCodec) -> Callable[..., SpeechLLM]:
    def make(model: object, text_tokenizer: object, **extension) -> SpeechLLM:
        vocabulary = extend_vocabulary(model, text_tokenizer, small_codec, 2, **extension)
        return SpeechLLM(model, text_tokenizer, vocabulary)

    return make


@pytest.mark.parametrize("family", POSITIONS)
def test_both_majors_of_transformers_find_the_positions(
    tmp_path: Path, family: str, make_language_model: Callable, text_tokenizer: object, untrained: Callable
) -> None:
    newer, older = POSITIONS[family]
    config = make_language_model(family, text_tokenizer).config
    config.rope_parameters = newer
    model = AutoModelForCausalLM.from_config(config).eval()
    export_model(untrained(model, text_tokenizer), tmp_path / "served")
    config = json.loads((tmp_path / "served" / "config.json").read_text())
    assert {key: config[key] for key in OLDER if key in config} == older
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "served")
    assert loaded.config.rope_parameters == model.config.rope_parameters == newer
    ids = torch.arange(40)[None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def llama_2() -> object:
    """Its <s> opens a text, and a first space is written before it."""
    words = ["<unk>", "<s>", "</s>", "\u2581", *map(chr, range(33, 127))]
    return LlamaTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[], add_bos_token=True)


def chat_of(text_tokenizer: object, content: object) -> list[int]:
    messages = [{"role": "user", "content": content}]
    return text_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


@pytest.mark.parametrize("kind", ["byte-level", "Llama-2", "template=chat", "template=chat, with date and thinking"])
def test_in_a_chat_the_prompt_is_that_of_training(
    tmp_path: Path, kind: str, make_language_model: Callable, text_tokenizer: object, untrained: Callable
) -> None:
    chatml = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    text_tokenizer.chat_template = chatml + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    if kind.endswith("thinking"):  # as SmolLM3 does
        text_tokenizer.chat_template = (
            "{{ strftime_now('%B %d, %Y') }}" + text_tokenizer.chat_template + "{% if enable_thinking is not defined "
            "or enable_thinking %}<think>{% else %}<think></think>{% endif %}"
        )
    text_tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>"]})
    used = llama_2() if kind == "Llama-2" else text_tokenizer
    template = "chat" if kind.startswith("template=chat") else "plain"
    speech_llm = untrained(make_language_model("Llama", used), used, template=template)
    (codes,) = random_codes(5)
    prompt = transcription_prompt(codes, speech_llm.vocabulary, used).input_ids.tolist()
    before = used.chat_template
    export_model(speech_llm, tmp_path / "served")
    assert used.chat_template == before  # the caller's stays
    served = AutoTokenizer.from_pretrained(tmp_path / "served")
    text = as_text(codes, speech_llm)
    assert chat_of(served, text) == prompt
    assert served.all_special_ids == used.all_special_ids
    settings = json.loads((tmp_path / "served" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"  # the other major lacks TokenizersBackend
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]  # and would add token types
    assert "extra_special_tokens" not in settings  # a dictionary in the other major
    if template == "chat":
        said = served.decode(prompt)
        assert said.startswith("July 26, 2024") is said.endswith("<think></think>") is kind.endswith("thinking")
        return
    assert served(text)["input_ids"] == prompt
    start = text.index("<|audio_start|>")
    assert chat_of(served, [{"type": "text", "text": part} for part in (text[:start], text[start:])]) == prompt
    with pytest.raises(TemplateError, match="only text is understood"):
        chat_of(served, [{"type": "input_audio", "input_audio": {}}])


def test_answers_in_a_chat_end_as_in_training(tmp_path: Path, make_trained: MakeTrained) -> None:
    speech_llm = make_trained(form=None)
    export_model(speech_llm, tmp_path / "served")
    served = AutoTokenizer.from_pretrained(tmp_path / "served")
    turns = [Message("user", ("TURN",)), Message("assistant", ("ON",)), Message("user", ("CALL",))]
    writer = ConversationWriter(speech_llm.vocabulary, speech_llm.text_tokenizer)
    messages = [{"role": turn.role, "content": turn.parts[0]} for turn in turns]
    found = served.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert found == conversation_example(turns, writer, answering=True).input_ids.tolist()


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
