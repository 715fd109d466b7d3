"""How good speech is after the codec, by the number of codebooks it is decoded from (the paper's Table 1).

    python recipes/eval_codec.py codec=RUN/model data=CORPUS output=RESULTS "splits=[test-clean]" "layers=[1,2,4,8]"

Each utterance is encoded once and decoded from each number of codebooks; the measures are those of `Quality`. Whatever
cannot be scored is listed with the reason and never averaged in. Writes RESULTS/results.json and utterances.jsonl, and
prints a Markdown table. Needs the packages of `pip install "speechllm[eval]"`.
"""

import json
import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from speechllm import (
    AudioError,
    QualityError,
    SpeechCodec,
    Utterance,
    available_cpus,
    layer_counts,
    load_audio,
    mean_and_interval,
    read_corpus,
    reconstruct,
    run_recipe,
    speech_quality,
    versions,
    write_json,
    write_text,
)

LONGEST_S = 40.0  # `speech_quality` refuses longer ones: do not even encode them
MEASURES = {
    "pesq_wb": "PESQ-WB",
    "pesq_nb": "PESQ-NB",
    "stoi": "STOI",
    "si_sdr": "SI-SDR (dB)",
    "mel_distance": "mel distance",
}
Row = dict[str, Any]


@dataclass
class EvalCodecConfig:
    codec: str  # folder or hub name of a speech codec
    data: str  # corpus folder: manifest.jsonl or LibriSpeech's layout
    output: str  # folder for results.json and utterances.jsonl
    splits: list[str] | None = None  # all when null
    layers: list[int] | None = None  # numbers of codebooks to decode from; 1, 2, 4, ... and all when null
    max_utterances: int | None = None  # spread evenly over the splits, all when null
    seed: int = 0  # of the bootstrap


def main(config: EvalCodecConfig) -> None:
    started = time.perf_counter()
    codec = SpeechCodec.from_pretrained(config.codec).to("cuda" if torch.cuda.is_available() else "cpu")
    try:
        counts = layer_counts(codec, config.layers)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    utterances = spread(read_corpus(config.data, config.splits), config.max_utterances)
    rows = list(tqdm(score(utterances, codec, counts), "score", len(utterances), unit="utt"))

    failed = [failure for row in rows for failure in row["failed"]]
    results = {
        "codec": config.codec,
        "codec_fingerprint": codec.fingerprint,
        "data": config.data,
        "splits": config.splits,
        "utterances": len(rows),
        "codebooks": {count: summarize(rows, count, codec, config.seed) for count in counts},
        "failed": failed,
        "versions": versions() | {package: version(package) for package in ("pesq", "pystoi")},
        "seconds": time.perf_counter() - started,
    }
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "utterances.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    write_json(folder / "results.json", results)
    print(table(results["codebooks"]))
    if failed:
        print(f"\n{len(failed)} without scores, see {folder / 'results.json'}; the first: {failed[0]['detail']}")


def spread(utterances: list[Utterance], most: int | None) -> list[Utterance]:
    """At most `most` utterances in equal steps, so that not only the first speakers are among them."""
    if most is None or most >= len(utterances):
        return utterances
    return [utterances[i * len(utterances) // most] for i in range(most)]


def score(utterances: Sequence[Utterance], codec: SpeechCodec, counts: Sequence[int]) -> Iterator[Row]:
    """One row per utterance, in order: this process runs the codec, the others compute PESQ and its companions."""
    workers = available_cpus()
    with ProcessPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        waiting: deque[tuple[Utterance, dict[int, Future]]] = deque()
        for utterance in utterances:
            waiting.append((utterance, submit(pool, utterance, codec, counts)))
            if len(waiting) > 2 * workers:  # the waveforms of a whole corpus would fill the memory
                yield collect(*waiting.popleft())
        while waiting:
            yield collect(*waiting.popleft())


def submit(
    pool: ProcessPoolExecutor, utterance: Utterance, codec: SpeechCodec, counts: Sequence[int]
) -> dict[int, Future]:
    """The coming scores by number of codebooks; for an unusable recording they fail with its AudioError."""
    try:
        original = load_audio(utterance.path, codec.sample_rate, max_duration_s=LONGEST_S)
    except AudioError as error:
        unusable: Future = Future()
        unusable.set_exception(error)
        return dict.fromkeys(counts, unusable)
    return {
        count: pool.submit(speech_quality, original.numpy(), waveform.numpy(), codec.sample_rate)
        for count, waveform in reconstruct(codec, original, counts).items()
    }


def collect(utterance: Utterance, futures: dict[int, Future]) -> Row:
    """Scores by number of codebooks, and what failed: one entry per reason with the numbers of codebooks it met."""
    scores: dict[int, dict[str, float]] = {}
    failed: dict[str, Row] = {}
    for count, future in futures.items():
        try:
            scores[count] = asdict(future.result())
        except (AudioError, QualityError) as error:
            failure = {"id": utterance.id, "reason": error.reason, "detail": str(error), "codebooks": []}
            failed.setdefault(str(error), failure)["codebooks"].append(count)
    return {"id": utterance.id, "speaker": utterance.speaker, "scores": scores, "failed": list(failed.values())}


def summarize(rows: Sequence[Row], count: int, codec: SpeechCodec, seed: int) -> Row:
    """Rate and mean scores of decoding from `count` codebooks; no means where nothing could be scored."""
    scores = [row["scores"][count] for row in rows if count in row["scores"]]
    tokens = count * codec.frame_rate
    return {
        "tokens_per_second": tokens,
        "kbps": tokens * math.log2(codec.codebook_size) / 1000,
        "utterances": len(scores),
        **{name: mean_and_interval([score[name] for score in scores], seed) for name in MEASURES if scores},
    }


def table(codebooks: dict[int, Row]) -> str:
    """Markdown: one row per number of codebooks, means with their intervals."""
    lines = [
        f"| codebooks | tokens/s | kbps | {' | '.join(MEASURES.values())} | utterances |",
        f"|{'---|' * (len(MEASURES) + 4)}",
    ]
    for count, row in codebooks.items():
        cells = [f"{count}", f"{row['tokens_per_second']:g}", f"{row['kbps']:g}"]
        for name in MEASURES:
            low, high = row[name]["ci95"] if name in row else (math.nan, math.nan)
            cells.append(f"{row[name]['mean']:.3f} ({low:.3f} to {high:.3f})" if name in row else "none")
        lines.append(f"| {' | '.join(cells)} | {row['utterances']} |")
    return "\n".join(lines)


if __name__ == "__main__":
    run_recipe(main, EvalCodecConfig)
