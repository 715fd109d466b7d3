"""Fine-tune a language model to transcribe: audio tokens in, text out.

    python recipes/train_asr.py --config configs/asr/qwen2-1.5b.yaml codes=CODES codec=CODEC output=RUN
    speechllm run train_asr --processes 8 ...        on 8 GPUs

Extends the vocabulary by the codec's codes, then trains on "Transcribe this speech" prompts with utterances encoded by
recipes/encode_speech.py. A killed run, started again with the same command, resumes from its newest checkpoint and ends
as if it had not been interrupted. The model is saved in RUN/model, with its text tokenizer, audio vocabulary and codec.
For a smaller GPU: configs/asr/qwen2-1.5b_lora.yaml. To test whether new codes can be learnt: configs/asr/overfit.yaml.
"""

import functools
import math
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Literal

from speechllm.data.config import AugmentationConfig
from speechllm.runs.config import parse_config
from speechllm.small_model import SmallShape, TextTokens
from tokenizer.settings import Corpus, Count, Decay, Names, Natural, NonNegative, Positive, Seed, Settings, Share

SAMPLE = 2000  # rows from which the plan is computed
FREE = "micro_batch_tokens gradient_checkpointing compile liger".split()  # may also change while a run is interrupted


@dataclass
class SmallModelConfig(SmallShape):
    """A Qwen2 with random weights and a text tokenizer trained on the transcripts."""

    text_tokens: TextTokens = 400  # byte-level BPE vocabulary
    text_steps: Natural = 50  # first steps, on sentences without audio, so that the model learns the language


@dataclass
class LoraConfig(Settings):
    """Low-rank updates of all linear layers."""

    rank: Count = 64
    alpha: Count = 128  # the scale is alpha / rank
    dropout: Share = 0.0


@dataclass
class RowsConfig(Settings):
    file: str  # JSONL: rows of messages, see recipes/README.md
    weight: Positive = 1.0  # by which the weights of its rows are multiplied: how often they are read in an epoch


@dataclass
class AsrConfig(Settings):
    codes: Corpus  # folder of encode_speech, or several as [A, B]
    codec: str  # the audio tokenizer that made them, as `load_tokenizer` takes it
    output: str  # run folder; the model goes to its subfolder `model`
    model: str | None = "Qwen/Qwen2-1.5B"  # folder or hub name, or RUN/model to train further; null: a small new one
    small: SmallModelConfig = field(default_factory=SmallModelConfig)  # its shape, used when model is null
    train: Literal["full", "lora", "rows"] = "full"  # all weights, LoRA and the new rows, or the new rows alone
    lora: LoraConfig = field(default_factory=LoraConfig)
    splits: Names | None = None  # training splits, all when null
    dev_splits: Names | None = None  # pooled, for the WER while training (CER without spaces); none when null
    rows: list[RowsConfig] = field(default_factory=list)  # other tasks, which hear utterances of the same splits
    transcription_weight: NonNegative = 1.0  # how often an utterance is transcribed in an epoch; 0: only other tasks
    template: Literal["plain", "chat"] = "plain"  # the paper's prompt, or the chat template of an instruct model
    dev_text: str | None = None  # file of sentences, a line each, .gz or not, whose perplexity tells what is forgotten
    normalizer: Literal["librispeech", "whisper_english", "none"] = "librispeech"  # of the transcripts, also for dev
    max_utterances: Count | None = None  # of the training splits, evenly chosen; all when null
    layers: Count = 1  # codebooks the model reads; 1 is 50 tokens/s
    order: Literal["frame", "layer", "delay", "semantic"] = "frame"  # of the codes of several codebooks
    stack: Count = 2  # continuous features per token
    prefix_attention: bool = False  # the tokens of an audio attend to each other in both directions
    init: Literal["codebook", "mean", "random"] = "codebook"  # of the new rows
    letters: str | None = None  # compressor trained on the codes: rows of layer 0 begin as the letters it finds in them
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    speech_loss: NonNegative = 0.0  # weight of the loss of predicting codes, with label smoothing; 0: text only
    steps: Count = 10_000
    batch_tokens: Count = 24_576  # at most, per optimizer step over all processes: about 35 utterances of 13 s
    micro_batch_tokens: Count = 8192  # about as many are computed at once in each process
    packing: bool = True  # where the language model can keep packed examples apart; false: padded batches
    learning_rate: Positive = 5e-5
    row_learning_rate: NonNegative | None = None  # of the new rows and a projector; null: the same; 0: frozen
    row_steps: Natural = 0  # first steps, in which only these are trained
    weight_decay: NonNegative = 0.01  # except of embeddings, norms and biases
    warmup: Count = 500  # steps, at the start and again after row_steps
    clip: Positive = 1.0  # largest gradient norm
    precision: Literal["no", "bf16"] = "bf16"
    gradient_checkpointing: bool = False  # less memory for one third more computation
    compile: bool = False  # the layers, by torch.compile; takes minutes first
    liger: bool = False  # kernels of the extra `liger`, on a CUDA GPU
    weight_average: Decay | None = None  # largest decay of a moving average of the weights, which is exported
    validate_every: Count = 1000  # steps
    dev_utterances: Count = 100  # at most, evenly chosen, for the WER while training
    keep_best: bool = True  # export the best checkpoint instead of the last one
    patience: Count | None = None  # validations without a better WER (or CER) after which to stop; null: never
    trackers: list[Literal["tensorboard", "wandb"]] | None = None  # that also receive the log
    log_every: Count = 10  # steps
    save_every: Count = 1000  # steps between checkpoints
    seed: Seed = 0

    def contradictions(self) -> Iterable[str]:
        if self.row_steps > self.steps:
            yield f"row_steps must be at most steps = {self.steps}, got {self.row_steps}"
        if self.row_learning_rate == 0 and (self.row_steps or self.train == "rows"):
            yield "row_learning_rate=0 freezes the rows, the only weights that row_steps and train: rows train"
        if self.model is None and (self.train != "full" or self.row_steps > 0):
            yield "train: lora or rows and row_steps need a pretrained language model, but model is null"
        if self.model is None and self.template == "chat":
            yield "template: chat needs a pretrained language model with a chat template, but model is null"
        if self.prefix_attention and self.speech_loss > 0:
            yield "speech_loss predicts codes that prefix_attention shows already: set one of them"
        if self.transcription_weight == 0 and not self.rows:
            yield "transcription_weight=0 leaves nothing to train on without rows"
        if self.transcription_weight == 0 and self.dev_splits and (self.keep_best or self.patience is not None):
            yield "transcription_weight=0 trains no transcription, which dev_splits measure: set dev_splits=null"
        if self.model is None and self.small.text_steps >= self.steps:
            yield f"small.text_steps must be below steps = {self.steps}, got {self.small.text_steps}: no audio is heard"
        if self.patience is not None and not self.dev_splits:
            yield "patience needs dev_splits for measuring the WER"


if __name__ == "__main__":  # help and mistakes are answered before torch is loaded
    CONFIG = parse_config(AsrConfig, shares_work=True)

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed

from speechllm import (
    DataError,
    LabelledLoss,
    RunError,
    SpeechLLM,
    describe_rows,
    extend_vocabulary,
    load_codes,
    load_language_model,
    load_tokenizer,
    prepare_adapter,
)
from speechllm.data.augmentation import Augmentation
from speechllm.data.conversations import Conversations, LazyRows, Row, StepExamples, step_examples, transcription_rows
from speechllm.data.encoded import require_texts, transcribed
from speechllm.data.rows import mixed, read_rows
from speechllm.data.spelling import letters_of_codes
from speechllm.decoding import with_room
from speechllm.evaluation.scripts import primary_rate
from speechllm.extension import Extension
from speechllm.messages import ConversationWriter
from speechllm.model import load_letters
from speechllm.prompt import label_counts, sentence
from speechllm.reports.pages import finish_training
from speechllm.runs.loop import TrainingLoop
from speechllm.runs.machine import make_accelerator
from speechllm.runs.recipe import run_recipe
from speechllm.runs.run import MAY_CHANGE, Run, read_log
from speechllm.small_model import small_qwen2, small_text_tokenizer
from speechllm.training.checkpoints import TrainingState, prepare
from speechllm.training.kernels import compile_layers, require_liger, use_liger
from speechllm.training.loss import check_loss_once
from speechllm.training.optimization import keep_row_gradients, make_optimizer
from speechllm.training.perplexity import read_texts, text_perplexity
from speechllm.training.plan import training_plan
from speechllm.training.schedule import set_learning_rate, warmup_cosine
from speechllm.training.validation import dev_rates, recognize_together
from tokenizer.corpus import spread
from tokenizer.files import atomic_folder
from tokenizer.utterances import spell_corpora


def main(config: AsrConfig) -> None:
    accelerator = make_accelerator(config.precision)
    refuse_sharding(accelerator, config)
    if config.liger:
        require_liger()

    # 1. encoded speech and its codec
    require_texts(config.codes, config.normalizer)
    speech, encoding = load_codes(config.codes, config.splits)
    train = transcribed(speech, normalizer=config.normalizer)
    without_words = len(speech) - len(train)
    train = train.select(spread(range(len(train)) if config.transcription_weight else [], config.max_utterances))
    numbers = {name: number for number, name in enumerate(speech["id"])} if config.rows else {}
    tasks = [(read_rows(source.file, numbers), source.weight) for source in config.rows]
    transcriptions = transcription_rows(train, np.searchsorted(speech.places, train.places))
    rows, frequencies = mixed((transcriptions, config.transcription_weight), *tasks)
    dev_texts = read_texts(config.dev_text) if config.dev_text else []
    dev = []
    if config.dev_splits:
        held_out, _ = load_codes(config.codes, config.dev_splits)
        dev = [*transcribed(held_out, config.dev_utterances, config.normalizer)]
    if not len(rows) or (config.dev_splits and not dev):
        purpose = "validation" if len(rows) else "training"
        raise DataError(f"{spell_corpora(config.codes)}: no utterance for {purpose} has a transcript")
    primary = primary_rate(row["text"] for row in dev)  # steers: the best checkpoint and early stopping follow it
    if without_words and config.transcription_weight:
        accelerator.print(f"left out: {without_words} utterances whose transcript holds no words ({config.normalizer})")
    codec = load_tokenizer(config.codec)
    encoding.require(codec.fingerprint, config.codec)
    letters = load_letters(config.letters, encoding) if config.letters else None
    run = Run(config.output, config, accelerator, config.trackers, free=[*MAY_CHANGE, *FREE])
    if run.summary:
        accelerator.print(f"{config.output} is finished: {run.summary}")
        return
    set_seed(config.seed)

    # 2. a language model, its vocabulary extended by the codes unless it already is, and the training examples
    extension = Extension(
        layers=config.layers,
        init=config.init,
        seed=config.seed,
        order=config.order,
        stack=config.stack,
        template=config.template,
        prefix_attention=config.prefix_attention,
        code_letters=letters_of_codes(letters, speech),
    )
    texts = train["text"] + [answer for task, _ in tasks for row in task for answer in row.answers]
    if config.model is None:
        text_tokenizer = small_text_tokenizer(texts, config.small.text_tokens)
        shape = {name: size for name, size in asdict(config.small).items() if not name.startswith("text_")}
        model = small_qwen2(text_tokenizer, **shape)
        vocabulary = extend_vocabulary(model, text_tokenizer, codec, **extension)
    else:
        loaded = load_language_model(config.model, codec, **extension)
        model, text_tokenizer, vocabulary = loaded.model, loaded.text_tokenizer, loaded.vocabulary
    vocabulary.require(encoding)
    new_rows = describe_rows(model, vocabulary)
    if config.liger:
        use_liger(model)
    if config.train != "full":
        model = prepare_adapter(model, vocabulary, config.train, **asdict(config.lora))
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    learn_speech = config.speech_loss > 0
    writer = ConversationWriter(vocabulary, text_tokenizer)
    examples = Conversations(rows, speech, writer, learn_speech, frequencies)
    sentences = Conversations(LazyRows(len(texts), lambda i: Row(sentence(texts[i]), texts[i])), None, writer)
    augmentation = Augmentation(config.augmentation, vocabulary, getattr(codec, "codebooks", None))
    sample = spread(range(len(examples)), SAMPLE)
    lengths, labels = examples.sizes(sample).T
    durations_s = [train[i]["duration_s"] for i in sample if i < len(train)]  # other rows come after these
    vocabulary = with_room(vocabulary, labels[: len(durations_s)], durations_s)

    # 3. loss, optimizer and state; a killed run is resumed
    tokens = text_tokenizer.convert_ids_to_tokens(range(len(text_tokenizer)))
    loss_of = LabelledLoss(model, vocabulary, config.packing)
    check_loss_once(loss_of, examples, accelerator)
    optimizer = make_optimizer(model, vocabulary, config.learning_rate, config.weight_decay, config.row_learning_rate)
    training = TrainingState(accelerator, model, optimizer, config.weight_average)
    speech_llm = SpeechLLM(training.evaluated, text_tokenizer, vocabulary, codec)
    plan = training_plan(
        model,
        len(examples),
        lengths.tolist(),
        int(labels.sum()),
        accelerator,
        steps=config.steps,
        batch_tokens=config.batch_tokens,
        micro_batch_tokens=config.micro_batch_tokens,
        form=config.train,
        averaged=config.weight_average is not None,
        packing=loss_of.packing,
    )
    accelerator.print(plan)
    accelerator.print(
        f"new rows ({'letters' if letters else config.init}): mean norm {new_rows['new_row_norm']:.3f} "
        f"(text rows: {new_rows['text_row_norm']:.3f}), mean cosine {new_rows['new_row_cosine']:.3f}"
    )
    if config.compile:
        compile_layers(model)
    loss_of, optimizer = prepare(accelerator, loss_of, optimizer, config.clip)
    # the moments of DeepSpeed are not accessible
    save_every = None if accelerator.distributed_type == DistributedType.DEEPSPEED else config.save_every
    settings = {"steps": config.steps, "seed": config.seed, "save_every": save_every, "labels": tokens}
    loop = TrainingLoop(run, training, "asr", **settings)

    # 4. train. The loss of a step is the mean over all labels of the batch, however it is split: the sum of each
    # micro-batch is divided by the total count, and multiplied by the number of processes, which average gradients
    text_steps = config.small.text_steps if config.model is None else 0
    if dev_texts:
        before = perplexity_before(dev_texts, speech_llm, training, run)
    text_shares = shares_of(sentences, config, accelerator, loop.done)
    audio_shares = shares_of(examples, config, accelerator, max(loop.done, text_steps), augmentation)
    model.train()
    for step in loop:
        set_learning_rate(optimizer, warmup_cosine(step, config.steps, config.warmup, joined=config.row_steps))
        source, shares = (sentences, text_shares) if step < text_steps else (examples, audio_shares)
        share = next(shares)
        counts = label_counts([one for part in share.parts for one in part], vocabulary).to(accelerator.device)
        counts = accelerator.reduce(counts).clamp(min=1)
        weights = torch.tensor([1.0, config.speech_loss], device=accelerator.device) / counts
        sums = torch.zeros(2, device=accelerator.device)
        optimizer.zero_grad()
        for i, part in enumerate(share.parts):
            accelerator.sync_gradients = i + 1 == len(share.parts)
            # with FSDP each part is added to the sharded gradients: else every process would hold all of them
            at_once = accelerator.sync_gradients or training.sharded
            with nullcontext() if at_once else accelerator.no_sync(loss_of):
                losses = loss_of(part)
                accelerator.backward((weights * losses).sum() * accelerator.num_processes)
            sums += losses.detach()
        if step < config.row_steps:
            keep_row_gradients(model, vocabulary)
        norm = accelerator.clip_grad_norm_(loss_of.parameters(), config.clip)
        names = functools.partial(source.names, share.rows)
        skipped = loop.skips(norm, weights * sums, recordings=names)
        if not skipped:
            optimizer.step()
            training.follow()

        # 5. log and validate
        validating = bool(dev) and loop.due(config.validate_every)
        if (loop.due(config.log_every) or validating) and not skipped:
            loss, speech_loss = (accelerator.reduce(sums) / counts).tolist()
            more = {"speech_loss": speech_loss} if config.speech_loss else {}
            rate = optimizer.param_groups[0]["lr"]
            loop.log(loss=loss, **more, lr=rate, tokens=share.tokens)
        if validating:
            # compiled layers are for training: when decoding every word has another shape
            stance = torch.compiler.set_stance("force_eager") if config.compile else nullcontext()
            with training.evaluation_weights(), stance:
                answers = recognize_together(dev, encoding, speech_llm, accelerator, training.evaluators)
                if run.main:
                    rates = dev_rates([row["text"] for row in dev], answers, config.normalizer)
                    run.log(loop.done, **rates)
                    training.record_validation(loop.done, rates[f"dev_{primary}"], keep=config.keep_best)
                    if training.best.validations_without_improvement == config.patience:
                        accelerator.set_trigger()
            if accelerator.check_trigger():
                better = f"no better {primary.upper()} in {config.patience} validations"
                accelerator.print(f"{better}: training stops after {loop.done} steps")
                break

    # 6. export
    with training.evaluation_weights():
        if run.main:
            training.load_best()
            training.evaluated.eval()
            after = text_perplexity(dev_texts, speech_llm) if dev_texts else None
            with atomic_folder(run.folder / "model") as folder:
                speech_llm.save(folder)
    if run.main:
        best = {f"dev_{primary}": training.best.error_rate, "best_step": training.best.step} if dev else {}
        kept = {"normalizer": config.normalizer} | ({"without_words": without_words} if without_words else {})
        summary = {"steps": loop.done, "loss": loop.figures.get("loss"), **best, **kept}
        summary["codec_fingerprint"] = codec.fingerprint
        if after is not None:
            summary |= {"text_perplexity_before": before, "text_perplexity": after.perplexity}
            summary |= {"text_tokens": after.tokens, "text_words": after.words}
            print(f"perplexity of {config.dev_text}: {before:.2f} before, {after.perplexity:.2f} after (per token)")
        finish_training(run, summary)
        print(f"speech language model saved in {run.folder / 'model'}")
    accelerator.wait_for_everyone()


def refuse_sharding(accelerator: Accelerator, config: AsrConfig) -> None:
    """Raise RunError for settings that do not support sharded weights."""
    kind, full = accelerator.distributed_type, config.train == "full"
    if kind not in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        return
    if config.weight_average is not None or (full and (config.row_learning_rate is not None or config.row_steps)):
        raise RunError(
            "weight_average, row_learning_rate and row_steps need all weights in each process, but FSDP and DeepSpeed "
            "shard them: remove these keys"
        )
    if kind == DistributedType.FSDP and not full:
        raise RunError(f"train: {config.train}: FSDP cannot shard an adapter's rows; use DeepSpeed or neither")
    if kind == DistributedType.DEEPSPEED and config.row_steps:
        raise RunError("row_steps: DeepSpeed updates weights before gradients can be dropped: remove this key")


def shares_of(
    examples: Conversations,
    config: AsrConfig,
    accelerator: Accelerator,
    start: int,
    augmentation: Augmentation | None = None,
) -> Iterator[StepExamples]:
    """What this process computes in successive optimizer steps, from `start` on."""
    budget = config.batch_tokens, config.micro_batch_tokens
    process = accelerator.process_index, accelerator.num_processes
    return step_examples(examples, *budget, config.seed, start, *process, augmentation)


def perplexity_before(texts: list[str], speech_llm: SpeechLLM, training: TrainingState, run: Run) -> float:
    """The perplexity of texts before the first step; that of the log if the training goes on. Main process."""
    held = [line["text_perplexity"] for line in read_log(run.folder) if "text_perplexity" in line]
    with training.evaluation_weights():
        if run.main and not held:
            held = [text_perplexity(texts, speech_llm).perplexity]
            run.log(0, text_perplexity=held[0])
    return held[0] if held else math.nan


if __name__ == "__main__":
    run_recipe(main, CONFIG)
