"""Information in the codes: codebook use, content of layer 0 compared with log-mel k-means, voice in layers 0 and 1.

    python recipes/eval_tokenizer.py codes=CODES data=CORPUS output=results.json test_splits=test

Content needs codes at a fixed rate, and a phone alignment (see recipes/align_speech.py) or texts of single words; it is
measured on the utterances that have them.
The probe (for example probe_steps=2000) measures content on any corpus with texts: a small recogniser is trained on the
codes of the training splits, and its error rate on the test splits is compared with one on log-mel k-means units.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from speechllm.runs.config import parse_config
from tokenizer.settings import Corpus, Count, Names, Natural, Seed, Settings

LOG_MEL_RATE = 50.0  # frames/s of the baseline
PROBE_NORMALIZER = "librispeech"  # of the texts that the probe learns and is scored on
Row = dict[str, object]  # of encoded speech


@dataclass
class EvalTokenizerConfig(Settings):
    codes: str  # folder of encode_speech, with at least two layers for the voice
    data: Corpus  # the corpus that was encoded, or the same corpora, as [A, B]
    output: str  # JSON file; the report beside it has the same name and the suffix .html
    train_splits: Names | None = None  # for the k-means baseline and the voices, all when null
    test_splits: Names | None = None  # for codebook use and content, all when null
    baseline: bool = True  # also evaluate log-mel k-means units
    kmeans_utterances: Count = 400  # training utterances for the baseline's clusters
    probe_steps: Natural = 0  # training steps of the probe of layer 0; 0: no probe
    seed: Seed = 0

    def contradictions(self) -> Iterable[str]:
        if self.output.endswith(".html"):
            yield f"output is the JSON file, the page beside it ends in .html: got {self.output}"


if __name__ == "__main__":  # help and mistakes are answered before torch is loaded
    CONFIG = parse_config(EvalTokenizerConfig)

import numpy as np
import torch
from sklearn.cluster import MiniBatchKMeans

from speechllm import (
    DataError,
    Encoding,
    Utterance,
    load_codes,
    read_corpus,
    word_error_rate,
)
from speechllm.data.encoded import EncodedSpeech, codes_of, transcribed
from speechllm.evaluation.error_rates import character_errors
from speechllm.evaluation.scripts import primary_rate
from speechllm.reports.pages import write_results_report
from speechllm.runs.machine import provenance
from speechllm.runs.recipe import holds_config, run_recipe
from tokenizer.claims import claim_file
from tokenizer.corpus import load_utterance
from tokenizer.files import write_json
from tokenizer.metrics.code_usage import (
    count_codes,
    label_information,
    log_mel_features,
    speaker_accuracy,
    usage_of_counts,
)
from tokenizer.metrics.probe import ctc_probe
from tokenizer.utterances import frame_phones, spell_corpora

UnitsOf = Callable[[Row], torch.Tensor]  # units long [T]


def main(config: EvalTokenizerConfig) -> None:
    started = time.perf_counter()
    for file in (config.output, Path(config.output).with_suffix(".html")):  # the page is replaced with its results
        claim_file(file, own=lambda _: holds_config(config.output, config))
    train, encoding = load_codes(config.codes, config.train_splits)
    test, _ = load_codes(config.codes, config.test_splits)
    if config.probe_steps:
        check_for_probe(train, test)
    corpus = {utterance.id: utterance for utterance in read_corpus(config.data)}
    if unknown := [name for name in chain(train["id"], test["id"]) if name not in corpus]:
        source = spell_corpora(config.data)
        raise DataError(f"{source} lacks {len(unknown)} utterances of {config.codes}, {unknown[0]} first")
    results = {
        "codec_fingerprint": encoding.fingerprint,
        "usage": usage(test, encoding),
        "speaker": speakers(train, encoding),
    }
    kind, pairs = labelled(test, corpus, encoding)
    if pairs or config.probe_steps:
        units = {"layer_0": lambda row: codes_of(row, encoding)[0].clone()}
        if config.baseline:
            units["log_mel_kmeans"] = log_mel_clusters(config, train, corpus, encoding.codebook_size)
    if pairs:
        rates = {"layer_0": encoding.frame_rate, "log_mel_kmeans": LOG_MEL_RATE}
        results["content"] = {"label": kind, "utterances": len(pairs)} | {
            name: content(pairs, units_of, rates[name]) for name, units_of in units.items()
        }
    if config.probe_steps:
        results["probe"] = {"steps": config.probe_steps} | {
            name: probe(config, train, test, units_of, encoding.codebook_size) for name, units_of in units.items()
        }
    results |= provenance(config, time.perf_counter() - started, "scikit-learn")
    write_json(config.output, results)
    report(config, results)
    print({name: results[name] for name in ("speaker", "content", "probe") if name in results})


def report(config: EvalTokenizerConfig, results: dict[str, object]) -> None:
    """Write the page beside the JSON file."""
    counts = [np.array(layer["counts"]) for layer in results["usage"]]
    shown = {name: value for name, value in results.items() if name != "usage"}
    page = Path(config.output).with_suffix(".html")
    write_results_report(page, f"{config.codes}: content of the codes", shown, codebook_counts=counts)


def usage(codes: EncodedSpeech, encoding: Encoding) -> list[dict[str, object]]:
    """Usage statistics of every codebook, with the count of each code."""
    ids = (codes_of(row, encoding).numpy() for row in codes)
    counts, _ = count_codes(ids, encoding.layers, encoding.codebook_size)
    return [{**usage_of_counts(layer), "counts": layer.tolist()} for layer in counts]


def speakers(codes: EncodedSpeech, encoding: Encoding) -> dict[str, float]:
    """Accuracy of speaker identification from one layer's code histogram, for the layers with distillation.

    Empty with a single speaker, or if no speaker has a second utterance.
    """
    rows = [row for row in codes if row["speaker"]]
    names = [row["speaker"] for row in rows]
    if len(set(names)) in (1, len(names)):
        return {}
    layers = range(min(2, encoding.layers))
    accuracy = {
        f"layer_{layer}": speaker_accuracy(
            [codes_of(row, encoding)[layer].numpy().copy() for row in rows], names, encoding.codebook_size
        )
        for layer in layers
    }
    return {**accuracy, "speakers": len(set(names)), "chance": 1 / len(set(names))}


def labelled(
    codes: EncodedSpeech, corpus: dict[str, Utterance], encoding: Encoding
) -> tuple[str, list[tuple[Row, Utterance]]]:
    """The kind of frame labels, "phone" or "word", and the rows that have them; none if frames have no time."""
    pairs = [(row, corpus[row["id"]]) for row in codes]
    aligned = [(row, utterance) for row, utterance in pairs if utterance.phones]
    words = all(utterance.text and " " not in utterance.text for _, utterance in pairs)
    kind, pairs = ("phone", aligned) if aligned else ("word", pairs if words else [])
    if pairs and encoding.deduplicated:
        print(f"no {kind} information: repeats are merged in these codes, so that frames have no time")
        return kind, []
    return kind, pairs


def content(pairs: Sequence[tuple[Row, Utterance]], units_of: UnitsOf, rate: float) -> dict[str, object]:
    """Information in units, of which there are `rate` per second, about the phone or word at their time."""
    units = [units_of(row) for row, _ in pairs]
    labels = [
        frame_phones(utterance, len(ids), rate) if utterance.phones else [utterance.text] * len(ids)
        for ids, (_, utterance) in zip(units, pairs, strict=True)
    ]
    return label_information(torch.cat(units).numpy(), list(chain.from_iterable(labels)), [*map(len, units)])


def log_mel_clusters(
    config: EvalTokenizerConfig, train: EncodedSpeech, corpus: dict[str, Utterance], clusters: int
) -> UnitsOf:
    """The baseline: k-means of log-mel frames, with as many clusters as the codebook has codes."""

    def features(row: Row) -> np.ndarray:
        return log_mel_features(load_utterance(corpus[row["id"]]))

    chosen = np.random.default_rng(config.seed).permutation(len(train))[: config.kmeans_utterances]
    fit = np.concatenate([features(train[int(i)]) for i in chosen])
    print(f"k-means of log-mel frames: {len(fit)} frames, {clusters} clusters", flush=True)
    kmeans = MiniBatchKMeans(clusters, batch_size=4096, n_init=1, random_state=config.seed).fit(fit)
    return lambda row: torch.from_numpy(kmeans.predict(features(row))).long()


def check_for_probe(train: EncodedSpeech, test: EncodedSpeech) -> None:
    """Raise DataError for splits that the probe cannot be trained or tested on."""
    if shared := set(train["id"]) & set(test["id"]):
        raise DataError(
            f"the probe would learn from {len(shared)} utterances it is tested on: choose train_splits and test_splits "
            "that do not overlap"
        )
    for name, rows in (("train_splits", train), ("test_splits", test)):
        if not len(transcribed(rows, normalizer=PROBE_NORMALIZER)):
            raise DataError(f"the probe needs texts, but no utterance of {name} has one: choose probe_steps=0")


def probe(
    config: EvalTokenizerConfig, train: EncodedSpeech, test: EncodedSpeech, units_of: UnitsOf, size: int
) -> dict[str, object]:
    """Error rates of a small recogniser of units, trained on one part of the corpus and tested on the other."""
    train, test = (transcribed(part, normalizer=PROBE_NORMALIZER) for part in (train, test))
    examples = [(units_of(row), row["text"]) for row in train]
    references = test["text"]
    hypotheses = ctc_probe(examples, [units_of(row) for row in test], size, config.probe_steps, config.seed)
    words = word_error_rate(references, hypotheses, PROBE_NORMALIZER)
    characters = character_errors(references, hypotheses, PROBE_NORMALIZER)
    rates = {"wer": words.wer, "wer_ci95": words.ci95, "cer": characters.wer, "cer_ci95": characters.ci95}
    return {**rates, "primary": primary_rate(references), "normalizer": PROBE_NORMALIZER}


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    run_recipe(main, CONFIG)
