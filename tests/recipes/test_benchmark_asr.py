"""recipes/benchmark_asr.py: what it compares is the same work, and what it counts is counted rightly."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from speechllm import Example, SpeechCodec, Utterance, encode_shards, save_audio
from speechllm.training.plan import training_flops

TINY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY |= {"num_key_value_heads": 1, "vocab_size": 512}


@pytest.fixture(scope="module")
def bench(recipe: Callable[[str], ModuleType]) -> ModuleType:
    return recipe("benchmark_asr.py")


def example(size: int, labels: int) -> Example:
    ids = torch.arange(size) % 50
    return Example(ids, torch.where(torch.arange(size) < size - labels, -100, ids))


def test_padded_batches_hold_every_example_once_within_the_limit(bench: ModuleType) -> None:
    examples = [example(size, 1) for size in (3, 9, 5, 8, 2, 12)]
    parts = bench.padded_batches(examples, tokens=16)
    assert sorted(len(one) for part in parts for one in part) == [2, 3, 5, 8, 9, 12]
    assert all(len(part) == 1 or max(map(len, part)) * len(part) <= 16 for part in parts)
    assert [[len(one) for one in part] for part in parts] == [[12], [9], [8, 5], [3, 2]]


def test_padding_is_masked_and_has_no_labels(bench: ModuleType) -> None:
    batch = bench.collate([example(4, 2), example(2, 1)], pad_id=7)
    assert batch["input_ids"].tolist() == [[0, 1, 2, 3], [0, 1, 7, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 2, 3], [-100, 1, -100, -100]]


def test_operations_are_counted_by_the_formula(make_qwen2: Callable, text_tokenizer: object) -> None:
    model = make_qwen2(text_tokenizer)  # width 16, two layers
    layers = sum(p.numel() for name, p in model.named_parameters() if "layers" in name)
    head = model.lm_head.weight.numel()
    once = 2 * layers * 14 + 2 * head * 4 + 2 * 2 * 16 * (100 + 16)
    assert training_flops(model, [10, 4], 4, frozen=False) == 3 * once
    assert training_flops(model, [10, 4], 4, frozen=True) == 2 * once


@pytest.mark.parametrize("train", ["full", "lora"])
def test_both_methods_are_measured(
    bench: ModuleType,
    train: str,
    tmp_path: Path,
    small_codec: SpeechCodec,
    noise: Callable[..., Tensor],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    utterances = []
    for number in range(4):
        path, samples = tmp_path / f"{number}.wav", 3200 + 1600 * number
        save_audio(path, noise(samples, seed=number)[0], 16_000)
        utterances.append(Utterance(str(number), str(path), samples / 16_000, "train", "TURN ON"))
    list(encode_shards(utterances, small_codec, tmp_path / "codes"))
    small_codec.save_pretrained(tmp_path / "codec")
    monkeypatch.setitem(bench.QWEN2_SHAPES, "small", TINY)
    config = bench.BenchmarkConfig(
        codes=str(tmp_path / "codes"),
        codec=str(tmp_path / "codec"),
        output=str(tmp_path / "results"),
        shape="small",
        train=train,
        batch_tokens=120,
        micro_batch_tokens=80,
        precision="no",
        steps=2,
        peak_tflops=1.0,
    )
    with torch.set_grad_enabled(True):
        bench.main(config)
    results = json.loads((tmp_path / "results" / "results.json").read_text(encoding="utf-8"))
    methods = results["methods"]
    assert set(methods) == {"packed", "padded"} and len(results["speedup_of_steps"]) == 2
    assert all(method["tokens_per_second"] > 0 and 0 < method["mfu"] < 1 for method in methods.values())
    assert 0 < results["tokens_per_step"] <= 120
    assert "tokens_per_second" in (tmp_path / "results" / "report.html").read_text(encoding="utf-8")
    assert "| packed |" in capsys.readouterr().out
