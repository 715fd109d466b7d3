"""Train a small teacher in place of a published one.

    python recipes/train_teacher.py --config configs/teacher/semantic_demo.yaml data=FOLDER output=RUN
    speechllm run train_teacher --processes 8 ...    on 8 GPUs

kind: semantic  a HuBERT on raw waveforms, saved as a transformers folder. With objective ctc it is trained on the
                characters of the transcripts and saved with its head (`recognizer:RUN/model` is a tokenizer; see
                configs/teacher/recognizer.yaml), with objective alignment on the phones of recipes/align_speech.py or
                of a synthetic corpus.
kind: speaker   an ECAPA-TDNN on speaker labels, saved as a SpeechBrain folder.
Both are loaded in the same way as facebook/hubert-base-ls960 and speechbrain/spkrec-ecapa-voxceleb.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

from speechllm.runs.config import parse_config
from tokenizer.settings import Corpus, Count, CropLength, Names, Positive, Rule, Seed, Settings

HEAD_RATE = 20  # factor of the learning rate of a new head on a pretrained HuBERT
Width = Annotated[int, Rule("a multiple of 8", lambda n: n > 0 and n % 8 == 0)]  # groups of convolutions
LOG_EVERY = 10  # steps
READ_AHEAD = 4  # batches
WORD_END = "|"  # the space in transformers' CTC vocabularies


@dataclass
class TeacherConfig(Settings):
    kind: Literal["semantic", "speaker"]
    data: Corpus  # corpus folder, or several as [A, B]: manifest.jsonl or LibriSpeech's layout
    output: str  # run folder; the teacher goes to its subfolder `model`
    objective: Literal["ctc", "alignment"] = "ctc"  # of the semantic teacher
    splits: Names | None = None  # training splits, all when null
    dev_splits: Names | None = None  # for the score at the end, none when null
    init: str | None = None  # semantic: HuBERT to start from, folder or hub name; null: a small new one
    hidden_size: Width = 128  # of a new HuBERT: width of the features
    layers: Count = 3  # of a new HuBERT: transformer layers
    channels: Width = 64  # speaker: ECAPA channels; frames have three times as many
    steps: Count = 300
    batch_size: Count = 32  # over all processes
    learning_rate: Positive = 2e-3
    warmup: Count = 30  # steps
    max_duration_s: Positive = 12.0  # longer utterances are left out, but not by a speaker teacher, which reads crops
    crop_s: CropLength = 1.0  # speaker: seconds per example
    save_every: Count = 200  # steps between checkpoints
    seed: Seed = 0

    def contradictions(self) -> Iterable[str]:
        if self.init and self.kind != "semantic":
            yield "init is for kind: semantic; an ECAPA-TDNN is always trained from scratch"


if __name__ == "__main__":  # help and mistakes are answered before torch is loaded
    CONFIG = parse_config(TeacherConfig, shares_work=True)

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from torch import Tensor, nn

from speechllm import AudioError, CorpusError, Utterance, pad_waveforms, read_corpus
from speechllm.data.batches import endless_batches
from speechllm.reports.pages import finish_training
from speechllm.runs.loop import Parts, TrainingLoop
from speechllm.runs.machine import make_accelerator
from speechllm.runs.recipe import run_recipe
from speechllm.runs.run import MAY_CHANGE, Run
from speechllm.training.schedule import set_learning_rate, warmup_cosine
from tokenizer.corpus import as_skip, keep_usable, load_usable, spread, try_load
from tokenizer.errors import InputError
from tokenizer.files import atomic_folder
from tokenizer.frames import frame_count
from tokenizer.prefetch import prefetch
from tokenizer.training.crops import Crops
from tokenizer.training.small_teachers import FrameClassifier, save_ecapa, save_hubert, save_recognizer, small_hubert
from tokenizer.training.step import remember_statistics
from tokenizer.training.teachers import SemanticTeacher, WhisperTeacher
from tokenizer.utterances import frame_phones, spell_corpora

Batch = tuple[list[Utterance], tuple[Tensor, ...]]  # and what the student's `forward` takes


def main(config: TeacherConfig) -> None:
    accelerator = make_accelerator()
    corpus = read_corpus(config.data, config.splits)
    held_out = read_corpus(config.data, config.dev_splits) if config.dev_splits else []
    utterances, dev = (short_enough(split, config) for split in (corpus, held_out))
    longer = len(corpus) + len(held_out) - len(utterances) - len(dev)
    dev = spread(dev, 8 * config.batch_size)
    run = Run(config.output, config, accelerator, free=MAY_CHANGE)
    if run.summary:
        accelerator.print(f"{config.output} is finished: {run.summary}")
        return
    set_seed(config.seed)

    # 1. the model and its batches
    student_class = SemanticStudent if config.kind == "semantic" else SpeakerStudent
    student = student_class(config, utterances, run.skipped)
    accelerator.print(
        f"{config.kind} teacher: {len(student.utterances)} utterances, {config.steps} steps, "
        f"{sum(p.numel() for p in student.parameters()) / 1e6:.1f} M parameters"
    )
    if longer:
        accelerator.print(f"left out: {longer} utterances are longer than max_duration_s = {config.max_duration_s:g}")
    model = accelerator.prepare(student)
    parameters = student.groups() if config.init else student.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate)

    # 2. train, from the newest checkpoint on
    loop = TrainingLoop(
        run,
        Parts(model=student, optimizer=optimizer),
        f"{config.kind} teacher",
        steps=config.steps,
        seed=config.seed,
        save_every=config.save_every,
        labels=student.labels,
    )
    batches = student.batches(loop.done, accelerator.process_index, accelerator.num_processes)
    for step in loop:
        set_learning_rate(optimizer, warmup_cosine(step, config.steps, config.warmup))
        chosen, batch = next(batches)
        restore = remember_statistics(student)
        loss = model(*(tensor.to(accelerator.device) for tensor in batch))
        optimizer.zero_grad()
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(student.parameters(), 1.0)
        if loop.skips(loss, norm, recordings=lambda chosen=chosen: [u.path for u in chosen]):
            restore()
            continue
        optimizer.step()
        if loop.due(LOG_EVERY):
            loop.log(loss=loss.item())

    # 3. export, and score on the dev splits
    student.eval()
    if accelerator.is_main_process:
        with atomic_folder(run.folder / "model") as folder:
            student.save(folder)
        scores = student.score(dev)
        finish_training(run, {"steps": config.steps, **loop.figures, **scores})
        print(f"{config.kind} teacher saved in {run.folder / 'model'} {scores}")
    accelerator.wait_for_everyone()


def short_enough(utterances: list[Utterance], config: TeacherConfig) -> list[Utterance]:
    """Those that are not too long, for a speaker teacher all. Raises CorpusError if none is left of some."""
    short = [u for u in utterances if config.kind == "speaker" or u.duration_s <= config.max_duration_s]
    if utterances and not short:
        found = f"all utterances are longer than max_duration_s = {config.max_duration_s:g}: raise it"
        raise CorpusError(f"{spell_corpora(config.data)}: {found}")
    return short


def numbered(names: Iterable[str], start: int = 0) -> dict[str, int]:
    """The sorted distinct names and their class labels, from `start` on."""
    return {name: label for label, name in enumerate(sorted(set(names)), start)}


class SemanticStudent(nn.Module):
    """A HuBERT that classifies characters (ctc) or phones (alignment); label 0 is the blank, or "no phone".

    With several processes, the loss is the average of each process's mean over its labels, which is only approximately
    the mean over all labels.
    """

    def __init__(self, config: TeacherConfig, utterances: list[Utterance], skipped: Path | None = None):
        super().__init__()
        self.config, self.skipped = config, skipped
        self.key = "text" if config.objective == "ctc" else "phones"
        self.utterances = [u for u in utterances if getattr(u, self.key)]
        if not self.utterances:
            source = spell_corpora(config.data)
            raise CorpusError(f"{source}: no utterance has {self.key}: required by objective {config.objective}")
        self.labels = numbered((symbol for u in self.utterances for symbol in self._symbols(u)), start=1)
        if config.init:
            teacher = SemanticTeacher.from_pretrained(config.init)
            if isinstance(teacher, WhisperTeacher):
                raise InputError(f"{config.init} is a Whisper model: init must be HuBERT, WavLM or wav2vec 2.0")
            hubert, normalize = teacher.model.train().requires_grad_(True), teacher.normalize
        else:
            hubert, normalize = small_hubert(config.hidden_size, config.layers), True
        self.classifier = FrameClassifier(hubert, len(self.labels) + 1, normalize)

    def groups(self) -> list[dict[str, Any]]:
        """Parameter groups for a pretrained HuBERT.

        The new head needs a much higher learning rate, to use the pretrained features before CTC's initial gradient,
        blanks everywhere, destroys them: with the same rate for all, the loss stays near that plateau for much longer.
        """
        body, head = self.classifier.hubert.parameters(), self.classifier.head.parameters()
        return [{"params": body}, {"params": head, "lr": HEAD_RATE * self.config.learning_rate}]

    def _symbols(self, utterance: Utterance) -> list[str]:
        if self.config.objective == "ctc":
            return list((utterance.text or "").replace(" ", WORD_END))
        return frame_phones(utterance, math.ceil(utterance.duration_s * 50))

    def batches(self, start: int, process: int, processes: int) -> Iterator[Batch]:
        """Endless batches from step `start` on; each process gets its share."""
        lengths = [u.duration_s for u in self.utterances]
        orders = endless_batches(lengths, self.config.batch_size, self.config.seed, start)

        def read(order: np.ndarray) -> list[tuple[Utterance, Tensor | AudioError]]:
            """This process's share of a batch, and of the others' as many as it takes to have a usable recording."""
            own, loaded = order[process::processes], []
            for i in dict.fromkeys([*own, *order]):
                if len(loaded) >= len(own) and any(isinstance(found, Tensor) for _, found in loaded):
                    break
                try:
                    loaded.append(try_load(utterance := self.utterances[i]))
                except OSError as error:
                    loaded.append((utterance, as_skip(utterance, error)))
            return loaded

        for loaded in prefetch(read, orders, READ_AHEAD):
            pairs = list(keep_usable(loaded, self.skipped))
            if not pairs:
                raise CorpusError(f"no recording of a batch of {len(loaded)} is usable, such as {loaded[0][0].path}")
            yield [u for u, _ in pairs], self._batch(pairs)

    def _batch(self, pairs: list[tuple[Utterance, Tensor]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        waveform, lengths = pad_waveforms([waveform for _, waveform in pairs])
        labels = [torch.tensor([self.labels.get(s, 0) for s in self._symbols(u)]) for u, _ in pairs]
        sizes = torch.tensor([len(x) for x in labels])
        return waveform, lengths, nn.utils.rnn.pad_sequence(labels, batch_first=True), sizes

    def forward(self, waveform: Tensor, lengths: Tensor, labels: Tensor, sizes: Tensor) -> Tensor:
        scores = F.log_softmax(self.classifier(waveform, lengths), -1)
        if self.config.objective == "ctc":
            return F.ctc_loss(scores.transpose(0, 1), labels, frame_count(lengths), sizes, zero_infinity=True)
        length = min(scores.shape[1], labels.shape[1])
        return F.nll_loss(scores[:, :length].flatten(0, 1), labels[:, :length].flatten(), ignore_index=0)

    @torch.no_grad()
    def score(self, utterances: list[Utterance]) -> dict[str, float]:
        """Character error rate of greedy CTC decoding, or accuracy of frame labels."""
        import jiwer

        names = ["", *self.labels]
        device = next(self.parameters()).device
        correct, total, references, hypotheses = 0, 0, [], []
        labelled = load_usable([u for u in utterances if getattr(u, self.key)], skipped=self.skipped)
        while group := list(islice(labelled, self.config.batch_size)):
            waveform, lengths, labels, sizes = self._batch(group)
            best = self.classifier(waveform.to(device), lengths.to(device)).argmax(-1).cpu()
            for row, length, label, size, (u, _) in zip(best, frame_count(lengths), labels, sizes, group, strict=True):
                if self.config.objective == "ctc":
                    references.append(u.text)
                    characters = [names[i] for i in row[:length].unique_consecutive().tolist()]
                    hypotheses.append("".join(characters).replace(WORD_END, " "))
                else:
                    size = min(length, size)
                    correct += int((row[:size] == label[:size]).sum())
                    total += int(size)
        if self.config.objective == "ctc":
            return {"dev_cer": jiwer.cer(references, hypotheses)} if references else {}
        return {"dev_frame_accuracy": correct / total} if total else {}

    def save(self, folder) -> None:
        if self.config.objective == "ctc":
            save_recognizer(self.classifier, list(self.labels), folder)
        else:
            save_hubert(self.classifier.hubert, folder, self.classifier.normalize)


class SpeakerStudent(nn.Module):
    """An ECAPA-TDNN with an additive angular margin loss over the training speakers."""

    MELS = 80

    def __init__(self, config: TeacherConfig, utterances: list[Utterance], skipped: Path | None = None):
        super().__init__()
        from speechbrain.lobes.features import Fbank
        from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN, Classifier
        from speechbrain.nnet.losses import AdditiveAngularMargin, LogSoftmaxWrapper
        from speechbrain.processing.features import InputNormalization

        self.config, self.skipped = config, skipped
        self.utterances = [u for u in utterances if u.speaker]
        self.labels = numbered(u.speaker for u in self.utterances)
        if len(self.labels) < 2:
            found = f"a speaker teacher needs at least 2 speakers, found {len(self.labels)}"
            raise CorpusError(f"{spell_corpora(config.data)}: {found}")
        width = config.channels
        self.settings = {
            "channels": [width] * 4 + [3 * width],
            "kernel_sizes": [5, 3, 3, 3, 1],
            "dilations": [1, 2, 3, 4, 1],
            "attention_channels": width,
            "lin_neurons": width,
        }
        self.features = Fbank(n_mels=self.MELS)
        self.normalization = InputNormalization(norm_type="sentence", std_norm=False)
        self.ecapa = ECAPA_TDNN(self.MELS, **self.settings)
        self.classifier = Classifier(width, out_neurons=len(self.labels))
        self.criterion = LogSoftmaxWrapper(AdditiveAngularMargin(margin=0.2, scale=30))

    def batches(self, start: int, process: int, processes: int) -> Iterator[Batch]:
        """Batches of crops from step `start` on; each process gets its share."""
        crops = Crops(self.utterances, self.config.crop_s, seed=self.config.seed, skipped=self.skipped)

        def read(step: int) -> list[dict[str, Any]]:
            first = step * self.config.batch_size
            share = [*range(first + process, first + self.config.batch_size, processes)]
            others = [i for i in (first, first + 1) if i not in share]
            return [crops[i] for i in [*share, *others[: max(0, 2 - len(share))]]]  # batch normalisation needs two

        for items in prefetch(read, range(start, self.config.steps), READ_AHEAD):
            chosen = [self.utterances[item["utterance"]] for item in items]
            targets = torch.tensor([self.labels[u.speaker] for u in chosen])
            lengths = torch.tensor([item["length"] for item in items])
            yield chosen, (torch.stack([item["waveform"] for item in items]), lengths, targets)

    def forward(self, waveform: Tensor, lengths: Tensor, targets: Tensor) -> Tensor:
        return self.criterion(self.classifier(self._embed(waveform, lengths)), targets[:, None])

    def _embed(self, waveform: Tensor, lengths: Tensor) -> Tensor:
        shares = lengths / waveform.shape[1]  # as SpeechBrain counts them: what is behind is padding, and not heard
        return self.ecapa(self.normalization(self.features(waveform), shares), shares)

    @torch.no_grad()
    def score(self, utterances: list[Utterance]) -> dict[str, float]:
        """Equal error rate of cosine similarity over all pairs of `utterances`, of speakers not seen in training."""
        device = next(self.parameters()).device
        speakers, embeddings = [], []
        for u, waveform in load_usable([u for u in utterances if u.speaker], skipped=self.skipped):
            speakers.append(u.speaker)
            lengths = torch.tensor([len(waveform)], device=device)
            embeddings.append(self._embed(waveform[None].to(device), lengths)[0, 0].cpu())
        if len(set(speakers)) in (0, 1, len(speakers)):  # no pair of different speakers, or none of the same
            return {}
        voices = torch.stack(embeddings)
        similarity = F.cosine_similarity(voices[:, None], voices[None], dim=-1)
        pairs = torch.ones_like(similarity).triu(1).bool()
        same = torch.tensor([[a == b for a in speakers] for b in speakers])[pairs]
        return {"dev_equal_error_rate": _equal_error_rate(similarity[pairs], same)}

    def save(self, folder) -> None:
        save_ecapa(self.ecapa, self.settings, self.MELS, list(self.labels), folder)


def _equal_error_rate(scores: Tensor, same: Tensor) -> float:
    order = scores.argsort()
    missed = same[order].cumsum(0) / same.sum()  # same-speaker pairs below the threshold
    accepted = 1 - (~same)[order].cumsum(0) / (~same).sum()  # other pairs above it
    return float(torch.maximum(missed, accepted).min())


if __name__ == "__main__":
    run_recipe(main, CONFIG)
