"""What the codes hold: codebook use, content of layer 0 against log-mel k-means, voice in layers 0 and 1.

    python recipes/eval_tokenizer.py codes=CODES data=CORPUS output=results.json test_splits=[test]

Content needs a corpus with a phone alignment, or one whose texts are single words; it is left out otherwise.
"""

from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from sklearn.cluster import MiniBatchKMeans

from speechllm import (
    Encoding,
    Utterance,
    codebook_usage,
    codes_of,
    frame_phones,
    label_information,
    load_audio,
    load_codes,
    log_mel_features,
    read_corpus,
    run_recipe,
    speaker_accuracy,
    write_json,
)


@dataclass
class EvalTokenizerConfig:
    codes: str  # folder of encode_speech, with at least two layers for the voice
    data: str  # the corpus that was encoded
    output: str  # JSON file
    train_splits: list[str] | None = None  # for the k-means baseline and the voices, all when null
    test_splits: list[str] | None = None  # for codebook use and content, all when null
    kmeans_utterances: int = 400  # training utterances the baseline's clusters are fitted on
    seed: int = 0


def main(config: EvalTokenizerConfig) -> None:
    train, encoding = load_codes(config.codes, config.train_splits)
    test, _ = load_codes(config.codes, config.test_splits)
    corpus = {utterance.id: utterance for utterance in read_corpus(config.data)}
    results = {"usage": usage(test, encoding), "speaker": speakers(train, encoding)}
    labels = frame_labels(test, corpus, encoding)
    if labels is not None:
        kind, per_frame = labels
        layer0 = np.concatenate([codes_of(row, encoding)[0].numpy() for row in test])
        baseline = log_mel_clusters(config, train, test, corpus, encoding.codebook_size)
        results["content"] = {
            "label": kind,
            "layer_0": label_information(layer0, per_frame),
            "log_mel_kmeans": label_information(baseline, per_frame),
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


def frame_labels(codes: Dataset, corpus: dict[str, Utterance], encoding: Encoding) -> tuple[str, list[str]] | None:
    """("phone" or "word", label of every frame) where the corpus knows them."""
    counts = [len(row["codes"]) // encoding.layers for row in codes]
    utterances = [corpus[row["id"]] for row in codes]
    if all(utterance.phones for utterance in utterances):
        pairs = zip(utterances, counts, strict=True)
        return "phone", [label for u, n in pairs for label in frame_phones(u, n, encoding.frame_rate)]
    if all(utterance.text and " " not in utterance.text for utterance in utterances):
        return "word", [u.text for u, n in zip(utterances, counts, strict=True) for _ in range(n)]
    return None


def log_mel_clusters(
    config: EvalTokenizerConfig, train: Dataset, test: Dataset, corpus: dict[str, Utterance], clusters: int
) -> np.ndarray:
    """Codes of the baseline: k-means of log-mel frames with as many clusters as the codebook has codes."""
    chosen = np.random.default_rng(config.seed).permutation(len(train))[: config.kmeans_utterances]
    fit = np.concatenate([log_mel_features(load_audio(corpus[train[int(i)]["id"]].path)) for i in chosen])
    kmeans = MiniBatchKMeans(clusters, batch_size=4096, n_init=1, random_state=config.seed).fit(fit)
    return np.concatenate([kmeans.predict(log_mel_features(load_audio(corpus[row["id"]].path))) for row in test])


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    run_recipe(main, EvalTokenizerConfig)
