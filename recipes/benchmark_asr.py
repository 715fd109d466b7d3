"""Training speed of the language model with packed and with padded batches, in one run on the same examples.

    python recipes/benchmark_asr.py codes=CODES codec=CODEC output=RESULTS

packed: as in recipes/train_asr.py, without padding and with logits only at labelled positions. padded: as usual in
transformers, with batches padded to their longest example and logits at all positions. Both do full optimizer steps on
encoded speech with its real lengths; padding does not count as tokens. The language model has random weights in
Qwen2-1.5B's shape (`shape=small` without a GPU), or is the one given by `model`. Prints a Markdown table and writes
RESULTS/results.json and report.html: tokens/s, their ratio, peak memory, and the share of the GPU's peak FLOP/s
(`training_flops`; `peak_tflops` is the GPU's specification, 989 for an H100 or H200 in bfloat16).
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from speechllm.runs.config import parse_config
from tokenizer.settings import Count, Names, Positive, Seed, Settings


@dataclass
class BenchmarkConfig(Settings):
    codes: str  # folder of encode_speech
    codec: str  # the audio tokenizer that made them
    output: str  # folder for results.json and report.html
    model: str | None = None  # language model, folder or hub name; null: random weights in `shape`
    shape: Literal["1.5b", "small"] = "1.5b"
    train: Literal["full", "lora"] = "full"
    splits: Names | None = None  # all when null
    batch_tokens: Count = 24_576  # per optimizer step
    micro_batch_tokens: Count = 8192  # computed at once; in padded batches including padding
    precision: Literal["no", "bf16"] = "bf16"
    gradient_checkpointing: bool = False
    steps: Count = 8  # timed steps per method, after one for warm-up
    peak_tflops: Positive | None = None
    seed: Seed = 0


if __name__ == "__main__":  # help and mistakes are answered before torch is loaded
    CONFIG = parse_config(BenchmarkConfig)

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer

from speechllm import (
    Example,
    LabelledLoss,
    extend_vocabulary,
    load_codes,
    load_tokenizer,
    prepare_adapter,
    transcription_example,
)
from speechllm.adapters import load_causal
from speechllm.data.batches import token_batches
from speechllm.data.encoded import codes_of, transcribed
from speechllm.data.packing import micro_batches
from speechllm.evaluation.tables import plain
from speechllm.prompt import label_counts
from speechllm.reports.pages import write_results_report
from speechllm.runs.machine import provenance
from speechllm.runs.recipe import claim_output, run_recipe
from speechllm.small_model import QWEN2_SHAPES, small_qwen2, small_text_tokenizer
from speechllm.training.optimization import make_optimizer
from speechllm.training.plan import training_flops
from tokenizer.files import write_json
from tokenizer.pretrained import check_folder, load_part

Step = Callable[[Sequence[Example]], None]


def main(config: BenchmarkConfig) -> None:
    started = time.perf_counter()
    folder = claim_output(config.output, config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows, encoding = load_codes(config.codes, config.splits)
    rows = transcribed(rows, normalizer="librispeech")  # as train_asr does by default
    codec = load_tokenizer(config.codec)
    encoding.require(codec.fingerprint, config.codec)
    torch.manual_seed(config.seed)
    model, text_tokenizer = language_model(config, rows["text"])
    vocabulary = extend_vocabulary(model, text_tokenizer, codec, seed=config.seed)
    if config.train == "lora":
        model = prepare_adapter(model, vocabulary)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.to(device).train()
    padded_attention = model.config._attn_implementation
    loss_of = LabelledLoss(model, vocabulary)  # changes the attention implementation
    packed_attention = model.config._attn_implementation
    optimizer = make_optimizer(model, vocabulary, 1e-5)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")
    examples = [transcription_example(codes_of(row, encoding), row["text"], vocabulary, text_tokenizer) for row in rows]

    def packed(batch: Sequence[Example]) -> None:
        labels = label_counts(batch, vocabulary)[0].item()
        for part in filter(None, micro_batches(list(map(len, batch)), config.micro_batch_tokens)):
            with autocast:
                loss = loss_of([batch[i] for i in part])[0] / labels
            loss.backward()

    def padded(batch: Sequence[Example]) -> None:
        parts = padded_batches(batch, config.micro_batch_tokens)
        for part in parts:
            inputs = {name: tensor.to(device) for name, tensor in collate(part, text_tokenizer.pad_token_id).items()}
            with autocast:
                loss = model(**inputs).loss / len(parts)
            loss.backward()

    methods: dict[str, tuple[Step, str]] = {"packed": (packed, packed_attention), "padded": (padded, padded_attention)}
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    memory: dict[str, float | None] = dict.fromkeys(methods)
    tokens, flops = [], []
    sizes = np.array(list(map(len, examples)))
    batches = token_batches(len(sizes), sizes.take, config.batch_tokens, config.seed)
    for step, indices in zip(range(config.steps + 1), batches, strict=False):
        batch = [examples[i] for i in indices]
        for name, (method, attention) in methods.items():
            model.set_attn_implementation(attention)
            elapsed, peak = timed(lambda method=method, batch=batch: learn(method, batch, optimizer), device)
            if step:
                seconds[name].append(elapsed)
                memory[name] = None if peak is None else max(peak, memory[name] or 0.0)
        if step:
            tokens.append(sum(map(len, batch)))
            labels = int(label_counts(batch, vocabulary).sum())
            flops.append(training_flops(model, sizes[indices].tolist(), labels, frozen=config.train != "full"))

    ratios = [padded_s / packed_s for packed_s, padded_s in zip(seconds["packed"], seconds["padded"], strict=True)]
    results = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads",
        "model": config.model or f"Qwen2 {config.shape}, random weights",
        "train": config.train,
        "parameters": sum(p.numel() for p in model.parameters()),
        "precision": config.precision,
        "tokens_per_step": sum(tokens) / len(tokens),
        "speedup": median(ratios),
        "speedup_of_steps": ratios,
        "methods": {
            name: {
                "tokens_per_second": sum(tokens) / sum(times),
                "peak_memory_gb": memory[name],
                "mfu": config.peak_tflops and sum(flops) / sum(times) / (1e12 * config.peak_tflops),
            }
            for name, times in seconds.items()
        },
        **provenance(config, time.perf_counter() - started),
    }
    write_json(folder / "results.json", results)
    write_results_report(folder / "report.html", f"Training speed: {results['model']}", results)
    print(table(results))


def language_model(config: BenchmarkConfig, texts: list[str]) -> tuple[Any, Any]:
    """The named language model, or one with random weights, and its text tokenizer."""
    if config.model is not None:
        name = check_folder(config.model, ["config.json"], "a causal language model")
        return load_causal(name), load_part(AutoTokenizer, name, "the text tokenizer of a language model")
    text_tokenizer = small_text_tokenizer(texts, 400)
    shape = QWEN2_SHAPES[config.shape]
    # an adapter needs the name of its language model
    return small_qwen2(text_tokenizer, **shape, name_or_path="random weights"), text_tokenizer


def padded_batches(batch: Sequence[Example], tokens: int) -> list[list[Example]]:
    """The examples in batches of similar lengths, of up to `tokens` tokens including padding."""
    parts: list[list[Example]] = [[]]
    for example in sorted(batch, key=len, reverse=True):
        if parts[-1] and len(parts[-1][0]) * (len(parts[-1]) + 1) > tokens:
            parts.append([])
        parts[-1].append(example)
    return parts


def collate(examples: Sequence[Example], pad_id: int) -> dict[str, Tensor]:
    """Right-padded examples, as usual in transformers: input_ids, attention_mask and labels, long [B, S]."""
    ids = pad_sequence([example.input_ids for example in examples], batch_first=True, padding_value=pad_id)
    labels = pad_sequence([example.labels for example in examples], batch_first=True, padding_value=-100)
    lengths = torch.tensor(list(map(len, examples)))
    return {
        "input_ids": ids,
        "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long(),
        "labels": labels,
    }


def learn(method: Step, batch: Sequence[Example], optimizer: torch.optim.Optimizer) -> None:
    """One optimizer step."""
    optimizer.zero_grad()
    method(batch)
    optimizer.step()


def timed(work: Callable[[], None], device: torch.device) -> tuple[float, float | None]:
    """Seconds that `work` takes, and on a GPU the peak memory in GB."""
    if device.type != "cuda":
        started = time.perf_counter()
        work()
        return time.perf_counter() - started, None
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - started, torch.cuda.max_memory_allocated() / 1e9


def table(results: dict[str, Any]) -> str:
    """Markdown: one row per method."""
    lines = [
        f"{results['model']}, {results['train']}, {results['precision']}, {results['device']}",
        "",
        "| method | tokens/s | peak memory (GB) | share of peak FLOP/s |",
        "|---|---|---|---|",
    ]
    for name, found in results["methods"].items():
        memory, share = plain(found["peak_memory_gb"], ".1f"), plain(found["mfu"], ".0%")
        lines.append(f"| {name} | {found['tokens_per_second']:,.0f} | {memory} | {share} |")
    return "\n".join([*lines, "", f"packed is {results['speedup']:.2f} times as fast (median over steps)"])


if __name__ == "__main__":
    run_recipe(main, CONFIG)
