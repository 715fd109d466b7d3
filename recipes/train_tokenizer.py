"""Train the speech tokenizer: reconstruct speech, layer 0 taught content (eq. 4), layer 1 taught voice (eq. 5).

    accelerate launch recipes/train_tokenizer.py --config configs/tokenizer/paper.yaml data=LIBRISPEECH output=RUN

A killed run started again with the same words goes on from its newest checkpoint and ends as if never interrupted.
The codec lands in RUN/model; RUN also holds the configuration, log.jsonl, checkpoints and audio samples.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader

from speechllm import (
    AcousticDistillation,
    Crops,
    Lesson,
    MultiScaleMelLoss,
    ReconstructionLoss,
    Run,
    SemanticDistillation,
    SemanticTeacher,
    SpeakerTeacher,
    SpeechCodec,
    SpeechCodecConfig,
    StepSampler,
    Utterance,
    average_gradients,
    codebook_usage,
    codec_backward,
    draw_layers,
    initialize_codebooks,
    load_audio,
    make_accelerator,
    read_corpus,
    run_recipe,
    save_audio,
    seed_step,
    set_learning_rate,
    warmup_cosine,
    whole_folder,
)


@dataclass
class SemanticConfig:
    teacher: str | None = "facebook/hubert-base-ls960"  # folder or hub name; null: no distillation
    layer: int | Literal["avg"] = "avg"  # hidden state, or the mean of all
    weight: float = 0.5  # lambda_s of eq. 7
    center: bool = True  # compare time courses without their mean; false is the paper's literal form
    gradient_cap: float | None = None  # largest ratio of its gradient to the reconstruction's at z0; null: no limit


@dataclass
class AcousticConfig:
    teacher: str | None = "speechbrain/spkrec-ecapa-voxceleb"  # folder or hub name; null: no distillation
    weight: float = 0.5  # lambda_a of eq. 7
    gradient_cap: float | None = 0.2  # above about 1 the voice displaces the content of layer 0; null: no limit


@dataclass
class TokenizerConfig:
    data: str  # corpus folder: manifest.jsonl or LibriSpeech's layout
    output: str  # run folder; the codec goes to its subfolder `model`
    splits: list[str] | None = None  # training splits, all when null
    dev_splits: list[str] | None = None  # for validation, none when null
    codec: SpeechCodecConfig = field(default_factory=SpeechCodecConfig)
    semantic: SemanticConfig = field(default_factory=SemanticConfig)
    acoustic: AcousticConfig = field(default_factory=AcousticConfig)
    time_weight: float = 0.1  # L1 of the waveform
    mel_weight: float = 1.0  # multi-scale log-mel
    commitment_weight: float = 1.0
    quantizer_dropout: list[int] | None = None  # codebooks to decode from, drawn per utterance; all when null
    codebook_decay: float = 0.99  # of the codebooks' moving averages; with hundreds of steps they lag behind at 0.99
    steps: int = 200_000
    batch_size: int = 32  # crops over all processes
    crop_s: float = 3.0  # seconds per crop
    decode_s: float | None = None  # decode a random window of the crop only; all of it when null
    learning_rate: float = 1e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])  # of AdamW
    weight_decay: float = 0.01
    warmup: int = 1000  # steps
    clip: float = 1.0  # largest gradient norm
    precision: Literal["no", "bf16"] = "no"
    log_every: int = 10  # steps
    validate_every: int = 2000  # steps
    save_every: int = 2000  # steps between checkpoints
    num_workers: int = 2  # data loading processes, per training process
    seed: int = 0

    def __post_init__(self) -> None:
        problems = []
        if min(self.steps, self.batch_size, self.warmup, self.log_every, self.validate_every, self.save_every) < 1:
            problems.append("steps, batch_size, warmup, log_every, validate_every and save_every must be at least 1")
        if not 0 <= self.codebook_decay < 1:
            problems.append(f"codebook_decay must be at least 0 and below 1, got {self.codebook_decay}")
        if self.decode_s is not None and not 0.08 <= self.decode_s <= self.crop_s:
            problems.append(f"decode_s must be between 0.08 and crop_s = {self.crop_s}, got {self.decode_s}")
        if self.acoustic.teacher and self.codec.num_codebooks < 2:
            problems.append("acoustic distillation teaches layer 1: codec.num_codebooks must be at least 2")
        if self.quantizer_dropout and not all(1 <= n <= self.codec.num_codebooks for n in self.quantizer_dropout):
            problems.append(f"quantizer_dropout: numbers from 1 to codec.num_codebooks = {self.codec.num_codebooks}")
        if problems:
            raise ValueError("; ".join(problems))


def main(config: TokenizerConfig) -> None:
    accelerator = make_accelerator(config.precision)
    utterances = read_corpus(config.data, config.splits)
    run = Run(config.output, config, accelerator)
    if run.summary:
        accelerator.print(f"{config.output} is finished: {run.summary}")
        return
    set_seed(config.seed)
    device = accelerator.device

    # 1. the speech, the codec and what teaches it
    dev = read_corpus(config.data, config.dev_splits)[::7][:16] if config.dev_splits else []
    crops = Crops(utterances, config.crop_s, config.codec.sample_rate, config.seed)
    codec = SpeechCodec(config.codec).to(device)
    codec.quantizer.decay = config.codebook_decay
    mel_loss = MultiScaleMelLoss(codec.sample_rate).to(device)
    criterion = ReconstructionLoss(mel_loss, config.time_weight, config.mel_weight, config.commitment_weight)
    lessons = make_lessons(config, codec, device)
    students = nn.ModuleList(lesson.student for lesson in lessons)
    parameters = [*codec.parameters(), *students.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, config.learning_rate, betas=tuple(config.betas), weight_decay=config.weight_decay
    )
    accelerator.print(plan(config, utterances, codec))

    # 2. go on where a killed run stopped, or place the codebooks where the encoder's latents are
    start = 0
    if state := run.resume():
        codec.load_state_dict(state["codec"])
        students.load_state_dict(state["students"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    else:
        initialize_codebooks(codec, crops, config.batch_size, config.seed)

    # 3. train. Gradients meet at the latents z0, where the auxiliary ones are weighed against the reconstruction's;
    # processes therefore average gradients here instead of inside a wrapper that expects one backward pass
    sampler = StepSampler(config.batch_size, start, config.steps, accelerator.process_index, accelerator.num_processes)
    loader = DataLoader(
        crops, batch_sampler=sampler, num_workers=config.num_workers, persistent_workers=config.num_workers > 0
    )
    window = None if config.decode_s is None else round(config.decode_s * codec.frame_rate)
    codec.train()
    bar = run.steps(start, config.steps, "tokenizer")
    for step, batch in zip(bar, loader, strict=True):
        seed_step(config.seed, step, accelerator.process_index)
        set_learning_rate(optimizer, warmup_cosine(step, config.steps, config.warmup))
        optimizer.zero_grad()
        waveform, length = batch["waveform"].to(device), batch["length"].to(device)
        num_layers = draw_layers(config.quantizer_dropout, len(waveform), device)
        with accelerator.autocast():
            metrics = codec_backward(codec, waveform, length, criterion, lessons, num_layers, window)
        average_gradients(parameters)
        metrics["gradient_norm"] = float(nn.utils.clip_grad_norm_(parameters, config.clip))
        optimizer.step()

        # 4. say how it goes, and leave a place to resume from
        done = step + 1
        if done % config.log_every == 0 or done == config.steps:
            run.log(done, **metrics)
            bar.set_postfix({name: f"{metrics[name]:.3f}" for name in ("mel", "semantic") if name in metrics})
        if dev and (done % config.validate_every == 0 or done == config.steps) and run.main:
            run.log(done, **validate(codec, mel_loss, dev))
        if done % config.save_every == 0 and done < config.steps:
            state = {"codec": codec.state_dict(), "students": students.state_dict()}
            run.save(done, {**state, "optimizer": optimizer.state_dict()})

    # 5. export
    codec.eval()
    if run.main:
        with whole_folder(run.folder / "model") as folder:
            codec.save_pretrained(folder)
        for utterance in dev[:3]:
            write_samples(codec, utterance, run.folder / "samples")
        run.finish({"steps": config.steps, "fingerprint": codec.fingerprint, **metrics})
        print(f"codec {codec.fingerprint} saved in {run.folder / 'model'}")
    accelerator.wait_for_everyone()


def make_lessons(config: TokenizerConfig, codec: SpeechCodec, device: torch.device) -> list[Lesson]:
    """The lessons the configuration asks for: content for layer 0, voice for layer 1."""
    lessons = []
    dimension = codec.config.dimension
    if (semantic := config.semantic).teacher:
        teacher = SemanticTeacher.from_pretrained(semantic.teacher, semantic.layer)
        student = SemanticDistillation(dimension, teacher.width, semantic.center)
        lessons.append(Lesson("semantic", 0, teacher, student, semantic.weight, semantic.gradient_cap))
    if (acoustic := config.acoustic).teacher:
        teacher = SpeakerTeacher.from_pretrained(acoustic.teacher)
        student = AcousticDistillation(dimension, teacher.width)
        lessons.append(Lesson("acoustic", 1, teacher, student, acoustic.weight, acoustic.gradient_cap))
    for lesson in lessons:
        lesson.teacher.to(device)
        lesson.student.to(device)
    return lessons


@torch.no_grad()
def validate(codec: SpeechCodec, mel_loss: MultiScaleMelLoss, dev: list[Utterance]) -> dict[str, float]:
    """Mel distance of reconstructions from all codebooks, and how much of each codebook is in use."""
    codec.eval()
    device = codec.codebooks.device
    distances, ids = [], []
    for utterance in dev:
        waveform = load_audio(utterance.path, codec.sample_rate)[None].to(device)
        waveform = F.pad(waveform, (0, max(0, codec.sample_rate // 4 - waveform.shape[1])))
        codes = codec.encode(waveform)
        distances.append(float(mel_loss(codec.decode(codes), waveform)))
        ids.append(codes.utterance(0))
    codec.train()
    joined = torch.cat(ids, 1).cpu().numpy()
    perplexity = {
        f"dev_perplexity_{layer}": codebook_usage(joined[layer], codec.codebook_size)["perplexity"]
        for layer in range(codec.num_codebooks)
    }
    return {"dev_mel": sum(distances) / len(distances), **perplexity}


@torch.no_grad()
def write_samples(codec: SpeechCodec, utterance: Utterance, folder) -> None:
    """The utterance as it was and from 1, 2, 4, ... codebooks, as WAV files."""
    waveform = load_audio(utterance.path, codec.sample_rate)
    save_audio(folder / f"{utterance.id}_original.wav", waveform, codec.sample_rate)
    codes = codec.encode(waveform[None].to(codec.codebooks.device))
    for layers in sorted({n for n in (1, 2, 4, 8) if n < codec.num_codebooks} | {codec.num_codebooks}):
        audio = codec.decode(codes.first(layers))[0]
        save_audio(folder / f"{utterance.id}_{layers}_codebooks.wav", audio, codec.sample_rate)


def plan(config: TokenizerConfig, utterances: list[Utterance], codec: SpeechCodec) -> str:
    """One line on what is about to happen."""
    hours = sum(u.duration_s for u in utterances) / 3600
    passes = config.steps * config.batch_size * config.crop_s / 3600 / hours
    size = sum(p.numel() for p in codec.parameters()) / 1e6
    return (
        f"tokenizer: {len(utterances)} utterances, {hours:.2f} h, {config.steps} steps of {config.batch_size} x "
        f"{config.crop_s:g} s ({passes:.1f} passes); {size:.1f} M parameters, {config.codec.front_end} front end"
    )


if __name__ == "__main__":
    run_recipe(main, TokenizerConfig)
