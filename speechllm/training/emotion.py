"""Emotion recognition from audio tokens: who is labelled how, folds over actors, and BERT as the classifier."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from speechllm.data.shards import codes_of
from speechllm.encoding import DataError, Encoding
from speechllm.extension import new_rows
from tokenizer.interface import Codes
from tokenizer.ravdess import parse_ravdess

EMOTIONS = ("neutral", "happy", "sad", "angry")  # the paper's four of the eight of RAVDESS


@dataclass(frozen=True)
class EmotionalSpeech:
    """One labelled utterance: codes long [Q, T]; label: its place in EMOTIONS; actor: its speaker."""

    id: str
    codes: Tensor
    label: int
    actor: int


def emotional_speech(
    rows: Iterable[dict[str, Any]], encoding: Encoding, layers: Sequence[int]
) -> list[EmotionalSpeech]:
    """The codes of some layers of all utterances that have one of the four emotions, which their ids tell.

    Raises DataError when there are no codes, when they lack a layer, or no id is a RAVDESS name with an emotion.
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
            f"no utterance has an emotion of {', '.join(EMOTIONS)}: expected ids such as 03-01-05-01-02-02-16, the "
            f"file names of RAVDESS, found {first!r}; give the utterances of the manifest these names as ids"
        )
    return found


def actor_folds(actors: Iterable[int], folds: int, seed: int = 0) -> list[list[int]]:
    """Deal actors out: each stands in one fold, and folds differ by at most one actor, one man and one woman.

    Raises DataError for fewer actors than folds.
    """
    generator = np.random.default_rng(seed)
    everyone = sorted(set(actors))
    if len(everyone) < folds:
        raise DataError(f"{folds} folds need as many actors, but there are {len(everyone)}: ask for fewer folds")
    genders = [[actor for actor in everyone if actor % 2 == odd] for odd in (1, 0)]  # men have odd numbers
    order = [int(actor) for gender in genders for actor in generator.permutation(gender)]
    return [sorted(order[fold::folds]) for fold in range(folds)]


class EmotionClassifier(nn.Module):
    """BERT over frames of audio tokens: a marker and then one position a frame, with a class for each emotion.

    The embeddings of a frame's layers are summed, so that several layers need no further positions. The token
    embeddings of `bert` are replaced by those of the codes, codebooks float [Q, K, D]: with init "codebook" they are
    the projected code vectors, in the likeness of those that were there, see `new_rows`.
    """

    offsets: Tensor

    def __init__(
        self,
        bert: BertForSequenceClassification,
        codebooks: Tensor,
        init: Literal["codebook", "random"] = "codebook",
        seed: int = 0,
    ):
        super().__init__()
        layers, size, _ = codebooks.shape
        vectors = codebooks.flatten(0, 1)
        generator = torch.Generator().manual_seed(seed)
        rows = new_rows(bert.get_input_embeddings().weight.detach(), vectors, len(vectors) + 1, init, generator)
        bert.set_input_embeddings(nn.Embedding.from_pretrained(rows, freeze=False))
        bert.config.vocab_size = len(rows)
        self.bert = bert
        self.register_buffer("offsets", size * torch.arange(layers)[:, None])
        self.marker = layers * size  # the row behind the codes

    def forward(self, codes: Codes) -> Tensor:
        """Logits float [B, emotions] of codes long [B, Q, T]; an utterance gets the same in any batch."""
        embed = self.bert.get_input_embeddings()
        frames = embed(codes.ids + self.offsets).sum(1)
        marker = embed.weight[self.marker].expand(len(codes), 1, -1)
        places = torch.arange(frames.shape[1] + 1, device=frames.device)
        mask = places <= codes.lengths[:, None].to(frames.device)
        return self.bert(inputs_embeds=torch.cat([marker, frames], 1), attention_mask=mask.long()).logits


def small_bert(hidden_size: int = 768, **shape: Any) -> BertForSequenceClassification:
    """A BERT with random weights and a class for each emotion; `shape` are further sizes of BertConfig.

    Weights are drawn wider where the model is narrower than BERT-base: with its 0.02 the marker would hardly hear the
    frames at first.
    """
    config = BertConfig(
        vocab_size=1000,  # the codes will replace these words, and take their mean and spread
        num_labels=len(EMOTIONS),
        hidden_size=hidden_size,
        **{"initializer_range": 0.02 * (768 / hidden_size) ** 0.5, **shape},
    )
    return BertForSequenceClassification(config)
