"""The machine and how a result was made: processors, accelerators, package versions, command."""

import functools
import os
import platform
import shlex
import sys
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # who only starts others must not wait for these
    from accelerate import Accelerator

PACKAGES = ("torch", "torchaudio", "transformers", "peft", "accelerate", "datasets", "jiwer", "speechbrain")


def make_accelerator(precision: str = "no") -> "Accelerator":
    """An Accelerator on this machine's GPUs or, without any, on its CPUs.

    The CPU must be requested explicitly: otherwise processes that are started together would each train alone. On it,
    numbers below 1.2e-38 count as 0: moving averages of gradients end there, and such steps take up to a fifth longer.
    """
    import torch
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    torch.set_flush_denormal(True)
    buffers = DistributedDataParallelKwargs(broadcast_buffers=False)  # which all processes change in the same way
    return Accelerator(mixed_precision=precision, cpu=not torch.accelerator.is_available(), kwargs_handlers=[buffers])


def command_line() -> str:
    """The command that repeats this process, or the processes that share its work, in shell syntax."""
    recipe, *words = sys.argv
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        return shlex.join(["speechllm", "run", recipe, "--processes", str(processes), *words])
    return shlex.join(["python", recipe, *words])


def provenance(config: Any, seconds: float, *packages: str) -> dict[str, Any]:
    """How a result was made: config, a dataclass; command; seconds; versions, including those of further `packages`."""
    return {
        "config": asdict(config),
        "command": command_line(),
        "seconds": seconds,
        "versions": versions(*packages),
    }


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python, of the packages that results depend on, and of further `packages`, if installed."""
    found = {package: _version(package) for package in (*PACKAGES, *packages)}
    return {"python": platform.python_version()} | {package: number for package, number in found.items() if number}


@functools.cache  # reading the description of a package takes more than a millisecond
def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def available_cpus() -> int:
    """Number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
