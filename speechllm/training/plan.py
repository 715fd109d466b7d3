"""Estimate of a language model training's size, memory and time, printed before it starts."""

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

SHARE = 0.4  # share of a device's speed in one large matrix product that a training may reach
SIZES = {"cpu": 512, "cuda": 8192}  # of the square matrices in that product


def training_flops(model: Any, lengths: Sequence[int], labels: int, frozen: bool) -> float:
    """Floating point operations of one training pass over examples, without the overhead of an implementation.

    lengths: tokens of each example; labels: of all together. Two operations per weight and token, in three passes
    (forward, gradients of inputs, gradients of weights; the last one is omitted if most weights are `frozen`); the head
    is applied to labelled tokens only; attention covers all earlier tokens.
    """
    config, passes = model.config.get_text_config(), 2 if frozen else 3
    head = model.get_output_embeddings()
    looked_up = (part for part in model.modules() if isinstance(part, nn.Embedding) or part is head)
    others = {id(p) for part in looked_up for p in part.parameters()}
    layers = sum(p.numel() for p in model.parameters() if id(p) not in others)
    attention = 2 * config.num_hidden_layers * config.hidden_size * sum(length**2 for length in lengths)
    return passes * (2 * layers * sum(lengths) + 2 * head.weight.numel() * labels + attention)


def product_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Floating point operations per second in the product of two large square matrices, measured briefly."""
    size = SIZES.get(device.type, 512)
    square = torch.ones(size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(4):  # the first ones warm the device up
        started = time.perf_counter()
        (square @ square)[0, 0].item()  # waits for the result
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)


def training_plan(
    model: Any,
    count: int,
    lengths: Sequence[int],
    labels: int,
    accelerator: Accelerator,
    steps: int,
    batch_tokens: int,
    micro_batch_tokens: int,
    form: str,
    averaged: bool,
    packing: bool = True,
) -> str:
    """Lines on a training with `batch_tokens` tokens per step of `count` examples: its size, memory and time.

    lengths, labels: tokens of some of the examples, and the number of labels in these.
    form: full, lora or rows; averaged: with a moving average of the weights; packing: without padding.
    """
    processes = accelerator.num_processes
    known, share = sum(lengths), count / len(lengths)
    tokens = round(share * known)
    each = batch_tokens * count / tokens  # examples per step
    weights = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    state = 4 * (weights + trained * (4 if averaged else 3))  # with gradients and two moments, in float32
    labels_at_once = min(micro_batch_tokens, batch_tokens) * labels / known
    logits = 16 * len(model.get_output_embeddings().weight) * labels_at_once  # with gradients
    half = accelerator.mixed_precision == "bf16"
    speed = product_speed(accelerator.device, torch.bfloat16 if half else torch.float32)
    flops = training_flops(model, lengths, labels, frozen=form != "full") / len(lengths) * each * steps
    minutes = flops / (SHARE * speed * processes) / 60
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    long = sum(length > positions for length in lengths)
    notice = f"\n{long} of {len(lengths)} rows have more tokens than the {positions} positions of the model"
    return (
        f"asr: {count} rows, {'about ' if share > 1 else ''}{tokens:,} tokens including {round(share * labels):,} "
        f"labels; {steps} steps of up to {batch_tokens:,} tokens, about {each:.0f} rows ({steps * each / count:.1f} "
        f"epochs), "
        f"{'without padding' if packing else 'padded'}; about {minutes:.3g} min at {SHARE:.0%} of the "
        f"{speed / 1e12:.3g} TFLOP/s of one large matrix "
        f"product on this device, in {'1 process' if processes == 1 else f'{processes} processes'}\n"
        f"model: {weights / 1e6:.1f} M parameters, {trained / 1e6:.1f} M of them trained ({form})\n"
        f"memory: {state / 1e9:.2f} GB for weights, gradients and AdamW, {logits / 1e9:.2f} GB for the logits of a "
        f"micro-batch; plus activations{notice if long else ''}"
    )
