"""What the data of a language model's training costs each process: at the start, and at each step.

    python recipes/benchmark_startup.py output=RESULTS utterances=148_688

Makes encoded speech with LibriSpeech's lengths and random content in a temporary folder within RESULTS, and does with
it what train_asr does: reads it, normalises texts, plans batches, and makes the examples of `steps` steps. Prints a
Markdown table and writes RESULTS/results.json and report.html: processor seconds until the first step and for each
further one, and the growth of the process's peak memory above what it was after imports. `kind=features` makes soft
tokens, of which an hour takes 276 MB of disk with a width of 768.
"""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from speechllm.runs.config import parse_config
from tokenizer.settings import Count, Seed, Settings

FRAME_RATE = 50.0  # Hz
WORDS_PER_SECOND = 2.75  # of LibriSpeech
SHARD_VALUES = 20_000_000  # codes or numbers of a shard, so that making speech takes less memory than reading may


@dataclass
class StartupConfig(Settings):
    output: str  # folder for results.json and report.html
    utterances: Count = 10_000  # train-other-500 of LibriSpeech has 148,688
    kind: Literal["codes", "features"] = "codes"
    width: Count = 768  # numbers in a feature
    model: str | None = None  # language model whose text tokenizer counts; null: a small new one
    batch_tokens: Count = 24_576  # per step
    steps: Count = 20
    seed: Seed = 0


if __name__ == "__main__":  # help and mistakes are answered before torch is loaded
    CONFIG = parse_config(StartupConfig)

import numpy as np
import pyarrow as pa
import torch
from transformers import AutoTokenizer

from speechllm import AudioVocabulary, Encoding, load_codes
from speechllm.data.conversations import Conversations, step_examples, transcription_rows
from speechllm.data.encoded import transcribed
from speechllm.data.shards import SCHEMA, SHARD_SIZE, SPEECH, write_table
from speechllm.messages import ConversationWriter
from speechllm.reports.pages import write_results_report
from speechllm.runs.machine import provenance
from speechllm.runs.recipe import claim_output, run_recipe
from speechllm.runs.rehearsal import peak_memory_gb
from speechllm.small_model import small_text_tokenizer
from tokenizer.corpus import spread
from tokenizer.files import write_json
from tokenizer.pretrained import check_folder, load_part

CPU = torch.device("cpu")


def main(config: StartupConfig) -> None:
    started = time.perf_counter()
    folder = claim_output(config.output, config)
    random = np.random.default_rng(config.seed)
    words = made_words(random)
    if config.model is None:
        text_tokenizer = small_text_tokenizer(words, 1000)
    else:
        text_tokenizer = load_part(
            AutoTokenizer, check_folder(config.model, [], "a text tokenizer"), "a text tokenizer"
        )
    with TemporaryDirectory(f".{os.getpid()}.part", ".codes.", folder) as codes:
        hours = make_speech(Path(codes), config, words, random)
        size = sum(file.stat().st_size for file in Path(codes).iterdir())
        results = {"utterances": config.utterances, "hours": hours, "disk_gb": size / 1e9}
        results |= measured(Path(codes), config, text_tokenizer)
    results |= provenance(config, time.perf_counter() - started)
    write_json(folder / "results.json", results)
    write_results_report(folder / "report.html", f"Start-up: {config.utterances:,} utterances", results)
    print(
        "| utterances | hours | on disk | CPU until the first step | CPU per further step | peak memory above imports |"
    )
    print("|---|---|---|---|---|---|")
    print(
        f"| {config.utterances:,} | {hours:.0f} | {size / 1e9:.2f} GB | {results['startup_cpu_s']:.1f} s | "
        f"{1000 * results['step_cpu_s']:.0f} ms | {results['peak_memory_gb']:.2f} GB |"
    )


def made_words(random: np.random.Generator) -> list[str]:
    """Words of one to three syllables."""
    syllables = [first + vowel + last for first in "bdfgklmnprst" for vowel in "aeiou" for last in ("", "n", "r", "t")]
    return ["".join(random.choice(syllables, size)) for size in random.integers(1, 4, 5000)]


def make_speech(folder: Path, config: StartupConfig, words: Sequence[str], random: np.random.Generator) -> float:
    """Encoded speech as encode_speech writes it; returns its hours. Durations are 1.3 to 16.8 s, 12.3 s on average."""
    if config.kind == "codes":
        encoding = Encoding("0" * 16, 16_000, FRAME_RATE, 1, 1024)
    else:
        encoding = Encoding("0" * 16, 16_000, FRAME_RATE, 1, 1, "features", config.width)
    schema = SCHEMA.append(SPEECH[config.kind])
    schema = schema.with_metadata({"encoding": json.dumps(asdict(encoding)), "skipped": "[]", "seconds": "0"})
    each = max(1, min(SHARD_SIZE, SHARD_VALUES // (750 * max(1, encoding.width))))  # utterances of a shard
    durations_s = 1.3 + 15.5 * random.beta(3.2, 1.3, config.utterances)
    said = random.choice(words, 100_000).tolist()
    heard = random.integers(0, encoding.codebook_size, 1_000_000).astype(np.uint16)
    if config.kind == "features":
        heard = random.normal(size=(2000, config.width)).astype(np.float16).flatten()
    for number, first in enumerate(range(0, config.utterances, each)):
        rows = []
        for place, duration_s in enumerate(durations_s[first : first + each].tolist(), first):
            count, size = round(duration_s * WORDS_PER_SECOND), round(duration_s * FRAME_RATE) * max(1, encoding.width)
            row = {"id": f"u{place}", "split": "train", "speaker": f"s{place % 1000}", "duration_s": duration_s}
            row["text"] = " ".join(excerpt(said, count, random)).upper()
            row[SPEECH[config.kind].name] = excerpt(heard, size, random)
            rows.append(row)
        write_table(folder / f"codes_{number:05d}.arrow", pa.Table.from_pylist(rows, schema))
    return float(durations_s.sum() / 3600)


def excerpt(whole: Any, size: int, random: np.random.Generator) -> Any:
    """So many consecutive parts, from a random place on."""
    start = int(random.integers(len(whole) - size + 1))
    return whole[start : start + size]


def measured(folder: Path, config: StartupConfig, text_tokenizer: Any) -> dict[str, float]:
    """Processor seconds and memory of what train_asr does with encoded speech before and in its steps."""
    before, started = peak_memory_gb(CPU), time.process_time()
    speech, encoding = load_codes(folder)
    speech = transcribed(speech, normalizer="librispeech")
    first = len(text_tokenizer)
    last = first + encoding.layers * encoding.codebook_size
    vocabulary = AudioVocabulary(encoding, first, last, last + 1, last + 2, stack=2 if config.kind == "features" else 1)
    conversations = Conversations(transcription_rows(speech), speech, ConversationWriter(vocabulary, text_tokenizer))
    conversations.sizes(spread(range(len(conversations)), 2000))  # from which the plan is computed
    steps = step_examples(conversations, config.batch_tokens, config.batch_tokens, config.seed)
    next(steps)
    startup_s = time.process_time() - started
    for _ in range(config.steps):
        next(steps)
    step_s = (time.process_time() - started - startup_s) / config.steps
    return {"startup_cpu_s": startup_s, "step_cpu_s": step_s, "peak_memory_gb": peak_memory_gb(CPU) - before}


if __name__ == "__main__":
    run_recipe(main, CONFIG)
