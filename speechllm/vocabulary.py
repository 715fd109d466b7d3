"""Audio tokens in the vocabulary of a language model: one token per code, and two markers."""

import math
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from speechllm.encoding import DataError, Encoding, Speech
from tokenizer.errors import InputError
from tokenizer.files import write_json
from tokenizer.interface import Codes
from tokenizer.reading import AGAIN, read_json_object, reading

FILE = "audio_vocabulary.json"

Order = Literal["frame", "layer", "delay", "semantic"]
Template = Literal["plain", "chat"]
Names = Literal["audio", "speech"]  # of added tokens, see `token_names`

# of text tokenizers, whose settings change from call to call: they must not be used in two threads at once
_LOCK = threading.Lock()


class VocabularyError(InputError):
    """A vocabulary that cannot be extended, or codes that it has no tokens for."""


@dataclass(frozen=True)
class AudioVocabulary:
    """Token ids of codes: id = offset + layer * codebook_size + code.

    It includes the codec's fingerprint and rates, so that codes of another codec are refused. Continuous features have
    a single code, a placeholder whose embeddings come from a projector; texts are ordinary text tokens.
    """

    encoding: Encoding
    offset: int  # id of code 0 of layer 0
    start_id: int
    end_id: int
    size: int  # rows of the embedding matrix; all token ids are smaller
    order: Order = "frame"  # of the codes of several layers, see `arrangement`
    stack: int = 1  # features per placeholder
    template: Template = "plain"  # of conversations, see `ConversationWriter`
    prefix_attention: bool = False  # the tokens of an audio attend to each other in both directions
    names: Names = "audio"  # of its tokens, see `token_names`
    tokens_per_second: float = 12.0  # in an answer, at most

    def token_ids(self, speech: Codes | Speech, text_tokenizer: PreTrainedTokenizerBase | None = None) -> Tensor:
        """Ids of one utterance between the start and end markers.

        speech: codes long [Q, T] (or `Codes` of a single utterance) -> long [Q * T + 2], in `order`; features float
        [T, C] -> long [ceil(T / stack) + 2]; a text, with the text tokenizer -> its tokens between the markers. Behind
        features with labels stands, as text, what they spell: a language model corrects letters before it hears.
        Raises VocabularyError for codes outside the codebooks, and for another kind of speech than the vocabulary's.
        """
        if isinstance(speech, Codes):
            if len(speech) != 1:
                raise VocabularyError(f"expected one utterance, got {len(speech)}: use codes.utterance(i)")
            speech = speech.utterance(0)
        spelled: list[int] = []
        match self.encoding.kind, speech:
            case "text", str() if text_tokenizer is not None:
                ids = torch.tensor(text_token_ids(text_tokenizer, [speech])[0], dtype=torch.long)
            case "features", Tensor() if speech.is_floating_point():
                ids = torch.full((math.ceil(len(speech) / self.stack),), self.offset)
                if self.encoding.labels and text_tokenizer is not None:
                    spelled = text_token_ids(text_tokenizer, [self.encoding.spelled(speech)])[0]
            case "codes", Tensor() if not speech.is_floating_point():
                ids = self._code_ids(speech)
            case kind, _:
                needed = "text and the text tokenizer" if kind == "text" else kind
                raise VocabularyError(f"this vocabulary needs {needed}, got {_describe(speech)}")
        return torch.cat([ids.new_tensor([self.start_id]), ids, ids.new_tensor([self.end_id, *spelled])])

    def token_count(self, frames: int) -> int:
        """Number of `token_ids` of an utterance of so many frames: codes or features without labels, not texts."""
        return 2 + (
            math.ceil(frames / self.stack) if self.encoding.kind == "features" else frames * self.encoding.layers
        )

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
        """The order of the codes [Q, T] of T frames: long [Q * T], indices into the flattened codes.

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
        """Features of the placeholders, float [P, C * stack], zero-padded at the end; None for other speech."""
        if not isinstance(speech, Tensor) or not speech.is_floating_point():
            return None
        missing = -len(speech) % self.stack
        return torch.nn.functional.pad(speech, (0, 0, 0, missing)).view(-1, self.stack * speech.shape[1])

    def is_code(self, ids: Tensor) -> Tensor:
        """bool, like ids: whether each is an audio code or a placeholder (not a marker, not text)."""
        return (ids >= self.offset) & (ids < self.start_id)

    def audio_parts(self, ids: Tensor) -> Tensor:
        """long, like ids [S]: 1 within the first audio, markers included, 2 within the second, ...; 0 outside."""
        opened, closed = (ids == self.start_id).cumsum(0), (ids == self.end_id).cumsum(0)
        inside = (opened > closed) | (ids == self.end_id)
        return opened.where(inside, 0)

    @property
    def new_ids(self) -> Tensor:
        """All added token ids: those of the codes, then those of the markers."""
        codes = torch.arange(self.encoding.layers * self.encoding.codebook_size) + self.offset
        return torch.cat([codes, torch.tensor([self.start_id, self.end_id])])

    def neighbours(self, codebooks: Tensor, count: int = 8) -> Tensor:
        """Ids of the `count` closest codes of every token id (the id itself for other tokens), long [size, count].

        codebooks float [Q, K, D]: distances are those between the code vectors of a layer.
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
        """Write audio_vocabulary.json into the model's folder."""
        write_json(Path(folder) / FILE, asdict(self))

    @staticmethod
    def load(folder: str | Path) -> "AudioVocabulary":
        """Read audio_vocabulary.json. Raises VocabularyError if the folder has none."""
        file = Path(folder) / FILE
        if not file.is_file():
            raise VocabularyError(f"{folder} has no {FILE}: it is not a model with an audio vocabulary")
        expected = "an audio vocabulary as `SpeechLLM.save` writes it"
        values = read_json_object(file, expected)
        with reading(file, expected, error_class=VocabularyError):
            vocabulary = AudioVocabulary(**{**values, "encoding": Encoding(**values["encoding"])})
            ends = [vocabulary.offset, int(vocabulary.new_ids.max()) + 1, vocabulary.size, vocabulary.stack - 1]
        known = vocabulary.order in get_args(Order) and vocabulary.template in get_args(Template)
        known = known and vocabulary.names in get_args(Names)
        if not 0 <= ends[0] <= ends[1] <= ends[2] or ends[3] < 0 or not known:
            raise VocabularyError(f"{file} contradicts itself: expected {expected}; {AGAIN}")
        return vocabulary

    def check(self, model: Any, text_tokenizer: PreTrainedTokenizerBase, holder: str | Path) -> None:
        """Raise VocabularyError unless the model and the text tokenizer of a folder are the ones that were extended."""
        rows = model.get_input_embeddings().weight.shape[0]
        if rows != self.size:
            raise VocabularyError(f"{holder}: the model has {rows} rows and its vocabulary {self.size}: {AGAIN}")
        start, end = token_names(self.names, codes=0)
        found = text_tokenizer.convert_tokens_to_ids([start, end])
        if found != (expected := [self.start_id, self.end_id]):
            raise VocabularyError(
                f"{holder}: the ids of {start} and {end} are {found} in the text tokenizer and {expected} in the "
                f"vocabulary: they do not belong together; {AGAIN}"
            )


def token_names(names: Names, codes: int) -> list[str]:
    """<|audio_0|>, <|audio_1|>, ... of so many codes, <|audio_start|> and <|audio_end|>, as `new_ids` has them.

    <|speech_0|> and so on for a text tokenizer with audio tokens of its own, such as Qwen3.5's.
    """
    return [f"<|{names}_{name}|>" for name in (*range(codes), "start", "end")]


def _describe(speech: Speech) -> str:
    return "a text" if isinstance(speech, str) else f"a tensor of {speech.dtype}"


def text_token_ids(text_tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Ids of plain texts. A transcript that contains "<|audio_5|>" stays text and never becomes audio."""
    if not texts:
        return []
    with _LOCK:
        return text_tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]


def template_token_ids(text_tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of text from a chat template, in which the names of special tokens are these tokens."""
    with _LOCK:
        return text_tokenizer(text, add_special_tokens=False, split_special_tokens=False)["input_ids"]


def opening_token_ids(text_tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a plain text that opens a sequence, after the tokens that the tokenizer itself writes there.

    Llama, Mistral and Gemma begin with BOS, Qwen2 with nothing; so begins what other engines make of a prompt. An end
    token that the tokenizer would write is left out.
    """
    with _LOCK:
        ids = text_tokenizer(text, split_special_tokens=True)["input_ids"]
    closed = ids[-1:] == [text_tokenizer.eos_token_id] and len(ids) > len(text_token_ids(text_tokenizer, [text])[0])
    return ids[:-1] if closed else ids
