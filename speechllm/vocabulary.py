"""New words for a language model: one token per audio code, beside two markers."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from speechllm.data import DataError, Encoding, Speech
from speechllm.projector import add_projector
from speechllm.run import write_json
from tokenizer import AudioTokenizer, Codes, DiscreteTokenizer

START, END = "<|audio_start|>", "<|audio_end|>"
FILE = "audio_vocabulary.json"
MARK = "reads_codes_of"  # key of an extended model's config.json: the codec's fingerprint
Order = Literal["frame", "layer", "delay", "semantic"]


class VocabularyError(ValueError):
    """A vocabulary that cannot be extended, or codes it has no tokens for."""


@dataclass(frozen=True)
class AudioVocabulary:
    """Which token ids mean which codes: id = offset + layer * codebook_size + code.

    The codec's fingerprint and rates travel with it, so that codes of another codec are refused. Continuous features
    have a single code, a placeholder whose embeddings come from a projector; texts are ordinary text tokens.
    """

    encoding: Encoding
    offset: int  # id of code 0 of layer 0
    start_id: int
    end_id: int
    size: int  # all token ids lie below: rows of the embedding matrix
    order: Order = "frame"  # of the codes of several layers, see `arrangement`
    stack: int = 1  # features that share one placeholder

    def token_ids(self, speech: Codes | Speech, text_tokenizer: PreTrainedTokenizerBase | None = None) -> Tensor:
        """Ids of one utterance with the start and end markers around them.

        speech: codes long [Q, T] (or `Codes` of a single utterance) -> long [Q * T + 2], in `order`; features float
        [T, C] -> long [ceil(T / stack) + 2]; a text, which needs the text tokenizer -> its tokens between the markers.
        Raises VocabularyError for codes outside the codebooks, and for another kind of speech than the vocabulary's.
        """
        if isinstance(speech, Codes):
            if len(speech) != 1:
                raise VocabularyError(f"expected one utterance, got {len(speech)}: use codes.utterance(i)")
            speech = speech.utterance(0)
        match self.encoding.kind, speech:
            case "text", str() if text_tokenizer is not None:
                ids = torch.tensor(text_token_ids(text_tokenizer, [speech])[0], dtype=torch.long)
            case "features", Tensor() if speech.is_floating_point():
                ids = torch.full((math.ceil(len(speech) / self.stack),), self.offset)
            case "codes", Tensor() if not speech.is_floating_point():
                ids = self._code_ids(speech)
            case kind, _:
                needs = ", and the text tokenizer" if kind == "text" else ""
                raise VocabularyError(f"this vocabulary needs {kind}{needs}, got {_describe(speech)}")
        return torch.cat([ids.new_tensor([self.start_id]), ids, ids.new_tensor([self.end_id])])

    def _code_ids(self, codes: Tensor) -> Tensor:
        layers, size = self.encoding.layers, self.encoding.codebook_size
        if codes.ndim != 2 or codes.shape[0] < layers:
            raise VocabularyError(f"expected codes [{layers}, T], got {tuple(codes.shape)}")
        codes = codes[:layers]
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < size:
            raise VocabularyError(f"codes must be 0..{size - 1}, got {int(codes.min())}..{int(codes.max())}")
        ids = codes + self.offset + size * torch.arange(layers, device=codes.device)[:, None]
        return ids.flatten()[self.arrangement(codes.shape[1]).to(codes.device)]

    def arrangement(self, frames: int) -> Tensor:
        """In which order the codes [Q, T] of T frames are read: long [Q * T], places in the flattened codes.

        frame: all layers of frame 0, then of frame 1, ...; layer: all of layer 0, then of layer 1, ...;
        delay: layer q comes q frames later (Copet et al. 2023, "delay pattern", one code after the other);
        semantic: all of layer 0, then the other layers frame by frame (AudioLM: Borsos et al. 2022).
        """
        layers = self.encoding.layers
        layer, frame = torch.arange(layers)[:, None], torch.arange(frames)[None]
        rank = {
            "frame": frame * layers + layer,
            "layer": layer * frames + frame,
            "delay": (frame + layer) * layers + layer,
            "semantic": torch.where(layer == 0, frame, frames + frame * layers + layer),
        }[self.order]
        return rank.flatten().argsort()

    def features(self, speech: Codes | Speech) -> Tensor | None:
        """What the placeholders stand for, float [P, C * stack], the last one filled up with zeros; None for others."""
        if not isinstance(speech, Tensor) or not speech.is_floating_point():
            return None
        missing = -len(speech) % self.stack
        return torch.nn.functional.pad(speech, (0, 0, 0, missing)).view(-1, self.stack * speech.shape[1])

    def is_code(self, ids: Tensor) -> Tensor:
        """bool, like ids: which are audio codes or placeholders (not markers, not text)."""
        return (ids >= self.offset) & (ids < self.start_id)

    @property
    def new_ids(self) -> Tensor:
        """Every token id that was added: the codes', then the markers'."""
        codes = torch.arange(self.encoding.layers * self.encoding.codebook_size) + self.offset
        return torch.cat([codes, torch.tensor([self.start_id, self.end_id])])

    def neighbours(self, codebooks: Tensor, count: int = 8) -> Tensor:
        """For every token id its `count` closest codes' ids (its own, where the id is no code), long [size, count].

        codebooks float [Q, K, D]: distances between the code vectors of a layer.
        """
        count = min(count, self.encoding.codebook_size - 1)
        ids = torch.arange(self.size)[:, None].repeat(1, count)
        for layer in range(self.encoding.layers):
            first = self.offset + layer * self.encoding.codebook_size
            distance = torch.cdist(codebooks[layer].float().cpu(), codebooks[layer].float().cpu())
            distance.fill_diagonal_(torch.inf)
            ids[first : first + len(distance)] = first + distance.topk(count, largest=False).indices
        return ids

    def require(self, encoding: Encoding) -> None:
        """Raise DataError unless codes made with `encoding` fit this vocabulary."""
        encoding.require(self.encoding.fingerprint, "the language model's vocabulary")
        if encoding.layers < self.encoding.layers:
            raise DataError(
                f"the codes have {encoding.layers} layer(s), the vocabulary needs {self.encoding.layers}: "
                "encode the speech again with more layers"
            )

    def save(self, folder: str | Path) -> None:
        """Write audio_vocabulary.json beside the model's weights."""
        write_json(Path(folder) / FILE, asdict(self))

    @staticmethod
    def load(folder: str | Path) -> "AudioVocabulary":
        """Read audio_vocabulary.json. Raises VocabularyError when the folder has none."""
        file = Path(folder) / FILE
        if not file.is_file():
            raise VocabularyError(f"{folder} has no {FILE}: it is not a model whose vocabulary was extended with audio")
        values = json.loads(file.read_text(encoding="utf-8"))
        return AudioVocabulary(**{**values, "encoding": Encoding(**values["encoding"])})


def extend_vocabulary(
    model: PreTrainedModel,
    text_tokenizer: PreTrainedTokenizerBase,
    codec: AudioTokenizer,
    layers: int = 1,
    init: Literal["codebook", "mean", "random"] = "codebook",
    seed: int = 0,
    order: Order = "frame",
    stack: int = 1,
) -> AudioVocabulary:
    """Give a language model one token per code of the codec's first `layers` codebooks. Changes both in place, once.

    The strings are <|audio_0|>, <|audio_1|>, ...; tied and untied models work, and so do models with more rows than
    their tokenizer has tokens (Qwen2: 151,936 for 151,646), whose spare rows were never trained: every new row is
    initialised here, every text row stays bit for bit what it was.

    init: "codebook" projects the code vectors to the model's width by a random orthogonal map, and gives them the
    mean and per-dimension spread of the text rows, so that similar sounds start similar; "random" has the same mean
    and spread without the structure; "mean" makes all rows the mean text row.
    order: of the codes of several layers. stack: continuous features that make one token; what turns them into
    embeddings becomes the model's submodule `speech_projector`.
    Raises VocabularyError for a vocabulary that is extended already, DataError for layers that the codec lacks.
    """
    encoding = Encoding.of(codec, layers)
    if init not in ("codebook", "mean", "random"):
        raise VocabularyError(f'init must be "codebook", "mean" or "random", got {init!r}')
    if START in text_tokenizer.get_vocab():
        raise VocabularyError(f"the text tokenizer already has {START}: a vocabulary is extended once only")
    if read := getattr(model.config, MARK, None):
        raise VocabularyError(
            f"the model already reads codes, of codec {read}: a vocabulary is extended once only, and the text "
            "tokenizer to go on with lies in the model's folder (`load_language_model`)"
        )
    texts = len(text_tokenizer)
    count = encoding.layers * encoding.codebook_size
    names = [f"<|audio_{code}|>" for code in range(count)] + [START, END]
    added = text_tokenizer.add_tokens(names, special_tokens=True)
    ids = text_tokenizer.convert_tokens_to_ids(names)
    if added != len(names) or ids != list(range(ids[0], ids[0] + len(names))):
        raise VocabularyError("the text tokenizer already holds some of the audio tokens: start from an unextended one")
    rows = max(model.get_input_embeddings().weight.shape[0], len(text_tokenizer))
    model.resize_token_embeddings(rows, mean_resizing=False)

    vectors = (
        cast(DiscreteTokenizer, codec).codebooks[:layers].flatten(0, 1)
        if encoding.kind == "codes"
        else torch.empty(0, 1)
    )
    generator = torch.Generator().manual_seed(seed)
    matrices = [model.get_input_embeddings().weight]
    output = model.get_output_embeddings()
    if output is not None and output.weight is not matrices[0]:
        matrices.append(output.weight)
    with torch.no_grad():
        for matrix in matrices:
            rows_new = new_rows(matrix[:texts], vectors, len(names), init, generator)
            matrix[ids[0] : ids[0] + len(names)] = rows_new.to(matrix)
    stack = stack if encoding.kind == "features" else 1
    vocabulary = AudioVocabulary(encoding, ids[0], ids[count], ids[count + 1], rows, order, stack)
    add_projector(model, vocabulary)
    setattr(model.config, MARK, encoding.fingerprint)
    return vocabulary


def _describe(speech: Speech) -> str:
    return "a text" if isinstance(speech, str) else f"a tensor of {speech.dtype}"


def new_rows(text_rows: Tensor, vectors: Tensor, count: int, init: str, generator: torch.Generator) -> Tensor:
    """Rows float [count, H] for code vectors [M, D], M <= count, and markers, in the likeness of text rows [V, H]."""
    text_rows, vectors = text_rows.float().cpu(), vectors.float().cpu()
    mean, spread = text_rows.mean(0), text_rows.std(0)
    noise = torch.randn(count, text_rows.shape[1], generator=generator)
    if init == "mean":
        return mean.expand(count, -1).clone()
    if init == "codebook" and len(vectors):
        width = max(vectors.shape[1], text_rows.shape[1])
        square = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
        projected = vectors @ square[: vectors.shape[1], : text_rows.shape[1]]
        noise[: len(vectors)] = (projected - projected.mean(0)) / projected.std(0).clamp(min=1e-6)
    return mean + noise * spread


def describe_rows(model: PreTrainedModel, vocabulary: AudioVocabulary) -> dict[str, float]:
    """Report of an extended vocabulary: norms of text and new rows, how many new rows differ, their mean cosine.

    A cosine near 1 or few distinct rows: codes cannot be told apart. The rows are those of the input embedding.
    """
    weight = model.get_input_embeddings().weight.detach().float()
    new = weight[vocabulary.new_ids]
    unit = torch.nn.functional.normalize(new, dim=1)
    cosine = ((unit.sum(0).square().sum() - len(unit)) / (len(unit) * (len(unit) - 1))).item()
    return {
        "text_row_norm": weight[: vocabulary.offset].norm(dim=1).mean().item(),
        "new_row_norm": new.norm(dim=1).mean().item(),
        "distinct_new_rows": len(new.unique(dim=0)),
        "new_row_cosine": cosine,
    }


def text_token_ids(text_tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Ids of plain texts. A transcript that contains "<|audio_5|>" stays text: it cannot smuggle audio in."""
    if not texts:
        return []
    return text_tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]
