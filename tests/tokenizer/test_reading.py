"""Files that others wrote: a broken one is refused in one line that names it, and nothing in it is run."""

import json
import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, BertModel

from speechllm import Codes, InputError, SpeechCodec, load_tokenizer
from speechllm.adapters import load_causal
from speechllm.training.emotion import load_bert
from tokenizer import pretrained
from tokenizer.pretrained import read_weights
from tokenizer.training.small_teachers import save_hubert, small_hubert
from tokenizer.training.teachers import SemanticTeacher, SpeakerTeacher

BERT = BertConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=1, intermediate_size=8, vocab_size=9)
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 10\n"
Load = Callable[[Path], object]


@pytest.fixture(scope="module")
def models(codec: SpeechCodec, make_qwen2: Callable, make_text_tokenizer: Callable, tmp_path_factory) -> Path:
    """Tiny models, in folders named by their kind."""
    folder = tmp_path_factory.mktemp("models")
    codec.save_pretrained(folder / "codec")
    torch.manual_seed(0)
    save_hubert(small_hubert(hidden_size=16, layers=1), folder / "hubert")
    BertModel(BERT).save_pretrained(folder / "bert")
    BertForMaskedLM(BERT).save_pretrained(folder / "masked")
    text_tokenizer = make_text_tokenizer()
    make_qwen2(text_tokenizer, tied=False).save_pretrained(folder / "qwen2")
    text_tokenizer.save_pretrained(folder / "qwen2")
    return folder


LOADERS: dict[str, Load] = {
    "codec": load_tokenizer,
    "hubert": SemanticTeacher.from_pretrained,
    "bert": load_bert,
    "qwen2": load_causal,
}
BROKEN: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    "cut weights": ("model.safetensors", lambda b: b[: len(b) // 2], "is cut short or damaged"),
    "cut header": ("model.safetensors", lambda b: b[:10], "is cut short or damaged"),
    "empty weights": ("model.safetensors", lambda b: b"", "is empty"),
    "pointer": ("model.safetensors", lambda b: LFS, "is the pointer of Git LFS"),
    "pickle": ("model.safetensors", lambda b: pickle.dumps([1]), "is cut short or damaged"),
    "cut configuration": ("config.json", lambda b: b[: len(b) // 2], "is no JSON"),
    "empty configuration": ("config.json", lambda b: b"", "is empty"),
    "a list": ("config.json", lambda b: b"[1]", "holds a list and not an object"),
    "UTF-16": ("config.json", lambda b: b.decode().encode("utf-16"), "is no JSON"),
}


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("kind", LOADERS)
def test_a_broken_file_is_named(models: Path, tmp_path: Path, kind: str, broken: str) -> None:
    shutil.copytree(models / kind, tmp_path / kind)
    name, change, message = BROKEN[broken]
    file = tmp_path / kind / name
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(InputError, match=f"{name} {message}") as caught:
        LOADERS[kind](tmp_path / kind)
    assert "\n" not in str(caught.value)


CHANGED = {
    "hubert": ("encoder.layers.0.attention", r"lacks 8 weights of a HubertModel, encoder\.layers\.0\.attention"),
    "bert": ("layer.1.attention", r"lacks \d+ weights of a BertModel, encoder\.layer\.1"),
    "qwen2": ("lm_head", r"lacks 1 weights of a Qwen2ForCausalLM, lm_head\.weight first"),
    "codec": ("decoder.layers.0", r"lacks \d+ weights of a SpeechCodec, decoder\.layers\.0"),
}


@pytest.mark.parametrize("renamed", [False, True])
@pytest.mark.parametrize("kind", CHANGED)
def test_missing_and_renamed_weights_are_refused(models: Path, tmp_path: Path, kind: str, renamed: bool) -> None:
    shutil.copytree(models / kind, tmp_path / kind)
    part, message = CHANGED[kind]
    weights = load_file(tmp_path / kind / "model.safetensors")
    found = {name.replace(part, "other"): value for name, value in weights.items() if renamed or part not in name}
    save_file(found, tmp_path / kind / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=message):
        LOADERS[kind](tmp_path / kind)


def test_a_checkpoint_of_more_layers_than_its_configuration_is_refused(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "bert", tmp_path / "bert")
    file = tmp_path / "bert" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_hidden_layers": 1}))
    with pytest.raises(InputError, match="has 16 weights that a BertModel has not"):
        load_bert(tmp_path / "bert")


@pytest.mark.parametrize("kind", ["hubert", "codec"])
def test_weights_that_are_no_numbers_are_refused(models: Path, tmp_path: Path, kind: str) -> None:
    shutil.copytree(models / kind, tmp_path / kind)
    weights = load_file(tmp_path / kind / "model.safetensors")
    weights[next(name for name in weights if name.endswith("bias"))].fill_(torch.nan)
    save_file(weights, tmp_path / kind / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="bias is not finite"):
        LOADERS[kind](tmp_path / kind)


def test_a_missing_part_of_the_weights_is_named(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "bert", tmp_path / "bert")
    (tmp_path / "bert" / "model.safetensors").rename(tmp_path / "bert" / "a.safetensors")
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (tmp_path / "bert" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match=r"lacks 1 of 2 parts .*, b\.safetensors first"):
        load_bert(tmp_path / "bert")


EXCHANGED = [
    (load_bert, "hubert", "is a hubert model: expected a BERT"),
    (load_bert, "qwen2", "is a qwen2 model: expected a BERT"),
    (load_bert, "codec", "holds a speech codec: expected a BERT"),
    (load_causal, "bert", r"is a bert model \(BertModel\): expected a causal language model"),
    (load_causal, "masked", r"is a bert model \(BertForMaskedLM\): expected a causal language model"),
    (load_causal, "hubert", "is a hubert model .*: expected a causal language model"),
    (load_causal, "codec", "holds a speech codec: expected a causal language model"),
    (load_tokenizer, "qwen2", "found a qwen2 model; an audio tokenizer is"),
    (SemanticTeacher.from_pretrained, "bert", "is a bert model: expected HuBERT, WavLM or wav2vec 2.0"),
    (SemanticTeacher.from_pretrained, "codec", "holds a speech codec: expected HuBERT"),
    (SpeakerTeacher.from_pretrained, "hubert", "holds a hubert model and not an ECAPA-TDNN"),
    (SpeakerTeacher.from_pretrained, "codec", "holds a speech codec and not an ECAPA-TDNN"),
]


@pytest.mark.parametrize("load, kind, message", EXCHANGED)
def test_another_kind_of_model_is_named(models: Path, load: Load, kind: str, message: str) -> None:
    with pytest.raises((InputError, FileNotFoundError), match=message):
        load(models / kind)


def test_the_head_of_a_bert_is_left_out(models: Path) -> None:
    bert, states = load_bert(models / "masked"), load_file(models / "masked" / "model.safetensors")
    held = {name: value for name, value in bert.state_dict().items() if name != "embeddings.position_ids"}
    assert held and all(torch.equal(value, states[f"bert.{name}"]) for name, value in held.items())
    assert len(held) < len(states)


def test_code_that_comes_with_a_model_is_never_run(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "qwen2", tmp_path / "other")
    file, code = tmp_path / "other" / "config.json", {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": "other", "auto_map": code}))
    (tmp_path / "other" / "code.py").write_text(f"open({str(tmp_path / 'made')!r}, 'w')")
    with pytest.raises(InputError, match="is a other model, .* is never run: expected a causal language model"):
        load_causal(tmp_path / "other")
    assert not (tmp_path / "made").exists()


class _Call:
    def __init__(self, place: Path):
        self.place = place

    def __reduce__(self) -> tuple:
        return Path.mkdir, (self.place,)


@pytest.mark.parametrize("content", ["call", "cut", "empty", "text"])
def test_a_checkpoint_that_is_no_weights_is_refused_and_not_run(tmp_path: Path, content: str) -> None:
    file = tmp_path / "weights.pt"
    torch.save({"a": _Call(tmp_path / "made") if content == "call" else torch.ones(1000)}, file)
    if content != "call":
        file.write_bytes({"cut": file.read_bytes()[:2000], "empty": b"", "text": b"hello"}[content])
    with pytest.raises(InputError, match=r"weights\.pt is .*copy or download it again") as caught:
        read_weights(file, "the weights of a model")
    assert "\n" not in str(caught.value) and not (tmp_path / "made").exists()


@pytest.mark.parametrize("load", [load_tokenizer, load_causal, load_bert, SpeakerTeacher.from_pretrained])
def test_a_hub_name_without_a_network_is_answered_at_once(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    class NoNetwork:
        def head(self, *_: object, **__: object) -> None:
            raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_session", NoNetwork)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_: pytest.fail("tries again for half a minute"))
    pretrained._hub_answers.cache_clear()
    start = time.monotonic()
    try:
        with pytest.raises(FileNotFoundError, match="nobody/nothing: no such folder, and no hub model that can be"):
            load("nobody/nothing")
    finally:
        pretrained._hub_answers.cache_clear()
    assert time.monotonic() - start < 20  # SpeechBrain takes seconds to import


CODES = {
    "too high": ([[[8]]], [1], r"codes must be 0\.\.7, got 8\.\.8"),
    "negative": ([[[-1]]], [1], r"codes must be 0\.\.7, got -1\.\.-1"),
    "one axis too few": ([[1]], [1], r"expected codes long \[B, 1\.\.3, T\], got torch.int64 \[1, 1\]"),
    "fractions": ([[[0.5]]], [1], "got torch.float32"),
    "too many layers": ([[[1]] * 4], [1], r"got torch.int64 \[1, 4, 1\]"),
    "too long": ([[[1]]], [2], r"the lengths \[2\] are not those"),
}


@pytest.mark.parametrize("kind", CODES)
def test_codes_that_a_codec_cannot_have_made_are_refused(codec: SpeechCodec, kind: str) -> None:
    ids, lengths, message = CODES[kind]
    with pytest.raises(InputError, match=message):
        codec.decode(Codes(torch.tensor(ids), torch.tensor(lengths)))
