"""Transcribe encoded utterances and report the word error rate, with an interval and a control.

    python recipes/eval_asr.py model=RUN/model codes=CODES output=RESULTS splits=test-clean

The control transcribes utterances, 300 by default, from another one's audio: its WER shows whether the model uses the
audio. Runaway answers (empty, looped, refused, too long) are counted and decoded again. With model=null the texts of a
recogniser, or the letters of a compressor, are scored as they are. Writes RESULTS/results.json,
RESULTS/predictions.jsonl (`speechllm compare` compares two of them) and RESULTS/report.html.
"""

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from speechllm.runs.config import parse_config
from tokenizer.settings import Count, Names, NonNegative, Seed, Settings, Several


@dataclass
class EvalAsrConfig(Settings):
    model: str | None  # folder of train_asr, or one that `SpeechLLM.save` wrote; null: without a language model
    codes: str  # folder of encode_speech
    output: str  # folder for results.json, predictions.jsonl and report.html
    base: str | None = None  # location of an adapter's language model, if not the recorded one
    splits: Names | None = None  # all when null
    normalizer: Literal["librispeech", "whisper_english", "none"] = "librispeech"  # of references and answers
    beams: Count = 1  # 1: greedy
    letters_weight: NonNegative = 0.0  # of the letters that a compressor heard, beside the language model; 0: none
    letters: str | None = None  # the compressor, which hears them in the codes; null: its vectors are what is read
    fallback: bool = True  # decode runaway answers again, by beam search without repetitions
    shuffled_audio: bool = True  # also run the control
    shuffled_utterances: Several | None = 300  # of the control, evenly chosen; all when null
    precision: Literal["no", "bf16"] | None = None  # of the language model; null: bf16 on a GPU, no on a CPU
    batch_tokens: Count = 32_768  # of prompts and answers decoded at a time; a beam counts as an answer
    static_cache: bool = False  # on a GPU, compile the steps of plain greedy decoding; takes a while first
    seed: Seed = 0

    def contradictions(self) -> Iterator[str]:
        if self.model is None and (self.base or self.beams > 1 or self.letters_weight):
            yield "base, beams and letters_weight are of a language model, but model is null"
        if self.letters and not self.letters_weight:
            yield "letters without letters_weight change nothing: set letters_weight, for example to 0.15"


if __name__ == "__main__":  # help and mistakes are answered before torch is loaded
    CONFIG = parse_config(EvalAsrConfig)

import numpy as np

from speechllm import (
    DataError,
    Encoding,
    SpeechLLM,
    WordErrorRate,
    load_codes,
    load_speech_llm,
    merge,
    speech_of,
    word_error_rate,
)
from speechllm.data.encoded import require_texts, transcribed
from speechllm.data.shards import summarize_shards
from speechllm.decoding import Transcription, count_runaways, recognize
from speechllm.evaluation.error_rates import (
    character_errors,
    group_error_rates,
    results_verdict,
    speakers_interval,
)
from speechllm.evaluation.scripts import primary_rate
from speechllm.evaluation.tables import plain
from speechllm.reports.pages import write_recognition_report
from speechllm.runs.machine import decoding_device, provenance
from speechllm.runs.recipe import claim_output, run_recipe
from speechllm.runs.run import read_log
from tokenizer.corpus import spread
from tokenizer.files import read_json, write_json, write_jsonl
from tokenizer.pretrained import check_folder


def main(config: EvalAsrConfig) -> None:
    run_started = time.perf_counter()
    folder = claim_output(config.output, config)
    require_texts(config.codes, config.normalizer)
    speech_llm, run_folder = load(config), None
    if config.model is not None:
        run_folder = Path(check_folder(config.model, [], "a speech language model")).parent
    rows, encoding = load_codes(config.codes, config.splits)
    if speech_llm is not None:
        speech_llm.vocabulary.require(encoding)
    elif not encoding.readable:
        raise DataError(
            f"{config.codes}: {encoding.kind} say nothing without a language model: give one as model=RUN/model"
        )
    total, rows = len(rows), [*transcribed(rows)]
    if not rows:
        raise SystemExit(f"{config.codes}: no utterance of {config.splits or 'any split'} has a transcript")
    speech = [speech_of(row, encoding) for row in rows]
    durations_s = [row["duration_s"] for row in rows]
    references = [row["text"] for row in rows]
    speakers = [row["speaker"] or "?" for row in rows]
    word_error_rate(references, references, config.normalizer)  # fails before decoding if the texts cannot be scored
    decode = decoder(speech_llm, encoding, config)
    audio_s, figures = sum(durations_s), {}
    if speech_llm is not None:
        # without the two markers
        tokens = [len(speech_llm.vocabulary.token_ids(part, speech_llm.text_tokenizer)) - 2 for part in speech]
        figures = {"tokens_per_second": sum(tokens) / audio_s}
        if encoding.readable:
            name = "recognizer" if encoding.kind == "text" else "letters"
            alone, spelled = rates(references, [encoding.spelled(part) for part in speech], config)
            figures |= {f"wer_{name}": alone.wer, f"wer_{name}_ci95": alone.ci95, f"cer_{name}": spelled.wer}

    started = time.perf_counter()
    found = decode(speech, durations_s=durations_s)
    elapsed = time.perf_counter() - started
    hypotheses = [transcription.text for transcription in found]
    score, characters = rates(references, hypotheses, config)
    splits = [row["split"] or "?" for row in rows]
    results = {
        **asdict(score),
        "cer": characters.wer,
        "cer_ci95": characters.ci95,
        "primary": primary_rate(references),  # the rate to go by
        "training_normalizer": read_json(run_folder / "done.json").get("normalizer") if run_folder else None,
        "splits": group_error_rates(references, hypotheses, splits, config.normalizer, config.seed),
        "speakers": group_error_rates(references, hypotheses, speakers, config.normalizer, config.seed),
        # of the rate to go by, with speakers resampled in place of utterances
        "ci95_speakers": speakers_interval(
            references, hypotheses, speakers, config.normalizer, primary_rate(references), config.seed
        ),
        "beams": config.beams,
        "letters_weight": config.letters_weight,
        "letters_fingerprint": speech_llm.letters.fingerprint if speech_llm and speech_llm.letters else None,
        "fallback": count_runaways(found),
        "without_transcript": total - len(rows),  # not scored
        "audio_s": audio_s,
        "real_time_factor": elapsed / audio_s,
        **figures,
        "codec_fingerprint": encoding.fingerprint,
        "encoded": summarize_shards(config.codes),  # including what was skipped
        **provenance(config, time.perf_counter() - run_started),
    }
    predictions = [
        {
            "id": row["id"],
            "split": row["split"],
            "speaker": row["speaker"],
            "duration_s": round(row["duration_s"], 3),
            "reference": row["text"],
            "hypothesis": transcription.text,
            **({"fallback": transcription.runaway} if transcription.runaway else {}),
        }
        for row, transcription in zip(rows, found, strict=True)
    ]
    write_jsonl(folder / "predictions.jsonl", predictions)
    write_json(folder / "results.json", results)  # written again with the control

    if config.shuffled_audio and len(speech) > 1:
        chosen = spread(range(len(speech)), config.shuffled_utterances)
        order = [chosen[i] for i in cyclic_shuffle(len(chosen), config.seed)]
        shuffled = decode([speech[i] for i in order], durations_s=[durations_s[i] for i in order])
        texts = [transcription.text for transcription in shuffled]
        control, spelled = rates([references[i] for i in chosen], texts, config)
        results |= {"wer_shuffled_audio": control.wer, "wer_shuffled_audio_ci95": control.ci95}
        results |= {"cer_shuffled_audio": spelled.wer, "cer_shuffled_audio_ci95": spelled.ci95}
        results["utterances_shuffled_audio"] = len(chosen)
        results["seconds"] = time.perf_counter() - run_started
        write_json(folder / "results.json", results)
    write_recognition_report(
        folder / "report.html",
        title=f"{config.model or config.codes} on {', '.join(config.splits or ['all splits'])}",
        results=results,
        predictions=predictions,
        logs={"Training": read_log(run_folder)} if run_folder else {},
    )
    print(summary(score, results))


def load(config: EvalAsrConfig) -> SpeechLLM | None:
    """The language model that reads the speech, None without one."""
    if config.model is None:
        return None
    device, dtype = decoding_device(config.precision)
    options: dict[str, Any] = {"base": config.base, "with_codec": False, "letters": config.letters}
    return merge(load_speech_llm(config.model, device=device, dtype=dtype, **options))


def decoder(
    speech_llm: SpeechLLM | None, encoding: Encoding, config: EvalAsrConfig
) -> Callable[..., list[Transcription]]:
    """From speech and durations_s to texts: by the language model, or without one what the speech itself says."""
    if speech_llm is None:
        return lambda speech, durations_s: [Transcription(encoding.spelled(part)) for part in speech]
    return functools.partial(
        recognize,
        speech_llm=speech_llm,
        batch_tokens=config.batch_tokens,
        progress=True,
        beams=config.beams,
        fallback=config.fallback,
        static_cache=config.static_cache,
        letters_weight=config.letters_weight,
    )


def rates(references: list[str], hypotheses: list[str], config: EvalAsrConfig) -> tuple[WordErrorRate, WordErrorRate]:
    """Error rates of words and of characters."""
    texts = references, hypotheses, config.normalizer, config.seed
    return word_error_rate(*texts), character_errors(*texts)


def summary(score: WordErrorRate, results: dict[str, Any]) -> str:
    """The results, as printed at the end: the rate to go by first, pooled and by split."""
    low, high = results["cer_ci95"]
    lines = [str(score), f"CER {results['cer']:.2%} (95 % interval {low:.2%} to {high:.2%})"]
    if results["primary"] == "cer":
        lines[::-1] = [lines[0], f"{lines[1]}, the rate to go by: most of these texts are written without spaces"]
    if len(results["splits"]) > 1:
        lines.insert(0, f"Pooled over the splits {', '.join(results['splits'])}:")
        for split, found in results["splits"].items():
            of_split = [f"{rate.upper()} {plain(found[rate], '.2%')}" for rate in ("wer", "cer")]
            lines.append(f"{split}: {', '.join(of_split)} ({found['words']} words of {found['utterances']} utterances)")
    rate = results["primary"]
    if found := results["ci95_speakers"]:
        bounds = " to ".join(f"{bound:.2%}" for bound in found)
        lines.append(f"{rate.upper()} over its {len(results['speakers'])} speakers: 95 % interval {bounds}")
    if f"{rate}_shuffled_audio" in results:
        lines.append(f"{rate.upper()} with another utterance's audio {results[f'{rate}_shuffled_audio']:.2%}")
    return "\n".join([*lines, results_verdict(results)])


def cyclic_shuffle(count: int, seed: int) -> np.ndarray:
    """A random permutation without fixed points: a single cycle."""
    order = np.random.default_rng(seed).permutation(count)
    shuffled = np.empty(count, int)
    shuffled[order] = np.roll(order, 1)
    return shuffled


if __name__ == "__main__":
    run_recipe(main, CONFIG)
