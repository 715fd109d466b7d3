"""What a language model in training makes of the dev utterances."""

from collections.abc import Sequence
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from speechllm.data.encoded import speech_of
from speechllm.decoding import recognize
from speechllm.encoding import Encoding
from speechllm.evaluation.error_rates import character_error_rate, word_error_rate
from speechllm.evaluation.scripts import primary_rate
from speechllm.model import SpeechLLM


def recognize_together(
    dev: Sequence[dict[str, Any]],
    encoding: Encoding,
    speech_llm: SpeechLLM,
    accelerator: Accelerator,
    processes: int,
) -> list[str]:
    """What is heard of the dev utterances in the training's precision, by the first `processes` processes together.

    Every process must call it.
    """
    place = accelerator.process_index
    mine = range(place, len(dev), processes) if place < processes else range(0)
    speech, durations_s = [speech_of(dev[i], encoding) for i in mine], [dev[i]["duration_s"] for i in mine]
    with accelerator.autocast():
        found = recognize(speech, speech_llm, durations_s=durations_s)
    texts = [(i, transcription.text) for i, transcription in zip(mine, found, strict=True)]
    return [text for _, text in sorted(gather_object(texts))]


def dev_rates(references: Sequence[str], hypotheses: Sequence[str], normalizer: str) -> dict[str, float]:
    """WER on the dev utterances, and CER if it steers."""
    rates = {"dev_wer": word_error_rate(references, hypotheses, normalizer).wer}
    if primary_rate(references) == "cer":
        rates["dev_cer"] = character_error_rate(references, hypotheses, normalizer)
    return rates
