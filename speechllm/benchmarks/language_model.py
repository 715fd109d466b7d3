"""Training steps of a language model, and the head with its loss, against transformers with padding and all logits."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from speechllm.adapters import load_causal, prepare_adapter
from speechllm.benchmarks.timing import Measured, Precision, Size, Way, compare, measured
from speechllm.data.batches import token_batches
from speechllm.data.encoded import codes_of, load_codes, transcribed
from speechllm.data.packing import micro_batches, pack
from speechllm.encoding import Encoding
from speechllm.evaluation.tables import Table, plain
from speechllm.extension import extend_vocabulary
from speechllm.prompt import IGNORED, Example, label_counts, transcription_example
from speechllm.small_model import QWEN2_SHAPES, small_qwen2, small_text_tokenizer
from speechllm.training.loss import LabelledLoss
from speechllm.training.optimization import make_optimizer
from speechllm.training.plan import training_flops
from speechllm.vocabulary import AudioVocabulary
from tokenizer.codec.config import SpeechCodecConfig
from tokenizer.codec.speech_codec import SpeechCodec
from tokenizer.errors import InputError
from tokenizer.pretrained import check_folder, load_part

SHAPES = {"small": QWEN2_SHAPES["small"], "full": QWEN2_SHAPES["1.5b"]}
CODES = Encoding("0" * 16, 16_000, 50.0, 1, 1024)  # of no codec
LABELLED = 15  # tokens for each one with a label, as in transcription
LENGTH = 640  # tokens of an utterance of 12 s with its text

Parts = list[list[Example]]


@dataclass(frozen=True)
class Steps:
    """What lm_step does: full optimizer steps of `batch_tokens` tokens, `micro_batch_tokens` computed at once."""

    train: Literal["full", "lora"] = "full"
    batch_tokens: int = 24_576
    micro_batch_tokens: int = 8192  # in padded batches including padding
    peak_tflops: float | None = None  # of the device, for the share of it that is used


def lm_step(
    codes: str,
    model_name: str | None,
    size: Size,
    precision: Precision,
    steps: Steps,
    repeats: int,
    device: torch.device,
) -> Measured:
    """Optimizer steps on encoded speech with its real lengths: packed, padded as usual, and flattened.

    packed: as in train_asr, without padding and with logits at labelled positions only. flattened: without padding and
    without attention across examples either, but with all logits, as transformers' DataCollatorWithFlattening gives
    them. padded: in the order of the batch, and sorted by length. The learning rate is 0, so that all of them work on
    the same weights in every step, and losses and gradients can be compared. Padding does not count as tokens.
    """
    rows, encoding = load_codes(codes)
    if encoding.kind != "codes":
        raise InputError(f"{codes} holds {encoding.kind}: training speed is measured with codes")
    rows = transcribed(rows, normalizer="librispeech")  # as train_asr does by default
    model, text_tokenizer = language_model(model_name, SHAPES[size], rows["text"])
    vocabulary = extend_for(model, text_tokenizer, encoding)
    if steps.train == "lora":
        model = prepare_adapter(model, vocabulary)
    model.to(device).train()
    plain_attention = model.config._attn_implementation
    loss_of = LabelledLoss(model, vocabulary)  # changes the attention
    packed_attention = model.config._attn_implementation
    optimizer = make_optimizer(model, vocabulary, 0.0)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
    examples = [transcription_example(codes_of(row, encoding), row["text"], vocabulary, text_tokenizer) for row in rows]
    sizes = np.array(list(map(len, examples)))
    drawn = list(islice(token_batches(len(sizes), sizes.take, steps.batch_tokens, 0), repeats))
    batches = [[examples[i] for i in indices] for indices in drawn]
    labels = [int(label_counts(batch, vocabulary).sum()) for batch in batches]

    def without_padding(batch: Sequence[Example]) -> Parts:
        parts = micro_batches(list(map(len, batch)), steps.micro_batch_tokens)
        return [[batch[i] for i in part] for part in parts if part]

    def packed(part: Sequence[Example], count: int) -> Tensor:
        return loss_of(part)[0] / count

    def flattened(part: Sequence[Example], count: int) -> Tensor:
        flat = pack(part, device)
        starts = [torch.cat([example.labels.new_tensor([IGNORED]), example.labels[1:]]) for example in part]
        inputs = {"input_ids": flat.input_ids, "labels": torch.cat(starts)[None].to(device), **flat.arguments}
        return model(**inputs, num_items_in_batch=count, use_cache=False).loss

    def padded(part: Sequence[Example], count: int) -> Tensor:
        inputs = {name: x.to(device) for name, x in collate(part, text_tokenizer.pad_token_id).items()}
        return model(**inputs, num_items_in_batch=count, use_cache=False).loss

    def way(cut: Callable[[Sequence[Example]], Parts], loss: Callable[..., Tensor], attention: str) -> Way:
        def step(repeat: int) -> list[Tensor]:
            model.set_attn_implementation(attention)
            optimizer.zero_grad()
            total = torch.zeros((), device=device)
            for part in cut(batches[repeat]):
                with autocast:
                    own = loss(part, labels[repeat])
                own.backward()
                total += own.detach()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            return [total, norm]

        return step

    def in_order(batch: Sequence[Example]) -> Parts:
        return padded_batches(batch, steps.micro_batch_tokens)

    def by_length(batch: Sequence[Example]) -> Parts:
        return padded_batches(sorted(batch, key=len, reverse=True), steps.micro_batch_tokens)

    ways = {
        "packed": way(without_padding, packed, packed_attention),
        "flattened": way(without_padding, flattened, packed_attention),
        "padded, sorted": way(by_length, padded, plain_attention),
        "padded": way(in_order, padded, plain_attention),
    }
    found = compare(ways, repeats, device, memory=True)
    tokens = [int(sizes[indices].sum()) for indices in drawn]
    frozen = steps.train != "full"
    flops = [training_flops(model, sizes[i].tolist(), n, frozen) for i, n in zip(drawn, labels, strict=True)]
    speeds = {
        name: {
            "tokens_per_second": sum(tokens) / sum(seconds),
            "mfu": steps.peak_tflops and sum(flops) / sum(seconds) / (1e12 * steps.peak_tflops),
        }
        for name, seconds in found.seconds.items()
    }
    result = measured("Training step of the language model", {"": found}, tokens=tokens, labels=labels, speeds=speeds)
    result.results["parameters"] = sum(p.numel() for p in model.parameters())
    return Measured(result.results, [*result.tables, speeds_table(speeds)])


def speeds_table(speeds: dict[str, dict[str, float | None]]) -> Table:
    """Tokens per second of each way, and the share of the device's arithmetic that the model makes of them."""
    rows = [[name, plain(one["tokens_per_second"], ",.0f"), plain(one["mfu"], ".0%")] for name, one in speeds.items()]
    return Table("Tokens", ["way", "tokens/s", "share of peak FLOP/s"], rows)


def language_model(
    name: str | None, shape: dict[str, int], texts: list[str]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The named language model, or one with random weights, and its text tokenizer."""
    if name is not None:
        name = check_folder(name, ["config.json"], "a causal language model")
        return load_causal(name), load_part(AutoTokenizer, name, "the text tokenizer of a language model")
    text_tokenizer = small_text_tokenizer(texts, 400)
    # an adapter needs the name of its language model
    return small_qwen2(text_tokenizer, **shape, name_or_path="random weights"), text_tokenizer


def extend_for(model: PreTrainedModel, text_tokenizer: PreTrainedTokenizerBase, encoding: Encoding) -> AudioVocabulary:
    """A vocabulary for such codes, whose new rows are random: what they are costs nothing."""
    codec = SpeechCodec(
        SpeechCodecConfig(n_filters=4, dimension=8, num_codebooks=encoding.layers, codebook_size=encoding.codebook_size)
    )
    return extend_vocabulary(model, text_tokenizer, codec, encoding.layers, init="random")


def padded_batches(batch: Iterable[Example], tokens: int) -> Parts:
    """The examples, in their order, in batches of up to `tokens` tokens including padding."""
    parts: Parts = [[]]
    for example in batch:
        longest = max(map(len, [*parts[-1], example]))
        if parts[-1] and longest * (len(parts[-1]) + 1) > tokens:
            parts.append([])
        parts[-1].append(example)
    return parts


def collate(examples: Sequence[Example], pad_id: int) -> dict[str, Tensor]:
    """Right-padded examples, as usual in transformers: input_ids, attention_mask and labels, long [B, S]."""
    ids = pad_sequence([example.input_ids for example in examples], batch_first=True, padding_value=pad_id)
    labels = pad_sequence([example.labels for example in examples], batch_first=True, padding_value=IGNORED)
    lengths = torch.tensor(list(map(len, examples)))
    return {
        "input_ids": ids,
        "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long(),
        "labels": labels,
    }


def loss(size: Size, precision: Precision, tokens: int, repeats: int, device: torch.device) -> Measured:
    """The head and its loss, forward and backward, with logits at labels only and with all of them.

    The language model has no layers in between: only embeddings, head and loss are left of it. About `tokens` tokens in
    examples of 640, of which a fifteenth has labels. The memory holds the gradient of the head's matrix, too.
    """
    text_tokenizer = small_text_tokenizer(["turn on the red lamp"], 400)
    model = small_qwen2(text_tokenizer, **{**SHAPES[size], "num_hidden_layers": 0})
    texts = len(text_tokenizer)
    vocabulary = extend_for(model, text_tokenizer, CODES)
    model.to(device).train()
    loss_of = LabelledLoss(model, vocabulary)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
    examples = []
    for _ in range(max(1, tokens // LENGTH)):
        ids = torch.randint(texts, (LENGTH,))
        examples.append(Example(ids, ids.where(torch.arange(LENGTH) >= LENGTH - LENGTH // LABELLED, IGNORED)))
    inputs = {name: x.to(device) for name, x in collate(examples, text_tokenizer.pad_token_id).items()}
    count = int((inputs["labels"] != IGNORED).sum())

    def way(make: Callable[[], Tensor]) -> Way:
        def work(_: int) -> list[Any]:
            model.zero_grad()
            with autocast:
                found = make()
            found.backward()
            return [found.detach(), nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])]

        return work

    ways = {
        "labelled logits": way(lambda: loss_of(examples)[0] / count),
        "all logits": way(lambda: model(**inputs, num_items_in_batch=count, use_cache=False).loss),
    }
    case = f"{len(examples) * LENGTH:,} tokens"
    return measured("Head and loss", {case: compare(ways, repeats, device, memory=True)}, labels=count)
