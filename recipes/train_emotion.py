"""Emotion recognition from audio tokens with a BERT, tested on unseen speakers: the paper's Table 3.

    python recipes/train_emotion.py --config configs/emotion/ravdess.yaml codes=CODES codec=CODEC output=RUN
    speechllm run train_emotion --processes 6 ...      on 6 GPUs

Reads RAVDESS (official layout, or its file names as ids) as encoded by recipes/encode_speech.py. The actors are split
into folds, and each fold is classified by a model trained on the others; a control is trained on permuted labels and
should be at chance. Folds are distributed over processes; a killed run, started again, keeps finished folds. Writes
RUN/results.json, RUN/predictions.jsonl, RUN/confusion.png and RUN/report.html.
"""

import hashlib
import math
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from speechllm.runs.config import parse_config
from tokenizer.settings import DISTINCT, NOT_EMPTY, Count, Natural, NonNegative, Positive, Seed, Settings, Several

CONTROL = "shuffled labels"
Distinct = Annotated[list[Natural], NOT_EMPTY, DISTINCT]
SAVE_EVERY = 200  # steps between checkpoints
HEARD = "speech.json"  # which codes the folds of a run are of


@dataclass
class BertShape(Settings):
    """Sizes of a BERT with random weights; by default those of BERT-base."""

    hidden_size: Count = 768
    intermediate_size: Count = 3072
    num_hidden_layers: Natural = 12  # 0: embeddings of codes and positions alone
    num_attention_heads: Count = 12

    def contradictions(self) -> Iterable[str]:
        if (heads := self.num_attention_heads) > 0 and self.hidden_size % heads:
            yield f"hidden_size must be a multiple of num_attention_heads = {heads}, got {self.hidden_size}"


@dataclass
class EmotionConfig(Settings):
    codes: str  # folder of encode_speech
    codec: str  # the audio tokenizer that made them, as `load_tokenizer` takes it
    output: str  # run folder
    layers: Distinct = field(default_factory=lambda: [0])  # codebooks to read; the embeddings of several are summed
    model: str | None = None  # a pretrained BERT, folder or hub name; null: random weights
    bert: BertShape = field(default_factory=BertShape)  # its shape, used when model is null
    init: Literal["codebook", "random"] = "codebook"  # of the token embeddings
    folds: Several = 5  # over the actors
    epochs: Count = 30
    batch_size: Count = 16
    learning_rate: Positive = 5e-5
    weight_decay: NonNegative = 0.01
    warmup: Count = 50  # steps
    clip: Positive = 1.0  # largest gradient norm
    precision: Literal["no", "bf16"] = "no"
    seed: Seed = 0


if __name__ == "__main__":  # help and mistakes are answered before torch is loaded
    CONFIG = parse_config(EmotionConfig, shares_work=True)

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor

from speechllm import Codes, DataError, Encoding, load_codes, load_tokenizer
from speechllm.data.batches import endless_batches
from speechllm.evaluation.error_rates import groups_interval, mean_and_interval
from speechllm.evaluation.tables import Table, cell
from speechllm.reports.pages import write_emotion_report
from speechllm.reports.plots import confusion_figure, save_figure
from speechllm.runs.loop import Parts, TrainingLoop
from speechllm.runs.machine import make_accelerator
from speechllm.runs.recipe import run_recipe
from speechllm.runs.run import Run, read_log
from speechllm.training.emotion import (
    EMOTIONS,
    EmotionalSpeech,
    EmotionClassifier,
    actor_folds,
    emotional_speech,
    load_bert,
    small_bert,
)
from speechllm.training.schedule import set_learning_rate, warmup_cosine
from tokenizer.files import read_json, write_json, write_jsonl


def main(config: EmotionConfig) -> None:
    accelerator = make_accelerator(config.precision)

    # 1. labelled codes, their codec, and the folds
    rows, encoding = load_codes(config.codes)
    speech = emotional_speech(rows, encoding, config.layers)
    codec = load_tokenizer(config.codec)
    encoding.require(codec.fingerprint, config.codec)
    codebooks = codec.codebooks[config.layers].detach().float().cpu()
    folds = actor_folds([one.actor for one in speech], config.folds, config.seed)
    run = Run(config.output, config, accelerator)
    require_same_speech(run, speech, encoding)
    accelerator.print(f"emotion: {len(speech)} of {len(rows)} encoded utterances, {sum(map(len, folds))} actors")

    # 2. one classifier per fold, and one for the control; distributed over the processes
    jobs = [(str(number), actors) for number, actors in enumerate(folds)] + [(CONTROL, folds[0])]
    files = [run.folder / "folds" / f"{name}.json" for name, _ in jobs]
    for number in range(accelerator.process_index, len(jobs), accelerator.num_processes):
        if not files[number].exists():
            name, actors = jobs[number]
            settings = speech, codebooks, config, accelerator
            write_json(files[number], run_fold(name, actors, *settings, files[number].parent))
        shutil.rmtree(files[number].with_suffix(""), ignore_errors=True)  # what only an interrupted fold needs

    # 3. results over all folds
    accelerator.wait_for_everyone()
    if run.main:
        *found, control = map(read_json, files)
        results = score(found, control) | {
            "non_finite": sum(fold["non_finite"] for fold in (*found, control)),  # steps without finite numbers
            "skipped": len(rows) - len(speech),  # other emotions, or ids that are not RAVDESS names
            "tokens_per_second": tokens_per_second(rows, speech),
            "codec_fingerprint": encoding.fingerprint,
            **run.provenance,
        }
        report(run, results, found, control, config, encoding)
        run.finish({name: results[name] for name in ("accuracy", "ci95_actors", "accuracy_shuffled_labels")})


def require_same_speech(run: Run, speech: Sequence[EmotionalSpeech], encoding: Encoding) -> None:
    """Raise DataError if the folds of this run so far are of other codes, which a configuration does not tell."""
    content = hashlib.sha256()
    for one in speech:
        content.update(one.id.encode() + one.codes.numpy().tobytes())
    heard = {"codec": encoding.fingerprint, "codes": content.hexdigest()[:16]}
    held = read_json(run.folder / HEARD)
    if held and held != heard:
        raise DataError(
            f"{run.folder} holds answers about other codes ({held} in place of {heard}): choose another output folder "
            "or delete this one"
        )
    if run.main:
        write_json(run.folder / HEARD, heard)


def run_fold(
    name: str,
    actors: Sequence[int],
    speech: Sequence[EmotionalSpeech],
    codebooks: Tensor,
    config: EmotionConfig,
    accelerator: Accelerator,
    folder: Path,
) -> dict[str, Any]:
    """Train on all other actors and classify the utterances of these: mean loss by epoch, one row per utterance.

    folder: gets a subfolder of that name, from which an interrupted fold goes on.
    """
    train = [one for one in speech if one.actor not in actors]
    test = [one for one in speech if one.actor in actors]
    labels = torch.tensor([one.label for one in train])
    set_seed(config.seed)  # the same model and permutation when it goes on
    if name == CONTROL:
        labels = labels[torch.randperm(len(labels))]
    device = accelerator.device
    classifier = make_classifier(speech, codebooks, config).to(device)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    per_epoch = max(1, len(train) // config.batch_size)
    steps = config.epochs * per_epoch
    run = Run(folder / name, config)  # of this process alone
    parts = Parts(classifier=classifier, optimizer=optimizer)
    loop = TrainingLoop(run, parts, f"fold {name}", steps=steps, seed=config.seed, save_every=SAVE_EVERY)
    batches = endless_batches([one.codes.shape[1] for one in train], config.batch_size, config.seed, loop.done)
    classifier.train()
    for step in loop:
        set_learning_rate(optimizer, warmup_cosine(step, steps, config.warmup))
        batch = next(batches)
        with accelerator.autocast():
            logits = classifier(padded([train[i] for i in batch], device)).float()
        # utterances have equal weight, as in the accuracy; the mean recall shows the effect on rare emotions
        loss = F.cross_entropy(logits, labels[batch].to(device))
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(classifier.parameters(), config.clip)
        if loop.skips(loss, norm, recordings=lambda batch=batch: [train[i].id for i in batch]):
            continue
        optimizer.step()
        loop.log(loss=loss.item())

    classifier.eval()
    rows = []
    for first in range(0, len(test), config.batch_size):
        part = test[first : first + config.batch_size]
        with torch.no_grad(), accelerator.autocast():
            shares = classifier(padded(part, device)).float().softmax(-1).cpu()
        for one, share in zip(part, shares, strict=True):
            answer = int(share.argmax())
            row = {"id": one.id, "actor": one.actor, "fold": name, "emotion": EMOTIONS[one.label]}
            rows.append(row | {"answer": EMOTIONS[answer], "confidence": round(float(share[answer]), 4)})
    log = [line for line in read_log(run.folder) if "loss" in line]
    epochs = [[line["loss"] for line in log if (line["step"] - 1) // per_epoch == i] for i in range(config.epochs)]
    losses = [float(np.mean(epoch)) if epoch else math.nan for epoch in epochs]
    return {"actors": list(actors), "losses": losses, "non_finite": steps - len(log), "rows": rows}


def make_classifier(speech: Sequence[EmotionalSpeech], codebooks: Tensor, config: EmotionConfig) -> EmotionClassifier:
    """A new classifier. Raises DataError if an utterance is too long for it."""
    if config.model is None:
        bert = small_bert(**asdict(config.bert))
    else:
        bert = load_bert(config.model)
    longest, places = max(one.codes.shape[1] for one in speech), bert.config.max_position_embeddings
    if longest > places:
        raise DataError(f"an utterance has {longest} frames, but this BERT has room for {places}: exclude long ones")
    return EmotionClassifier(bert, codebooks, config.init, config.seed)


def padded(speech: Sequence[EmotionalSpeech], device: torch.device) -> Codes:
    codes = Codes.from_utterances([one.codes for one in speech])
    return Codes(codes.ids.to(device), codes.lengths)


def score(found: Sequence[dict[str, Any]], control: dict[str, Any]) -> dict[str, Any]:
    """Results over all folds. Every utterance is tested once, by a classifier that was not trained on its speaker.

    ci95 resamples utterances, which reflects the choice of utterances of these actors; ci95_actors resamples actors,
    which reflects the choice of actors.
    """
    rows = [row for fold in found for row in fold["rows"]]
    confusion = np.zeros((len(EMOTIONS), len(EMOTIONS)), int)
    for row in rows:
        confusion[EMOTIONS.index(row["emotion"]), EMOTIONS.index(row["answer"])] += 1
    totals = confusion.sum(1)
    overall, permuted = (
        mean_and_interval([row["answer"] == row["emotion"] for row in part]) for part in (rows, control["rows"])
    )
    actors = [str(row["actor"]) for row in rows]
    shares = np.array([(row["answer"] == row["emotion"], 1) for row in rows])
    return {
        "accuracy": overall["mean"],
        "ci95": overall["ci95"],
        "ci95_actors": groups_interval(shares, actors),
        "unweighted_average_recall": float((confusion.diagonal()[totals > 0] / totals[totals > 0]).mean()),
        "accuracy_shuffled_labels": permuted["mean"],
        "accuracy_shuffled_labels_ci95": permuted["ci95"],  # over the utterances of its fold
        "chance": float(totals.max() / totals.sum()),  # of always choosing the most frequent emotion
        "utterances": len(rows),
        "actors": len(set(actors)),
        "classes": list(EMOTIONS),
        "confusion": confusion.tolist(),  # one row per emotion, one column per answer
        "folds": [{"actors": fold["actors"], "accuracy": accuracy(fold["rows"])} for fold in found],
    }


def accuracy(rows: Sequence[dict[str, Any]]) -> float:
    return float(np.mean([row["answer"] == row["emotion"] for row in rows]))


def tokens_per_second(rows: Any, speech: Sequence[EmotionalSpeech]) -> float:
    seconds = dict(zip(rows["id"], rows["duration_s"], strict=True))
    return sum(one.codes.numel() for one in speech) / sum(seconds[one.id] for one in speech)


def report(
    run: Run,
    results: dict[str, Any],
    found: Sequence[dict[str, Any]],
    control: dict[str, Any],
    config: EmotionConfig,
    encoding: Encoding,
) -> None:
    """Write results, predictions, the confusion matrix and the page; print a row for a Markdown table."""
    folder = run.folder
    write_jsonl(folder / "predictions.jsonl", (row for fold in found for row in fold["rows"]))
    write_json(folder / "results.json", results)
    save_figure(confusion_figure(results["confusion"], EMOTIONS), folder / "confusion.png")
    losses = zip(np.mean([fold["losses"] for fold in found], 0), control["losses"], strict=True)
    log = [{"step": i, "loss": loss, "loss with shuffled labels": other} for i, (loss, other) in enumerate(losses, 1)]
    layers = "+".join(map(str, config.layers))
    title = f"{config.codec}, layer {layers}: emotions"
    write_emotion_report(folder / "report.html", title, results, log)
    accuracy = cell({"mean": results["accuracy"], "ci95": results["ci95_actors"]}, ".1%")
    head = ["codec", "layers", "tokens/s", "accuracy (95 % over actors)", "mean recall", "shuffled labels", "chance"]
    row = [f"{config.codec} ({encoding.fingerprint[:8]})", layers, f"{results['tokens_per_second']:.0f}", accuracy]
    control_cell = {"mean": results["accuracy_shuffled_labels"], "ci95": results["accuracy_shuffled_labels_ci95"]}
    row += [f"{results['unweighted_average_recall']:.1%}", cell(control_cell, ".1%"), f"{results['chance']:.1%}"]
    print(Table("Emotions", head, [row]).markdown())


if __name__ == "__main__":
    run_recipe(main, CONFIG)
