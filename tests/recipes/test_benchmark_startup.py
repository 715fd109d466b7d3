"""The benchmark of the data's cost, on a few utterances."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.mark.parametrize("kind, bytes_of_frame", [("codes", 2), ("features", 6)])
def test_the_costs_are_measured_on_speech_that_is_deleted(
    recipe: Callable, tmp_path: Path, kind: str, bytes_of_frame: int, capsys: pytest.CaptureFixture
) -> None:
    module = recipe("benchmark_startup.py")
    output = tmp_path / "out"
    module.main(module.StartupConfig(str(output), utterances=30, kind=kind, width=3, batch_tokens=2000, steps=2))
    results = json.loads((output / "results.json").read_text(encoding="utf-8"))
    assert 0 < results["startup_cpu_s"] < 60 and results["step_cpu_s"] > 0 and results["peak_memory_gb"] >= 0
    assert 30 * 1.3 < 3600 * results["hours"] < 30 * 16.8
    assert results["disk_gb"] * 1e9 > bytes_of_frame * 50 * 3600 * results["hours"] * 0.99
    assert "| 30 | " in capsys.readouterr().out
    assert not list(output.glob(".codes*")) and (output / "report.html").exists()
