"""Export of a trained speech language model to a folder that does not depend on this package."""

from dataclasses import replace
from pathlib import Path

from peft import PeftModel

from speechllm.decoding import forbidden_ids
from speechllm.model import SpeechLLM, own_generation_config
from tokenizer.claims import new_folder
from tokenizer.files import atomic_folder


def merge(speech_llm: SpeechLLM) -> SpeechLLM:
    """Merge an adapter's updates and rows into the language model and return it as an ordinary one.

    Consumes the adapter: the argument is changed in place. Without an adapter it is returned as it is.
    """
    if not isinstance(speech_llm.model, PeftModel):
        return speech_llm
    return replace(speech_llm, model=speech_llm.model.merge_and_unload())


def export_model(speech_llm: SpeechLLM, output: str | Path) -> None:
    """Write a folder that transformers, vLLM or llama.cpp's converter loads as an ordinary language model.

    The prompt is text: "Transcribe this speech<|audio_start|><|audio_17|>...<|audio_end|>". `generate` of transformers
    gives the same answers as `transcribe`; with other engines, set the temperature to 0. Merges as `merge` does.
    Raises OutputError unless the output is new or empty, ValueError for a model that reads continuous features.
    """
    new_folder(output)
    if speech_llm.vocabulary.encoding.kind == "features":
        raise ValueError("this model reads continuous features through a projector, which other engines do not support")
    merged = merge(speech_llm)
    model, text_tokenizer = merged.model, merged.text_tokenizer
    model.config.eos_token_id = text_tokenizer.eos_token_id
    suppressed = forbidden_ids(merged).nonzero().flatten().tolist()
    # transformers 5 keeps it in rope_parameters; engines based on transformers 4 would silently use 10,000 instead
    if theta := (getattr(model.config, "rope_parameters", None) or {}).get("rope_theta"):
        model.config.rope_theta = theta
    with atomic_folder(output) as folder:
        model.generation_config = own_generation_config(text_tokenizer, suppress_tokens=suppressed)
        merged.save(folder)
