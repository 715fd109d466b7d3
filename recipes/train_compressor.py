"""Train a compressor: a CTC network that turns the frames of a tokenizer into about one vector per letter.

    python recipes/train_compressor.py --config configs/published/compressor.yaml codes=CODES codec=TOKENIZER output=RUN
    speechllm run train_compressor --processes 8 ...        on 8 GPUs

CODES is what recipes/encode_speech.py wrote with TOKENIZER: features of an encoder, units, or codes of a codec. The
network learns the letters of the transcripts; RUN/model is an audio tokenizer of its own, with TOKENIZER inside, whose
vectors a language model reads like any features, stack=N of them a token. RUN/codes is CODES, all splits of it,
encoded by RUN/model; of several folders, "codes=[A, B]", they are RUN/codes/A and RUN/codes/B. A killed run, started
again with the same command, resumes from its newest checkpoint and ends as if it had not been interrupted.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from speechllm.runs.config import parse_config
from tokenizer.settings import Corpus, Count, Names, Natural, Positive, Seed, Settings, Share


@dataclass
class CompressorConfig(Settings):
    codes: Corpus  # folder of encode_speech, or several as [A, B]
    codec: str  # the audio tokenizer that made them, as `load_tokenizer` takes it
    output: str  # run folder; the compressor goes to its subfolder `model`
    layers: Count | None = None  # codebooks to read; all that the codes have when null
    splits: Names | None = None  # training splits, all when null
    dev_splits: Names | None = None  # for the WER of its letters, none when null
    normalizer: Literal["librispeech", "whisper_english", "none"] = "librispeech"  # of the transcripts
    max_utterances: Count | None = None  # of the training splits, evenly chosen; all when null
    start: str | None = None  # a compressor of the same codec and sizes, to train on; null: a new one
    width: Count = 256
    depth: Count = 2  # convolutions
    dropout: Share = 0.1
    mask_s: Natural = 1  # seconds at most that are masked in each utterance, in two spans
    steps: Count = 4000
    batch_size: Count = 24  # utterances per step, over all processes
    max_duration_s: Positive = 20.0  # longer utterances are left out of the training
    learning_rate: Positive = 1e-3
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
    CONFIG = parse_config(CompressorConfig, shares_work=True)

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torchaudio.transforms import TimeMasking

from speechllm import DataError, Encoding, load_codes, load_tokenizer, speech_of, word_error_rate
from speechllm.data.batches import endless_batches
from speechllm.data.encoded import EncodedSpeech, require_texts, transcribed
from speechllm.data.recoding import export_recoder
from speechllm.reports.pages import finish_training
from speechllm.runs.loop import Parts, TrainingLoop
from speechllm.runs.machine import make_accelerator
from speechllm.runs.recipe import run_recipe
from speechllm.runs.run import MAY_CHANGE, Run
from speechllm.training.schedule import set_learning_rate, warmup_cosine
from tokenizer.corpus import spread
from tokenizer.prefetch import prefetch
from tokenizer.schemes.compressor import BLANK, CtcCompressor
from tokenizer.training.distributed import mean_over_processes
from tokenizer.utterances import spell_corpora

READ_AHEAD = 4  # batches
Batch = tuple[Tensor, ...]  # what `CtcLoss` takes


def main(config: CompressorConfig) -> None:
    accelerator = make_accelerator(config.precision)

    # 1. encoded speech, its tokenizer, and the letters of the transcripts
    require_texts(config.codes, config.normalizer)
    train, encoding = load_codes(config.codes, config.splits)
    train = transcribed(train, normalizer=config.normalizer)
    short = [i for i, s in enumerate(train["duration_s"]) if s <= config.max_duration_s]
    train = train.select(spread(short, config.max_utterances))
    if not len(train):
        source = spell_corpora(config.codes)
        raise DataError(f"{source}: no utterance of up to {config.max_duration_s:g} s has a transcript")
    dev = load_codes(config.codes, config.dev_splits)[0] if config.dev_splits else None
    dev = transcribed(dev, config.dev_utterances, config.normalizer) if dev is not None else []
    base = load_tokenizer(config.codec)
    encoding.require(base.fingerprint, config.codec)
    if config.layers and config.layers > encoding.layers:
        raise DataError(
            f"{spell_corpora(config.codes)} holds {encoding.layers} layers of codes, fewer than layers={config.layers}"
        )
    run = Run(config.output, config, accelerator, free=MAY_CHANGE)
    if run.summary:
        accelerator.print(f"{config.output} is finished: {run.summary}")
        return
    set_seed(config.seed)
    letters = sorted(set("".join(train["text"])))
    sizes = config.width, config.depth, config.dropout, config.layers or encoding.layers
    if config.start:
        compressor = CtcCompressor.from_trained(load_tokenizer(config.start), base, letters, *sizes)
    else:
        compressor = CtcCompressor(base, ["", *letters], *sizes)
    network = compressor.to(accelerator.device).network
    hours, millions = sum(train["duration_s"]) / 3600, sum(p.numel() for p in network.parameters()) / 1e6
    passes = config.steps * config.batch_size / len(train)
    accelerator.print(
        f"compressor: {millions:.1f} M parameters, {len(compressor.labels) - 1} letters; {config.steps} steps of "
        f"{config.batch_size} utterances, {passes:.1f} passes over {hours:.2f} h"
    )

    # 2. train, from the newest checkpoint on
    optimizer = torch.optim.AdamW(network.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    loop = TrainingLoop(
        run,
        Parts(network=network, optimizer=optimizer),
        "compressor",
        steps=config.steps,
        seed=config.seed,
        save_every=config.save_every,
        labels=compressor.labels,
        keep_last=True,  # or a kill while it compresses trains again, perhaps to other bits
    )
    loss_of = accelerator.prepare(CtcLoss(network, round(config.mask_s * base.frame_rate)))
    batches = read_batches(train, encoding, compressor, config, loop.done, accelerator)
    loss_of.train()
    for step in loop:
        set_learning_rate(optimizer, warmup_cosine(step, config.steps, config.warmup))
        chosen, batch = next(batches)
        loss = loss_of(*(tensor.to(accelerator.device) for tensor in batch))
        optimizer.zero_grad()
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(network.parameters(), config.clip)
        if not loop.skips(loss, norm, recordings=lambda chosen=chosen: [train["id"][i] for i in chosen]):
            optimizer.step()
            if loop.due(config.log_every):
                loop.log(loss=mean_over_processes(loss.detach()).item())
        if len(dev) and loop.due(config.validate_every) and run.main:
            run.log(loop.done, dev_wer=letters_wer(compressor.eval(), dev, encoding, config.normalizer))
            compressor.train()

    # 3. export, and compress the speech; each process its share
    compressor = export_recoder(compressor, config.codes, run.folder, accelerator)
    if run.main:
        scores = {"dev_wer": letters_wer(compressor, dev, encoding, config.normalizer)} if len(dev) else {}
        finish_training(run, {"steps": config.steps, **loop.figures, **scores, "fingerprint": compressor.fingerprint})
        print(f"compressor saved in {run.folder / 'model'} {scores}")
    accelerator.wait_for_everyone()


class CtcLoss(nn.Module):
    """The CTC loss of a batch per letter; in training two spans of every utterance are masked, as in SpecAugment.

    Several processes average the means over their own letters, which is nearly the mean over all.
    mask: frames of a span at most.
    """

    def __init__(self, network: nn.Module, mask: int):
        super().__init__()
        self.network = network
        self.mask = TimeMasking(mask, iid_masks=True) if mask else nn.Identity()

    def forward(self, frames: Tensor, lengths: Tensor, labels: Tensor, sizes: Tensor) -> Tensor:
        """frames: float [B, T, C] with lengths long [B]; labels: long [B, S] with sizes long [B]."""
        if self.training:
            frames = self.mask(self.mask(frames[:, None].transpose(2, 3)))[:, 0].transpose(1, 2)
        _, scores = self.network(frames, lengths)
        losses = F.ctc_loss(
            scores.transpose(0, 1), labels, lengths, sizes, blank=BLANK, reduction="sum", zero_infinity=True
        )
        return losses / sizes.sum()


def read_batches(
    train: EncodedSpeech,
    encoding: Encoding,
    compressor: CtcCompressor,
    config: CompressorConfig,
    start: int,
    accelerator: Accelerator,
) -> Iterator[tuple[list[int], Batch]]:
    """Endless batches from step `start` on, and the numbers of their utterances; each process gets its share."""
    labels = {label: number for number, label in enumerate(compressor.labels)}
    orders = endless_batches(train["duration_s"], config.batch_size, config.seed, start)
    process, processes = accelerator.process_index, accelerator.num_processes

    def read(order: list[int]) -> tuple[list[int], Batch]:
        chosen = list(order[process::processes]) or list(order[:1])
        rows = [train[int(i)] for i in chosen]
        frames = [compressor.frames(speech_of(row, encoding)) for row in rows]
        targets = [torch.tensor([labels[letter] for letter in row["text"]]) for row in rows]
        sizes = [torch.tensor([len(x) for x in one]) for one in (frames, targets)]
        padded = [nn.utils.rnn.pad_sequence(one, batch_first=True) for one in (frames, targets)]
        return chosen, (padded[0], sizes[0], padded[1], sizes[1])

    yield from prefetch(read, (order.tolist() for order in orders), READ_AHEAD)


@torch.no_grad()
def letters_wer(compressor: CtcCompressor, dev: EncodedSpeech, encoding: Encoding, normalizer: str) -> float:
    """WER of what the letters spell, without any language model."""
    texts = []
    for row in dev:
        _, scores = compressor.label_speech(speech_of(row, encoding))
        texts.append(compressor.text(scores))
    return word_error_rate(dev["text"], texts, normalizer).wer


if __name__ == "__main__":
    run_recipe(main, CONFIG)
