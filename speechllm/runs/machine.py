"""What a run finds on its machine: processors, accelerators, package versions."""

import contextlib
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # who only starts others must not wait for these
    from accelerate import Accelerator

PACKAGES = ("torch", "torchaudio", "transformers", "peft", "accelerate", "datasets", "jiwer", "speechbrain")


def make_accelerator(precision: str = "no") -> "Accelerator":
    """Accelerate on whatever this machine has.

    Where there is no GPU that must be said: processes started together would each train alone otherwise.
    """
    import torch
    from accelerate import Accelerator

    return Accelerator(mixed_precision=precision, cpu=not torch.accelerator.is_available())


def versions() -> dict[str, str]:
    """Versions of Python and of the packages results depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def available_cpus() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
