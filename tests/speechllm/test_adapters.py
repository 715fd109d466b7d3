"""Adapters: what they train, what they leave alone, and what comes back from their files."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, PhiConfig, PhiForCausalLM

from speechllm import (
    Example,
    InputError,
    LabelledLoss,
    SpeechCodec,
    SpeechLLM,
    extend_vocabulary,
    load_speech_llm,
    merge,
    prepare_adapter,
    transcribe_codes,
    transcription_example,
)
from speechllm.adapters import base_fingerprint, load_causal
from speechllm.training.loss import check_loss

WIDTH = 16  # of the tiny Qwen2
LINEAR = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
RANK = 4
KINDS = [  # 18 rows are new: no room for them, or enough
    pytest.param({"form": "lora", "tied": True, "spare": 0}, id="lora, tied"),
    pytest.param({"form": "lora", "tied": False, "spare": 60}, id="lora, untied, spare rows"),
    pytest.param({"form": "rows", "tied": True, "spare": 60}, id="rows, tied, spare rows"),
    pytest.param({"form": "rows", "tied": False, "spare": 0}, id="rows, untied"),
]
kinds = pytest.mark.parametrize("kind", KINDS)
MakeAdapter = Callable[..., SpeechLLM]


@pytest.fixture
def make_adapter(
    tmp_path: Path, make_qwen2: Callable, make_text_tokenizer: Callable, small_codec: SpeechCodec
) -> MakeAdapter:
    """A tiny SpeechLLM with an untrained adapter; its language model lies in tmp_path/base."""

    def make(form: str = "lora", tied: bool = True, spare: int = 0, dtype: torch.dtype | None = None) -> SpeechLLM:
        text_tokenizer = make_text_tokenizer()
        if not (tmp_path / "base").exists():
            make_qwen2(text_tokenizer, tied, spare).save_pretrained(tmp_path / "base")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype or "auto")
        vocabulary = extend_vocabulary(model, text_tokenizer, small_codec)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            adapted = prepare_adapter(model, vocabulary, form, RANK, 2 * RANK)
        return SpeechLLM(adapted, text_tokenizer, vocabulary, small_codec)

    return make


def random_codes(*frames: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(8, (2, count), generator=generator) for count in frames]  # the codes 8 to 15 never occur


def examples_of(speech_llm: SpeechLLM) -> list[Example]:
    parts = speech_llm.vocabulary, speech_llm.text_tokenizer
    texts = ["TURN ON", "OPEN THE BLUE DOOR"]
    return [transcription_example(codes, text, *parts) for codes, text in zip(random_codes(40, 25), texts, strict=True)]


def loss_of(speech_llm: SpeechLLM) -> Tensor:
    return sum(
        speech_llm.model(input_ids=example.input_ids[None], labels=example.labels[None]).loss
        for example in examples_of(speech_llm)
    )


def train(speech_llm: SpeechLLM, steps: int = 3) -> list[float]:
    """A few steps on everything that is to be trained; the losses on the way."""
    optimizer = torch.optim.Adam([p for p in speech_llm.model.parameters() if p.requires_grad], 3e-3)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(speech_llm)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def logits(speech_llm: SpeechLLM) -> Tensor:
    with torch.no_grad():
        return speech_llm.model(examples_of(speech_llm)[0].input_ids[None]).logits


def assert_equal_but_for_rounding(found: Tensor, expected: Tensor) -> None:
    """A merged product sums in another order than its parts; what that changes goes with the largest values."""
    assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def matrices(model: torch.nn.Module) -> list[Tensor]:
    return [model.get_input_embeddings().weight.data, model.get_output_embeddings().weight.data]


# ---- what is trained


@kinds
def test_exactly_the_new_rows_and_with_lora_all_linear_layers_but_the_head_are_trained(
    make_adapter: MakeAdapter, kind: dict
) -> None:
    speech_llm = make_adapter(**kind)
    trained = {name: p for name, p in speech_llm.model.named_parameters() if p.requires_grad}
    rows = {name.split(".trainable")[0].split(".token_adapter")[0] for name in trained if "lora" not in name}
    prefix = "base_model.model."
    assert rows == {f"{prefix}model.embed_tokens"} | (set() if kind["tied"] else {f"{prefix}lm_head"})
    assert all(p.shape == (18, WIDTH) for name, p in trained.items() if "lora" not in name)
    lora = {name.split(".lora_")[0].rsplit(".", 1)[1] for name in trained if "lora" in name}
    assert lora == (set(LINEAR) if kind["form"] == "lora" else set())
    assert len(trained) - len(rows) == (2 * 2 * len(LINEAR) if kind["form"] == "lora" else 0)  # two layers, A and B


@kinds
def test_an_untrained_adapter_changes_nothing(make_adapter: MakeAdapter, kind: dict) -> None:
    speech_llm = make_adapter(**kind)
    with speech_llm.model.disable_adapter():
        without = logits(speech_llm)
    assert torch.equal(logits(speech_llm), without)


@kinds
def test_training_moves_the_new_rows_and_no_other_row(make_adapter: MakeAdapter, kind: dict) -> None:
    speech_llm = make_adapter(**kind)
    before = [matrix.clone() for matrix in matrices(speech_llm.model)]
    frozen = {name: p.clone() for name, p in speech_llm.model.named_parameters() if not p.requires_grad}
    losses = train(speech_llm)
    assert losses[-1] < losses[0]
    for name, parameter in speech_llm.model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name
    new = speech_llm.vocabulary.new_ids
    merged = merge(speech_llm).model
    head = matrices(merged)[1]
    assert (head[new] != before[1][new]).any(1).all()  # the softmax moves every one of them
    for matrix, old in zip(matrices(merged), before, strict=True):
        others = torch.ones(len(old), dtype=torch.bool)
        others[new] = False
        assert torch.equal(matrix[others], old[others])
    read = torch.cat([example.input_ids for example in examples_of(speech_llm)]).unique()
    read = read[read >= new[0]]
    embedding = matrices(merged)[0]
    assert (embedding[read] != before[0][read]).any(1).all()


@kinds
def test_the_loss_of_training_is_the_one_of_the_merged_model(make_adapter: MakeAdapter, kind: dict) -> None:
    speech_llm = make_adapter(**kind)
    train(speech_llm)
    examples = examples_of(speech_llm)
    with torch.no_grad():
        loss = LabelledLoss(speech_llm.model, speech_llm.vocabulary)(examples)
        merged = LabelledLoss(merge(speech_llm).model, speech_llm.vocabulary)(examples)
    assert_close(merged, loss)


def test_rows_and_lora_are_float32_also_where_the_model_is_not(make_adapter: MakeAdapter) -> None:
    speech_llm = make_adapter(tied=False, dtype=torch.bfloat16)
    kinds_of = {p.requires_grad: p.dtype for p in speech_llm.model.parameters()}
    assert kinds_of == {True: torch.float32, False: torch.bfloat16}
    losses = train(speech_llm)
    assert losses[-1] < losses[0]
    assert merge(speech_llm).model.dtype == torch.bfloat16


# ---- on disk


@kinds
def test_only_what_was_trained_is_saved(tmp_path: Path, make_adapter: MakeAdapter, kind: dict) -> None:
    speech_llm = make_adapter(**kind)
    speech_llm.save(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    saved = load_file(file)
    trained = [p for p in speech_llm.model.parameters() if p.requires_grad]
    assert sorted(t.shape for t in saved.values()) == sorted(p.shape for p in trained)
    rows = 18 * WIDTH * (1 if kind["tied"] else 2)
    assert sum(t.numel() for name, t in saved.items() if "lora" not in name) == rows
    header = int.from_bytes(file.read_bytes()[:8], "little")
    assert file.stat().st_size == 8 + header + 4 * sum(p.numel() for p in trained)
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "audio_vocabulary.json", "base_model.json", "codec"),
        *("tokenizer.json", "tokenizer_config.json"),
    }


@kinds
def test_a_saved_adapter_is_loaded_and_merged_equal(tmp_path: Path, make_adapter: MakeAdapter, kind: dict) -> None:
    speech_llm = make_adapter(**kind)
    train(speech_llm)
    speech_llm.save(tmp_path / "adapter")
    torch.manual_seed(7)  # what the growing matrix is filled with must not matter
    loaded = load_speech_llm(tmp_path / "adapter")
    assert isinstance(loaded.model, PeftModel) and not loaded.model.training
    assert loaded.vocabulary == speech_llm.vocabulary
    adapted = logits(speech_llm)
    assert torch.equal(logits(loaded), adapted)
    codes = random_codes(30, 4, 11)
    texts = transcribe_codes(codes, speech_llm)
    assert transcribe_codes(codes, loaded) == texts and len(set(texts)) == 3

    merged, merged_loaded = merge(speech_llm), merge(loaded)
    assert type(merged_loaded.model).__name__ == "Qwen2ForCausalLM"
    assert torch.equal(logits(merged), logits(merged_loaded))
    assert_equal_but_for_rounding(logits(merged), adapted)
    first, second = merged.model.get_input_embeddings().weight, merged.model.get_output_embeddings().weight
    assert (first is second) is kind["tied"]

    merged.save(tmp_path / "merged")
    assert torch.equal(logits(load_speech_llm(tmp_path / "merged")), logits(merged))


def test_merging_without_an_adapter_does_nothing(make_speech_llm: Callable) -> None:
    speech_llm = make_speech_llm()
    assert merge(speech_llm) is speech_llm


def test_an_adapter_works_on_an_extended_model(tmp_path: Path, make_adapter: MakeAdapter) -> None:
    first = make_adapter("rows")
    train(first)
    merge(first).save(tmp_path / "first")
    read = load_speech_llm(tmp_path / "first")
    read.model = prepare_adapter(read.model, read.vocabulary, "lora", RANK, 2 * RANK)
    train(read)
    read.save(tmp_path / "second")
    assert torch.equal(logits(load_speech_llm(tmp_path / "second")), logits(read))


def test_weights_are_loaded_in_the_type_asked_for(tmp_path: Path, make_adapter: MakeAdapter) -> None:
    speech_llm = make_adapter()
    speech_llm.save(tmp_path / "adapter")
    merge(speech_llm).save(tmp_path / "merged")
    for folder in ("adapter", "merged"):
        loaded = load_speech_llm(tmp_path / folder, dtype=torch.bfloat16, device=torch.device("cpu"))
        assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
        assert loaded.model.get_decoder().rotary_emb.inv_freq.dtype == torch.float32
        assert loaded.codec.codebooks.dtype == torch.float32
        assert load_speech_llm(tmp_path / folder).model.dtype == torch.float32


# ---- the language model under an adapter


def test_an_adapter_is_loaded_on_its_language_model_in_any_precision(tmp_path: Path, make_adapter: MakeAdapter) -> None:
    make_adapter()
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    speech_llm = make_adapter(dtype=torch.float32)  # as train_asr loads it
    train(speech_llm)
    speech_llm.save(tmp_path / "adapter")
    loaded = load_speech_llm(tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(speech_llm))
    assert_equal_but_for_rounding(logits(merge(loaded)), logits(speech_llm))


def test_the_language_model_may_be_moved(tmp_path: Path, make_adapter: MakeAdapter) -> None:
    speech_llm = make_adapter()
    train(speech_llm)
    speech_llm.save(tmp_path / "adapter")
    shutil.move(tmp_path / "base", tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="base: no such folder .*set `base` to it"):
        load_speech_llm(tmp_path / "adapter")
    loaded = load_speech_llm(tmp_path / "adapter", base=tmp_path / "elsewhere")
    assert torch.equal(logits(loaded), logits(speech_llm))


def test_a_relative_folder_is_found_from_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_adapter: MakeAdapter
) -> None:
    speech_llm = make_adapter()
    speech_llm.model.get_base_model().name_or_path = "base"
    monkeypatch.chdir(tmp_path)
    speech_llm.save("adapter")
    monkeypatch.chdir("/")
    assert torch.equal(logits(load_speech_llm(tmp_path / "adapter")), logits(speech_llm))


@pytest.mark.parametrize(
    "place", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
)
def test_another_language_model_is_refused(tmp_path: Path, make_adapter: MakeAdapter, place: str) -> None:
    speech_llm = make_adapter("rows")
    speech_llm.save(tmp_path / "adapter")
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    other.get_parameter(place).data.mul_(1.01)
    other.save_pretrained(tmp_path / "other")
    fingerprints = [base_fingerprint(model, speech_llm.vocabulary.offset) for model in (speech_llm.model, other)]
    with pytest.raises(ValueError, match=rf"{fingerprints[0]} \(.*base\), .*other has {fingerprints[1]}: set"):
        load_speech_llm(tmp_path / "adapter", base=tmp_path / "other")


def test_the_fingerprint_does_not_depend_on_the_precision(tmp_path: Path, make_adapter: MakeAdapter) -> None:
    make_adapter(dtype=torch.bfloat16).save(tmp_path / "adapter")
    assert load_speech_llm(tmp_path / "adapter").model.get_base_model().dtype == torch.float32


@kinds
def test_the_fingerprint_covers_every_weight_except_new_rows_and_adapters(
    tmp_path: Path, make_adapter: MakeAdapter, kind: dict
) -> None:
    speech_llm = make_adapter(**kind)
    texts = speech_llm.vocabulary.offset
    train(speech_llm)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    fingerprint = base_fingerprint(base, texts)
    assert base_fingerprint(speech_llm.model, texts) == fingerprint
    for name, parameter in base.named_parameters():
        before = parameter.data.clone()
        parameter.data += 0.01 * torch.randn(before.shape, generator=torch.Generator().manual_seed(0))
        assert base_fingerprint(base, texts) != fingerprint, name
        parameter.data = before
    assert base_fingerprint(base, texts) == fingerprint


# ---- what is refused


def test_a_model_without_a_name_is_refused_before_training(make_speech_llm: Callable) -> None:
    speech_llm = make_speech_llm()
    with pytest.raises(ValueError, match="not loaded from a folder or the hub: save it with save_pretrained"):
        prepare_adapter(speech_llm.model, speech_llm.vocabulary)
    assert all(p.requires_grad for p in speech_llm.model.parameters())


def test_an_unknown_form_is_refused(make_speech_llm: Callable) -> None:
    speech_llm = make_speech_llm()
    with pytest.raises(ValueError, match="form must be .*, got 'row'"):
        prepare_adapter(speech_llm.model, speech_llm.vocabulary, "row")


@pytest.mark.parametrize("part", ["embed_tokens", "layers.1.self_attn.q_proj"])
def test_an_adapter_without_its_rows_or_updates_is_refused(
    make_adapter: MakeAdapter, tmp_path: Path, part: str
) -> None:
    """PEFT itself warns and leaves them as they were initialised."""
    make_adapter().save(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: value for name, value in load_file(file).items() if part not in name}, file)
    with pytest.raises(InputError, match=part):
        load_speech_llm(tmp_path / "adapter")


def test_an_update_has_the_rank_scale_and_dropout_that_were_asked_for(make_speech_llm: Callable) -> None:
    speech_llm = make_speech_llm()
    speech_llm.model.name_or_path = "base"
    model = prepare_adapter(speech_llm.model, speech_llm.vocabulary, "lora", rank=4, alpha=12, dropout=0.5).eval()
    layers = [one for name, one in model.named_modules() if name.endswith("q_proj") and hasattr(one, "lora_A")]
    assert layers
    for layer in layers:
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        torch.nn.init.normal_(b)
        x = torch.randn(3, a.shape[1])
        assert_close(layer(x), layer.base_layer(x) + 12 / 4 * (x @ a.T @ b.T))
        assert len(a) == 4 and layer.lora_dropout["default"].p == 0.5


@pytest.mark.parametrize("form", ["lora", "rows"])
def test_a_head_keeps_its_bias(
    form: str, tmp_path: Path, make_text_tokenizer: Callable, small_codec: SpeechCodec
) -> None:
    """As Phi's has one: what is trained is what is saved, merged and measured."""
    text_tokenizer = make_text_tokenizer()
    sizes = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    phi = PhiForCausalLM(PhiConfig(vocab_size=len(text_tokenizer) + 60, **sizes))  # spare rows have a bias, too
    torch.nn.init.normal_(phi.lm_head.bias)
    phi.save_pretrained(tmp_path / "base")
    plain = load_causal(tmp_path / "base")
    vocabulary = extend_vocabulary(plain, text_tokenizer, small_codec)
    ids = torch.arange(8)[None]
    expected = plain(ids).logits.detach()
    speech_llm = SpeechLLM(prepare_adapter(plain, vocabulary, form, RANK, 2 * RANK), text_tokenizer, vocabulary)
    assert_equal_but_for_rounding(speech_llm.model(ids).logits, expected)
    train(speech_llm)
    found = speech_llm.model(ids).logits.detach()
    assert not torch.allclose(found, expected, atol=1e-3)
    examples = examples_of(speech_llm)
    check_loss(LabelledLoss(speech_llm.model, vocabulary), examples)  # of codes, too
    losses = LabelledLoss(speech_llm.model, vocabulary)(examples).detach()
    speech_llm.save(tmp_path / "adapter")
    loaded = load_speech_llm(tmp_path / "adapter", with_codec=False)
    assert_equal_but_for_rounding(loaded.model(ids).logits, found)
    merged = merge(loaded)
    assert_equal_but_for_rounding(merged.model(ids).logits, found)
    assert_equal_but_for_rounding(LabelledLoss(merged.model, vocabulary)(examples).detach(), losses)
