"""Speech recognisers of transformers as audio tokenizers that return text, for cascades."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.errors import InputError
from tokenizer.frames import split_utterances
from tokenizer.interface import Transcripts
from tokenizer.pretrained import (
    IncompleteError,
    check_folder,
    load_config,
    load_frozen,
    load_part,
    module_fingerprint,
    write_settings,
)

# What belongs to a recogniser among the generation settings of its folder: the ids and prompts it was trained with.
# Whatever else steers an answer (sampling, penalties, guidance, forbidden words) is transformers' default.
OWN_SETTINGS = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "max_length"),
    *("forced_bos_token_id", "forced_eos_token_id", "forced_decoder_ids", "suppress_tokens", "begin_suppress_tokens"),
    *("is_multilingual", "lang_to_id", "task_to_id", "language", "task", "no_timestamps_token_id", "prev_sot_token_id"),
    *("max_initial_timestamp_index", "alignment_heads"),
)
SHORTEST_S = 0.1  # shorter recordings are padded with silence, because convolutions need a few hundred samples
PROMPT = 4  # tokens of Whisper's prompt at most, which its answers lack and its longest length counts
NGRAM = 5  # tokens that a second answer does not repeat; fewer would forbid saying a word of many tokens twice


class Recognizer(nn.Module):
    """A CTC model (wav2vec 2.0, HuBERT, ...) or a sequence-to-sequence model (Whisper, ...), decoded greedily.

    If the vocabulary has no lower-case letters, the text is lower-cased, as language models expect. An answer that does
    not end, because it repeats itself, is decoded again without repeated 5-grams, but for recordings of more than 30 s.
    """

    frame_rate = 0.0

    def __init__(self, model: Any, processor: Any):
        """processor: transformers' processor of the model, with its feature extractor and its tokenizer."""
        super().__init__()
        self.model, self.processor = model.eval().requires_grad_(False), processor
        if model.can_generate():
            model.generation_config = own_generation_config(model.generation_config)
        letters = "".join(set(processor.tokenizer.get_vocab()) - set(processor.tokenizer.all_special_tokens))
        self.capitals_only = not any(letter.islower() for letter in letters)

    @classmethod
    def from_pretrained(cls, name: str | Path) -> "Recognizer":
        """Load a transformers folder or hub name, e.g. facebook/wav2vec2-base-960h or openai/whisper-small.

        Raises InputError for a model that was not trained to recognise speech.
        """
        from transformers import AutoModelForCTC, AutoModelForSpeechSeq2Seq, AutoProcessor
        from transformers.models.auto import modeling_auto as known

        expected = "a speech recogniser of transformers"
        name = check_folder(name, ["config.json"], expected)
        model_type = load_config(name, expected).model_type
        if model_type in known.MODEL_FOR_CTC_MAPPING_NAMES:
            auto_class = AutoModelForCTC
        elif model_type in known.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES:
            auto_class = AutoModelForSpeechSeq2Seq
        else:
            raise InputError(f"{name}: a model of type {model_type} is no speech recogniser of transformers")
        try:
            model = load_frozen(auto_class, name, expected)
        except IncompleteError as error:
            raise IncompleteError(f"not trained to recognise speech: {error}") from error
        processor = load_part(AutoProcessor, name, f"the processor of {expected}")
        if not hasattr(processor, "feature_extractor") or not hasattr(processor, "tokenizer"):
            raise InputError(f"{name} lacks a feature extractor or a tokenizer: expected those of {expected}")
        if len(processor.tokenizer) < model.config.vocab_size / 2:  # what transformers makes of missing files is empty
            raise InputError(f"{name} lacks the vocabulary of its tokenizer: expected {model.config.vocab_size} tokens")
        return cls(model, processor)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model, its preprocessor settings and its vocabulary."""
        self.model.save_pretrained(folder)
        self.processor.feature_extractor.save_pretrained(folder)
        self.processor.tokenizer.save_pretrained(folder)
        write_settings(folder, "recognizer")

    @property
    def sample_rate(self) -> int:
        return self.processor.feature_extractor.sampling_rate

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def fingerprint(self) -> str:
        settings: dict[str, Any] = {"lowered": True} if self.capitals_only else {}
        asked = self.model.generation_config if self.model.can_generate() else None
        settings |= {name: value for name in ("language", "task") if (value := getattr(asked, name, None))}
        return module_fingerprint(self.model, {"vocabulary": self.processor.tokenizer.get_vocab(), **settings})

    @torch.no_grad()
    def encode(self, waveform: Tensor, lengths: Tensor | None = None) -> Transcripts:
        """Waveforms float [B, N] -> their texts; each utterance is recognised separately."""
        return Transcripts([self._transcribe(samples) for samples in split_utterances(waveform, lengths)])

    def _transcribe(self, samples: Tensor) -> str:
        """The text of one utterance float [N]."""
        extractor, generates = self.processor.feature_extractor, self.model.can_generate()
        samples = F.pad(samples, (0, max(0, round(SHORTEST_S * self.sample_rate) - len(samples))))
        extractor_options, generate_options = {}, {}
        if self.model.config.model_type == "whisper" and len(samples) > extractor.n_samples:
            # beyond 30 s Whisper moves its window by the timestamps that it generates
            extractor_options = {"truncation": False, "padding": "longest", "return_attention_mask": True}
            generate_options = {"return_timestamps": True}
        inputs = extractor(
            samples.cpu().numpy(), sampling_rate=self.sample_rate, return_tensors="pt", **extractor_options
        ).to(self.device)
        if generates:
            ids = self.model.generate(**inputs, **generate_options)
            longest = self.model.generation_config.max_length
            if longest and not generate_options and ids.shape[1] >= longest - PROMPT:
                ids = self.model.generate(**inputs, no_repeat_ngram_size=NGRAM)
        else:
            ids = self.model(**inputs).logits.argmax(-1)
        # CTC needs its blanks to distinguish a double letter from a long one
        text = self.processor.batch_decode(ids, skip_special_tokens=generates)[0].strip()
        return text.lower() if self.capitals_only else text


def own_generation_config(settings: Any) -> Any:
    """A fresh GenerationConfig, which decodes greedily, with the OWN_SETTINGS of another."""
    from transformers import GenerationConfig

    values = {name: getattr(settings, name, None) for name in OWN_SETTINGS}
    return GenerationConfig(**{name: value for name, value in values.items() if value is not None})
