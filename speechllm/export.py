"""A trained speech language model as a folder that knows nothing of this package."""

from dataclasses import replace
from pathlib import Path

from peft import PeftModel
from transformers import GenerationConfig

from speechllm.decoding import forbidden_ids
from speechllm.model import SpeechLLM
from tokenizer.files import atomic_folder


def merge(speech_llm: SpeechLLM) -> SpeechLLM:
    """The same with an adapter's updates and rows written into the language model, which is a plain one again.

    Uses up the adapter: what was passed is changed in place. Without an adapter nothing happens.
    """
    if not isinstance(speech_llm.model, PeftModel):
        return speech_llm
    return replace(speech_llm, model=speech_llm.model.merge_and_unload())


def export_model(speech_llm: SpeechLLM, output: str | Path) -> None:
    """Write a folder that transformers, vLLM or llama.cpp's converter loads as an ordinary language model.

    The prompt is text: "Transcribe this speech<|audio_start|><|audio_17|>...<|audio_end|>". `generate` of transformers
    answers what `transcribe` answers; other engines have to be told temperature 0. Merges like `merge`.
    Raises FileExistsError for an output that is there already, ValueError for a model of continuous features.
    """
    if Path(output).exists():
        raise FileExistsError(f"{output} is there already: choose another folder or delete it")
    if speech_llm.vocabulary.encoding.kind == "features":
        raise ValueError("this model reads continuous features through a projector: no other engine can, keep it here")
    merged = merge(speech_llm)
    model, text_tokenizer = merged.model, merged.text_tokenizer
    model.config.eos_token_id = text_tokenizer.eos_token_id
    # made anew: a chat model's own asks for sampling and a repetition penalty, and may end elsewhere
    model.generation_config = GenerationConfig(
        eos_token_id=text_tokenizer.eos_token_id,
        pad_token_id=text_tokenizer.pad_token_id,
        suppress_tokens=forbidden_ids(merged).nonzero().flatten().tolist(),
    )
    # transformers 5 keeps it in rope_parameters; engines on transformers 4 would silently take 10,000 instead
    if theta := (getattr(model.config, "rope_parameters", None) or {}).get("rope_theta"):
        model.config.rope_theta = theta
    with atomic_folder(output) as folder:
        merged.save(folder)
