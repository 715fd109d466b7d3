"""A language model's vocabulary, extended by one token for every audio code."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict, cast, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from speechllm.encoding import Encoding
from speechllm.projector import add_projector, mean_rows
from speechllm.vocabulary import (
    AudioVocabulary,
    Names,
    Order,
    Template,
    VocabularyError,
    text_token_ids,
    token_names,
)
from tokenizer.interface import AudioTokenizer, DiscreteTokenizer

MARK = "reads_codes_of"  # key in the config.json of an extended model: the codec's fingerprint
Init = Literal["codebook", "mean", "random"]


@dataclass(frozen=True)
class CodeLetters:
    """What the first codes stand for. shares: float [codes, L], how much of each of the L labels is in each code.

    The shares of a code sum to 1, or are all 0: nothing is known of it.
    """

    labels: Sequence[str]
    shares: Tensor


class Extension(TypedDict, total=False):
    """Keyword arguments of `extend_vocabulary`, for functions that pass them on."""

    layers: int
    init: Init
    seed: int
    order: Order
    stack: int
    template: Template
    prefix_attention: bool
    code_letters: CodeLetters | None


def extend_vocabulary(
    model: PreTrainedModel,
    text_tokenizer: PreTrainedTokenizerBase,
    codec: AudioTokenizer,
    layers: int = 1,
    init: Init = "codebook",
    seed: int = 0,
    order: Order = "frame",
    stack: int = 1,
    template: Template = "plain",
    prefix_attention: bool = False,
    code_letters: CodeLetters | None = None,
) -> AudioVocabulary:
    """Add one token per code of the codec's first `layers` codebooks. Changes model and text tokenizer in place.

    The new tokens are <|audio_0|>, <|audio_1|>, ... (`token_names`). Embeddings may be tied or untied, and the model
    may have more rows than its tokenizer has tokens (Qwen2: 151,936 for 151,646; the spare rows were never trained), or
    fewer (`resize_rows`): every new row is initialised here, and every text row stays bit-identical.

    init: "codebook" projects the code vectors to the model's width by a random orthogonal map and gives them the mean
    and per-dimension spread of the text rows, so that similar sounds start with similar rows; "random" has the same
    mean and spread without that structure; "mean" sets all rows to the mean text row.
    order: of the codes of several layers. stack: number of continuous features per token; their projector becomes the
    model's submodule `speech_projector`. template: how conversations are written, see `ConversationWriter`.
    prefix_attention: the tokens of an audio attend to each other in both directions (`require_attention`).
    code_letters: the row of every code that they know begins as the mean of the rows of what the code stands for, so
    that a language model reads a kind of text from the first step on; others begin by `init`.
    Raises VocabularyError for a vocabulary that is already extended, DataError for layers that the codec lacks.
    """
    encoding = Encoding.of(codec, layers)
    if init not in ("codebook", "mean", "random"):
        raise VocabularyError(f'init must be "codebook", "mean" or "random", got {init!r}')
    words, count = text_tokenizer.get_vocab(), encoding.layers * encoding.codebook_size
    last = max(words, key=words.__getitem__)
    if last in [token_names(names, count)[-1] for names in get_args(Names)]:  # tokens of others stand elsewhere
        raise VocabularyError(f"the text tokenizer already ends with {last}: a vocabulary can be extended only once")
    if read := getattr(model.config, MARK, None):
        raise VocabularyError(
            f"the model already reads codes of codec {read}: a vocabulary can be extended only once; to train further, "
            "load the model with the text tokenizer in its folder (`load_language_model`)"
        )
    texts = words[last] + 1  # more than its tokens where ids are left out
    known = model.get_input_embeddings().weight.shape[0]
    specials = {index for index, token in text_tokenizer.added_tokens_decoder.items() if token.special}
    if {index for index in words.values() if index >= known} - specials:
        raise VocabularyError(
            f"the text tokenizer has {texts} tokens, the language model {known} rows: take the one that belongs to it"
        )
    if text_tokenizer.eos_token_id is None:
        raise VocabularyError("the text tokenizer has no end token (eos_token), so no answer would end: set one")
    names = next((names for names in get_args(Names) if not words.keys() & token_names(names, count)), None)
    if names is None:
        raise VocabularyError("the text tokenizer already has some of the audio tokens: use one that was not extended")
    new_tokens = token_names(names, count)
    text_tokenizer.add_tokens(new_tokens, special_tokens=True)
    ids = text_tokenizer.convert_tokens_to_ids(new_tokens)
    if ids[0] < texts:
        raise VocabularyError(
            f"the text tokenizer leaves out some of its {texts} ids, and would give {new_tokens[0]} that of another "
            f"token ({ids[0]}): renumber its vocabulary"
        )
    rows = max(known, ids[-1] + 1)
    matrices = resize_rows(model, ids[0], rows)

    vectors = (
        cast(DiscreteTokenizer, codec).codebooks[:layers].flatten(0, 1)
        if encoding.kind == "codes"
        else torch.empty(0, 1)
    )
    if code_letters is not None:
        if not 0 < len(code_letters.shares) <= len(vectors):
            raise VocabularyError(f"letters of {len(code_letters.shares)} codes do not fit the codec's {len(vectors)}")
        label_ids = text_token_ids(text_tokenizer, code_letters.labels)
        told = (code_letters.shares.sum(1) > 0).cpu()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for matrix in matrices:
            rows_new = new_rows(matrix[: min(texts, known)], vectors, len(ids), init, generator)
            if code_letters is not None:
                letters = code_letters.shares.float().cpu() @ mean_rows(matrix, label_ids).cpu()
                rows_new[: len(told)][told] = letters[told]
            matrix[ids[0] : ids[0] + len(ids)] = rows_new.to(matrix)
    stack = stack if encoding.kind == "features" else 1
    ends = ids[0], ids[count], ids[count + 1], rows
    vocabulary = AudioVocabulary(encoding, *ends, order, stack, template, prefix_attention, names)
    add_projector(model, vocabulary, text_token_ids(text_tokenizer, getattr(codec, "labels", ())))
    setattr(model.config, MARK, encoding.fingerprint)
    return vocabulary


def resize_rows(model: PreTrainedModel, texts: int, rows: int) -> list[Tensor]:
    """Give a language model so many rows, in place. Returns its matrices [rows, H]: one if they are tied, or two.

    A text tokenizer may have special tokens that its model has no rows for, such as Gemma-3's for images in models
    without eyes. No text has them; below `texts`, their rows repeat the last one, equal wherever the model is loaded.
    """
    known = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(rows, mean_resizing=False)
    matrices = [model.get_input_embeddings().weight]
    output = model.get_output_embeddings()
    if output is not None and output.weight is not matrices[0]:
        matrices.append(output.weight)
    with torch.no_grad():
        for matrix in matrices:
            matrix[known:texts] = matrix[known - 1]
    return matrices


def new_rows(text_rows: Tensor, vectors: Tensor, count: int, init: str, generator: torch.Generator) -> Tensor:
    """Rows float [count, H] for code vectors [M, D], M <= count, and markers, distributed like text rows [V, H]."""
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
    """Statistics of an extended vocabulary: norms of text and new rows, number of distinct new rows, their mean cosine.

    With a cosine near 1 or few distinct rows, codes are indistinguishable. The rows are those of the input embedding.
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
