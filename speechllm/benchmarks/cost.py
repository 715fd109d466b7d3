"""What grows with the amount of speech: the time to encode a recording, and to start a training on a corpus."""

from collections.abc import Iterator
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import torch

from speechllm.benchmarks.codec import random_encodec
from speechllm.benchmarks.corpus import startup
from speechllm.benchmarks.timing import Measured, Size, clock
from speechllm.evaluation.tables import Table
from speechllm.reports.plots import cost_figure, save_figure
from tokenizer.codec.converters import convert_encodec

LENGTHS_S = (2.0, 5.0, 10.0, 20.0, 30.0)
PARTS = (100, 10, 1)  # of the corpus
PICTURE = "cost.svg"


def cost(
    folder: Path, size: Size, utterances: int, batch_tokens: int, seed: int, repeats: int, device: torch.device
) -> Measured:
    """Seconds against seconds of speech, in results.json, a table and one plot, `folder`/cost.svg.

    encode: our codec in EnCodec's shape, one recording of noise of 2 to 30 s, median of the repeats; start: what
    `startup` finds before the first step, with a hundredth, a tenth and all of so many utterances.
    """
    lines = {
        "encode a recording": np.array([*encoding_seconds(size, repeats, device)]),
        "start a training": np.array([*start_seconds(folder, utterances, batch_tokens, seed)]),
    }
    save_figure(cost_figure(lines), folder / PICTURE)
    rows = [[name, f"{speech_s:,.0f}", f"{took_s:.3g}"] for name, line in lines.items() for speech_s, took_s in line]
    table = Table("Cost", ["what", "speech (s)", "took (s)"], rows, f"Plotted in {PICTURE}.")
    return Measured({"cost": {name: line.tolist() for name, line in lines.items()}}, [table])


@torch.no_grad()
def encoding_seconds(size: Size, repeats: int, device: torch.device) -> Iterator[tuple[float, float]]:
    """Lengths of recordings, and the time it takes to encode one."""
    with TemporaryDirectory() as place:
        random_encodec(place, size)
        codec = convert_encodec(place).to(device)
    for length_s in LENGTHS_S:
        waveform = 0.1 * torch.randn(1, round(length_s * codec.sample_rate), device=device)
        took_s = []
        for _ in range(repeats + 1):  # one for warm-up
            started = clock(device)
            codec.encode(waveform)
            took_s.append(clock(device) - started)
        yield length_s, median(took_s[1:])


def start_seconds(folder: Path, utterances: int, batch_tokens: int, seed: int) -> Iterator[tuple[float, float]]:
    """Lengths of corpora, and the processor's time until the first step of a training on each."""
    for part in PARTS:
        found = startup(folder, max(1, utterances // part), "codes", None, batch_tokens, seed).results
        yield 3600 * found["hours"], found["startup_cpu_s"]
