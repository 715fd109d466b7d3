"""What the codes of a trained tokenizer contain: codebook usage, phone and speaker information."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenizer.codec.log_mel import LogMel
from tokenizer.errors import InputError, text_list
from tokenizer.rates import HOP_LENGTH


def codebook_usage(ids: np.ndarray, size: int) -> dict[str, float]:
    """Usage of one codebook over a corpus, ids int [M]: used and dead codes, and perplexity exp(entropy)."""
    return usage_of_counts(np.bincount(ids, minlength=size))


def count_codes(utterances: Iterable[np.ndarray], layers: int, size: int) -> tuple[np.ndarray, int]:
    """How often each code occurs in utterances, ids int [Q, T_i] -> counts int [Q, K], and how many utterances."""
    counts, read = np.zeros((layers, size), int), 0
    for ids in utterances:
        counts += np.stack([np.bincount(layer, minlength=size) for layer in ids])
        read += 1
    return counts, read


def usage_of_counts(counts: np.ndarray) -> dict[str, float]:
    """As `codebook_usage`, from the number of uses of each code, int [K]."""
    share = counts[counts > 0] / counts.sum()
    used = int((counts > 0).sum())
    return {"used": used, "dead": len(counts) - used, "perplexity": float(np.exp(-(share * np.log(share)).sum()))}


def label_information(ids: np.ndarray, labels: Sequence[str], sizes: Sequence[int] = ()) -> dict[str, Any]:
    """Information in the codes int [M] about the labels of their frames (HuBERT, arXiv 2106.07447, section IV-C).

    purity: fraction of frames whose label is the most frequent one of their code.
    pnmi: mutual information of codes and labels divided by the entropy of the labels; 1 if codes determine labels.
    pnmi_ci95: its 95 % interval by the jackknife over utterances of these sizes in frames, with two or more of them.
    (To draw utterances again, as elsewhere, raises the information itself: what is drawn twice looks determined.)
    Raises InputError unless there is one label, a text, for each frame, and the sizes add up to M.
    """
    names, label_ids = np.unique(np.asarray(text_list(labels, "labels")), return_inverse=True)
    if len(label_ids) != len(ids):
        raise InputError(f"{len(ids)} codes but {len(label_ids)} labels: there must be one label for each frame")
    joint = np.zeros((int(ids.max()) + 1, len(names)))
    np.add.at(joint, (ids, label_ids), 1)
    found = {"purity": float(joint.max(1).sum() / joint.sum()), "pnmi": _pnmi(joint)}
    if sizes and sum(sizes) != len(ids):
        raise InputError(f"{len(ids)} codes, but the sizes of the utterances add up to {sum(sizes)}")
    if len(sizes) < 2:
        return found
    without = []
    for own in np.split(np.stack([ids, label_ids], 1), np.cumsum(sizes)[:-1]):
        np.add.at(joint, (own[:, 0], own[:, 1]), -1)
        without.append(_pnmi(joint))
        np.add.at(joint, (own[:, 0], own[:, 1]), 1)
    error = float(np.sqrt((len(sizes) - 1) * np.var(without)))
    return {**found, "pnmi_ci95": [found["pnmi"] - 1.96 * error, found["pnmi"] + 1.96 * error]}


def _pnmi(joint: np.ndarray) -> float:
    """As `label_information`, from the number of frames with each code and label, float [K, L]."""
    share = joint / joint.sum()
    label_share, code_share = share.sum(0), share.sum(1)
    seen = share > 0
    information = (share[seen] * np.log(share[seen] / np.outer(code_share, label_share)[seen])).sum()
    known = label_share[label_share > 0]
    entropy = -(known * np.log(known)).sum()
    return float(information / entropy) if entropy > 0 else 0.0


def speaker_accuracy(utterances: Sequence[np.ndarray], speakers: Sequence[str], size: int) -> float:
    """Accuracy of classifying speakers by code histograms: nearest class mean, every second utterance held out.

    utterances: codes int [T_i] of one layer; size: K. Chance level is one over the number of speakers.
    Raises InputError unless there is one speaker for each utterance, and one with two of them.
    """
    if len(speakers := text_list(speakers, "speakers")) != len(utterances):
        raise InputError(f"{len(utterances)} utterances but {len(speakers)} speakers: there must be one for each")
    if len(set(speakers)) == len(speakers):
        raise InputError("no speaker has a second utterance: there is nothing to test on")
    histograms = np.stack([np.sqrt(np.bincount(ids, minlength=size) / len(ids)) for ids in utterances])
    names, labels = np.unique(np.asarray(speakers), return_inverse=True)
    rank = np.zeros(len(labels), int)
    for label in range(len(names)):
        rank[labels == label] = np.arange((labels == label).sum())
    known = rank % 2 == 0
    means = np.stack([histograms[known & (labels == label)].mean(0) for label in range(len(names))])
    guesses = (histograms[~known] @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T).argmax(1)
    return float((guesses == labels[~known]).mean())


def log_mel_features(waveform: Tensor) -> np.ndarray:
    """Baseline features without training: log-mel, two 10 ms frames stacked, normalised over the utterance.

    waveform float [N] at 16 kHz -> float [ceil(N / 320), 160].
    """
    padded = torch.nn.functional.pad(waveform, (0, -waveform.shape[0] % HOP_LENGTH))
    features = LogMel()(padded[None])[0].T.unflatten(0, (-1, 2)).flatten(1)
    return ((features - features.mean(0)) / (features.std(0, correction=0) + 1e-5)).numpy()
