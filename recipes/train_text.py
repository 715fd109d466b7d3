"""Teach a small Qwen2 a language from text alone: something to fine-tune where Qwen2's own weights cannot be had.

    python recipes/train_text.py --config configs/text/small.yaml "text=[TEXT]" output=RUN
    speechllm run train_text --processes 8 ...       on 8 GPUs

TEXT: files with a sentence a line, .gz or not. RUN/model is an ordinary folder of transformers, which
recipes/train_asr.py takes as it takes Qwen/Qwen2-1.5B (model=RUN/model). transformers' own Trainer does the work: a
killed run started again with the same words goes on from its newest checkpoint.
"""

import math
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from speechllm.runs.config import parse_config
from speechllm.small_model import SmallShape

HELD_OUT = 0.01  # share of the sentences, where no file of held-out ones is named


@dataclass
class TextConfig:
    text: list[str]  # files with a sentence a line, .gz or not
    output: str  # run folder; the model goes to its subfolder `model`
    held_out: list[str] | None = None  # files to measure the perplexity on; null: one in a hundred of the sentences
    text_tokens: int = 1000  # byte-level BPE vocabulary, learnt from the text
    shape: SmallShape = field(default_factory=SmallShape)
    block: int = 256  # tokens of an example: sentences end to end, each behind the last one's end token
    steps: int = 1000
    batch_size: int = 32  # blocks of an optimizer step, over all processes
    learning_rate: float = 2e-3
    warmup: int = 100  # steps
    precision: Literal["no", "bf16"] = "no"
    validate_every: int = 250  # steps
    save_every: int = 250  # steps between checkpoints
    log_every: int = 10  # steps
    seed: int = 0


if __name__ == "__main__":  # help and mistakes are answered before torch is loaded
    CONFIG = parse_config(TextConfig)

import torch
from accelerate.utils import set_seed
from datasets import Dataset, load_dataset
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from speechllm import DataError, RunError
from speechllm.evaluation.normalizers import librispeech_normalizer
from speechllm.reports.pages import write_training_report
from speechllm.runs.machine import make_accelerator
from speechllm.runs.recipe import run_recipe
from speechllm.runs.run import Run
from speechllm.small_model import small_qwen2, small_text_tokenizer
from tokenizer.files import atomic_folder


class RunLog(TrainerCallback):
    """What Trainer says goes to the run's log."""

    def __init__(self, run: Run):
        self.run = run

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        self.run.cut_log(state.global_step)  # of a killed run: the steps after its checkpoint come again

    def on_log(self, args: TrainingArguments, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        named = {"loss": logs.get("loss"), "lr": logs.get("learning_rate"), "dev_loss": logs.get("eval_loss")}
        if found := {name: value for name, value in named.items() if value is not None}:
            self.run.log(state.global_step, **found)


def main(config: TextConfig) -> None:
    accelerator = make_accelerator(config.precision)
    if config.batch_size % accelerator.num_processes:
        raise RunError(f"{accelerator.num_processes} processes cannot share batch_size {config.batch_size} equally")
    run = Run(config.output, config, accelerator)
    if run.summary:
        accelerator.print(f"{config.output} is finished: {run.summary}")
        return

    # 1. sentences, normalised as encode_speech normalises transcripts, and a text tokenizer learnt from them
    with accelerator.main_process_first():  # the others find them in the cache of `datasets`
        learnt, held_out = sentences(config)
        text_tokenizer = small_text_tokenizer(learnt["text"], config.text_tokens)
        learnt, held_out = (blocks(part, text_tokenizer, config.block) for part in (learnt, held_out))
    if not len(learnt) or not len(held_out):
        raise DataError(f"text: {config.block} tokens make a block, which is more than there are to learn or to test")

    # 2. a model that learns to go on with them
    set_seed(config.seed)
    model = small_qwen2(text_tokenizer, **asdict(config.shape))
    passes = config.steps * config.batch_size / len(learnt)
    accelerator.print(
        f"text: {len(learnt) * config.block:,} tokens, {passes:.2f} passes; {model.num_parameters() / 1e6:.1f} M "
        f"parameters, {len(text_tokenizer)} text tokens"
    )
    checkpoints = run.folder / "checkpoints"
    settings = trainer_settings(config, checkpoints, config.batch_size // accelerator.num_processes)
    trainer = Trainer(model, settings, None, learnt, held_out, callbacks=[RunLog(run)])
    trainer.train(resume_from_checkpoint=get_last_checkpoint(checkpoints))
    loss = trainer.evaluate()["eval_loss"]

    # 3. export
    if run.main:
        with atomic_folder(run.folder / "model") as folder:
            model.save_pretrained(folder)
            text_tokenizer.save_pretrained(folder)
        summary = {"steps": config.steps, "dev_loss": loss, "perplexity": math.exp(loss)}
        write_training_report(run.folder, summary)
        run.finish(summary)
        print(f"language model saved in {run.folder / 'model'}: perplexity of a token {summary['perplexity']:.1f}")
    accelerator.wait_for_everyone()


def sentences(config: TextConfig) -> tuple[Dataset, Dataset]:
    """Normalised sentences to learn from, and held-out ones; column text."""
    files = {"learnt": config.text} | ({"held_out": config.held_out} if config.held_out else {})
    read = load_dataset("text", data_files=files)
    read = read.map(lambda text: {"text": librispeech_normalizer(text)}, input_columns="text", desc="normalise")
    read = read.filter(bool, input_columns="text", desc="empty lines")
    if config.held_out:
        return read["learnt"], read["held_out"]
    parts = read["learnt"].train_test_split(HELD_OUT, seed=config.seed)
    return parts["train"], parts["test"]


def blocks(texts: Dataset, text_tokenizer: PreTrainedTokenizerBase, size: int) -> Dataset:
    """Sentences end to end, each with the end token behind it, cut into blocks of `size` tokens; rests are skipped."""

    def cut(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        ids = text_tokenizer(batch["text"], add_special_tokens=False)["input_ids"]
        stream = list(chain.from_iterable([*sentence, text_tokenizer.eos_token_id] for sentence in ids))
        cuts = [stream[start : start + size] for start in range(0, len(stream) - size + 1, size)]
        return {"input_ids": cuts, "labels": cuts}

    return texts.map(cut, batched=True, batch_size=10_000, remove_columns="text", desc="tokens")


def trainer_settings(config: TextConfig, checkpoints: Path, batch_size: int) -> TrainingArguments:
    """The configuration in the words of transformers; batch_size: of one process."""
    return TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=config.steps,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=config.warmup,
        weight_decay=0.01,
        adam_beta2=0.95,
        bf16=config.precision == "bf16",
        use_cpu=not torch.accelerator.is_available(),
        eval_strategy="steps",
        eval_steps=config.validate_every,
        save_steps=config.save_every,
        save_total_limit=2,
        logging_steps=config.log_every,
        seed=config.seed,
        report_to="none",
    )


if __name__ == "__main__":
    run_recipe(main, CONFIG)
