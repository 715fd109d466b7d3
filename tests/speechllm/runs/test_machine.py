"""The machine that a recipe runs on."""

import pytest
import torch

from speechllm.runs.machine import make_accelerator


def test_numbers_that_slow_a_processor_down_count_as_zero() -> None:
    """Moving averages of gradients that have ended become so small that some processors take many times as long."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormal numbers")
    torch.set_flush_denormal(False)
    small, factor = torch.full((64,), 1e-30), 1e-10
    assert (small * factor).all()
    make_accelerator()
    assert not (small * factor).any()
