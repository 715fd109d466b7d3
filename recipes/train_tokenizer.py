"""Train the speech tokenizer: reconstruction, and distillation of content (layer 0, eq. 4) and voice (layer 1, eq. 5).

    python recipes/train_tokenizer.py --config configs/tokenizer/paper.yaml data=LIBRISPEECH output=RUN
    speechllm run train_tokenizer --processes 8 ...   on 8 GPUs

A killed run, started again with the same command, resumes from its newest checkpoint and ends as if it had not been
interrupted. The codec is saved in RUN/model; RUN also has the configuration, log.jsonl, report.html and audio samples.
"""

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Literal

from speechllm.runs.config import parse_config
from tokenizer.codec.config import SpeechCodecConfig
from tokenizer.rates import HOP_LENGTH, SAMPLE_RATE
from tokenizer.settings import (
    NOT_EMPTY,
    Betas,
    Corpus,
    Count,
    Counts,
    CropLength,
    Decay,
    Names,
    Natural,
    NonNegative,
    Positive,
    Rule,
    Seed,
    Settings,
    Share,
)

Windows = Annotated[list[Annotated[int, Rule("at least 16", lambda n: n >= 16)]], NOT_EMPTY]
Grouped = Annotated[int, Rule("0 or a multiple of 16", lambda n: n >= 0 and n % 16 == 0)]  # the convolutions' groups


@dataclass
class UnitsConfig(Settings):
    tokenizer: str | None = None  # of codec.quantizer=units: name of units, whose codes are layer 0
    cache: str | None = None  # folder for the units of whole utterances; null: those of every crop alone


@dataclass
class SemanticConfig(Settings):
    teacher: str | None = "facebook/hubert-base-ls960"  # folder or hub name, or a compressor; null: no distillation
    layer: int | Literal["avg"] = "avg"  # hidden state, or the mean of all; -1: of the last layer
    axis: Literal["D", "T"] = "D"  # cosine over time for every dimension (eq. 4), or over dimensions for every frame
    weight: NonNegative = 120.0  # lambda of eq. 7 (0.5 next to EnCodec's losses); SpeechTokenizer's, next to its own
    gradient_ratio: NonNegative | None = 1.0  # most that its gradient at the latents is of the reconstruction's
    center: bool = True  # subtract the mean over time first; false is the paper's literal form
    cache: str | None = None  # folder for the teacher's features of whole utterances; null: recomputed for every crop


@dataclass
class AcousticConfig(Settings):
    teacher: str | None = "speechbrain/spkrec-ecapa-voxceleb"  # folder or hub name; null: no distillation
    target: Literal["embedding", "frames"] = "embedding"  # the speaker from pooled layer 1, or eq. 5 to the letter
    weight: NonNegative = 10.0  # lambda of eq. 7; the paper's is 0.5
    gradient_ratio: NonNegative | None = 0.2  # as above; from about 1 on it degrades the content of layer 0
    cache: str | None = None  # as above


@dataclass
class LossConfig(Settings):
    time: NonNegative = 0.1  # L1 of the waveform
    mel: NonNegative = 1.0  # multi-scale mel distance
    adversarial: NonNegative = 3.0  # no discriminators if this and the next are 0
    feature_matching: NonNegative = 3.0
    speech_features: NonNegative = 0.0  # L1 distance of the semantic teacher's features of reconstruction and original
    commitment: NonNegative = 1.0  # outside the balancer, as teachers are: weighs half as much in twice the batch
    balance: bool = True  # EnCodec's balancer: weights are shares of the gradient at the waveform
    mel_windows: Windows = field(default_factory=lambda: [256, 512, 1024, 2048])  # samples
    mel_bands: list[Count] | None = None  # per window; one sixteenth of it when null
    mel_weights: list[NonNegative] | None = None  # per window; their mean when null, all 1 is the sum
    mel_squared: bool = True  # L2 in addition to L1
    mel_power: NonNegative = 0.0  # 0: of logarithms; above, of (x^p - 1) / p, where what is quiet counts less


@dataclass
class AdversaryConfig(Settings):
    kind: Literal["hinge", "least_squares"] = "hinge"
    stft_filters: Natural = 32  # width of the multi-scale STFT discriminator; 0: none, also below
    period_channels: Natural = 0  # width of the multi-period discriminator (HiFi-GAN: 32)
    scale_channels: Grouped = 0  # width of the multi-scale discriminator (HiFi-GAN: 128)
    relative_features: bool = True  # feature matching relative to the size of the features (EnCodec)
    learning_rate: Positive = 3e-4
    betas: Betas = field(default_factory=lambda: [0.5, 0.9])  # of Adam
    start: Natural = 0  # first step with discriminators; an untrained codec is of no use to them


@dataclass
class TokenizerConfig(Settings):
    data: Corpus  # corpus folder, or several as [A, B]: manifest.jsonl or LibriSpeech's layout
    output: str  # run folder; the codec goes to its subfolder `model`
    splits: Names | None = None  # training splits, all when null
    dev_splits: Names | None = None  # for validation, none when null
    codec: SpeechCodecConfig = field(default_factory=SpeechCodecConfig)
    units: UnitsConfig = field(default_factory=UnitsConfig)
    semantic: SemanticConfig = field(default_factory=SemanticConfig)
    acoustic: AcousticConfig = field(default_factory=AcousticConfig)
    losses: LossConfig = field(default_factory=LossConfig)
    adversary: AdversaryConfig = field(default_factory=AdversaryConfig)
    quantizer_dropout: Counts | None = None  # codebooks to decode from, drawn per utterance; all when null
    start: str | None = None  # folder or hub name of a codec of the same configuration, to train on; null: a new one
    linear_start: bool = False  # of a new codec of body convnext: begin as the best linear code of the spectra
    codebook_decay: Share = 0.99  # of the codebooks' moving averages; 0.99 is too slow for a few hundred steps
    weight_average: Decay | None = None  # largest decay of a moving average of the weights, which is exported
    steps: Count = 200_000
    batch_size: Count = 32  # crops over all processes
    crop_s: CropLength = 3.0  # seconds per crop
    decode_s: CropLength | None = None  # decode only a random window of the crop; all of it when null
    learning_rate: Positive = 1e-4
    betas: Betas = field(default_factory=lambda: [0.9, 0.99])  # of AdamW
    weight_decay: NonNegative = 0.01
    warmup: Count = 1000  # steps
    clip: Positive | None = 1.0  # largest gradient norm; null: no limit
    precision: Literal["no", "bf16"] = "no"
    log_every: Count = 10  # steps
    validate_every: Count = 2000  # steps
    dev_utterances: Count = 16  # at most, evenly chosen, for validation
    best: Literal["mel", "pesq_wb", "stoi"] | None = "mel"  # figure that chooses the exported weights; null: the last
    patience: Count | None = None  # validations without a better figure after which to stop; null: never
    save_every: Count = 2000  # steps between checkpoints
    num_workers: Natural = 2  # data loading processes, per training process
    seed: Seed = 0

    def contradictions(self) -> Iterable[str]:
        if self.decode_s is not None and self.decode_s > self.crop_s:
            yield f"decode_s must be at most crop_s = {self.crop_s}, got {self.decode_s}"
        if self.acoustic.teacher and self.codec.num_codebooks < 2:
            yield "acoustic distillation is on layer 1: codec.num_codebooks must be at least 2"
        if (self.codec.quantizer == "units") != bool(self.units.tokenizer) or (
            self.units.tokenizer and self.semantic.teacher
        ):
            yield "layer 0 of given units needs codec.quantizer=units, units.tokenizer=NAME and semantic.teacher=null"
        if self.linear_start and (self.codec.body != "convnext" or self.codec.norm == "batch_norm"):
            yield "linear_start needs codec.body=convnext and codec.norm=weight_norm, which leaves latents as they are"
        if max(self.quantizer_dropout or [0]) > self.codec.num_codebooks:
            yield f"quantizer_dropout must be numbers from 1 to {self.codec.num_codebooks}"
        if self.patience is not None and not (self.dev_splits and self.best):
            yield "patience needs dev_splits and best, the figure to watch"
        losses, adversary = self.losses, self.adversary
        for name in ("mel_bands", "mel_weights"):
            if (values := getattr(losses, name)) is not None and len(values) != len(losses.mel_windows):
                yield f"losses.{name} needs one number per value of losses.mel_windows, got {len(values)}"
        adversarial = losses.adversarial or losses.feature_matching
        if adversarial and not (adversary.stft_filters or adversary.period_channels or adversary.scale_channels):
            yield "adversarial losses need adversary.stft_filters, period_channels or scale_channels above 0"
        if not (losses.time or losses.mel or losses.speech_features or (adversarial and adversary.start == 0)):
            yield "the first steps have no loss: set losses.time or losses.mel above 0, or adversary.start=0"
        if losses.speech_features and not self.semantic.teacher:
            yield "losses.speech_features needs semantic.teacher"
        rate, hop = self.codec.sample_rate, self.codec.hop_length
        decoded = rate * (self.crop_s if self.decode_s is None else self.decode_s)  # samples at a time
        if max(losses.mel_windows) >= 2 * decoded > 0:
            yield f"losses.mel_windows must be below {2 * decoded:g}, twice the samples decoded at a time"
        if (self.semantic.teacher or self.acoustic.teacher) and rate != SAMPLE_RATE:
            yield f"teachers need codec.sample_rate=16000, got {rate}: set it, or both teachers to null"
        if self.semantic.teacher and hop != HOP_LENGTH:
            yield f"semantic.teacher needs codec.strides with a product of 320, got {hop}: or set it to null"


if __name__ == "__main__":  # help and mistakes are answered before torch is loaded
    CONFIG = parse_config(TokenizerConfig, shares_work=True)

import torch
from accelerate.utils import set_seed
from torch import Tensor, nn, optim
from torch.utils.data import DataLoader

from speechllm import SpeechCodec, Utterance, read_corpus
from speechllm.reports.pages import write_codec_report, write_training_report
from speechllm.reports.sounds import Reconstruction, save_sounds
from speechllm.runs.loop import Parts, TrainingLoop
from speechllm.runs.machine import make_accelerator
from speechllm.runs.recipe import run_recipe
from speechllm.runs.run import MAY_CHANGE, Run, read_log
from speechllm.runs.signals import follow_parent
from speechllm.training.schedule import set_learning_rate, warmup_cosine
from tokenizer.corpus import load_usable, spread
from tokenizer.files import atomic_folder
from tokenizer.loading import load_codec, load_discrete
from tokenizer.schemes.features import load_semantic_teacher
from tokenizer.training.averaging import average_weights
from tokenizer.training.crops import Crops, StepSampler, require_equal_shares
from tokenizer.training.discriminators import Adversary, make_discriminators
from tokenizer.training.distillation import AcousticDistillation, SemanticDistillation, SpeakerDistillation
from tokenizer.training.feature_cache import UnitIds, fill_caches
from tokenizer.training.initialization import initialize_codec, start_from
from tokenizer.training.losses import Balancer, MultiScaleMelLoss, ReconstructionLoss
from tokenizer.training.step import CodecLoss, DistillationLoss, draw_layers, parameter_groups, remember_statistics
from tokenizer.training.teachers import SpeakerTeacher
from tokenizer.training.validation import BestWeights, validate_codec

Distillations = dict[str, DistillationLoss]  # by name


def main(config: TokenizerConfig) -> None:
    accelerator = make_accelerator(config.precision)
    require_equal_shares(config.batch_size, accelerator.num_processes)
    utterances = read_corpus(config.data, config.splits)
    held_out = spread(read_corpus(config.data, config.dev_splits), config.dev_utterances) if config.dev_splits else []
    best = BestWeights(config.best) if config.best and config.dev_splits else None
    run = Run(config.output, config, accelerator, free=MAY_CHANGE)
    if run.summary:
        accelerator.print(f"{config.output} is finished: {run.summary}")
        return
    set_seed(config.seed)

    # 1. codec, distillation losses, reconstruction losses
    codec = make_codec(config).to(device := accelerator.device)
    codec.quantizer.decay = config.codebook_decay
    distillations = make_distillations(config, codec.quantizer.dimension, device)
    criterion = make_criterion(config, distillations, device)
    adversary = criterion.adversary
    loss_of = CodecLoss(codec, criterion, [*distillations.values()]).to(device)
    groups = parameter_groups(loss_of, config.weight_decay)
    optimizer = optim.AdamW(groups, config.learning_rate, tuple(config.betas), fused=True)
    averaged = average_weights(codec, config.weight_average)

    # 2. resume a killed run, or go on with a trained codec
    parts = Parts(loss=loss_of, optimizer=optimizer)
    optional = {"averaged": averaged, "adversary": adversary, "balancer": criterion.balancer, "best": best}
    parts |= {name: part for name, part in optional.items() if part is not None}
    loop = TrainingLoop(run, parts, "tokenizer", steps=config.steps, seed=config.seed, save_every=config.save_every)
    if config.start and not loop.done:
        start_from(codec, load_codec(config.start))

    # 3. data, with whose first crops a new codec begins: its codebooks, and perhaps its body
    teachers = {name: one.teacher for name, one in distillations.items()}
    teachers |= {} if codec.units is None else {"units": UnitIds(codec.units)}
    folders = {name: getattr(config, name).cache for name in teachers}
    caches = fill_caches(folders, teachers, utterances, config.codec.sample_rate, accelerator)
    crops = Crops(utterances, config.crop_s, config.codec.sample_rate, config.seed, caches, run.skipped)
    dev = {u.id: x for u, x in load_usable(held_out if run.main else [], config.codec.sample_rate, run.skipped)}
    accelerator.print(plan(config, codec, utterances))

    if not (config.start or loop.done):
        initialize_codec(codec, crops, config.batch_size, config.seed, config.linear_start)

    # 4. train. The discriminators have an optimizer of their own, and average their gradients themselves
    forward, optimizer = accelerator.prepare(loss_of, optimizer)
    place = accelerator.process_index, accelerator.num_processes
    sampler = StepSampler(config.batch_size, loop.done, config.steps, *place)
    workers = {"num_workers": config.num_workers, "persistent_workers": config.num_workers > 0}
    loader = DataLoader(crops, batch_sampler=sampler, worker_init_fn=follow_parent, **workers)
    window = None if config.decode_s is None else round(config.decode_s * codec.frame_rate)
    loss_of.train()
    for step, batch in zip(loop, loader, strict=True):
        set_learning_rate(optimizer, factor := warmup_cosine(step, config.steps, config.warmup))
        if adversary:
            set_learning_rate(adversary.optimizer, factor)
            criterion.adversary = adversary if step >= config.adversary.start else None
        optimizer.zero_grad()
        batch = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
        restore = remember_statistics(loss_of, balancer=criterion.balancer)
        num_layers = draw_layers(config.quantizer_dropout, len(batch["length"]), device)
        logging = loop.due(config.log_every)
        loss, metrics = forward(batch, num_layers, window, shares=logging)
        accelerator.backward(loss)
        metrics |= loss_of.caps.update()
        # of the codec only: AdamW's updates of a student do not depend on the scale of its gradient
        metrics["gradient_norm"] = norm = nn.utils.clip_grad_norm_(codec.parameters(), config.clip or math.inf)
        own = nn.utils.get_total_norm([p.grad for p in loss_of.students.parameters() if p.grad is not None])
        names = functools.partial(named, batch["utterance"], utterances)
        if loop.skips(norm, own, *metrics.values(), recordings=names):
            restore()
        else:
            optimizer.step()
            if averaged:
                averaged.update_parameters(codec)
            if logging:
                loop.log(**{name: float(value) for name, value in metrics.items()})

        # 5. validate, and keep the best weights
        if config.dev_splits and loop.due(config.validate_every):
            if dev:
                evaluated = averaged.module if averaged else codec
                found = report(run, loop.done, evaluated, criterion.mel, [*distillations.values()], dev)
                if best:
                    best.record(loop.done, found, evaluated)
                    if best.validations_without_improvement == config.patience:
                        accelerator.set_trigger()
            if accelerator.check_trigger():
                accelerator.print(f"no better {config.best} in {config.patience} validations: training stops")
                break

    # 6. export
    codec = (averaged.module if averaged else codec).eval()
    if run.main:
        if best:
            best.load_into(codec)
        with atomic_folder(run.folder / "model") as folder:
            codec.save_pretrained(folder)
        summary = {"steps": loop.done, "fingerprint": codec.fingerprint, **loop.figures}
        if best and best.weights:
            summary |= {"best_step": best.step, f"best_dev_{best.figure}": best.score}
        if not dev:  # otherwise the last validation has written the report
            write_training_report(run, summary)
        run.finish(summary)
        print(f"codec {codec.fingerprint} saved in {run.folder / 'model'}")
    accelerator.wait_for_everyone()


def plan(config: TokenizerConfig, codec: SpeechCodec, utterances: list[Utterance]) -> str:
    """What the training will do, in one line."""
    hours, millions = sum(u.duration_s for u in utterances) / 3600, sum(p.numel() for p in codec.parameters()) / 1e6
    read = config.steps * config.batch_size * config.crop_s / 3600
    return (
        f"tokenizer: {millions:.1f} M parameters, {config.steps} steps of {config.batch_size} x {config.crop_s:g} s: "
        f"{read:.1f} h of speech, {read / max(hours, 1e-9):.1f} passes over {hours:.2f} h"
    )


def named(numbers: Tensor, utterances: list[Utterance]) -> list[str]:
    """The recordings of a batch, by their numbers long [B]."""
    return [utterances[number].path for number in numbers.tolist()]


def make_codec(config: TokenizerConfig) -> SpeechCodec:
    """The codec with random weights, and with its units if layer 0 is given."""
    return SpeechCodec(config.codec, load_discrete(name) if (name := config.units.tokenizer) else None)


def make_distillations(config: TokenizerConfig, dimension: int, device: torch.device) -> Distillations:
    """The configured distillation losses by name: "semantic" on layer 0 (eq. 4), "acoustic" on layer 1 (eq. 5).

    dimension: of the layers.
    """
    distillations = {}
    if (semantic := config.semantic).teacher:
        teacher = load_semantic_teacher(semantic.teacher, semantic.layer).to(device)
        student = SemanticDistillation(dimension, teacher.width, semantic.center, semantic.axis).to(device)
        distillations["semantic"] = DistillationLoss(
            "semantic", 0, teacher, student, gradient_ratio=semantic.gradient_ratio, weight=semantic.weight
        )
    if (acoustic := config.acoustic).teacher:
        teacher = SpeakerTeacher.from_pretrained(acoustic.teacher).to(device)
        if acoustic.target == "frames":
            student = AcousticDistillation(dimension, teacher.width).to(device)
        else:
            student = SpeakerDistillation(dimension, teacher.embedding_size, teacher.pool).to(device)
        distillations["acoustic"] = DistillationLoss(
            "acoustic", 1, teacher, student, gradient_ratio=acoustic.gradient_ratio, weight=acoustic.weight
        )
    return distillations


def make_criterion(config: TokenizerConfig, distillations: Distillations, device: torch.device) -> ReconstructionLoss:
    """The losses of the reconstruction, with discriminators and the semantic teacher's features if configured."""
    losses, adversary = config.losses, None
    if losses.adversarial or losses.feature_matching:
        chosen = config.adversary
        networks = make_discriminators(chosen.stft_filters, chosen.period_channels, chosen.scale_channels).to(device)
        betas = tuple(chosen.betas)
        adversary = Adversary(networks, chosen.kind, chosen.learning_rate, betas, chosen.relative_features)
    names = ("time", "mel", "adversarial", "feature_matching", "speech_features", "commitment")
    weights = {name: getattr(losses, name) for name in names}
    scales = losses.mel_windows, losses.mel_bands, losses.mel_weights, losses.mel_squared, losses.mel_power
    mel = MultiScaleMelLoss(config.codec.sample_rate, *scales).to(device)
    feature_model = distillations["semantic"].teacher if losses.speech_features else None
    balancer = Balancer(weights) if losses.balance else None
    return ReconstructionLoss(weights, mel, adversary, feature_model, balancer)


def report(
    run: Run, step: int, codec: SpeechCodec, mel: nn.Module, losses: list[DistillationLoss], dev: dict[str, Tensor]
) -> dict[str, float]:
    """Validate, and write samples and the report with metrics, curves, spectrograms and sounds into the run folder.

    Returns what was measured.
    """
    validation = validate_codec(codec, dev.values(), mel, losses)
    run.log(step, **validation.metrics)
    save_sounds(run.folder / "samples", sounds := Reconstruction.of(codec, *next(iter(dev.items()))))
    write_codec_report(
        run.folder / "report.html",
        title=f"{run.folder.name}: tokenizer after {step} steps",
        metrics=validation.metrics,
        log=read_log(run.folder),
        codebook_counts=list(validation.counts),
        reconstruction=sounds,
        provenance=run.provenance,
    )
    return validation.metrics


if __name__ == "__main__":
    run_recipe(main, CONFIG)
