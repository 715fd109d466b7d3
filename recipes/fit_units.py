"""Fit speech units: k-means over the frames of a self-supervised model (HuBERT, GSLM: Lakhotia et al., 2102.01192).

    python recipes/fit_units.py model=HUBERT data=CORPUS output=RUN clusters=500 layer=6 "splits=[train]"
    python recipes/fit_units.py ... deduplicate=true bpe=2000       sequences of units as further codes

Frames are those of utterances in random order, up to `max_frames`. RUN/model is an audio tokenizer, like a codec;
RUN/results.json and report.html show the distances of frames to their centroids, the use of units and the codes a
second, RUN/skipped.jsonl lists unusable recordings.
"""

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from speechllm.runs.config import parse_config
from tokenizer.settings import CodebookSize, Corpus, Count, Names, Positive, Seed, Settings


@dataclass
class UnitsConfig(Settings):
    model: str  # folder or hub name of HuBERT, WavLM, wav2vec 2.0 or Whisper, or of a compressor
    data: Corpus  # corpus folder, or several as [A, B]: manifest.jsonl or LibriSpeech's layout
    output: str  # run folder; the tokenizer goes to its subfolder `model`
    clusters: CodebookSize = 500  # K
    layer: int | Literal["avg"] | None = 6  # hidden state; "avg": mean; null: as `features:` has it
    splits: Names | None = None  # all when null
    deduplicate: bool = False  # merge repeats of a unit
    bpe: CodebookSize | None = None  # codes after merges of frequent sequences (BPE), units included; null: none
    max_frames: Count = 500_000  # for k-means: 2.8 hours
    max_duration_s: Positive = 60.0  # longer utterances are skipped
    seed: Seed = 0

    def contradictions(self) -> Iterable[str]:
        if self.clusters > self.max_frames:
            yield f"clusters must be at most max_frames = {self.max_frames}, got {self.clusters}"
        if self.bpe is not None and not self.deduplicate:
            yield "bpe merges units whose repeats are merged: it needs deduplicate=true"
        if self.bpe is not None and self.bpe <= self.clusters:
            yield f"bpe counts the units, too: it must be more than clusters = {self.clusters}, got {self.bpe}"


if __name__ == "__main__":  # help and mistakes are answered before torch is loaded
    CONFIG = parse_config(UnitsConfig)

import numpy as np
import torch
from sklearn.cluster import MiniBatchKMeans
from tqdm import tqdm

from speechllm import AudioError, Utterance, read_corpus
from speechllm.reports.pages import write_results
from speechllm.runs.machine import make_accelerator, provenance
from speechllm.runs.recipe import claim_output, run_recipe
from speechllm.runs.run import report_skipped
from tokenizer.corpus import load_each, skipped_row
from tokenizer.files import atomic_folder
from tokenizer.metrics.code_usage import usage_of_counts
from tokenizer.schemes.features import FeatureEncoder
from tokenizer.schemes.merges import UnitMerges
from tokenizer.schemes.units import UnitTokenizer
from tokenizer.utterances import spell_corpora


def main(config: UnitsConfig) -> None:
    started = time.perf_counter()
    run = claim_output(config.output, config)
    utterances = read_corpus(config.data, config.splits)
    encoder = FeatureEncoder.from_pretrained(config.model, config.layer).to(make_accelerator().device)
    frames, sizes, skipped = collect(utterances, encoder, config)
    reasons = dict(Counter(row["reason"] for row in skipped))
    if len(frames) < config.clusters:
        raise SystemExit(
            f"error: {spell_corpora(config.data)}: {len(frames)} frames cannot make {config.clusters} clusters; "
            f"skipped: {reasons}"
        )
    print(f"k-means: {len(frames)} frames, {config.clusters} clusters", flush=True)
    kmeans = MiniBatchKMeans(config.clusters, batch_size=10_000, n_init=5, random_state=config.seed).fit(frames)
    spoken = torch.from_numpy(kmeans.labels_).long().split(sizes)
    merges = None
    if config.bpe is not None:
        merges = UnitMerges.fit((one.unique_consecutive() for one in spoken), config.clusters, config.bpe)
    units = UnitTokenizer(encoder, torch.from_numpy(kmeans.cluster_centers_), config.deduplicate, merges)

    with atomic_folder(run / "model") as folder:
        units.save_pretrained(folder)
    report_skipped(run, skipped)
    counts = np.bincount(kmeans.labels_, minlength=config.clusters)
    results = {
        "fingerprint": units.fingerprint,
        "frames": len(frames),
        "inertia": kmeans.inertia_ / len(frames),  # mean squared distance of a frame to its centroid
        "variance": float(frames.var(0).sum()),  # the same for a single cluster
        **usage_of_counts(counts),
        "codes": units.codebook_size,
        "codes_per_second": encoder.frame_rate * sum(len(units.shorten(one)) for one in spoken) / len(frames),
        "skipped": reasons,
        **provenance(config, time.perf_counter() - started, "scikit-learn"),
    }
    write_results(run, f"{run}: speech units", results, codebook_counts=[counts])
    print(
        f"{config.clusters} units of {len(frames)} frames in {run / 'model'}: perplexity {results['perplexity']:.1f}, "
        f"{results['codes']} codes, {results['codes_per_second']:.1f} of them a second"
    )


def collect(
    utterances: Sequence[Utterance], encoder: FeatureEncoder, config: UnitsConfig
) -> tuple[np.ndarray, list[int], list[dict[str, str]]]:
    """Frames float [M, C] of utterances in random order, how many each has, and the skipped recordings."""
    found: list[np.ndarray] = []
    missing = config.max_frames
    skipped: list[dict[str, str]] = []
    order = np.random.default_rng(config.seed).permutation(len(utterances))
    loaded = load_each([utterances[index] for index in order], max_duration_s=config.max_duration_s)
    with tqdm(total=config.max_frames, desc="features", unit="frames", dynamic_ncols=True) as bar:
        for utterance, waveform in loaded:
            if isinstance(waveform, AudioError):
                skipped.append(skipped_row(utterance, waveform))
                continue
            frames = encoder.encode(waveform[None].to(encoder.device)).utterance(0).numpy()
            found.append(frames[:missing])
            bar.update(len(found[-1]))
            missing -= len(found[-1])
            if not missing:
                break
    whole = np.concatenate(found) if found else np.empty((0, encoder.width), np.float32)
    return whole, [len(frames) for frames in found], skipped


if __name__ == "__main__":
    run_recipe(main, CONFIG)
