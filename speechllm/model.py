"""A language model that hears: model, text tokenizer, audio vocabulary and codec as one small object."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from speechllm.adapters import load_adapter, save_adapter
from speechllm.encoding import DataError, Encoding
from speechllm.extension import extend_vocabulary
from speechllm.projector import load_projector, save_with_projector
from speechllm.vocabulary import FILE as VOCABULARY_FILE
from speechllm.vocabulary import AudioVocabulary, Order, VocabularyError
from tokenizer.interface import AudioTokenizer
from tokenizer.loading import load_tokenizer
from tokenizer.pretrained import check_folder


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
