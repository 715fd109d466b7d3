"""Emotion recognition from audio tokens: labelled utterances, folds over actors, and BERT as the classifier."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from speechllm.data.encoded import codes_of
from speechllm.encoding import DataError, Encoding
from speechllm.extension import new_rows
from tokenizer.errors import InputError
from tokenizer.interface import Codes
from tokenizer.pretrained import check_folder, load_complete, load_config
from tokenizer.ravdess import parse_ravdess

EMOTIONS = ("neutral", "happy", "sad", "angry")  # the paper's four of the eight of RAVDESS


@dataclass(frozen=True)
class EmotionalSpeech:
    """One labelled utterance: codes long [Q, T]; label: index into EMOTIONS; actor: the speaker."""

    id: str
    codes: Tensor
    label: int
    actor: int


def emotional_speech(
    rows: Iterable[dict[str, Any]], encoding: Encoding, layers: Sequence[int]
) -> list[EmotionalSpeech]:
    """The codes of the given layers of all utterances with one of the four emotions, according to their ids.

    Raises DataError without codes, for a layer that the codes lack, or if no id is a RAVDESS name with such an emotion.
    """
    absent = [layer for layer in layers if layer >= encoding.layers]
    if absent and encoding.kind == "codes":
        raise DataError(
            f"the codes have {encoding.layers} layer(s), counted from 0, but not layer {absent[0]}: "
            "encode the speech again with more layers"
        )
    found, first = [], None
    for row in rows:
        first = first or row["id"]
        name = parse_ravdess(str(row["id"]))
        if name and name.emotion in EMOTIONS:
            codes = codes_of(row, encoding)[list(layers)]
            found.append(EmotionalSpeech(str(row["id"]), codes, EMOTIONS.index(name.emotion), name.actor))
    if not found:
        raise DataError(
            f"no utterance has one of the emotions {', '.join(EMOTIONS)}: expected file names of RAVDESS as ids, such "
            f"as 03-01-05-01-02-02-16, found {first!r}; use the file names as ids in the manifest"
        )
    return found


def actor_folds(actors: Iterable[int], folds: int, seed: int = 0) -> list[list[int]]:
    """Split actors into folds whose sizes differ by at most one actor, also among men and among women.

    Raises DataError for fewer actors than folds.
    """
    generator = np.random.default_rng(seed)
    everyone = sorted(set(actors))
    if len(everyone) < folds:
        raise DataError(f"{folds} folds need at least as many actors, found {len(everyone)}: use fewer folds")
    genders = [[actor for actor in everyone if actor % 2 == odd] for odd in (1, 0)]  # men have odd numbers
    order = [int(actor) for gender in genders for actor in generator.permutation(gender)]
    return [sorted(order[fold::folds]) for fold in range(folds)]


class EmotionClassifier(nn.Module):
    """BERT over frames of audio tokens, whose outputs are averaged over time, with one class per emotion.

    The mean, because a few hundred utterances do not teach a marker where to look (recipes/RESULTS.md). The embeddings
    of a frame's layers are summed, so that several layers need no more positions. The token embeddings of `bert` are
    replaced by those of the codes, codebooks float [Q, K, D]: with init "codebook" they are the projected code vectors
    with the statistics of the old embeddings, see `new_rows`.
    """

    offsets: Tensor

    def __init__(
        self, bert: BertModel, codebooks: Tensor, init: Literal["codebook", "random"] = "codebook", seed: int = 0
    ):
        super().__init__()
        layers, size, _ = codebooks.shape
        vectors = codebooks.flatten(0, 1)
        generator = torch.Generator().manual_seed(seed)
        rows = new_rows(bert.get_input_embeddings().weight.detach(), vectors, len(vectors), init, generator)
        bert.set_input_embeddings(nn.Embedding.from_pretrained(rows, freeze=False))
        bert.config.vocab_size = len(rows)
        self.bert, self.dropout = bert, nn.Dropout(bert.config.hidden_dropout_prob)
        self.output = nn.Linear(bert.config.hidden_size, len(EMOTIONS))
        nn.init.normal_(self.output.weight, std=bert.config.initializer_range)
        self.register_buffer("offsets", size * torch.arange(layers)[:, None])

    def forward(self, codes: Codes) -> Tensor:
        """Codes long [B, Q, T] -> logits float [B, emotions]; those of an utterance do not depend on its batch."""
        frames = self.bert.get_input_embeddings()(codes.ids + self.offsets).sum(1)
        lengths = codes.lengths[:, None].to(frames.device)
        inside = torch.arange(frames.shape[1], device=frames.device) < lengths
        states = self.bert(inputs_embeds=frames, attention_mask=inside.long()).last_hidden_state
        return self.output(self.dropout((states * inside[..., None]).sum(1) / lengths))


def load_bert(name: str | Path) -> BertModel:
    """A pretrained BERT, without any head.

    Raises FileNotFoundError, or InputError for another kind of model or a checkpoint that is damaged or incomplete.
    """
    name = check_folder(name, ["config.json"], "a BERT")
    if (found := load_config(name, "a BERT").model_type) != "bert":
        raise InputError(f"{name} is a {found} model: expected a BERT, such as bert-base-uncased")
    return load_complete(BertModel, name, "a BERT", add_pooling_layer=False)


def small_bert(hidden_size: int = 768, **shape: Any) -> BertModel:
    """A BERT with random weights; shape: further sizes of BertConfig.

    Models narrower than BERT-base get larger initial weights, because sums over fewer inputs are smaller.
    """
    config = BertConfig(
        vocab_size=1000,  # replaced by the codes, which take over their mean and spread
        hidden_size=hidden_size,
        **{"initializer_range": 0.02 * (768 / hidden_size) ** 0.5, **shape},
    )
    return BertModel(config, add_pooling_layer=False)
