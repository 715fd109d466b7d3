"""recipes/benchmark.py: the ways write the same, and their times are compared."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def test_all_ways_of_decoding_write_the_same(
    recipe: Callable[[str], ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    module = recipe("benchmark.py")
    monkeypatch.setitem(module.QWEN2_SHAPES, "small", {**SHAPE, "num_key_value_heads": 1, "vocab_size": 1500})
    monkeypatch.setattr(module, "LENGTHS_S", {"mixed": [0.3, 2.0, 1.0]})
    monkeypatch.setattr(module, "PADDED", 2)
    module.main(module.SpeedConfig(str(tmp_path / "out"), repeats=1))
    found = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))["decoding"]["mixed"]
    assert found["equal"] == {"one by one": 3, "padded": 3} and found["answers"] == 3 and 3 < found["words"] <= 12
    assert {name: len(seconds) for name, seconds in found["seconds"].items()} == dict.fromkeys(found["seconds"], 1)
    assert found["ratios"]["padded"] == found["seconds"]["padded"][0] / found["seconds"]["packed"][0]
    assert "| mixed: one by one |" in capsys.readouterr().out


def test_a_ratio_is_the_median_over_the_repeats(
    recipe: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, now = recipe("benchmark.py"), [0.0]
    durations = {"ours": iter([9.0, 1.0, 1.0, 2.0]), "theirs": iter([9.0, 2.0, 5.0, 3.0])}

    def way(name: str) -> Callable[[], list[list[int]]]:
        def work() -> list[list[int]]:
            now[0] += next(durations[name])
            return [[1], [2 if name == "ours" else 3]]

        return work

    monkeypatch.setattr(module.time, "process_time", lambda: now[0])
    found = module.compare({name: way(name) for name in durations}, 3, torch.device("cpu"))
    assert found["seconds"] == {"ours": [1.0, 1.0, 2.0], "theirs": [2.0, 5.0, 3.0]}
    assert found["ratios"] == {"theirs": 2.0} and found["equal"] == {"theirs": 1} and found["words"] == 2
