"""Ways to do the same work, timed in turns: ratios of pairs, peak memory, and whether they come to the same result."""

import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

import psutil
import torch
from torch import Tensor

from speechllm.evaluation.tables import DASH, Table, plain

Size = Literal["small", "full"]  # of models with random weights: quick to try, or as published
Precision = Literal["no", "bf16"]  # of language models
Way = Callable[[int], Any]  # the work, given the number of the repeat
RESET = Path("/proc/self/clear_refs")  # Linux: 5 makes the memory that is held now the peak so far


@dataclass
class Comparison:
    """Ways to do the same work, by name, the first of which is ours.

    seconds, memory_gb: of each repeat, the latter above what was held before, where it was asked for and can be
    measured. Of the others: ratios, how many times as long as ours they take, median over the repeats; equal, the share
    of items equal to ours, and difference, that of floating point numbers relative to the largest of an item, both in
    the worst repeat.
    """

    seconds: dict[str, list[float]]
    memory_gb: dict[str, list[float]] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)
    equal: dict[str, float] = field(default_factory=dict)
    difference: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Measured:
    """What a benchmark found, for results.json and as tables."""

    results: dict[str, Any]
    tables: Sequence[Table]


def compare(
    ways: Mapping[str, Way],
    repeats: int,
    device: torch.device,
    items: Callable[[Any], Sequence[Any]] = list,
    memory: bool = False,
    warm_ups: int = 1,
) -> Comparison:
    """Time each way `repeats` times, one after the other in each repeat, and compare what they return.

    On a CPU the time is the processor's, of this process and of those that it has started and waited for, which other
    programs disturb less than the clock. items: what is compared of a result, outside the time; tensors of floats by
    their difference, everything else for equality.
    """
    found = Comparison({name: [] for name in ways})
    names = list(ways)
    for repeat in range(-warm_ups, repeats):
        results = {}
        for name in names:
            before = reset_peak(device) if memory else None
            started = clock(device)
            results[name] = ways[name](max(0, repeat))
            seconds = clock(device) - started
            if repeat >= 0:
                found.seconds[name].append(seconds)
                if before is not None:
                    found.memory_gb.setdefault(name, []).append(max(0.0, peak_gb(device) - before))
        expected = items(results.pop(names[0]))
        for name, result in results.items():
            _judge(found, name, items(result), expected)
    for name in names[1:]:
        pairs = zip(found.seconds[name], found.seconds[names[0]], strict=True)
        found.ratios[name] = median(theirs / ours for theirs, ours in pairs)
    return found


def clock(device: torch.device) -> float:
    """Seconds that a device has worked: of the processor on a CPU, of the clock when a GPU has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def reset_peak(device: torch.device) -> float | None:
    """Forget the peak memory so far; returns the GB that are held now, None where peaks cannot be forgotten."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device) / 1e9
    try:
        RESET.write_text("5")
    except OSError:
        return None
    return psutil.Process().memory_info().rss / 1e9


def peak_gb(device: torch.device) -> float:
    """The largest memory since `reset_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e9


def _judge(found: Comparison, name: str, items: Sequence[Any], expected: Sequence[Any]) -> None:
    """Note how far the items of a way are those expected."""
    pairs = list(zip(items, expected, strict=True))
    floats = [(a, b) for a, b in pairs if isinstance(a, Tensor) and a.is_floating_point()]
    if floats:
        distance = max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-12)) for a, b in floats)
        found.difference[name] = max(distance, found.difference.get(name, 0.0))
    elif pairs:
        found.equal[name] = min(sum(a == b for a, b in pairs) / len(pairs), found.equal.get(name, 1.0))


def speed_table(title: str, found: Mapping[str, Comparison], note: str = "") -> Table:
    """One row per case and way."""
    rows = []
    ours = next(iter(next(iter(found.values())).seconds))
    for case, comparison in found.items():
        for way, seconds in comparison.seconds.items():
            memory = max(comparison.memory_gb.get(way, []), default=None)
            cells = [
                f"{case}: {way}" if case else way,
                f"{median(seconds):.3g}",
                plain(memory, ".2f"),
                plain(comparison.ratios.get(way), ".2f"),
                _agreement(comparison, way),
            ]
            rows.append(cells)
    head = ["what", "seconds", "peak memory (GB)", f"times as long as {ours}", "same result"]
    return Table(title, head, rows, note)


def _agreement(comparison: Comparison, way: str) -> str:
    if way in comparison.difference:
        return f"±{comparison.difference[way]:.1g}"
    return plain(comparison.equal.get(way), ".2%") if way in comparison.equal else DASH


def measured(title: str, found: Mapping[str, Comparison], note: str = "", **figures: Any) -> Measured:
    """The comparisons of a benchmark by case, with their table; figures: further ones for results.json."""
    cases = {case: asdict(comparison) for case, comparison in found.items()}
    return Measured({"cases": cases, **figures}, [speed_table(title, found, note)])
