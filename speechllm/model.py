"""A speech language model: model, text tokenizer, audio vocabulary and codec in one object."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

import torch
from peft import PeftModel
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from speechllm.adapters import load_adapter, load_causal, save_adapter
from speechllm.encoding import DataError, Encoding
from speechllm.extension import Extension, extend_vocabulary
from speechllm.projector import load_projector, save_with_projector
from speechllm.vocabulary import FILE as VOCABULARY_FILE
from speechllm.vocabulary import AudioVocabulary, VocabularyError
from tokenizer.interface import AudioTokenizer
from tokenizer.loading import load_tokenizer
from tokenizer.pretrained import check_folder, load_part
from tokenizer.schemes.compressor import CtcCompressor


@dataclass
class SpeechLLM:
    """Everything that `transcribe` needs. `codec` may be None if only encoded speech is transcribed.

    letters: finds letters in the codes that the model reads, for joint decoding (`speechllm.letters`); not saved.
    """

    model: PreTrainedModel | PeftModel
    text_tokenizer: PreTrainedTokenizerBase
    vocabulary: AudioVocabulary
    codec: AudioTokenizer | None = None
    letters: CtcCompressor | None = None

    def __post_init__(self) -> None:
        """Replace the generation settings of the language model: a chat model's own would change what it answers."""
        model = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        model.generation_config = own_generation_config(self.text_tokenizer)

    def save(self, folder: str | Path) -> None:
        """Write everything into one folder: the model in transformers' format, the codec in its subfolder `codec`.

        Of a model with an adapter (`prepare_adapter`), only the adapter and the name of its language model are written.
        """
        if isinstance(self.model, PeftModel):
            save_adapter(self.model, self.vocabulary, folder)
        else:
            save_with_projector(self.model, folder)
        self.text_tokenizer.save_pretrained(folder)
        self.vocabulary.save(folder)
        if self.codec is not None:
            self.codec.save_pretrained(Path(folder) / "codec")


def own_generation_config(text_tokenizer: PreTrainedTokenizerBase, **settings: Any) -> GenerationConfig:
    """Greedy decoding, as transformers does it by default, with the ids of a text tokenizer and nothing else."""
    tokens = text_tokenizer
    return GenerationConfig(
        bos_token_id=tokens.bos_token_id, eos_token_id=tokens.eos_token_id, pad_token_id=tokens.pad_token_id, **settings
    )


def load_speech_llm(
    folder: str | Path,
    codec: str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    base: str | Path | None = None,
    with_codec: bool = True,
    letters: str | Path | None = None,
) -> SpeechLLM:
    """Load what `SpeechLLM.save` wrote, in eval mode.

    codec: location of the codec, if not the subfolder; dtype: of the language model's weights, as stored by default;
    an adapter is merged first; base: location of an adapter's language model, if not the recorded one; with_codec:
    without a codec only encoded speech can be transcribed; letters: location of a compressor over the codec's codes.
    Raises FileNotFoundError, VocabularyError, or DataError (for another codec than the vocabulary's, another
    language model than the adapter's, or letters of other codes).
    """
    folder = check_folder(folder, [], "a speech language model")
    adapter = (Path(folder) / "adapter_config.json").is_file()
    if not adapter:
        folder = check_folder(folder, ["config.json"], "a speech language model")
    vocabulary = AudioVocabulary.load(folder)
    loaded_codec = _load_codec(folder, codec, vocabulary) if with_codec else None
    if adapter:
        model = load_adapter(folder, vocabulary, base)
    else:
        model = load_causal(folder, "auto")
        load_projector(model, vocabulary, folder)
    if dtype is not None:
        model = model.merge_and_unload() if adapter else model
        for parameter in model.parameters():  # not model.to(dtype): the rotary frequencies must stay float32
            parameter.data = parameter.data.to(dtype)
    text_tokenizer = load_part(AutoTokenizer, folder, "the text tokenizer of a speech language model")
    vocabulary.check(model, text_tokenizer, folder)
    loaded_codec = loaded_codec and loaded_codec.to(device)
    compressor = None if letters is None else load_letters(letters, vocabulary.encoding)
    if compressor is not None and loaded_codec is not None:
        compressor.base = loaded_codec  # the same one: in memory once
    compressor = compressor and compressor.to(device)
    return SpeechLLM(model.to(device).eval(), text_tokenizer, vocabulary, loaded_codec, compressor)


def load_letters(name: str | Path, encoding: Encoding) -> CtcCompressor:
    """The compressor of a folder; raises DataError unless it reads this speech, or the first of its layers."""
    compressor = load_tokenizer(name)
    if not isinstance(compressor, CtcCompressor):
        raise DataError(f"{name} is no compressor: train one on this speech with recipes/train_compressor.py")
    if compressor.fingerprint == encoding.fingerprint:
        raise DataError(f"the speech is this compressor's vectors already, with letters in them: leave {name} out")
    encoding.require(compressor.base.fingerprint, str(name))
    if compressor.layers > encoding.layers:
        raise DataError(
            f"{name} reads {compressor.layers} layers of codes, not {encoding.layers}: train a compressor with "
            f"layers={encoding.layers}"
        )
    return compressor


def _load_codec(folder: str | Path, codec: str | Path | None, vocabulary: AudioVocabulary) -> AudioTokenizer:
    place = Path(folder) / "codec" if codec is None else codec
    if codec is None and not Path(place).is_dir():
        raise FileNotFoundError(f"{place}: no such folder; set `codec` to the location of the codec")
    loaded = load_tokenizer(place)
    vocabulary.encoding.require(loaded.fingerprint, "the codec")
    return loaded


def load_language_model(
    name: str | Path,
    codec: AudioTokenizer,
    **extension: Unpack[Extension],
) -> SpeechLLM:
    """A language model from a folder or the hub in float32, with a vocabulary for the codec's codes.

    extension: arguments of `extend_vocabulary`, which extends the vocabulary, unless `SpeechLLM.save` wrote the folder:
    then it is kept with its rows, `init` says nothing, and `layers`, `order` and `stack` must be the ones it was
    extended with.
    Raises DataError for an adapter, or a saved model that reads another codec; VocabularyError for a saved model that
    reads other layers, or reads them differently.
    """
    name = check_folder(name, [], "a language model")
    if (Path(name) / "adapter_config.json").is_file():
        raise DataError(f"{name} is an adapter: merge it with `speechllm merge` and train the result further")
    model = load_causal(name)
    text_tokenizer = load_part(AutoTokenizer, name, "the text tokenizer of a language model")
    if not (Path(name) / VOCABULARY_FILE).is_file():
        texts, rows = len(text_tokenizer), model.get_input_embeddings().weight.shape[0]
        if texts <= rows / 2:  # without its files a text tokenizer is almost empty
            raise VocabularyError(
                f"{name}: the text tokenizer has {texts} tokens, the language model {rows} rows: its files are missing "
                "or belong to another model"
            )
        try:
            vocabulary = extend_vocabulary(model, text_tokenizer, codec, **extension)
        except VocabularyError as error:
            raise VocabularyError(f"{name}: {error}") from error
        return SpeechLLM(model, text_tokenizer, vocabulary, codec)
    if extension.get("code_letters") is not None:
        raise VocabularyError(f"{name} reads codes already: its rows cannot begin as letters; leave letters out")
    saved, both_ways = AudioVocabulary.load(name), extension.get("prefix_attention", False)
    if saved.prefix_attention and not both_ways:
        raise VocabularyError(f"{name} was trained with prefix_attention: set prefix_attention=true")
    template = extension.get("template", "plain")
    if saved.template != "plain" and template == "plain":
        raise VocabularyError(f"{name} was trained with template={saved.template}: set template={saved.template}")
    vocabulary = replace(saved, template=template, prefix_attention=both_ways)
    encoding = Encoding.of(codec, extension.get("layers", 1))
    encoding.require(vocabulary.encoding.fingerprint, str(name))
    stack = extension.get("stack", 1) if encoding.kind == "features" else 1
    found = vocabulary.encoding.layers, vocabulary.order, vocabulary.stack
    expected = encoding.layers, extension.get("order", "frame"), stack
    if found != expected:
        raise VocabularyError(f"{name} reads (layers, order, stack) {found}, but {expected} was asked for")
    load_projector(model, vocabulary, name)
    vocabulary.check(model, text_tokenizer, name)
    return SpeechLLM(model, text_tokenizer, vocabulary, codec)
