"""Train a RepCodec: codes of an encoder's frames that are learnt by giving the frames back (arXiv 2309.00169).

    python recipes/train_repcodec.py --config configs/published/repcodec.yaml codes=FRAMES codec=ENCODER output=RUN
    speechllm run train_repcodec --processes 8 ...        on 8 GPUs

FRAMES is what recipes/encode_speech.py wrote with ENCODER, such as features:openai/whisper-base. The codebook begins as
k-means of some of the frames (recipes/fit_units.py) and learns from there; the loss is the share of the frames'
variance that the codes lose. RUN/model is an audio tokenizer of its own, with the encoder inside. RUN/codes is FRAMES,
all splits of it, encoded by RUN/model; of several folders, "codes=[A, B]", they are RUN/codes/A and RUN/codes/B. A
killed run, started again with the same command, resumes from its newest checkpoint and ends as if it had not been
interrupted.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from speechllm.runs.config import parse_config
from tokenizer.settings import CodebookSize, Corpus, Count, Names, Natural, Positive, Seed, Settings, Share


@dataclass
class RepCodecConfig(Settings):
    codes: Corpus  # folder of encode_speech, or several as [A, B]
    codec: str  # the audio tokenizer that made them, as `load_tokenizer` takes it
    output: str  # run folder; the tokenizer goes to its subfolder `model`
    splits: Names | None = None  # training splits, all when null
    dev_splits: Names | None = None  # for the share of the variance that is lost, none when null
    num_codebooks: Count = 1  # each codes what those before it leave
    codebook_size: CodebookSize = 1024
    codebook_decay: Share = 0.99  # of the moving averages that codes follow, per step
    depth: Count = 2  # ConvNeXt blocks on either side of the codebooks
    commitment: Positive = 1.0  # weight of the latents' distance to their codes; small, they run away from them
    crop_s: Positive = 2.0  # seconds of each utterance in a step
    steps: Count = 4000
    batch_size: Count = 16  # utterances per step, over all processes
    learning_rate: Positive = 5e-4
    weight_decay: Positive = 1e-2
    warmup: Natural = 200  # steps
    clip: Positive = 1.0  # largest gradient norm
    precision: Literal["no", "bf16"] = "no"
    validate_every: Count = 500  # steps
    dev_utterances: Count = 100  # at most, evenly chosen
    log_every: Count = 10  # steps
    save_every: Count = 500  # steps between checkpoints
    seed: Seed = 0


if __name__ == "__main__":  # help and mistakes are answered before torch is loaded
    CONFIG = parse_config(RepCodecConfig, shares_work=True)

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from speechllm import DataError, Encoding, load_codes, load_tokenizer, speech_of
from speechllm.data.batches import endless_batches
from speechllm.data.encoded import EncodedSpeech
from speechllm.data.recoding import export_recoder
from speechllm.reports.pages import finish_training
from speechllm.runs.loop import Parts, TrainingLoop
from speechllm.runs.machine import make_accelerator
from speechllm.runs.recipe import run_recipe
from speechllm.runs.run import MAY_CHANGE, Run
from speechllm.training.schedule import set_learning_rate, warmup_cosine
from tokenizer.corpus import spread
from tokenizer.prefetch import prefetch
from tokenizer.schemes.repcodec import RepCodec
from tokenizer.training.distributed import mean_over_processes
from tokenizer.training.step import parameter_groups, remember_statistics
from tokenizer.utterances import spell_corpora

READ_AHEAD = 4  # batches
FRAMES_PER_CODE = 40  # for k-means
Batch = tuple[Tensor, Tensor]  # frames float [B, T, C] with lengths long [B]


def main(config: RepCodecConfig) -> None:
    accelerator = make_accelerator(config.precision)

    # 1. encoded speech and its tokenizer
    train, encoding = load_codes(config.codes, config.splits)
    if not len(train):
        raise DataError(f"{spell_corpora(config.codes)} holds no utterance to train on")
    dev = load_codes(config.codes, config.dev_splits)[0] if config.dev_splits else []
    dev = dev.select(spread(range(len(dev)), config.dev_utterances)) if len(dev) else []
    base = load_tokenizer(config.codec)
    encoding.require(base.fingerprint, config.codec)
    set_seed(config.seed)
    repcodec = RepCodec(base, config.depth, config.num_codebooks, config.codebook_size)
    run = Run(config.output, config, accelerator, free=MAY_CHANGE)
    if run.summary:
        accelerator.print(f"{config.output} is finished: {run.summary}")
        return
    network = repcodec.to(accelerator.device).network
    network.quantizer.decay = config.codebook_decay
    crop = max(1, round(config.crop_s * base.frame_rate))
    hours, millions = sum(train["duration_s"]) / 3600, sum(p.numel() for p in network.parameters()) / 1e6
    accelerator.print(
        f"RepCodec: {millions:.1f} M parameters; {config.steps} steps of {config.batch_size} crops of {crop} frames, "
        f"{config.steps * config.batch_size / len(train):.1f} from each utterance of {hours:.2f} h"
    )

    # 2. train, from k-means or the newest checkpoint on
    optimizer = torch.optim.AdamW(parameter_groups(network, config.weight_decay), config.learning_rate)
    loop = TrainingLoop(
        run,
        Parts(network=network, optimizer=optimizer),
        "RepCodec",
        steps=config.steps,
        seed=config.seed,
        save_every=config.save_every,
        keep_last=True,  # or a kill while it encodes trains again, perhaps to other bits
    )
    if not loop.done:
        begin(repcodec, train, encoding, config, run.main)
    losses_of = accelerator.prepare(network)
    batches = read_batches(train, encoding, crop, config, loop.done, accelerator)
    losses_of.train()
    for step in loop:
        set_learning_rate(optimizer, warmup_cosine(step, config.steps, config.warmup))
        chosen, batch = next(batches)
        restore = remember_statistics(network)
        lost, commitment = losses_of(*(tensor.to(accelerator.device) for tensor in batch))
        loss = lost + config.commitment * commitment
        optimizer.zero_grad()
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(network.parameters(), config.clip)
        if loop.skips(loss, norm, recordings=lambda chosen=chosen: [train["id"][i] for i in chosen]):
            restore()
        else:
            optimizer.step()
            if loop.due(config.log_every):
                lost, commitment = mean_over_processes(torch.stack([lost, commitment]).detach()).tolist()
                loop.log(lost=lost, commitment=commitment)
        if len(dev) and loop.due(config.validate_every) and run.main:
            run.log(loop.done, dev_lost=lost_share(repcodec.eval(), dev, encoding))
            repcodec.train()

    # 3. export, and encode the speech; each process its share
    repcodec = export_recoder(repcodec, config.codes, run.folder, accelerator)
    if run.main:
        scores = {"dev_lost": lost_share(repcodec, dev, encoding)} if len(dev) else {}
        finish_training(run, {"steps": config.steps, **loop.figures, **scores, "fingerprint": repcodec.fingerprint})
        print(f"RepCodec saved in {run.folder / 'model'} {scores}")
    accelerator.wait_for_everyone()


def begin(repcodec: RepCodec, train: EncodedSpeech, encoding: Encoding, config: RepCodecConfig, main: bool) -> None:
    """Begin the codebooks by k-means of the frames of utterances in random order."""
    wanted, found = FRAMES_PER_CODE * config.codebook_size, [torch.empty(0, repcodec.base.width)]
    for index in np.random.default_rng(config.seed).permutation(len(train)):
        found.append(speech_of(train[int(index)], encoding)[:wanted].float())
        wanted -= len(found[-1])
        if not wanted:
            break
    frames = torch.cat(found)
    if len(frames) < 20 * config.codebook_size:
        raise DataError(
            f"{spell_corpora(config.codes)}: {len(frames)} frames cannot make codebook_size={config.codebook_size} "
            f"codes: give at most {len(frames) // 20}, or more speech"
        )
    repcodec.network.begin(frames.to(repcodec.device), config.seed, main)


def read_batches(
    train: EncodedSpeech, encoding: Encoding, crop: int, config: RepCodecConfig, start: int, accelerator: Accelerator
) -> Iterator[tuple[list[int], Batch]]:
    """Endless batches from step `start` on, and the numbers of their utterances; each process gets its share."""
    orders = endless_batches(train["duration_s"], config.batch_size, config.seed, start)
    process, processes = accelerator.process_index, accelerator.num_processes

    def read(numbered: tuple[int, np.ndarray]) -> tuple[list[int], Batch]:
        step, order = numbered
        places = np.random.default_rng((config.seed, step)).random(len(order))  # where crops begin, of the room
        chosen = list(range(len(order)))[process::processes] or [0]
        crops = []
        for i in chosen:
            frames = speech_of(train[int(order[i])], encoding).float()
            first = int(places[i] * (max(0, len(frames) - crop) + 1))
            crops.append(frames[first : first + crop])
        lengths = torch.tensor([len(frames) for frames in crops])
        return [int(order[i]) for i in chosen], (nn.utils.rnn.pad_sequence(crops, batch_first=True), lengths)

    yield from prefetch(read, enumerate(orders, start), READ_AHEAD)


def lost_share(repcodec: RepCodec, dev: Sequence[dict], encoding: Encoding) -> float:
    """The share of the variance of whole utterances that their codes lose; more than 1 is worse than the mean."""
    errors = frames = 0.0
    for row in dev:
        spoken = speech_of(row, encoding).float()
        errors += float((repcodec.reconstruct(repcodec.recode(spoken)) - spoken).square().sum())
        frames += len(spoken)
    return errors / (frames * repcodec.base.width * float(repcodec.network.scale) ** 2)


if __name__ == "__main__":
    run_recipe(main, CONFIG)
