"""Speed against the usual way, side by side in one run, with equal results: one command per row.

    python recipes/benchmark.py row=decode output=RESULTS size=full

encode, decode: our codec against transformers' EncodecModel and the package speechtokenizer, with the same weights.
codec_step: a training step with discriminators, against the order of operations in SpeechTokenizer's trainer.
lm_step: training steps on encoded speech, `codes`: packed, against padded and flattened batches with all logits.
loss: the head with its loss, with logits at labels only, against all logits.
decoding: greedy answers to speech prompts, read packed, against `generate` of transformers one by one and padded.
encoding: encode_speech on recordings, `data`, against a plain program that encodes one after the other.
startup: what the data of train_asr costs each process; there is no other way to compare it with.
cost: how the time of encoding and of this start grows with the amount of speech, also as a plot in RESULTS/cost.svg.
import: starting Python for our package and its commands, against `import torch, transformers`.

Weights are random, in the shapes that `size` says. On a CPU the time is the processor's, which other programs on the
machine disturb less than the clock. Each ratio is the median over the repeats, in which the ways follow each other.
Prints Markdown tables and writes RESULTS/results.json and report.html.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from speechllm.runs.config import parse_config
from tokenizer.settings import Corpus, Count, Positive, Seed, Settings

Row = Literal["encode", "decode", "codec_step", "lm_step", "loss", "decoding", "encoding", "startup", "cost", "import"]
NEEDS = {"lm_step": "codes", "encoding": "data"}


@dataclass
class SpeedConfig(Settings):
    row: Row  # what is measured, see above
    output: str  # folder for results.json and report.html
    size: Literal["small", "full"] = "small"  # full: EnCodec's, SpeechTokenizer's, Qwen2-1.5B's
    precision: Literal["no", "bf16"] = "no"  # of language models
    repeats: Count = 3  # of each way
    data: Corpus | None = None  # recordings of encoding: a corpus folder, or several as [A, B]
    codes: str | None = None  # folder of encode_speech, for lm_step
    model: str | None = None  # language model of lm_step, whose text tokenizer startup takes; null: random or small
    train: Literal["full", "lora"] = "full"  # of lm_step
    utterances: Count = 10_000  # that startup and cost make (train-other-500: 148,688), or encoding takes at most
    kind: Literal["codes", "features"] = "codes"  # of encoded speech that startup makes
    batch_tokens: Count = 24_576  # per step of lm_step, startup and cost
    micro_batch_tokens: Count = 8192  # computed at once by lm_step, in padded batches including padding, and by loss
    peak_tflops: Positive | None = None  # the GPU's specification, such as 989 of an H200 in bfloat16, for lm_step
    seed: Seed = 0

    def contradictions(self) -> Iterable[str]:
        key = NEEDS.get(self.row)
        if key and getattr(self, key) is None:
            yield f"row={self.row} needs {key}="


if __name__ == "__main__":  # help and mistakes are answered before torch is loaded
    CONFIG = parse_config(SpeedConfig)

import torch

from speechllm.benchmarks.codec import codec_step, coding
from speechllm.benchmarks.corpus import encoding, startup
from speechllm.benchmarks.cost import cost
from speechllm.benchmarks.decoding import decoding
from speechllm.benchmarks.imports import imports
from speechllm.benchmarks.language_model import Steps, lm_step, loss
from speechllm.benchmarks.timing import Measured
from speechllm.reports.pages import write_results
from speechllm.runs.machine import provenance
from speechllm.runs.recipe import claim_output, run_recipe


def main(config: SpeedConfig) -> None:
    started = time.perf_counter()
    folder = claim_output(config.output, config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(config.seed)
    found = measure(config, folder, device)
    results = {
        "row": config.row,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads",
        **found.results,
        **provenance(config, time.perf_counter() - started, "speechtokenizer"),
    }
    write_results(folder, f"Speed: {config.row}", results, found.tables)
    print(*(table.markdown() for table in found.tables), sep="\n")


def measure(config: SpeedConfig, folder: Path, device: torch.device) -> Measured:
    size, repeats, precision = config.size, config.repeats, config.precision
    match config.row:
        case "encode" | "decode":
            return coding(config.row, size, repeats, device)
        case "codec_step":
            return codec_step(size, repeats, device)
        case "lm_step":
            assert config.codes is not None
            steps = Steps(config.train, config.batch_tokens, config.micro_batch_tokens, config.peak_tflops)
            return lm_step(config.codes, config.model, size, precision, steps, repeats, device)
        case "loss":
            return loss(size, precision, config.micro_batch_tokens, repeats, device)
        case "decoding":
            return decoding(size, precision, repeats, device)
        case "encoding":
            assert config.data is not None
            return encoding(config.data, size, config.utterances, repeats, device)
        case "startup":
            batch_tokens = config.batch_tokens
            return startup(folder, config.utterances, config.kind, config.model, batch_tokens, config.seed)
        case "cost":
            return cost(folder, size, config.utterances, config.batch_tokens, config.seed, repeats, device)
        case "import":
            return imports(repeats)


if __name__ == "__main__":
    run_recipe(main, CONFIG)
