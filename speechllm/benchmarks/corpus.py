"""What a corpus costs: encoding it, and starting to train a language model on it."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import psutil
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from speechllm.benchmarks.codec import random_encodec
from speechllm.benchmarks.language_model import CODES
from speechllm.benchmarks.timing import Measured, Size, compare, measured
from speechllm.data.conversations import Conversations, step_examples, transcription_rows
from speechllm.data.encoded import load_codes, transcribed
from speechllm.data.shards import SHARD_SIZE, SPEECH, write_rows
from speechllm.evaluation.tables import Table
from speechllm.messages import ConversationWriter
from speechllm.runs.launch import find_recipe, recipe_command, recipe_environment
from speechllm.runs.signals import child_environment
from speechllm.small_model import small_text_tokenizer
from speechllm.vocabulary import AudioVocabulary
from tokenizer.audio import save_audio
from tokenizer.codec.converters import convert_encodec
from tokenizer.corpus import load_usable, read_corpus, spread
from tokenizer.files import write_jsonl
from tokenizer.pretrained import check_folder, load_part
from tokenizer.utterances import Corpora, Utterance

Kind = Literal["codes", "features"]
WORDS_PER_SECOND = 2.75  # of LibriSpeech
SHARD_VALUES = 20_000_000  # codes or numbers of a shard, so that making speech takes less memory than reading may
WIDTH = 768  # numbers in a feature: an hour takes 276 MB of disk
STEPS = 20
ONE_BY_ONE = """
import json, sys, numpy, soundfile, torch
from transformers import EncodecModel
folder, corpus, output = sys.argv[1:]
device = "cuda" if torch.cuda.is_available() else "cpu"
model = EncodecModel.from_pretrained(folder).eval().to(device)
with open(f"{corpus}/manifest.jsonl") as manifest:
    rows = [json.loads(line) for line in manifest]
for row in rows:
    waveform, _ = soundfile.read(f"{corpus}/{row['path']}", dtype="float32")
    with torch.no_grad():
        inputs = torch.from_numpy(waveform)[None, None].to(device)
        codes = model.encode(inputs, bandwidth=0.5).audio_codes[0, 0, 0]
    numpy.save(f"{output}/{row['id']}.npy", codes.cpu().numpy().astype("uint16"))
"""


def encoding(data: Corpora, size: Size, utterances: int, repeats: int, device: torch.device) -> Measured:
    """encode_speech in one and in two processes against a plain program that encodes one recording after the other.

    The program is what one writes with transformers' EncodecModel, whose weights our codec has; all start anew. They
    read copies at 16 kHz, in FLAC, of at most so many usable recordings, evenly chosen. A process encodes shards of
    500.
    """
    waited: dict[str, list[float]] = {}
    with TemporaryDirectory() as place:
        folder = Path(place)
        random_encodec(folder / "encodec", size)
        convert_encodec(folder / "encodec").save_pretrained(folder / "codec")
        rows = copy_corpus(spread(read_corpus(data), utterances), folder / "corpus")

        def start(name: str, output: str, words: Sequence[Any]) -> Path:
            started = time.perf_counter()
            environment = recipe_environment() | child_environment()
            subprocess.run([sys.executable, *map(str, words)], check=True, stdout=subprocess.DEVNULL, env=environment)
            waited.setdefault(name, []).append(time.perf_counter() - started)
            return folder / output

        def ours(processes: int, repeat: int) -> Path:
            name = f"{processes} process" + "es" * (processes > 1)
            output = f"{name} {repeat}"
            words = [f"codec={folder / 'codec'}", f"data={folder / 'corpus'}", f"output={folder / output}"]
            return start(name, output, recipe_command(find_recipe("encode_speech"), words, processes))

        def plain_program(repeat: int) -> Path:
            output = f"plain {repeat}"
            (folder / output).mkdir()
            words = ["-c", ONE_BY_ONE, folder / "encodec", folder / "corpus", folder / output]
            return start("one by one", output, words)

        def items(output: Path) -> list[int]:
            """The frames of all recordings."""
            if output.name.startswith("plain"):
                return [frame for row in rows for frame in np.load(output / f"{row['id']}.npy").tolist()]
            encoded = {row["id"]: row["codes"] for row in load_codes(output)[0]}
            return [frame for row in rows for frame in encoded[row["id"]]]

        ways = {
            "1 process": lambda repeat: ours(1, repeat),
            "2 processes": lambda repeat: ours(2, repeat),
            "one by one": plain_program,
        }
        if torch.cuda.device_count() == 1:  # which two processes cannot share
            del ways["2 processes"]
        found = compare(ways, repeats, device, items, warm_ups=0)
    hours = sum(row["duration_s"] for row in rows) / 3600
    result = measured("Encoding a corpus", {f"{len(rows):,} recordings": found}, hours=hours, waited_s=waited)
    cells = [[name, f"{min(seconds):.1f}"] for name, seconds in waited.items()]
    waiting = Table("By the clock", ["way", "seconds"], cells, "The clock counts what else the machine does.")
    return Measured(result.results, [*result.tables, waiting])


def copy_corpus(utterances: Sequence[Utterance], folder: Path) -> list[dict[str, Any]]:
    """Copies of the usable recordings that every program can read; returns the rows of the manifest."""
    folder.mkdir()
    rows: list[dict[str, Any]] = []
    for number, (_, waveform) in enumerate(load_usable(utterances)):
        save_audio(folder / f"{number}.flac", waveform)
        rows.append({"id": f"{number}", "path": f"{number}.flac", "duration_s": len(waveform) / 16_000})
    write_jsonl(folder / "manifest.jsonl", rows)
    return rows


def startup(
    folder: Path, utterances: int, kind: Kind, model_name: str | None, batch_tokens: int, seed: int
) -> Measured:
    """What the data of a training costs each process: at the start, and at each step.

    Makes encoded speech with LibriSpeech's lengths and random content in a temporary folder within `folder`, and does
    with it what train_asr does: reads it, normalises texts, plans batches, and makes the examples of 20 steps. Found
    are processor seconds until the first step and for each further one, and the largest memory of its own that the
    process has at a step above what it had before; pages of the files, which processes share and the system takes back
    when it needs them, are not counted.
    model_name: whose text tokenizer counts; None: a small new one.
    """
    random = np.random.default_rng(seed)
    words = made_words(random)
    if model_name is None:
        text_tokenizer = small_text_tokenizer(words, 1000)
    else:
        name = check_folder(model_name, [], "a text tokenizer")
        text_tokenizer = load_part(AutoTokenizer, name, "a text tokenizer")
    with TemporaryDirectory(f".{os.getpid()}.part", ".codes.", folder) as place:
        codes = Path(place)
        hours = make_speech(codes, utterances, kind, words, random)
        size_gb = sum(file.stat().st_size for file in codes.iterdir()) / 1e9
        found = start_training(codes, text_tokenizer, batch_tokens)
    head = ["utterances", "hours", "on disk (GB)", "CPU until the first step (s)", "CPU per further step (ms)"]
    cells = [f"{utterances:,}", f"{hours:.0f}", f"{size_gb:.2f}", f"{found['startup_cpu_s']:.1f}"]
    cells += [f"{1000 * found['step_cpu_s']:.0f}", f"{found['memory_gb']:.2f}"]
    shown = Table("Start-up", [*head, "memory of its own above that before (GB)"], [cells])
    return Measured({"utterances": utterances, "hours": hours, "disk_gb": size_gb, **found}, [shown])


def made_words(random: np.random.Generator) -> list[str]:
    """Words of one to three syllables."""
    syllables = [first + vowel + last for first in "bdfgklmnprst" for vowel in "aeiou" for last in ("", "n", "r", "t")]
    return ["".join(random.choice(syllables, size)) for size in random.integers(1, 4, 5000)]


def make_speech(folder: Path, count: int, kind: Kind, words: Sequence[str], random: np.random.Generator) -> float:
    """Encoded speech as encode_speech writes it; returns its hours. Durations are 1.3 to 16.8 s, 12.3 s on average."""
    if kind == "codes":
        encoding = CODES
    else:
        encoding = replace(CODES, codebook_size=1, kind="features", width=WIDTH)
    each = max(1, min(SHARD_SIZE, SHARD_VALUES // (750 * max(1, encoding.width))))  # utterances of a shard
    durations_s = 1.3 + 15.5 * random.beta(3.2, 1.3, count)
    said = random.choice(words, 100_000).tolist()
    heard: np.ndarray = random.integers(0, encoding.codebook_size, 1_000_000).astype(np.uint16)
    if kind == "features":
        heard = random.normal(size=(2000, WIDTH)).astype(np.float16).flatten()
    for number, first in enumerate(range(0, count, each)):
        rows = []
        for place, duration_s in enumerate(durations_s[first : first + each].tolist(), first):
            size = round(duration_s * CODES.frame_rate) * max(1, encoding.width)
            row = {"id": f"u{place}", "split": "train", "speaker": f"s{place % 1000}", "duration_s": duration_s}
            row["text"] = " ".join(excerpt(said, round(duration_s * WORDS_PER_SECOND), random)).upper()
            row[SPEECH[kind].name] = excerpt(heard, size, random)
            rows.append(row)
        write_rows(folder / f"codes_{number:05d}.arrow", rows, encoding, {"skipped": "[]", "seconds": "0"})
    return float(durations_s.sum() / 3600)


def excerpt(whole: Any, size: int, random: np.random.Generator) -> Any:
    """So many consecutive parts, from a random place on."""
    start = int(random.integers(len(whole) - size + 1))
    return whole[start : start + size]


def start_training(folder: Path, text_tokenizer: PreTrainedTokenizerBase, batch_tokens: int) -> dict[str, Any]:
    """Processor seconds and memory of what train_asr does with encoded speech before and in its steps."""
    before, started = private_gb(), time.process_time()
    speech, encoding = load_codes(folder)
    speech = transcribed(speech, normalizer="librispeech")
    first = len(text_tokenizer)
    last = first + encoding.layers * encoding.codebook_size
    stack = 2 if encoding.kind == "features" else 1
    vocabulary = AudioVocabulary(encoding, first, last, last + 1, last + 2, stack=stack)
    conversations = Conversations(transcription_rows(speech), speech, ConversationWriter(vocabulary, text_tokenizer))
    conversations.sizes(spread(range(len(conversations)), 2000))  # from which the plan is computed
    steps = step_examples(conversations, batch_tokens, batch_tokens, 0)
    next(steps)
    startup_s = time.process_time() - started
    memory_gb = private_gb()
    for _ in range(STEPS):
        next(steps)
        memory_gb = max(memory_gb, private_gb())
    step_s = (time.process_time() - started - startup_s) / STEPS
    return {"startup_cpu_s": startup_s, "step_cpu_s": step_s, "memory_gb": max(0.0, memory_gb - before)}


def private_gb() -> float:
    """Memory that this process shares with no other and with no file."""
    memory = psutil.Process().memory_info()
    return (memory.rss - getattr(memory, "shared", 0)) / 1e9  # known on Linux
