"""The machine that a recipe runs on."""

import pytest
import torch

from speechllm.runs import machine
from speechllm.runs.machine import decoding_device, make_accelerator


def test_numbers_that_slow_a_processor_down_count_as_zero() -> None:
    """Moving averages of gradients that have ended become so small that some processors take many times as long."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormal numbers")
    torch.set_flush_denormal(False)
    small, factor = torch.full((64,), 1e-30), 1e-10
    assert (small * factor).all()
    make_accelerator()
    assert not (small * factor).any()


@pytest.mark.usefixtures("new_accelerator")
@pytest.mark.parametrize(("times", "words"), [(120.0, "120 times as long in bfloat16"), (0.5, "")])
def test_a_processor_without_bfloat16_is_told_of(
    times: float, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(machine, "bf16_slowdown", lambda: times)
    make_accelerator("bf16")
    said = capsys.readouterr().err
    assert words in said
    assert ("precision=no" in said) == bool(words)


@pytest.mark.usefixtures("new_accelerator")
def test_float32_is_not_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(machine, "bf16_slowdown", lambda: pytest.fail("not asked for"))
    make_accelerator("no")
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("gpu", "precision", "expected"),
    [
        (True, None, ("cuda", torch.bfloat16)),
        (True, "bf16", ("cuda", torch.bfloat16)),
        (True, "no", ("cuda", torch.float32)),
        (False, None, ("cpu", torch.float32)),
        (False, "no", ("cpu", torch.float32)),
        (False, "bf16", ("cpu", torch.bfloat16)),
    ],
)
def test_a_model_decodes_in_bfloat16_on_gpus_and_where_it_is_asked_for(
    gpu: bool,
    precision: str | None,
    expected: tuple[str, torch.dtype],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(machine, "bf16_slowdown", lambda: 100.0)
    assert decoding_device(precision) == expected
    slow = expected == ("cpu", torch.bfloat16)
    assert ("100 times as long" in capsys.readouterr().err) == slow
