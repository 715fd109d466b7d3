"""recipes/benchmark.py: ways that come to the same result, timed in turns, and counted rightly."""

import importlib.util
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from speechllm import Example, SpeechCodec, Utterance, encode_shards, save_audio
from speechllm.benchmarks import codec, corpus, cost, decoding, imports, language_model, timing
from speechllm.benchmarks.timing import compare
from speechllm.runs.config import load_config
from speechllm.training.plan import training_flops
from tokenizer.files import write_jsonl

TINY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY |= {"num_key_value_heads": 1, "vocab_size": 1500}
CPU = torch.device("cpu")
Measure = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory, noise: Callable[..., Tensor]) -> Path:
    """A corpus of four."""
    folder, rows = tmp_path_factory.mktemp("corpus"), []
    for number in range(4):
        samples = 3200 + 1600 * number
        save_audio(folder / f"{number}.wav", noise(samples, seed=number)[0], 16_000)
        rows.append({"path": f"{number}.wav", "duration_s": samples / 16_000, "split": "train", "text": "TURN ON"})
    write_jsonl(folder / "manifest.jsonl", rows)
    return folder


@pytest.fixture
def measure(
    recipe: Callable[[str], ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    without_pictures: None,
) -> Measure:
    """Runs a row with tiny shapes, looks at what is written and printed, and returns its results."""
    monkeypatch.setitem(language_model.SHAPES, "small", TINY)
    module = recipe("benchmark.py")

    def run(row: str, **settings: Any) -> dict[str, Any]:
        folder = tmp_path / "out"
        with torch.set_grad_enabled(True):
            module.main(module.SpeedConfig(row, str(folder), repeats=1, **settings))
        assert (folder / "report.html").exists() and "|---|" in capsys.readouterr().out
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        for case in results.get("cases", {}).values():
            ours, *others = case["seconds"]
            assert all(len(seconds) == 1 and seconds[0] > 0 for seconds in case["seconds"].values())
            assert case["ratios"] == {name: case["seconds"][name][0] / case["seconds"][ours][0] for name in others}
        return results

    return run


def test_a_ratio_is_the_median_over_the_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    now, durations = [0.0], {"ours": iter([9.0, 1.0, 1.0, 2.0]), "theirs": iter([9.0, 2.0, 5.0, 3.0])}

    def way(name: str) -> Callable[[int], list[list[int]]]:
        def work(repeat: int) -> list[list[int]]:
            now[0] += next(durations[name])
            return [[1], [2 if name == "ours" or repeat else 3]]

        return work

    monkeypatch.setattr(timing, "clock", lambda device: now[0])
    found = compare({name: way(name) for name in durations}, 3, CPU)
    assert found.seconds == {"ours": [1.0, 1.0, 2.0], "theirs": [2.0, 5.0, 3.0]}
    assert found.ratios == {"theirs": 2.0} and found.equal == {"theirs": 0.5} and not found.difference


def test_floats_are_compared_by_their_largest_difference_in_any_repeat() -> None:
    ways = {
        "ours": lambda _: [torch.tensor([1.0, -4.0]), torch.tensor(0.5)],
        "theirs": lambda repeat: [torch.tensor([1.0, -4.0 - repeat]), torch.tensor(0.5)],
    }
    found = compare(ways, 2, CPU)
    assert found.difference == {"theirs": 0.25} and not found.equal


@pytest.mark.skipif(not timing.RESET.exists(), reason="needs Linux's record of the largest memory")
def test_memory_is_what_a_way_holds_at_most() -> None:
    ways = {"little": lambda _: [], "much": lambda _: [] if torch.ones(25_000_000).sum() else []}
    found = compare(ways, 1, CPU, memory=True)
    assert found.memory_gb["little"][0] < 0.05 < 0.09 < found.memory_gb["much"][0] < 0.2


@pytest.mark.parametrize("row", ["encode", "decode"])
def test_the_codec_does_what_its_peers_do(row: str, measure: Measure, monkeypatch: pytest.MonkeyPatch) -> None:
    mixed = {"3 mixed": [0.2, 0.6, 0.4]}
    monkeypatch.setattr(codec, "CASES_S", {"EncodecModel": mixed, "SpeechTokenizer": {"alone": [0.3]}})
    cases = measure(row)["cases"]
    names = ["EncodecModel", "SpeechTokenizer"] if importlib.util.find_spec("speechtokenizer") else ["EncodecModel"]
    assert [case.partition(",")[0] for case in cases] == names
    for case, name in zip(cases.values(), names, strict=True):
        assert case["equal"][name] > 0.97 if row == "encode" else case["difference"][name] < 1e-4


def test_a_training_step_of_the_codec_is_that_of_the_reference(
    measure: Measure, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(codec.STFT_FILTERS, "small", 2)
    monkeypatch.setattr(codec, "CROPS", (2, 1600))
    assert measure("codec_step")["cases"][""]["difference"]["reference order"] < 1e-4


@pytest.mark.parametrize("train", ["full", "lora"])
def test_steps_of_the_language_model_come_to_the_same(
    train: str, measure: Measure, recordings: Path, small_codec: SpeechCodec, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in (recordings / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]
    utterances = [
        Utterance(f"{number}", str(recordings / row["path"]), row["duration_s"], "train", row["text"])
        for number, row in enumerate(rows)
    ]
    list(encode_shards(utterances, small_codec, tmp_path / "codes"))
    settings = {"batch_tokens": 120, "micro_batch_tokens": 80, "peak_tflops": 1.0}
    results = measure("lm_step", codes=str(tmp_path / "codes"), train=train, **settings)
    others = results["cases"][""]["difference"]
    assert list(others) == ["flattened", "padded, sorted", "padded"] and max(others.values()) < 1e-4
    assert all(one["tokens_per_second"] > 0 and 0 < one["mfu"] < 1 for one in results["speeds"].values())
    assert 0 < results["tokens"][0] <= 120 and 0 < results["labels"][0] < results["tokens"][0]


def test_the_loss_is_that_of_all_logits(measure: Measure) -> None:
    results = measure("loss", micro_batch_tokens=1300)
    case = results["cases"]["1,280 tokens"]
    assert results["labels"] == 2 * 42 and case["difference"]["all logits"] < 1e-5


def test_all_ways_of_decoding_write_the_same(measure: Measure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "LENGTHS_S", {"mixed": [0.3, 2.0, 1.0]})
    monkeypatch.setattr(decoding, "PADDED", 2)
    assert measure("decoding")["cases"]["mixed"]["equal"] == {"one by one": 1.0, "padded": 1.0}


def test_a_corpus_gets_the_same_codes_from_all_programs(
    measure: Measure, recordings: Path, recipe: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The programs run in this process."""
    started: list[str] = []

    def run(command: list[str], **_: Any) -> None:
        if "-c" in command:
            started.append("plain")
            monkeypatch.setattr(sys, "argv", command[2:])
            exec(command[2], {})
            return
        started.append("several" if "speechllm.runs.launch" in command else "one")
        module = recipe("encode_speech.py")
        script = next(place for place, word in enumerate(command) if word.endswith("encode_speech.py"))
        module.main(load_config(module.EncodeConfig, None, command[script + 1 :]))

    monkeypatch.setattr(corpus, "subprocess", types.SimpleNamespace(run=run, DEVNULL=None))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)  # two processes cannot share one
    results = measure("encoding", data=str(recordings), utterances=3)
    assert started == ["one", "several", "plain"]
    case = results["cases"]["3 recordings"]
    assert case["equal"] == {"2 processes": 1.0, "one by one": 1.0}
    assert results["waited_s"].keys() == case["seconds"].keys() and 0 < results["hours"] < 1


@pytest.mark.parametrize("kind, bytes_of_frame", [("codes", 2), ("features", 6)])
def test_what_the_data_costs_is_measured_on_speech_that_is_deleted(
    kind: str, bytes_of_frame: int, measure: Measure, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(corpus, "WIDTH", 3)
    monkeypatch.setattr(corpus, "STEPS", 2)
    results = measure("startup", utterances=30, kind=kind, batch_tokens=2000)
    assert 0 < results["startup_cpu_s"] < 60 and results["step_cpu_s"] > 0 and results["memory_gb"] >= 0
    assert 30 * 1.3 < 3600 * results["hours"] < 30 * 16.8
    assert results["disk_gb"] * 1e9 > bytes_of_frame * 50 * 3600 * results["hours"] * 0.99
    assert not list((tmp_path / "out").glob(".codes*"))


def test_costs_are_measured_by_the_amount_of_speech_and_plotted(
    measure: Measure, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cost, "LENGTHS_S", (0.5, 1.0))
    monkeypatch.setattr(cost, "PARTS", (3, 1))
    monkeypatch.setattr(corpus, "STEPS", 1)
    lines = measure("cost", utterances=30, batch_tokens=2000)["cost"]
    assert [speech_s for speech_s, _ in lines["encode a recording"]] == [0.5, 1.0]
    (third_s, _), (whole_s, _) = lines["start a training"]
    assert 10 * 1.3 < third_s < 10 * 16.8 and 30 * 1.3 < whole_s < 30 * 16.8
    assert all(took_s > 0 for line in lines.values() for _, took_s in line)
    assert (tmp_path / "out" / "cost.svg").exists()


def test_imports_are_measured_in_processes_of_their_own(measure: Measure, monkeypatch: pytest.MonkeyPatch) -> None:
    starts = {"import speechllm": ["-c", "import speechllm"], "more": ["-c", "sum(range(10**7))"]}
    monkeypatch.setattr(imports, "STARTS", starts)
    assert measure("import")["cases"][""]["ratios"]["more"] > 1


def example(size: int, labels: int) -> Example:
    ids = torch.arange(size) % 50
    return Example(ids, torch.where(torch.arange(size) < size - labels, -100, ids))


def test_padded_batches_hold_every_example_once_within_the_limit() -> None:
    examples = [example(size, 1) for size in (12, 9, 8, 5, 3, 2)]
    parts = language_model.padded_batches(examples, tokens=16)
    assert [[len(one) for one in part] for part in parts] == [[12], [9], [8, 5], [3, 2]]
    parts = language_model.padded_batches(examples[::-1], tokens=16)
    assert [[len(one) for one in part] for part in parts] == [[2, 3, 5], [8], [9], [12]]


def test_padding_is_masked_and_has_no_labels() -> None:
    batch = language_model.collate([example(4, 2), example(2, 1)], pad_id=7)
    assert batch["input_ids"].tolist() == [[0, 1, 2, 3], [0, 1, 7, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 2, 3], [-100, 1, -100, -100]]


def test_operations_are_counted_by_the_formula(language_model: torch.nn.Module) -> None:
    config, head = language_model.config, language_model.get_output_embeddings()
    language_model.per_layer = torch.nn.Embedding(1000, 7)  # as Gemma 3n has: a table, of which a row is read
    tables = [part for part in language_model.modules() if isinstance(part, torch.nn.Embedding)]
    outside = {id(p): p.numel() for part in (*tables, head) for p in part.parameters()}
    layers = sum(p.numel() for p in language_model.parameters()) - sum(outside.values())
    assert layers > 1000
    attention = 2 * config.num_hidden_layers * config.hidden_size * (100 + 16)
    once = 2 * layers * 14 + 2 * head.weight.numel() * 4 + attention
    assert training_flops(language_model, [10, 4], 4, frozen=False) == 3 * once
    assert training_flops(language_model, [10, 4], 4, frozen=True) == 2 * once
