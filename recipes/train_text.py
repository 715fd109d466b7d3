"""Train a small Qwen2 on text alone, as a language model to fine-tune if Qwen2's own weights are not available.

    python recipes/train_text.py --config configs/text/small.yaml "text=[TEXT]" output=RUN
    speechllm run train_text --processes 8 ...       on 8 GPUs

TEXT: files with one sentence per line, .gz or not. RUN/model is an ordinary transformers folder, which
recipes/train_asr.py can use like Qwen/Qwen2-1.5B (model=RUN/model). Uses the Trainer of transformers: a killed run,
started again with the same command, resumes from its newest checkpoint.
"""

import glob
import math
import os
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from speechllm.runs.config import parse_config
from speechllm.small_model import SmallShape, TextTokens
from tokenizer.settings import Count, Names, Natural, Positive, Seed, Settings, Several

HELD_OUT = 0.01  # share of the sentences, unless files of held-out ones are given


@dataclass
class TextConfig(Settings):
    text: Names  # files with one sentence per line, .gz or not
    output: str  # run folder; the model goes to its subfolder `model`
    held_out: Names | None = None  # files for the perplexity; null: one in a hundred of the sentences
    text_tokens: TextTokens = 1000  # byte-level BPE vocabulary, learnt from the text
    shape: SmallShape = field(default_factory=SmallShape)
    block: Several = 256  # tokens per example: concatenated sentences, each followed by the end token
    steps: Count = 1000
    batch_size: Count = 32  # blocks per optimizer step, over all processes
    learning_rate: Positive = 2e-3
    warmup: Natural = 100  # steps
    precision: Literal["no", "bf16"] = "no"
    validate_every: Count = 250  # steps
    save_every: Count = 250  # steps between checkpoints
    log_every: Count = 10  # steps
    seed: Seed = 0


if __name__ == "__main__":  # help and mistakes are answered before torch is loaded
    CONFIG = parse_config(TextConfig, shares_work=True)

import torch
from accelerate.utils import set_seed
from datasets import Dataset, load_dataset
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainerState, TrainingArguments

from speechllm import DataError, RunError
from speechllm.evaluation.normalizers import librispeech_normalizer
from speechllm.reports.pages import finish_training
from speechllm.runs.loop import StepGuard
from speechllm.runs.machine import make_accelerator
from speechllm.runs.recipe import run_recipe
from speechllm.runs.run import MAY_CHANGE, Run, check_archive, newest_usable
from speechllm.runs.signals import Interrupted
from speechllm.small_model import small_qwen2, small_text_tokenizer
from tokenizer.files import atomic_folder
from tokenizer.tables import require_utf8
from tokenizer.training.crops import require_equal_shares
from tokenizer.training.distributed import mean_over_processes


class TextTrainer(Trainer):
    """Keeps the loss of the last step; a mean since the last line of the log would begin anew after a kill."""

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        self.loss = super().training_step(*args, **kwargs)
        return self.loss


class RunCallback(TrainerCallback):
    """Gives a `Trainer` what the other trainings get from a `TrainingLoop`: log, skipped steps, an end by signal."""

    def __init__(self, run: Run, guard: StepGuard, text: list[str]):
        self.run, self.guard, self.text = run, guard, text
        self.trainer: TextTrainer
        self.learning_rate = 0.0

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        self.run.cut_log(state.global_step)  # after a resumed checkpoint: those steps are repeated
        state.compute_steps(args, state.max_steps)  # those of the checkpoint may have been others

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: Any, control: Any, model: Any, optimizer: Any, **_: Any
    ) -> None:
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        self.learning_rate = optimizer.param_groups[0]["lr"]
        if self.guard.skips(state.global_step + 1, self.trainer.loss, norm, recordings=lambda: self.text):
            optimizer.zero_grad()  # an optimizer passes over weights without a gradient, and over their moments

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        step = state.global_step
        if self.guard.signal is not None:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False
        if (step % args.logging_steps == 0 or step == state.max_steps) and not self.guard.skipped:
            loss = mean_over_processes(self.trainer.loss).item()
            self.run.log(step, loss=loss, lr=self.learning_rate)

    def on_log(self, args: TrainingArguments, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "eval_loss" in logs:
            self.run.log(state.global_step, dev_loss=logs["eval_loss"])


def main(config: TextConfig) -> None:
    accelerator = make_accelerator(config.precision)
    require_equal_shares(config.batch_size, accelerator.num_processes)
    run = Run(config.output, config, accelerator, free=MAY_CHANGE)
    if run.summary:
        accelerator.print(f"{config.output} is finished: {run.summary}")
        return

    # 1. sentences, normalised as train_asr does by default, and a text tokenizer trained on them
    with accelerator.main_process_first():  # the others read the cache of `datasets`
        train, held_out = sentences(config)
        text_tokenizer = small_text_tokenizer(train["text"], config.text_tokens)
        train, held_out = (blocks(part, text_tokenizer, config.block) for part in (train, held_out))
    if not len(train) or not len(held_out):
        raise DataError(f"the training or held-out text is shorter than a block of {config.block} tokens")

    # 2. train
    set_seed(config.seed)
    model = small_qwen2(text_tokenizer, **asdict(config.shape))
    epochs = config.steps * config.batch_size / len(train)
    accelerator.print(
        f"text: {len(train) * config.block:,} tokens, {epochs:.2f} epochs; {model.num_parameters() / 1e6:.1f} M "
        f"parameters, {len(text_tokenizer)} text tokens"
    )
    checkpoints = run.folder / "checkpoints"
    settings = trainer_settings(config, checkpoints, config.batch_size // accelerator.num_processes)
    callback = RunCallback(run, guard := StepGuard(run, config.steps), config.text)
    trainer = TextTrainer(model, settings, train_dataset=train, eval_dataset=held_out, callbacks=[callback])
    callback.trainer = trainer
    checkpoint = newest_usable(saved_steps(checkpoints), complete, run.main)
    run.require_labels(text_tokenizer.convert_ids_to_tokens(range(len(text_tokenizer))), bool(checkpoint))
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json")) if checkpoint else TrainerState()
    if state.global_step > config.steps:
        raise RunError(f"{run.folder} has done {state.global_step} steps already: set steps to at least that")
    if checkpoint and state.global_step == config.steps:  # the Trainer would make one more step
        trainer.state = state
        model.load_state_dict(load_file(checkpoint / "model.safetensors"), strict=False)  # without a head that is tied
    else:
        with guard.catching():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if guard.signal is not None:
        step = trainer.state.global_step
        raise Interrupted(guard.signal, f"step {step} is saved, and the same command goes on from there")
    last = [entry for entry in trainer.state.log_history if entry["step"] == config.steps and "eval_loss" in entry]
    loss = (last[-1] if last else trainer.evaluate())["eval_loss"]

    # 3. export
    if run.main:
        with atomic_folder(run.folder / "model") as folder:
            model.save_pretrained(folder)
            text_tokenizer.save_pretrained(folder)
        summary = {"steps": config.steps, "dev_loss": loss, "perplexity": math.exp(loss)}
        finish_training(run, summary)
        print(f"language model saved in {run.folder / 'model'}: perplexity per token {summary['perplexity']:.1f}")
    accelerator.wait_for_everyone()


def saved_steps(folder: Path) -> list[Path]:
    """The Trainer's checkpoints, oldest first; not one that it was writing when it was killed: the state comes last."""
    found = [state.parent for state in folder.glob("checkpoint-*/trainer_state.json") if state.stat().st_size]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def complete(checkpoint: Path) -> Path:
    """The Trainer's checkpoint itself. Raises an error of some kind if a file is missing or cut short."""
    TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    load_file(checkpoint / "model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt"):
        check_archive(checkpoint / name)
    return checkpoint


def sentences(config: TextConfig) -> tuple[Dataset, Dataset]:
    """Normalised sentences for training, and held-out ones; column text."""
    files = {"train": config.text, **({"held_out": config.held_out} if config.held_out else {})}
    # a file that exists is no pattern, whatever its name looks like
    found = {part: [glob.escape(name) if os.path.exists(name) else name for name in files[part]] for part in files}
    for file in (file for part in files.values() for file in part if Path(file).is_file()):
        require_utf8(file)
    texts = load_dataset("text", data_files=found)
    texts = texts.map(
        lambda lines: {"text": [*map(librispeech_normalizer, lines)]},
        batched=True,
        input_columns="text",
        desc="normalise",
    )
    texts = texts.filter(bool, input_columns="text", desc="empty lines")
    if config.held_out:
        return texts["train"], texts["held_out"]
    parts = texts["train"].train_test_split(HELD_OUT, seed=config.seed)
    return parts["train"], parts["test"]


def blocks(texts: Dataset, text_tokenizer: PreTrainedTokenizerBase, size: int) -> Dataset:
    """Concatenated sentences, each followed by the end token, in blocks of `size` tokens; remainders are dropped."""

    def cut(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        ids = text_tokenizer(batch["text"], add_special_tokens=False)["input_ids"]
        stream = list(chain.from_iterable([*sentence, text_tokenizer.eos_token_id] for sentence in ids))
        cuts = [stream[start : start + size] for start in range(0, len(stream) - size + 1, size)]
        return {"input_ids": cuts, "labels": cuts}

    return texts.map(cut, batched=True, batch_size=10_000, remove_columns="text", desc="tokens")


def trainer_settings(config: TextConfig, checkpoints: Path, batch_size: int) -> TrainingArguments:
    """The configuration as settings of transformers; batch_size: per process."""
    settings = TrainingArguments(
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
    if settings.n_gpu > 1:  # the Trainer would multiply the batch by the GPUs that no launcher has given a process
        settings._n_gpu = 1
    return settings


if __name__ == "__main__":
    run_recipe(main, CONFIG)
