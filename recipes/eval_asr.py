"""Transcribe encoded utterances and report the word error rate, with an interval and a control.

    python recipes/eval_asr.py model=RUN/model codes=CODES output=RESULTS splits=[test-clean]

The control transcribes every utterance from another utterance's audio: a model that listens must then fail. Writes
RESULTS/results.json, RESULTS/predictions.jsonl and RESULTS/report.html, the page to look at.
"""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from speechllm import (
    codes_of,
    load_codes,
    load_speech_llm,
    read_log,
    run_recipe,
    transcribe_codes,
    versions,
    word_error_rate,
    write_json,
    write_recognition_report,
    write_text,
)


@dataclass
class EvalAsrConfig:
    model: str  # folder of train_asr, or one that `SpeechLLM.save` wrote
    codes: str  # folder of encode_speech
    output: str  # folder for results.json, predictions.jsonl and report.html
    splits: list[str] | None = None  # all when null
    normalizer: str = "librispeech"
    shuffled_audio: bool = True  # also run the control
    batch_size: int = 32
    seed: int = 0


def main(config: EvalAsrConfig) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    speech_llm = load_speech_llm(config.model, device=device)
    rows, encoding = load_codes(config.codes, config.splits)
    speech_llm.vocabulary.require(encoding)
    rows = [row for row in rows if row["text"]]
    if not rows:
        raise SystemExit(f"{config.codes}: no utterance of {config.splits or 'any split'} has a transcript to score")
    codes = [codes_of(row, encoding)[: speech_llm.vocabulary.encoding.layers] for row in rows]
    references = [row["text"] for row in rows]
    seconds = sum(row["duration_s"] for row in rows)

    started = time.perf_counter()
    hypotheses = transcribe_codes(codes, speech_llm, config.batch_size, progress=True)
    elapsed = time.perf_counter() - started
    score = word_error_rate(references, hypotheses, config.normalizer, config.seed)
    results = {
        **asdict(score),
        "audio_s": seconds,
        "tokens_per_second": sum(part.numel() for part in codes) / seconds,
        "real_time_factor": elapsed / seconds,
        "codec_fingerprint": encoding.fingerprint,
        "versions": versions(),
    }
    if config.shuffled_audio and len(codes) > 1:
        order = cyclic_shuffle(len(codes), config.seed)
        shuffled = transcribe_codes([codes[i] for i in order], speech_llm, config.batch_size, progress=True)
        results["wer_shuffled_audio"] = word_error_rate(references, shuffled, config.normalizer).wer

    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    predictions = [
        {
            "id": row["id"],
            "speaker": row["speaker"],
            "duration_s": round(row["duration_s"], 3),
            "reference": row["text"],
            "hypothesis": hypothesis,
        }
        for row, hypothesis in zip(rows, hypotheses, strict=True)
    ]
    lines = (json.dumps(prediction, ensure_ascii=False) + "\n" for prediction in predictions)
    write_text(folder / "predictions.jsonl", "".join(lines))
    write_json(folder / "results.json", results)
    write_recognition_report(
        folder / "report.html",
        title=f"{config.model} on {', '.join(config.splits or ['all splits'])}",
        results=results,
        predictions=predictions,
        logs={"Training": read_log(Path(config.model).parent)},  # of the run folder, where the model lies in one
    )
    print(f"{score}\nwith another utterance's audio: {results.get('wer_shuffled_audio', float('nan')):.2%}")


def cyclic_shuffle(count: int, seed: int) -> np.ndarray:
    """A random order in which no utterance keeps its place: one long cycle."""
    order = np.random.default_rng(seed).permutation(count)
    shuffled = np.empty(count, int)
    shuffled[order] = np.roll(order, 1)
    return shuffled


if __name__ == "__main__":
    run_recipe(main, EvalAsrConfig)
