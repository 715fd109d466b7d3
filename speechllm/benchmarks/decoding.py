"""Greedy answers of a language model: read packed, rows leaving as they end, against `generate` of transformers."""

from collections.abc import Sequence
from typing import Any

import torch

from speechllm.benchmarks.language_model import CODES, SHAPES, extend_for
from speechllm.benchmarks.timing import Comparison, Measured, Precision, Size, compare, measured
from speechllm.greedy import greedy_answers, reads_packed
from speechllm.prompt import Example, collate_prompts, transcription_prompt
from speechllm.small_model import small_qwen2, small_text_tokenizer

Answers = list[list[int]]
WORDS_PER_SECOND = 3.6  # text tokens of English speech, with the vocabulary of Qwen2
LENGTHS_S = {  # of the recordings in each set
    "12 mixed": [1.5, 2, 3, 3.5, 4, 5, 6, 8, 10, 13, 16, 24],
    "16 of similar length": [7 + i / 5 for i in range(16)],
}
PADDED = 16  # prompts in a padded batch


@torch.no_grad()
def decoding(size: Size, precision: Precision, repeats: int, device: torch.device) -> Measured:
    """Answers to speech prompts, by a model with random weights; they have the lengths of English."""
    text_tokenizer = small_text_tokenizer(["turn on the red lamp"], 400)
    shape: dict[str, Any] = {**SHAPES[size], "initializer_range": 0.05}
    model = small_qwen2(text_tokenizer, **shape).eval()
    vocabulary = extend_for(model, text_tokenizer, CODES)
    model.to(device, torch.bfloat16 if precision == "bf16" else torch.float32)
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

    found: dict[str, Comparison] = {}
    for name, lengths_s in LENGTHS_S.items():
        codes = [torch.randint(CODES.codebook_size, (1, round(CODES.frame_rate * s))) for s in lengths_s]
        prompts = [transcription_prompt(each, vocabulary, text_tokenizer) for each in codes]
        bounds = [max(1, round(WORDS_PER_SECOND * s)) for s in lengths_s]
        ways = {
            "packed": lambda _, p=prompts, b=bounds: greedy_answers(p, b, model, vocabulary, nothing, end_id),
            "one by one": lambda _, p=prompts, b=bounds: generate(p, b, 1),
            "padded": lambda _, p=prompts, b=bounds: generate(p, b, PADDED),
        }
        found[name] = compare(ways, repeats, device)
    return measured("Decoding", found)
