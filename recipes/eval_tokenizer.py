"""What the codes hold: codebook use, content of layer 0 against log-mel k-means, voice in layers 0 and 1.

    python recipes/eval_tokenizer.py codes=CODES data=CORPUS output=results.json test_splits=[test]

Content needs a phone alignment (recipes/align_speech.py makes one), or texts that are single words; it is measured on
the utterances that have them.
The probe (probe_steps=2000, say) measures it on any corpus with texts: a small recogniser learns to read the training
splits' codes, and its error rate on the test splits is set beside that of one that reads log-mel k-means units.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from sklearn.cluster import MiniBatchKMeans

from speechllm import (
    DataError,
    Encoding,
    Utterance,
    codebook_usage,
    codes_of,
    ctc_probe,
    frame_phones,
    label_information,
    librispeech_normalizer,
    load_audio,
    load_codes,
    log_mel_features,
    read_corpus,
    run_recipe,
    speaker_accuracy,
    word_error_rate,
    write_json,
)

UnitsOf = Callable[[dict[str, object]], torch.Tensor]  # a row of encoded speech -> units long [T]


@dataclass
class EvalTokenizerConfig:
    codes: str  # folder of encode_speech, with at least two layers for the voice
    data: str  # the corpus that was encoded
    output: str  # JSON file
    train_splits: list[str] | None = None  # for the k-means baseline and the voices, all when null
    test_splits: list[str] | None = None  # for codebook use and content, all when null
    baseline: bool = True  # also measure the content of log-mel k-means units
    kmeans_utterances: int = 400  # training utterances the baseline's clusters are fitted on
    probe_steps: int = 0  # of the recogniser that reads layer 0, no probe at 0
    seed: int = 0


def main(config: EvalTokenizerConfig) -> None:
    train, encoding = load_codes(config.codes, config.train_splits)
    test, _ = load_codes(config.codes, config.test_splits)
    if config.probe_steps:
        check_for_probe(train, test)
    corpus = {utterance.id: utterance for utterance in read_corpus(config.data)}
    results = {"usage": usage(test, encoding), "speaker": speakers(train, encoding)}
    labels = frame_labels(test, corpus, encoding)
    if labels is not None or config.probe_steps:
        units = {"layer_0": lambda row: codes_of(row, encoding)[0]}
        if config.baseline:
            units["log_mel_kmeans"] = log_mel_clusters(config, train, corpus, encoding.codebook_size)
    if labels is not None:
        kind, rows, per_frame = labels
        results["content"] = {"label": kind, "utterances": len(rows)} | {
            name: label_information(torch.cat([units_of(row) for row in rows]).numpy(), per_frame)
            for name, units_of in units.items()
        }
    if config.probe_steps:
        results["probe"] = {"steps": config.probe_steps} | {
            name: probe(config, train, test, units_of, encoding.codebook_size) for name, units_of in units.items()
        }
    write_json(config.output, results)
    print({name: value for name, value in results.items() if name != "usage"})


def usage(codes: Dataset, encoding: Encoding) -> list[dict[str, object]]:
    """Use of every codebook, with the counts a picture needs."""
    joined = np.concatenate([codes_of(row, encoding).numpy() for row in codes], 1)
    return [
        {
            **codebook_usage(layer, encoding.codebook_size),
            "counts": np.bincount(layer, minlength=encoding.codebook_size).tolist(),
        }
        for layer in joined
    ]


def speakers(codes: Dataset, encoding: Encoding) -> dict[str, float]:
    """Accuracy of telling the speaker from one layer's code histogram, for the layers the paper teaches."""
    rows = [row for row in codes if row["speaker"]]
    names = [row["speaker"] for row in rows]
    if len(set(names)) < 2:
        return {}
    layers = range(min(2, encoding.layers))
    accuracy = {
        f"layer_{layer}": speaker_accuracy(
            [codes_of(row, encoding)[layer].numpy() for row in rows], names, encoding.codebook_size
        )
        for layer in layers
    }
    return {**accuracy, "speakers": len(set(names)), "chance": 1 / len(set(names))}


def frame_labels(
    codes: Dataset, corpus: dict[str, Utterance], encoding: Encoding
) -> tuple[str, list[dict[str, object]], list[str]] | None:
    """("phone" or "word", the rows whose labels the corpus knows, the label of every frame), if there are any."""
    pairs = [(row, corpus[row["id"]]) for row in codes]
    if aligned := [(row, utterance) for row, utterance in pairs if utterance.phones]:
        kind, pairs = "phone", aligned
        labels = [frame_phones(utterance, frames(row, encoding), encoding.frame_rate) for row, utterance in pairs]
    elif all(utterance.text and " " not in utterance.text for _, utterance in pairs):
        kind, labels = "word", [[utterance.text] * frames(row, encoding) for row, utterance in pairs]
    else:
        return None
    return kind, [row for row, _ in pairs], [label for utterance in labels for label in utterance]


def frames(row: dict[str, object], encoding: Encoding) -> int:
    return len(row["codes"]) // encoding.layers


def log_mel_clusters(
    config: EvalTokenizerConfig, train: Dataset, corpus: dict[str, Utterance], clusters: int
) -> UnitsOf:
    """The baseline: k-means of log-mel frames with as many clusters as the codebook has codes."""

    def features(row: dict[str, object]) -> np.ndarray:
        return log_mel_features(load_audio(corpus[row["id"]].path))

    chosen = np.random.default_rng(config.seed).permutation(len(train))[: config.kmeans_utterances]
    fit = np.concatenate([features(train[int(i)]) for i in chosen])
    kmeans = MiniBatchKMeans(clusters, batch_size=4096, n_init=1, random_state=config.seed).fit(fit)
    return lambda row: torch.from_numpy(kmeans.predict(features(row))).long()


def check_for_probe(train: Dataset, test: Dataset) -> None:
    """Raise DataError for splits that a recogniser cannot learn from, or not be tested on."""
    if shared := set(train["id"]) & set(test["id"]):
        raise DataError(
            f"the probe would learn from {len(shared)} utterances it is tested on: choose train_splits and test_splits "
            "that share none"
        )
    for name, rows in (("train_splits", train), ("test_splits", test)):
        if not any(rows["text"]):
            raise DataError(f"the probe needs texts, and no utterance of {name} has one: choose probe_steps=0")


def probe(
    config: EvalTokenizerConfig, train: Dataset, test: Dataset, units_of: UnitsOf, size: int
) -> dict[str, object]:
    """Error rates of a small recogniser of units, trained on one part of the corpus and tested on the other."""
    learnt = [(units_of(row), librispeech_normalizer(row["text"])) for row in train if row["text"]]
    spoken = [librispeech_normalizer(text) for text in test["text"] if text]
    read = ctc_probe(learnt, [units_of(row) for row in test if row["text"]], size, config.probe_steps, config.seed)
    words = word_error_rate(spoken, read)
    characters = word_error_rate([*map(spell, spoken)], [*map(spell, read)], normalizer="none")
    return {"wer": words.wer, "wer_ci95": words.ci95, "cer": characters.wer, "cer_ci95": characters.ci95}


def spell(text: str) -> str:
    """Characters as words, the space among them."""
    return " ".join(text.replace(" ", "_"))


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    run_recipe(main, EvalTokenizerConfig)
