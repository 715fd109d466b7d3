"""Continuous features as input of a language model: projected features replace the embeddings of placeholders."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from tokenizer.pretrained import fill_weights, read_weights

if TYPE_CHECKING:
    from speechllm.vocabulary import AudioVocabulary


NAME = "speech_projector"  # of the submodule
FILE = "speech_projector.safetensors"


class SpeechProjector(nn.Module):
    """Features float [P, C] -> embeddings float [P, H]: layer normalisation and two linear layers with GELU between.

    Where the last features are probabilities of labels, such as letters, the embeddings begin as the expected ones of
    these labels, so that a language model reads text from the first step on; what the layers add begins at zero.
    """

    def __init__(self, width: int, hidden: int, spread: float = 1.0, labels: int = 0):
        """spread: approximate initial standard deviation of the embeddings, such as that of texts."""
        super().__init__()
        self.normalization = nn.LayerNorm(width)
        self.inner, self.outer = nn.Linear(width, hidden), nn.Linear(hidden, hidden)
        nn.init.normal_(self.outer.weight, std=0.0 if labels else spread * math.sqrt(2 / hidden))
        nn.init.zeros_(self.outer.bias)
        self.rows = nn.Parameter(torch.zeros(labels, hidden)) if labels else None

    def forward(self, features: Tensor) -> Tensor:
        projected = self.outer(nn.functional.gelu(self.inner(self.normalization(features))))
        return projected if self.rows is None else projected + features[:, -len(self.rows) :] @ self.rows


def add_projector(
    model: PreTrainedModel, vocabulary: "AudioVocabulary", label_ids: Sequence[Sequence[int]] = ()
) -> None:
    """Add a projector for the vocabulary's features to a language model, as its submodule `speech_projector`.

    Does nothing for a vocabulary of codes or texts. label_ids: of each label, the tokens of its text, whose mean
    embedding it begins with.
    """
    if vocabulary.encoding.kind == "features":
        embedding = model.get_input_embeddings()
        rows = embedding.weight
        scale = float(getattr(embedding, "embed_scale", 1.0))  # Gemma's layer multiplies what it looks up
        width = vocabulary.encoding.width * vocabulary.stack
        # stacked, the last features are those of one label of several
        labels = len(vocabulary.encoding.labels) if vocabulary.stack == 1 else 0
        projector = SpeechProjector(width, rows.shape[1], scale * float(rows.detach().float().std()), labels)
        if projector.rows is not None and label_ids:
            projector.rows.data.copy_(scale * mean_rows(rows.detach(), label_ids))
        model.add_module(NAME, projector.to(rows))


def mean_rows(rows: Tensor, label_ids: Sequence[Sequence[int]]) -> Tensor:
    """The mean of the rows [V, H] of each label's tokens, float32 [L, H]; zeros for a label without any."""
    none = rows.new_zeros(rows.shape[1], dtype=torch.float32)
    return torch.stack([rows[list(ids)].float().mean(0) if ids else none for ids in label_ids])


def save_with_projector(model: PreTrainedModel, folder: str | Path) -> None:
    """`save_pretrained`, with the projector, if there is one, in a file of its own."""
    own = {name: weight for name, weight in model.state_dict().items() if not name.startswith(f"{NAME}.")}
    model.save_pretrained(folder, state_dict=own)
    if hasattr(model, NAME):
        save_file(model.speech_projector.state_dict(), Path(folder) / FILE)


def load_projector(model: PreTrainedModel, vocabulary: "AudioVocabulary", folder: str | Path) -> None:
    """Load the projector that `save_with_projector` wrote into a language model."""
    add_projector(model, vocabulary)
    if vocabulary.encoding.kind == "features":
        file = Path(folder) / FILE
        fill_weights(model.speech_projector, read_weights(file, "the projector of a speech language model"), file)


def model_inputs(
    model: Any, vocabulary: "AudioVocabulary", input_ids: Tensor, features: Tensor | None
) -> dict[str, Any]:
    """Input arguments of a language model, with or without an adapter.

    input_ids long [B, S]; features float [P, C * stack], one for each of the P placeholders among the ids, or None
    without placeholders.
    """
    if vocabulary.encoding.kind != "features":
        return {"input_ids": input_ids}
    vectors = model.get_input_embeddings()(input_ids)
    if features is None:  # no audio; the projector takes part all the same, because processes wait for its gradient
        features = vectors.new_zeros(0, vocabulary.encoding.width * vocabulary.stack)
    projected = model.speech_projector(features.to(vectors)).to(vectors)  # autocast may have lowered the precision
    return {"inputs_embeds": vectors.masked_scatter(vocabulary.is_code(input_ids)[..., None], projected)}
