"""Speech quality after the codec, by the number of codebooks used for decoding (the paper's Table 1).

    python recipes/eval_codec.py codec=RUN/model data=CORPUS output=RESULTS "splits=[test-clean]" "layers=[1,2,4,8]" \\
        speaker=ECAPA recognizer=recognizer:NAME

Each utterance is encoded once and decoded from each number of codebooks; the measures are those of `Quality`, with
`speaker` also the cosine similarity of the voice to the original's, and with `recognizer` the word error rate of a
recogniser. The original scored against itself is the bound of every measure. Failures to score are listed with the
reason and do not enter the means. Writes RESULTS/results.json, utterances.jsonl and report.html, and prints a Markdown
table. Needs the packages of `pip install "speechllm[eval]"`.
"""

import functools
import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from speechllm.runs.config import parse_config
from tokenizer.settings import Corpus, Count, Counts, Names, Seed, Settings

ORIGINAL = "original"  # key of the original among the numbers of codebooks
Row = dict[str, Any]


@dataclass
class EvalCodecConfig(Settings):
    codec: str  # name of a codec, as load_tokenizer takes it
    data: Corpus  # corpus folder, or several as [A, B]: manifest.jsonl or LibriSpeech's layout
    output: str  # folder for results.json, utterances.jsonl and report.html
    splits: Names | None = None  # all when null
    layers: Counts | None = None  # numbers of codebooks to decode from; 1, 2, 4, ... and all when null
    max_utterances: Count | None = None  # evenly chosen, all when null
    speaker: str | None = None  # folder or hub name of a SpeechBrain ECAPA-TDNN, for speaker similarity
    recognizer: str | None = None  # recognizer:NAME, for the word error rate
    seed: Seed = 0  # of the bootstrap


if __name__ == "__main__":  # help and mistakes are answered before torch is loaded
    CONFIG = parse_config(EvalCodecConfig)

import torch
from torch import Tensor
from tqdm import tqdm

from speechllm import (
    AudioError,
    AudioTokenizer,
    Codec,
    QualityError,
    Utterance,
    load_codec,
    read_corpus,
    reconstruct,
    speech_quality,
)
from speechllm.evaluation.comparison import quality_table
from speechllm.evaluation.error_rates import mean_and_interval, recognition_measures
from speechllm.reports.pages import write_results
from speechllm.runs.machine import available_cpus, provenance
from speechllm.runs.recipe import claim_output, run_recipe
from speechllm.runs.signals import follow_parent
from tokenizer.corpus import load_utterance, spread
from tokenizer.files import write_jsonl
from tokenizer.loading import load_recognizer
from tokenizer.metrics.evaluators import recognized_text, speaker_embedding
from tokenizer.metrics.quality import MAX_SCORED_S, layer_counts
from tokenizer.training.teachers import SpeakerTeacher


def main(config: EvalCodecConfig) -> None:
    started = time.perf_counter()
    folder = claim_output(config.output, config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    codec = load_codec(config.codec).to(device)
    counts = layer_counts(codec, config.layers)
    recognizer = load_recognizer(config.recognizer).to(device) if config.recognizer else None
    speaker = SpeakerTeacher.from_pretrained(config.speaker).to(device) if config.speaker else None
    utterances = spread(read_corpus(config.data, config.splits), config.max_utterances)
    scored = score(utterances, codec, counts, speaker, recognizer)
    rows = list(tqdm(scored, "score", len(utterances), unit="utt"))

    failed = [failure for row in rows for failure in row["failed"]]
    results = {
        "codec_fingerprint": codec.fingerprint,
        "utterances": len(rows),
        "original": means(rows, ORIGINAL, config.seed),
        "codebooks": {count: rates(count, codec) | means(rows, count, config.seed) for count in counts},
        "splits": split_means(rows, [ORIGINAL, *counts], config.seed),
        "failed": failed,
        **provenance(config, time.perf_counter() - started, "pesq", "pystoi"),
    }
    write_jsonl(folder / "utterances.jsonl", rows)
    table = quality_table({config.codec: {"quality": results}})
    write_results(folder, f"{config.codec}: speech quality", results, [table])
    if results["splits"]:
        print(f"pooled over the splits {', '.join(results['splits'])}; each of them in {folder / 'results.json'}")
    print(table.markdown())
    if failed:
        print(f"{len(failed)} not scored, see {folder / 'results.json'}; the first: {failed[0]['detail']}")


@dataclass
class Waiting:
    """An utterance whose sounds, by number of codebooks, are being scored in other processes."""

    utterance: Utterance
    sounds: dict[int | str, Tensor]
    futures: dict[int | str, Future]


def score(
    utterances: Sequence[Utterance],
    codec: Codec,
    counts: Sequence[int],
    speaker: SpeakerTeacher | None,
    recognizer: AudioTokenizer | None,
) -> Iterator[Row]:
    """One row per utterance, in order: this process runs the networks, other processes compute PESQ and so on."""
    workers = available_cpus()
    with ProcessPoolExecutor(workers, initializer=start_worker) as pool:
        waiting: deque[Waiting] = deque()
        for utterance in utterances:
            waiting.append(submit(pool, utterance, codec, counts))
            if len(waiting) > 2 * workers:  # limits the waveforms in memory
                yield collect(waiting.popleft(), codec.sample_rate, speaker, recognizer)
        while waiting:
            yield collect(waiting.popleft(), codec.sample_rate, speaker, recognizer)


def start_worker() -> None:
    torch.set_num_threads(1)
    follow_parent()


def submit(pool: ProcessPoolExecutor, utterance: Utterance, codec: Codec, counts: Sequence[int]) -> Waiting:
    """Sounds and the futures of their scores; an unusable recording has no sounds, and futures with its AudioError."""
    try:
        original = load_utterance(utterance, codec.sample_rate, MAX_SCORED_S)
    except AudioError as error:
        unusable: Future = Future()
        unusable.set_exception(error)
        return Waiting(utterance, {}, dict.fromkeys([ORIGINAL, *counts], unusable))
    sounds = {ORIGINAL: original, **reconstruct(codec, original, counts)}
    futures = {
        name: pool.submit(speech_quality, original.numpy(), sound.numpy(), codec.sample_rate)
        for name, sound in sounds.items()
    }
    return Waiting(utterance, sounds, futures)


def collect(
    waiting: Waiting, sample_rate: int, speaker: SpeakerTeacher | None, recognizer: AudioTokenizer | None
) -> Row:
    """Scores by number of codebooks, and failures: one entry per reason, with the numbers of codebooks concerned."""
    utterance, sounds = waiting.utterance, waiting.sounds
    row: Row = {
        "id": utterance.id,
        "split": utterance.split,
        "speaker": utterance.speaker,
        "text": utterance.text,
        "scores": {},
        "recognized": {},
    }
    failed: dict[str, Row] = {}
    embed = functools.cache(lambda name: speaker_embedding(speaker, sounds[name], sample_rate))
    for name, future in waiting.futures.items():
        if recognizer is not None and utterance.text and name in sounds:  # also of what PESQ and STOI refuse
            row["recognized"][name] = recognized_text(recognizer, sounds[name], sample_rate)
        try:
            scores = asdict(future.result())
            if speaker is not None:
                scores["speaker_similarity"] = float(embed(ORIGINAL) @ embed(name))
        except (AudioError, QualityError) as error:
            failure = {"id": utterance.id, "reason": error.reason, "detail": str(error), "codebooks": []}
            failed.setdefault(str(error), failure)["codebooks"].append(name)
            continue
        row["scores"][name] = scores
    return row | {"failed": list(failed.values())}


def rates(count: int, codec: Codec) -> Row:
    """Token rate and bitrate of `count` codebooks."""
    tokens = count * codec.frame_rate
    return {"tokens_per_second": tokens, "kbps": tokens * math.log2(codec.codebook_size) / 1000}


def means(rows: Sequence[Row], name: int | str, seed: int) -> Row:
    """Mean scores for one number of codebooks, or of the originals, for every measure that has values."""
    scores = [row["scores"][name] for row in rows if name in row["scores"]]
    found: Row = {"utterances": len(scores)}
    for measure in scores[0] if scores else ():
        found[measure] = mean_and_interval([score[measure] for score in scores], seed)
    recognized = [row for row in rows if name in row["recognized"]]
    texts = [row["text"] for row in recognized], [row["recognized"][name] for row in recognized]
    return found | recognition_measures(*texts, seed)


def split_means(rows: Sequence[Row], names: Sequence[int | str], seed: int) -> dict[str, dict[int | str, Row]]:
    """`means` of each split by number of codebooks, if there are several splits."""
    splits: dict[str, list[Row]] = {}
    for row in rows:
        splits.setdefault(row["split"], []).append(row)
    if len(splits) < 2:
        return {}
    return {split: {name: means(own, name, seed) for name in names} for split, own in splits.items()}


if __name__ == "__main__":
    run_recipe(main, CONFIG)
