"""The machine and how a result was made: processors, accelerators, package versions, command."""

import functools
import os
import platform
import shlex
import sys
import timeit
from dataclasses import asdict
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # who only starts others must not wait for these
    import torch
    from accelerate import Accelerator

# one process may have a share that takes hours longer; where one dies, the launcher ends the others of its machine
PATIENCE = timedelta(days=1)
SLOW = 5.0  # times as long in bfloat16 as in float32; a processor with arithmetic for it takes half as long
ACCELERATE = "SPEECHLLM_ACCELERATE"  # set for the processes of a configuration of Accelerate: its file
PACKAGES = ("torch", "torchaudio", "transformers", "peft", "accelerate", "datasets", "jiwer", "speechbrain")


def make_accelerator(precision: str = "no") -> "Accelerator":
    """An Accelerator on this machine's GPUs or, without any, on its CPUs.

    The CPU must be requested explicitly: otherwise processes that are started together would each train alone. On it,
    numbers below 1.2e-38 count as 0: moving averages of gradients end there, and such steps take up to a fifth longer.
    Says so, once a machine, where bf16 takes much longer than float32.
    """
    import torch
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

    torch.set_flush_denormal(True)
    settings = [
        # buffers are changed in the same way by all processes; gradients are not held twice
        DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
        InitProcessGroupKwargs(timeout=PATIENCE),
    ]
    cpu = not torch.accelerator.is_available()
    accelerator = Accelerator(mixed_precision=precision, cpu=cpu, kwargs_handlers=settings)
    if cpu and precision == "bf16" and accelerator.is_local_main_process:
        warn_of_slow_bf16()
    return accelerator


def decoding_device(precision: str | None = None) -> "tuple[str, torch.dtype]":
    """Where a language model decodes, and in which weights, whichever it is stored in.

    precision: bf16, no (float32), or None: bf16 on a GPU, no on a CPU. Says so where bf16 takes much longer.
    """
    import torch

    gpu = torch.cuda.is_available()
    half = precision == "bf16" or (precision is None and gpu)
    if half and not gpu:
        warn_of_slow_bf16()
    return "cuda" if gpu else "cpu", torch.bfloat16 if half else torch.float32


def warn_of_slow_bf16() -> None:
    """Tell of a CPU without arithmetic in bfloat16, on stderr."""
    if (times := bf16_slowdown()) > SLOW:
        print(
            f"warning: matrix products take {times:.0f} times as long in bfloat16 as in float32 on this processor: "
            "set precision=no",
            file=sys.stderr,
        )


def bf16_slowdown() -> float:
    """How many times as long as in float32 the CPU takes for a matrix product in bfloat16."""
    import torch

    def seconds(dtype: torch.dtype) -> float:
        square = torch.ones(128, 128, dtype=dtype)
        return min(timeit.repeat(lambda: square @ square, number=1, repeat=5))

    return seconds(torch.bfloat16) / seconds(torch.float32)


def command_line() -> str:
    """The command that repeats this process, or the processes that share its work, in shell syntax."""
    recipe, *words = sys.argv
    processes, configured = os.environ.get("WORLD_SIZE", "1"), os.environ.get(ACCELERATE)
    how = ["--accelerate", configured] if configured else ["--processes", processes] if processes != "1" else []
    return shlex.join(["speechllm", "run", recipe, *how, *words] if how else ["python", recipe, *words])


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
