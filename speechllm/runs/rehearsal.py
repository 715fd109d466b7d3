"""What stages of an experiment take on this machine, found out in a few steps: time, memory, what bounds them."""

import functools
import gc
import importlib.util
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from speechllm.encoding import Encoding
from speechllm.prompt import Example
from speechllm.runs.launch import find_recipe
from speechllm.training.plan import product_speed, training_flops
from tokenizer.audio import save_audio
from tokenizer.utterances import Utterance

BUSY = 0.7  # share of a step that a GPU computes, below which the processor does not feed it fast enough
WAITING = 0.2  # share of a step spent waiting for data, above which the loader bounds it
WORDS_PER_SECOND = 3.0  # of English speech
LONGEST = 50  # steps that are measured at most


def load_recipe(name: str) -> ModuleType:
    """The file of a recipe as a module, for what it is made of: recipes are no package that could be imported."""
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", find_recipe(name))
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def noise_corpus(folder: Path, count: int, sample_rate: int) -> list[Utterance]:
    """Recordings of noise with about the lengths of LibriSpeech's training splits: two of three have 12 to 17 s."""
    draw = np.random.default_rng(0)
    long, short = draw.normal(14.3, 1.5, count).clip(12, 17), draw.uniform(1.5, 12, count)
    utterances = []
    for i, seconds in enumerate(np.where(np.arange(count) % 3 < 2, long, short)):
        path = folder / f"{i}.flac"
        save_audio(path, 0.1 * torch.randn(round(seconds * sample_rate)), sample_rate)
        text = " ".join(["word"] * max(1, round(WORDS_PER_SECOND * seconds)))
        utterances.append(Utterance(path.stem, str(path), float(seconds), "train", text, "s"))
    return utterances


def random_speech(encoding: Encoding, utterances: Sequence[Utterance]) -> list[Tensor]:
    """Codes long [layers, T] of the lengths of the recordings."""
    frames = [max(1, round(encoding.frame_rate * one.duration_s)) for one in utterances]
    return [torch.randint(encoding.codebook_size, (encoding.layers, count)) for count in frames]


def flops_and_tokens(model: nn.Module, examples: Sequence[Example], labels: int, frozen: bool) -> tuple[float, int]:
    """Operations of a training pass over examples with so many labels (`training_flops`), and the examples' tokens."""
    lengths = [*map(len, examples)]
    return training_flops(model, lengths, labels, frozen), sum(lengths)


def try_stage(stage: Callable[[], dict[str, Any]], device: torch.device) -> dict[str, Any]:
    """What a stage finds, or why it could not run, with its peak memory; either way its memory is free again.

    A stage returns at least precision ("no" or "bf16"), step_s, and flops, the floating point operations of a step;
    their share of the speed of one large matrix product, measured now, is added as mfu. fits: None if it failed for
    another reason than memory.
    """
    started = time.perf_counter()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        found = {"fits": True, **stage()}
        half = found["precision"] == "bf16"
        found["matmul_tflops"] = product_speed(device, torch.bfloat16 if half else torch.float32) / 1e12
        found["mfu"] = found["flops"] / found["step_s"] / 1e12 / found["matmul_tflops"]
    except (torch.OutOfMemoryError, MemoryError) as error:
        found = {"fits": False, "problem": str(error).split("\n")[0]}
    except Exception as error:  # whatever ends a stage, the others are worth knowing
        found = {"fits": None, "problem": f"{type(error).__name__}: {error}".split("\n")[0]}
    found |= {"peak_memory_gb": peak_memory_gb(device), "seconds": time.perf_counter() - started}
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def measure_steps(
    take: Callable[[], Any], work: Callable[[Any], Any], device: torch.device, seconds: float
) -> dict[str, Any]:
    """Take a batch and work on it, again and again for about so many seconds, after one step for warm-up.

    Returns step_s and wait_s, the medians of a step and of its waiting for the batch; busy, the share of a step that a
    GPU computes (None of a CPU); bound, what takes most: "loader", "processor" (of a GPU that waits) or "device".
    """
    waits: list[float] = []
    steps: list[float] = []
    work(take())
    end = time.perf_counter() + seconds
    while len(steps) < 2 or (time.perf_counter() < end and len(steps) < LONGEST):
        waited, batch = timed(take, device)
        worked, _ = timed(functools.partial(work, batch), device)
        waits.append(waited)
        steps.append(waited + worked)
    step_s, wait_s = median(steps), median(waits)
    busy = busy_share(functools.partial(work, batch), device)
    bound = "loader" if wait_s > WAITING * step_s else "device" if busy is None or busy > BUSY else "processor"
    return {"step_s": step_s, "wait_s": wait_s, "busy": busy, "bound": bound, "measured_steps": len(steps)}


class _Flops(TorchDispatchMode):
    """Adds up what PyTorch's counters say of every operation; its own mode does not bear gradients within a loss."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


def count_flops(work: Callable[[], Any]) -> int:
    """Floating point operations of matrix products, convolutions and attention; LSTMs are not counted."""
    with _Flops() as flops:
        work()
    return flops.total


def timed(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds until the device has done the work, and its result."""
    started = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started, result


def busy_share(work: Callable[[], Any], device: torch.device) -> float | None:
    """Share of the time in which a GPU computes; None of a CPU."""
    if device.type != "cuda":
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        seconds, _ = timed(work, device)
    return sum(event.self_device_time_total for event in recorded.key_averages()) / 1e6 / seconds


def size_gb(state: Any) -> float:
    """What the tensors of a state take in a checkpoint."""
    return sum(x.nbytes for x in tree_leaves(state) if isinstance(x, Tensor)) / 1e9


def device_name(device: torch.device) -> str:
    """The GPU, or how much of a CPU is used."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"


def memory_gb(device: torch.device) -> float:
    """All that the device has."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 1e9
    return psutil.virtual_memory().total / 1e9


def peak_memory_gb(device: torch.device) -> float:
    """Of a GPU since `torch.cuda.reset_peak_memory_stats`; of a CPU, of the whole process so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
