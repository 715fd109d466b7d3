"""Before the hours: a few steps of every stage at full size on this machine, and what the whole would take.

    python recipes/rehearse.py --config configs/rehearse/paper.yaml output=REHEARSAL

Runs the codec's training with its teachers, encoding, fine-tuning and decoding as the two configurations say, one after
the other, with the corpus `data` or with noise of LibriSpeech's lengths; with random weights of the published shapes,
so that nothing is downloaded, or with the real ones. A table says of each stage whether it fits, its peak memory, the
time of a step, the share of the speed of a large matrix product (MFU, measured here), what bounds it, and the hours and
the disk of the whole. A stage that does not fit does not end the others. The time of validation and checkpoints is
not counted, nor are features of teachers on disk. Writes REHEARSAL/results.json and report.html.
"""

import functools
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

from speechllm.runs.config import load_config, parse_config
from tokenizer.settings import Corpus, Count, Positive, Seed, Settings

PUBLISHED = ("facebook/hubert-base-ls960", "speechbrain/spkrec-ecapa-voxceleb", "Qwen/Qwen2-1.5B")


@dataclass
class RehearsalConfig(Settings):
    output: str  # folder for results.json and report.html
    tokenizer: str | None = "configs/tokenizer/paper.yaml"  # configuration of train_tokenizer; null: without the codec
    asr: str | None = "configs/asr/qwen2-1.5b.yaml"  # configuration of train_asr; null: without the language model
    data: Corpus | None = None  # corpus folder, or several; null: noise of LibriSpeech's lengths
    weights: Literal["random", "real"] = "random"  # of the published models; folders of yours are always loaded
    minutes: Positive = 5.0  # of measuring, shared by the stages; preparing them comes on top
    train_hours: Positive = 500.0  # of speech, to be encoded
    test_hours: Positive = 10.5  # of speech, to be transcribed; test-clean and test-other
    recordings: Count = 64  # of noise, or of the corpus, evenly chosen
    seed: Seed = 0

    def contradictions(self) -> Iterator[str]:
        if self.tokenizer is None and self.asr is None:
            yield "tokenizer and asr are both null: nothing to rehearse"


if __name__ == "__main__":  # help and mistakes are answered before torch is loaded
    CONFIG = parse_config(RehearsalConfig)

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn, optim
from torch.utils.data import DataLoader

from speechllm import (
    Encoding,
    LabelledLoss,
    SpeechCodec,
    SpeechCodecConfig,
    SpeechLLM,
    Utterance,
    encode_shards,
    extend_vocabulary,
    load_language_model,
    prepare_adapter,
    read_corpus,
    transcription_example,
)
from speechllm.data.batches import token_batches
from speechllm.data.packing import micro_batches
from speechllm.decoding import BATCH_TOKENS, answer_batches, forbidden_ids
from speechllm.evaluation.tables import DASH, Table, plain
from speechllm.greedy import greedy_answers, reads_packed
from speechllm.prompt import label_counts, transcription_prompt
from speechllm.reports.pages import write_results
from speechllm.runs.machine import make_accelerator, provenance
from speechllm.runs.recipe import claim_output, run_recipe
from speechllm.runs.rehearsal import (
    LONGEST,
    WAITING,
    count_flops,
    device_name,
    flops_and_tokens,
    load_recipe,
    measure_steps,
    memory_gb,
    noise_corpus,
    random_speech,
    size_gb,
    timed,
    try_stage,
)
from speechllm.runs.run import KEPT_CHECKPOINTS
from speechllm.small_model import QWEN2_SHAPES, small_qwen2, small_text_tokenizer
from speechllm.training.checkpoints import TrainingState
from speechllm.training.kernels import compile_layers, require_liger, use_liger
from speechllm.training.optimization import make_optimizer
from tokenizer.corpus import load_each, spread
from tokenizer.training.averaging import average_weights
from tokenizer.training.crops import Crops, StepSampler
from tokenizer.training.small_teachers import random_ecapa, random_hubert
from tokenizer.training.step import CodecLoss, draw_layers, parameter_groups, remember_statistics

Row = dict[str, Any]


@dataclass
class Rehearsal:
    """What the stages share. seconds: of measuring, for each."""

    config: RehearsalConfig
    folder: Path  # deleted in the end
    utterances: list[Utterance]
    seconds: float
    tokenizer: Any = None  # configurations of the two trainings
    asr: Any = None
    recipe: Any = None  # train_tokenizer, with the functions that make its losses

    @functools.cached_property
    def accelerator(self) -> Accelerator:
        return make_accelerator()

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @functools.cached_property
    def codec(self) -> SpeechCodec:
        """That of the configuration, with random weights."""
        return self.recipe.make_codec(self.tokenizer) if self.tokenizer else SpeechCodec(SpeechCodecConfig())

    def autocast(self, precision: str) -> torch.autocast:
        """That of a training in this precision."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16")

    def measure(self, take: Callable[[], Any], work: Callable[[Any], Any]) -> Row:
        return measure_steps(take, work, self.device, self.seconds)


def main(config: RehearsalConfig) -> None:
    started = time.perf_counter()
    folder = claim_output(config.output, config)
    torch.manual_seed(config.seed)
    stages: dict[str, Callable[[Rehearsal], Row]] = {}
    stages |= {"codec training": train_codec, "encoding": encode} if config.tokenizer else {}
    stages |= {"fine-tuning": fine_tune, "decoding": decode} if config.asr else {}
    with tempfile.TemporaryDirectory() as place:
        rehearsal = prepare_rehearsal(config, Path(place), 60 * config.minutes / len(stages))
        device, rows = rehearsal.device, {}
        for name, stage in stages.items():
            rows[name] = try_stage(functools.partial(stage, rehearsal), device)
    hours, disk = (sum(row.get(key) or 0.0 for row in rows.values()) for key in ("hours", "disk_gb"))
    results = {
        "device": device_name(device),
        "memory_gb": memory_gb(device),
        "stages": rows,
        "hours": hours,
        "disk_gb": disk,
        **provenance(config, time.perf_counter() - started),
    }
    write_results(folder, "Rehearsal", results, [table(results)])
    print(table(results).markdown())


def prepare_rehearsal(config: RehearsalConfig, folder: Path, seconds: float) -> Rehearsal:
    """The corpus and both configurations, which are checked here."""
    rehearsal = Rehearsal(config, folder, [], seconds)
    places = [f"output={folder}"]
    if config.tokenizer:
        rehearsal.recipe = recipe = load_recipe("train_tokenizer")
        rehearsal.tokenizer = load_config(recipe.TokenizerConfig, config.tokenizer, [*places, f"data={folder}"])
    if config.asr:
        words = [*places, f"codes={folder}", f"codec={folder}"]
        rehearsal.asr = load_config(load_recipe("train_asr").AsrConfig, config.asr, words)
    if config.data:
        splits = rehearsal.tokenizer.splits if config.tokenizer else rehearsal.asr.splits
        rehearsal.utterances = spread(read_corpus(config.data, splits), config.recordings)
    else:
        rate = rehearsal.tokenizer.codec.sample_rate if config.tokenizer else 16_000
        rehearsal.utterances = noise_corpus(folder, config.recordings, rate)
    return rehearsal


# ---- the stages: each returns what `try_stage` and the table take


def train_codec(rehearsal: Rehearsal) -> Row:
    """Steps of train_tokenizer with everything on, from files to weights; teachers as without a cache."""
    config, recipe, device = rehearsal.tokenizer, rehearsal.recipe, rehearsal.device
    codec = rehearsal.codec.to(device)
    for part, write in ((config.semantic, random_hubert), (config.acoustic, random_ecapa)):
        if part.teacher in PUBLISHED and rehearsal.config.weights == "random":
            write(folder := rehearsal.folder / write.__name__)
            part.teacher = str(folder)
    distillations = recipe.make_distillations(config, codec.quantizer.dimension, device)
    criterion = recipe.make_criterion(config, distillations, device)
    loss_of = CodecLoss(codec, criterion, [*distillations.values()]).to(device)
    groups = parameter_groups(loss_of, config.weight_decay)
    optimizer = optim.AdamW(groups, config.learning_rate, tuple(config.betas), fused=True)
    averaged = average_weights(codec, config.weight_average)
    crops = Crops(rehearsal.utterances, config.crop_s, config.codec.sample_rate, config.seed)
    sampler = StepSampler(config.batch_size, 0, 2 * LONGEST)
    batches = iter(DataLoader(crops, batch_sampler=sampler, num_workers=config.num_workers))
    window = None if config.decode_s is None else round(config.decode_s * codec.frame_rate)
    loss_of.train()

    def learn(batch: dict[str, torch.Tensor]) -> None:
        optimizer.zero_grad()
        batch = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
        remember_statistics(loss_of, balancer=criterion.balancer)
        num_layers = draw_layers(config.quantizer_dropout, len(batch["length"]), device)
        with rehearsal.autocast(config.precision):
            loss, _ = loss_of(batch, num_layers, window)
        loss.backward()
        loss_of.caps.update()
        nn.utils.clip_grad_norm_(codec.parameters(), config.clip or torch.inf).item()
        optimizer.step()
        if averaged:
            averaged.update_parameters(codec)

    found = rehearsal.measure(lambda: next(batches), learn)
    best = codec if config.best and config.dev_splits else None
    held = [x.state_dict() for x in (loss_of, optimizer, criterion.adversary, averaged, best) if x is not None]
    return {
        **found,
        "flops": count_flops(lambda: learn(next(batches))),  # without LSTMs
        "precision": config.precision,
        "steps": config.steps,
        "hours": config.steps * found["step_s"] / 3600,
        "disk_gb": KEPT_CHECKPOINTS * size_gb(held) + size_gb(codec.state_dict()),
        "speed": f"{config.batch_size * config.crop_s / found['step_s']:.3g} s of speech/s",
    }


def encode(rehearsal: Rehearsal) -> Row:
    """Encoding of the recordings as encode_speech does it, into a folder, from files to shards."""
    device, utterances = rehearsal.device, rehearsal.utterances
    codec = rehearsal.codec.to(device).eval()
    layers = rehearsal.asr.layers if rehearsal.asr else 1
    batch_s = 60.0 if device.type == "cuda" else 0.0
    numbers, hours = itertools.count(), sum(one.duration_s for one in utterances) / 3600
    shards = rehearsal.folder / "codes"

    def write(some: Sequence[Utterance]) -> None:
        for _ in encode_shards(some, codec, shards / f"{next(numbers)}", layers, batch_s=batch_s):
            pass

    found = rehearsal.measure(lambda: utterances, write)
    reading_s, _ = timed(lambda: [*load_each(utterances, codec.sample_rate)], device)
    if reading_s > (1 - WAITING) * found["step_s"]:
        found["bound"] = "loader"
    waveform = torch.zeros(round(10 * codec.sample_rate))
    shards_gb = sum(file.stat().st_size for file in shards.rglob("*") if file.is_file()) / 1e9 / next(numbers)
    passes = rehearsal.config.train_hours / hours
    return {
        **found,
        "flops": 360 * hours * count_flops(lambda: Encoding.of(codec, layers).encode(codec, waveform)),
        "precision": "no",
        "steps": passes,
        "hours": passes * found["step_s"] / 3600,
        "disk_gb": passes * shards_gb,
        "speed": f"{3600 * hours / found['step_s']:.3g} s of speech/s",
    }


def fine_tune(rehearsal: Rehearsal) -> Row:
    """Optimizer steps of train_asr."""
    config, device = rehearsal.asr, rehearsal.device
    speech_llm = language_model(rehearsal)
    model, vocabulary = speech_llm.model, speech_llm.vocabulary
    if config.liger:
        require_liger()
        use_liger(model)
    if config.train != "full":
        model = prepare_adapter(model, vocabulary, config.train, **vars(config.lora))
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    speech = random_speech(vocabulary.encoding, rehearsal.utterances)
    examples = [
        transcription_example(codes, one.text or "", vocabulary, speech_llm.text_tokenizer, config.speech_loss > 0)
        for one, codes in zip(rehearsal.utterances, speech, strict=True)
    ]
    loss_of = LabelledLoss(model.to(device), vocabulary, config.packing)
    optimizer = make_optimizer(model, vocabulary, config.learning_rate, config.weight_decay, config.row_learning_rate)
    training = TrainingState(rehearsal.accelerator, model, optimizer, config.weight_average)
    if config.compile:
        compile_layers(model)
    lengths = np.array([*map(len, examples)])
    order = token_batches(len(examples), lengths.take, config.batch_tokens, config.seed)
    model.train()
    sizes = []

    def learn(batch: list[Any]) -> None:
        counts = label_counts(batch, vocabulary)
        sizes.append(flops_and_tokens(model, batch, int(counts[0]), frozen=config.train != "full"))
        counts = counts.clamp(min=1).to(device)
        weights = torch.tensor([1.0, config.speech_loss], device=device) / counts
        optimizer.zero_grad()
        for part in filter(None, micro_batches([*map(len, batch)], config.micro_batch_tokens)):
            with rehearsal.autocast(config.precision):
                losses = loss_of([batch[i] for i in part])
            (weights * losses).sum().backward()
        nn.utils.clip_grad_norm_(loss_of.parameters(), config.clip).item()
        optimizer.step()
        training.follow()

    found = rehearsal.measure(lambda: [examples[i] for i in next(order)], learn)
    flops, tokens = (median(each) for each in zip(*sizes, strict=True))
    trained = size_gb([p for p in model.parameters() if p.requires_grad])
    whole = size_gb([*model.parameters()]) if config.train == "full" else trained
    states = 3 + (config.weight_average is not None) + (config.keep_best and bool(config.dev_splits))
    return {
        **found,
        "flops": flops,
        "precision": config.precision,
        "steps": config.steps,
        "hours": config.steps * found["step_s"] / 3600,
        "disk_gb": KEPT_CHECKPOINTS * states * trained + whole,
        "speed": f"{tokens / found['step_s']:.3g} tokens/s",
    }


@torch.no_grad()
def decode(rehearsal: Rehearsal) -> Row:
    """Transcription of the recordings as eval_asr does it, with answers as long as the texts."""
    device = rehearsal.device
    speech_llm = language_model(rehearsal)
    half = device.type == "cuda"
    for parameter in speech_llm.model.parameters():  # not the rotary frequencies
        parameter.data = parameter.data.to(torch.bfloat16) if half else parameter.data
    model, text_tokenizer = speech_llm.model.to(device).eval(), speech_llm.text_tokenizer
    vocabulary = speech_llm.vocabulary
    speech = random_speech(vocabulary.encoding, rehearsal.utterances)
    prompts = [transcription_prompt(codes, vocabulary, text_tokenizer) for codes in speech]
    bounds = [max(1, len(text_tokenizer(one.text or "")["input_ids"])) for one in rehearsal.utterances]
    forbidden = forbidden_ids(text_tokenizer, vocabulary).to(device, copy=True)
    forbidden[text_tokenizer.eos_token_id] = True  # a model that knows nothing might end at once
    if not reads_packed(model):
        raise ValueError(f"{model.config.model_type}: prompts cannot be packed, and their decoding is not measured")
    hours = sum(one.duration_s for one in rehearsal.utterances) / 3600
    parts = vocabulary, forbidden, text_tokenizer.eos_token_id
    batches = answer_batches([*map(len, prompts)], bounds, BATCH_TOKENS)

    def answer(batches: list[list[int]]) -> None:
        for batch in batches:
            greedy_answers([prompts[i] for i in batch], [bounds[i] for i in batch], model, *parts)

    found = rehearsal.measure(lambda: batches, answer)
    passes = rehearsal.config.test_hours / hours
    texts = [one.text or "" for one in rehearsal.utterances]
    examples = [transcription_example(*pair, vocabulary, text_tokenizer) for pair in zip(speech, texts, strict=True)]
    flops, _ = flops_and_tokens(model, examples, int(label_counts(examples, vocabulary)[0]), frozen=False)
    return {
        **found,
        "flops": flops / 3,  # of the three passes only the first
        "precision": "bf16" if half else "no",
        "steps": passes,
        "hours": passes * found["step_s"] / 3600,
        "disk_gb": None,
        "speed": f"{3600 * hours / found['step_s']:.3g} s of speech/s",
    }


def language_model(rehearsal: Rehearsal) -> SpeechLLM:
    """The language model of the configuration with its new rows, real or with random weights."""
    config, codec = rehearsal.asr, rehearsal.codec.to("cpu")
    extension = {name: getattr(config, name) for name in ("layers", "init", "order", "stack", "prefix_attention")}
    if config.model is not None and (config.model not in PUBLISHED or rehearsal.config.weights == "real"):
        return load_language_model(config.model, codec, **extension)
    texts = [one.text or "" for one in rehearsal.utterances]
    text_tokenizer = small_text_tokenizer(texts, config.small.text_tokens)
    small = {name: size for name, size in vars(config.small).items() if not name.startswith("text_")}
    shape = QWEN2_SHAPES["1.5b"] if config.model else small
    model = small_qwen2(text_tokenizer, **shape, name_or_path="random weights")
    return SpeechLLM(model, text_tokenizer, extend_vocabulary(model, text_tokenizer, codec, **extension), codec)


def table(results: Row) -> Table:
    """One row per stage, and the sum."""
    head = ["stage", "fits", "peak memory (GB)", "step (s)", "speed", "MFU", "bound by", "hours", "disk (GB)"]
    rows, notes = [], []
    for name, found in results["stages"].items():
        fits = {True: "yes", False: "no", None: "failed"}[found["fits"]]
        row = [name, fits, f"{found['peak_memory_gb']:.1f}"]
        row += [plain(found.get("step_s"), ".3g"), found.get("speed", DASH), plain(found.get("mfu"), ".0%")]
        row += [found.get("bound", DASH), plain(found.get("hours"), ".3g"), plain(found.get("disk_gb"), ".3g")]
        rows.append(row)
        notes += [f"{name}: {found['problem']}"] if "problem" in found else []
    rows.append(["all", *[DASH] * 6, f"{results['hours']:.3g}", f"{results['disk_gb']:.3g}"])
    note = f"On {results['device']} with {results['memory_gb']:.0f} GB. {' '.join(notes)}"
    return Table("Rehearsal", head, rows, note.strip())


if __name__ == "__main__":
    run_recipe(main, CONFIG)
