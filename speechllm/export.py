"""Export of a trained speech language model to a folder that does not depend on this package."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from speechllm.decoding import forbidden_ids
from speechllm.messages import fixed_template
from speechllm.model import SpeechLLM, own_generation_config
from speechllm.prompt import PROMPT
from speechllm.vocabulary import opening_token_ids, template_token_ids
from tokenizer.claims import new_folder
from tokenizer.errors import InputError
from tokenizer.files import atomic_folder, read_json, write_json

# What is said, one after the other, as `ConversationWriter` writes it where the template is plain
PLAIN_TEMPLATE = """\
{{- %s -}}
{%%- for message in messages -%%}
  {%%- if message.content is string -%%}
    {{- message.content -}}
  {%%- else -%%}
    {%%- for part in message.content -%%}
      {%%- if part.type != "text" -%%}
        {{- raise_exception("only text is understood, with speech written as its tokens") -}}
      {%%- endif -%%}
      {{- part.text -}}
    {%%- endfor -%%}
  {%%- endif -%%}
  {%%- if message.role == "assistant" -%%}{{- %s -}}{%%- endif -%%}
{%%- endfor -%%}"""


def merge(speech_llm: SpeechLLM) -> SpeechLLM:
    """Merge an adapter's updates and rows into the language model and return it as an ordinary one.

    Consumes the adapter: the argument is changed in place. Without an adapter it is returned as it is.
    """
    if not isinstance(speech_llm.model, PeftModel):
        return speech_llm
    return replace(speech_llm, model=speech_llm.model.merge_and_unload())


def export_model(speech_llm: SpeechLLM, output: str | Path) -> None:
    """Write a folder that transformers, vLLM or llama.cpp's converter loads as an ordinary language model.

    The prompt is text: "Transcribe this speech<|audio_start|><|audio_17|>...<|audio_end|>", or the same as the content
    of a user's message in a chat; `token_names` of other names. `generate` of transformers, 4.57 and 5, gives the same
    answers as `transcribe`; with other engines, set the temperature to 0. Merges as `merge` does; the weights keep
    their precision.
    Raises OutputError unless the output is new or empty, InputError for a model that reads continuous features or in
    which audio attends in both directions.
    """
    new_folder(output)
    if speech_llm.vocabulary.encoding.kind == "features":
        raise InputError(
            "this model reads continuous features through a projector, which other engines do not support; to train an "
            "adapter of it further, use `speechllm merge`"
        )
    if speech_llm.vocabulary.prefix_attention:
        raise InputError(
            "in this model audio attends in both directions (prefix_attention), but in other engines only backwards: "
            "they would answer something else"
        )
    merged = merge(speech_llm)
    text_tokenizer = deepcopy(merged.text_tokenizer)
    template = fixed_template if merged.vocabulary.template == "chat" else _plain_template
    text_tokenizer.chat_template = template(text_tokenizer)
    merged = replace(merged, text_tokenizer=text_tokenizer)
    model = merged.model
    model.config.eos_token_id = text_tokenizer.eos_token_id
    suppressed = forbidden_ids(text_tokenizer, merged.vocabulary).nonzero().flatten().tolist()
    model.generation_config = own_generation_config(text_tokenizer, suppress_tokens=suppressed)
    with atomic_folder(output) as folder:
        merged.save(folder)
        for name, changed in {"config.json": _older_config, "tokenizer_config.json": _older_tokenizer_config}.items():
            write_json(folder / name, changed(read_json(folder / name)))


def _plain_template(text_tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A chat template that writes the prompt of training; None if no template can."""
    opening = opening_token_ids(text_tokenizer, "")
    expected = opening_token_ids(text_tokenizer, PROMPT)
    begin = "".join(text_tokenizer.convert_ids_to_tokens(opening))
    # behind <s>, a text of Llama-2 has its first space only where it is written
    written = (text for text in (begin, f"{begin} ") if template_token_ids(text_tokenizer, text + PROMPT) == expected)
    strings = next(written, None), text_tokenizer.eos_token
    return None if strings[0] is None else PLAIN_TEMPLATE % tuple(map(repr, strings))


def _older_config(config: dict[str, Any]) -> dict[str, Any]:
    """With the keys by which transformers 4, and engines that follow it, know what 5 writes otherwise; 5 reads both.

    Without them they would silently take a default: 10,000 for rope_theta, no scaling of the positions.
    """
    older: dict[str, Any] = {"torch_dtype": config["dtype"]} if "dtype" in config else {}
    if "text_config" in config:
        older["text_config"] = _older_config(config["text_config"])
    rope = config.get("rope_parameters") or {}
    if {"full_attention", "sliding_attention"} <= rope.keys():  # Gemma-3's two kinds of layers
        older["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    older |= {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    if rope.get("rope_type", "default") != "default":
        older["rope_scaling"] = {key: value for key, value in rope.items() if key not in older}
    return config | older


def _older_tokenizer_config(config: dict[str, Any]) -> dict[str, Any]:
    """The same for a text tokenizer, which either major then reads from tokenizer.json as it is."""
    if config.get("backend") != "tokenizers":
        return config
    specials = {"additional_special_tokens": config["extra_special_tokens"]} if "extra_special_tokens" in config else {}
    kept = {key: value for key, value in config.items() if key != "extra_special_tokens"}
    inputs = ["input_ids", "attention_mask"]  # by default the other major adds token types, which `generate` refuses
    return kept | specials | {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": inputs}
