"""Speed against the usual way, side by side in one process, with equal results.

    python recipes/benchmark.py output=RESULTS

decoding: greedy answers to speech prompts, read without padding in rows that leave when their answer ends, as
`recognize` writes them, against `generate` of transformers one by one and in padded batches. The language model has
random weights; the answers have the lengths of English. On a CPU the time is the processor's, which other programs on
the machine disturb less than the clock. Prints a Markdown table and writes RESULTS/results.json and report.html; each
ratio is the median over the repeats, in which the ways follow each other.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from speechllm.runs.config import parse_config
from tokenizer.settings import Count, Seed, Settings

WORDS_PER_SECOND = 3.6  # text tokens of English speech, with the vocabulary of Qwen2
LENGTHS_S = {  # of the recordings in each set
    "12 mixed": [1.5, 2, 3, 3.5, 4, 5, 6, 8, 10, 13, 16, 24],
    "16 of similar length": [7 + i / 5 for i in range(16)],
}
PADDED = 16  # prompts in a padded batch


@dataclass
class SpeedConfig(Settings):
    output: str  # folder for results.json and report.html
    shape: Literal["1.5b", "small"] = "small"  # of a Qwen2 with random weights
    precision: Literal["no", "bf16"] = "no"
    repeats: Count = 3  # after one for warm-up
    seed: Seed = 0


if __name__ == "__main__":  # help and mistakes are answered before torch is loaded
    CONFIG = parse_config(SpeedConfig)

import torch

from speechllm import Example, SpeechCodec, SpeechCodecConfig, extend_vocabulary
from speechllm.evaluation.tables import Table, plain
from speechllm.greedy import greedy_answers, reads_packed
from speechllm.prompt import collate_prompts, transcription_prompt
from speechllm.reports.pages import write_results_report
from speechllm.runs.machine import provenance
from speechllm.runs.recipe import claim_output, run_recipe
from speechllm.small_model import QWEN2_SHAPES, small_qwen2, small_text_tokenizer
from tokenizer.files import write_json

Answers = list[list[int]]


def main(config: SpeedConfig) -> None:
    started = time.perf_counter()
    folder = claim_output(config.output, config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    measured = decoding(config, device)
    results = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads",
        "decoding": measured,
        **provenance(config, time.perf_counter() - started),
    }
    write_json(folder / "results.json", results)
    write_results_report(folder / "report.html", "Speed", results, [table(measured)])
    print(table(measured).markdown())


@torch.no_grad()
def decoding(config: SpeedConfig, device: torch.device) -> dict[str, dict[str, Any]]:
    """Seconds of each way on each set of recordings, and whether all write the same."""
    torch.manual_seed(config.seed)
    text_tokenizer = small_text_tokenizer(["turn on the red lamp"], 400)
    model = small_qwen2(text_tokenizer, **QWEN2_SHAPES[config.shape], initializer_range=0.05).eval()
    codec = SpeechCodec(SpeechCodecConfig(n_filters=4, dimension=8, num_codebooks=1))
    vocabulary = extend_vocabulary(model, text_tokenizer, codec, init="random")
    model.to(device, torch.bfloat16 if config.precision == "bf16" else torch.float32)
    assert reads_packed(model)
    nothing = torch.zeros(vocabulary.size, dtype=torch.bool, device=device)  # is forbidden, as in plain generate
    end_id = text_tokenizer.eos_token_id

    def generate(prompts: Sequence[Example], bounds: Sequence[int], at_once: int) -> Answers:
        answers: Answers = []
        for first in range(0, len(prompts), at_once):
            part, limits = prompts[first : first + at_once], bounds[first : first + at_once]
            inputs = {name: x.to(device) for name, x in collate_prompts(part, end_id).items()}
            ids = model.generate(
                **inputs, max_new_tokens=max(limits), do_sample=False, eos_token_id=end_id, pad_token_id=end_id
            )
            rows = ids[:, inputs["input_ids"].shape[1] :].tolist()
            cut = [row[:limit] for row, limit in zip(rows, limits, strict=True)]
            answers += [row[: row.index(end_id)] if end_id in row else row for row in cut]
        return answers

    measured = {}
    for name, lengths_s in LENGTHS_S.items():
        codes = [torch.randint(codec.codebook_size, (1, round(50 * s))) for s in lengths_s]
        prompts = [transcription_prompt(each, vocabulary, text_tokenizer) for each in codes]
        bounds = [max(1, round(WORDS_PER_SECOND * s)) for s in lengths_s]
        ways: dict[str, Callable[[], Answers]] = {
            "packed": lambda p=prompts, b=bounds: greedy_answers(p, b, model, vocabulary, nothing, end_id),
            "one by one": lambda p=prompts, b=bounds: generate(p, b, 1),
            "padded": lambda p=prompts, b=bounds: generate(p, b, PADDED),
        }
        measured[name] = compare(ways, config.repeats, device)
    return measured


def compare(ways: dict[str, Callable[[], Answers]], repeats: int, device: torch.device) -> dict[str, Any]:
    """Seconds of each way in each repeat, how many times as long as the first one they take, and equal answers."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter  # answers are on the host at the end
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    answers: dict[str, Answers] = {}
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            started = clock()
            answers[name] = way()
            if repeat:
                seconds[name].append(clock() - started)
    first, *others = ways
    pairs = {name: [a / b for a, b in zip(seconds[name], seconds[first], strict=True)] for name in others}
    return {
        "seconds": seconds,
        "ratios": {name: median(pair) for name, pair in pairs.items()},
        "equal": {name: sum(a == b for a, b in zip(answers[name], answers[first], strict=True)) for name in others},
        "answers": len(answers[first]),
        "words": sum(map(len, answers[first])),
    }


def table(measured: dict[str, dict[str, Any]]) -> Table:
    """One row per set of recordings and way."""
    rows = []
    for name, found in measured.items():
        for way, seconds in found["seconds"].items():
            ratio, equal = found["ratios"].get(way), found["equal"].get(way)
            same = "" if equal is None else f"{equal} of {found['answers']}"
            rows.append([f"{name}: {way}", f"{median(seconds):.3g}", plain(ratio, ".2f"), same])
    return Table("Decoding", ["recordings", "seconds", "times as long as packed", "equal answers"], rows)


if __name__ == "__main__":
    run_recipe(main, CONFIG)
