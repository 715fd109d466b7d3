"""A language model that hears: model, text tokenizer, audio vocabulary and codec as one small object."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from speechllm.adapters import load_adapter, save_adapter
from speechllm.data import DataError, Encoding
from speechllm.packing import PACKED, pack
from speechllm.projector import load_projector, model_inputs, save_with_projector
from speechllm.prompt import IGNORED, Example
from speechllm.vocabulary import FILE as VOCABULARY_FILE
from speechllm.vocabulary import AudioVocabulary, Order, VocabularyError, extend_vocabulary
from tokenizer import AudioTokenizer, check_folder, load_tokenizer

SMOOTHING = 0.1  # of the labels of speech


@dataclass
class SpeechLLM:
    """What `transcribe` needs. `codec` may be None where only codes are decoded."""

    model: PreTrainedModel | PeftModel
    text_tokenizer: PreTrainedTokenizerBase
    vocabulary: AudioVocabulary
    codec: AudioTokenizer | None = None

    def save(self, folder: str | Path) -> None:
        """Write everything into one folder: the model as transformers knows it, the codec in its subfolder `codec`.

        Of a model with an adapter (`prepare_adapter`) the adapter alone, and which language model it belongs to.
        """
        if isinstance(self.model, PeftModel):
            save_adapter(self.model, self.vocabulary, folder)
        else:
            save_with_projector(self.model, folder)
        self.text_tokenizer.save_pretrained(folder)
        self.vocabulary.save(folder)
        if self.codec is not None:
            self.codec.save_pretrained(Path(folder) / "codec")


def load_speech_llm(
    folder: str | Path,
    codec: str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    base: str | Path | None = None,
    with_codec: bool = True,
) -> SpeechLLM:
    """Load what `SpeechLLM.save` wrote, in eval mode.

    codec: another place of the codec than the subfolder; dtype: of the language model's weights, as stored by default,
    with an adapter merged into them first; base: another place of the language model under an adapter than the
    recorded one; with_codec: without one only codes can be decoded.
    Raises FileNotFoundError, VocabularyError, or DataError (a codec with another fingerprint, another language model
    than the adapter's) with the remedy.
    """
    adapter = (Path(folder) / "adapter_config.json").is_file()
    if not adapter:
        check_folder(folder, ["config.json"], "a speech language model")
    vocabulary = AudioVocabulary.load(folder)
    loaded_codec = _load_codec(folder, codec, vocabulary) if with_codec else None
    if adapter:
        model = load_adapter(folder, vocabulary, base)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder)
        load_projector(model, vocabulary, folder)
    if dtype is not None:
        model = model.merge_and_unload() if adapter else model
        for parameter in model.parameters():  # not model.to(dtype): the rotary frequencies must stay float32
            parameter.data = parameter.data.to(dtype)
    text_tokenizer = AutoTokenizer.from_pretrained(folder)
    return SpeechLLM(model.to(device).eval(), text_tokenizer, vocabulary, loaded_codec and loaded_codec.to(device))


def _load_codec(folder: str | Path, codec: str | Path | None, vocabulary: AudioVocabulary) -> AudioTokenizer:
    place = Path(folder) / "codec" if codec is None else codec
    if codec is None and not Path(place).is_dir():
        raise FileNotFoundError(f"{place}: no such folder; name the place of the codec")
    loaded = load_tokenizer(place)
    vocabulary.encoding.require(loaded.fingerprint, "the codec")
    return loaded


def load_language_model(
    name: str | Path,
    codec: AudioTokenizer,
    layers: int = 1,
    init: Literal["codebook", "mean", "random"] = "codebook",
    seed: int = 0,
    order: Order = "frame",
    stack: int = 1,
) -> SpeechLLM:
    """A language model of a folder or the hub in float32, to be trained to read the codec's codes.

    Its vocabulary is extended (the other arguments are those of `extend_vocabulary`), or has been before, where the
    folder is one that `SpeechLLM.save` wrote: then it goes on with the rows it has.
    Raises DataError for an adapter, or where the folder's model reads another codec; VocabularyError where it reads
    other layers, or the same ones in another way.
    """
    if (Path(name) / "adapter_config.json").is_file():
        raise DataError(f"{name} is an adapter: `speechllm export` makes a whole language model of it to go on from")
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    text_tokenizer = AutoTokenizer.from_pretrained(name)
    if not (Path(name) / VOCABULARY_FILE).is_file():
        vocabulary = extend_vocabulary(model, text_tokenizer, codec, layers, init, seed, order, stack)
        return SpeechLLM(model, text_tokenizer, vocabulary, codec)
    vocabulary, encoding = AudioVocabulary.load(name), Encoding.of(codec, layers)
    encoding.require(vocabulary.encoding.fingerprint, str(name))
    held = vocabulary.encoding.layers, vocabulary.order, vocabulary.stack
    asked = encoding.layers, order, stack if encoding.kind == "features" else 1
    if held != asked:
        raise VocabularyError(f"{name} reads (layers, order, stack) {held}, asked for are {asked}")
    load_projector(model, vocabulary, name)
    return SpeechLLM(model, text_tokenizer, vocabulary, codec)


class LabelledLoss(nn.Module):
    """A language model as a function of examples to their summed loss, with logits only where there is a label.

    Speech is most of every sequence and carries no label, so this saves nearly all of the head's work and memory. The
    examples are packed: no padding is computed, and none sees another. Changes the model's attention to that end.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, vocabulary: AudioVocabulary):
        super().__init__()
        self.model = model
        self.vocabulary = vocabulary
        model.set_attn_implementation(PACKED)

    def forward(self, examples: Sequence[Example]) -> Tensor:
        """Float [2]: cross entropy summed over the labels of text, and over those of speech.

        Of speech the choice among the codes alone is judged, against smoothed labels: up to constants that is cross
        entropy and Kullback-Leibler divergence together (Chen et al. 2023, arXiv 2311.04534).
        """
        packed = pack(examples, self.model.device)
        hidden = self.model.get_decoder()(
            **model_inputs(self.model, self.vocabulary, packed.input_ids, packed.features),
            position_ids=packed.position_ids,
            attention_mask=packed.input_ids.new_empty(1, 1, 1, 1),  # one of four dimensions is taken for ready-made
            lengths=packed.lengths,
            borders=packed.borders,
            use_cache=False,
        ).last_hidden_state[0]
        head = self.model.get_output_embeddings()
        speech = self.vocabulary.is_code(packed.targets)
        text = (packed.targets != IGNORED) & ~speech
        text_loss = F.cross_entropy(head(hidden[text]).float(), packed.targets[text], reduction="sum")
        if not speech.any():
            return torch.stack([text_loss, torch.zeros_like(text_loss)])
        codes = slice(self.vocabulary.offset, self.vocabulary.start_id)
        bias = None if getattr(head, "bias", None) is None else head.bias[codes]
        choice = F.linear(hidden[speech], head.weight[codes], bias).float()  # a hundredth of all logits, for Qwen2
        targets = packed.targets[speech] - codes.start
        speech_loss = F.cross_entropy(choice, targets, reduction="sum", label_smoothing=SMOOTHING)
        return torch.stack([text_loss, speech_loss])


def small_text_tokenizer(texts: list[str], size: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer of Qwen2's kind, learnt from `texts`, with up to `size` tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

    # Qwen2's own way of cutting text into words: beside a Qwen2 it will be loaded with that, whatever is made here
    qwen2 = Qwen2Tokenizer().backend_tokenizer
    bpe = Tokenizer(models.BPE())
    bpe.normalizer, bpe.pre_tokenizer, bpe.decoder = qwen2.normalizer, qwen2.pre_tokenizer, qwen2.decoder
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=specials[2], pad_token=specials[0])


@dataclass
class SmallShape:
    """Sizes of a small Qwen2."""

    hidden_size: int = 192
    intermediate_size: int = 512
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2


def small_qwen2(text_tokenizer: PreTrainedTokenizerBase, **shape: int) -> PreTrainedModel:
    """A Qwen2 with random weights for `text_tokenizer`; `shape` are Qwen2Config's sizes."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=len(text_tokenizer),
        bos_token_id=None,
        eos_token_id=text_tokenizer.eos_token_id,
        pad_token_id=text_tokenizer.pad_token_id,
        tie_word_embeddings=True,
        **shape,
    )
    return Qwen2ForCausalLM(config)
