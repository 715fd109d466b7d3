"""Voice conversion by swapping codes (the paper's Table 2, eq. 8), with bounds from real recordings.

    python recipes/eval_conversion.py codec=RUN/model data=CORPUS output=RESULTS "splits=[test]" pairs=100 \\
        "layers=[[1],[1,2,3,4,5,6,7]]" speaker=ECAPA recognizer=recognizer:NAME

A pair is a source, a recording with its words, and a target, a recording of another speaker whose codes are inserted;
if possible with other words, so that the target cannot contribute the words, too. Conversions are compared with
recordings of the target speaker that the method does not use:
- distortion (MCD) and pitch correlation with the reference: the target speaker saying the words of the source, of
  several recordings the one closest to the source in length. Both need such parallel text;
- speaker similarity (with `speaker`) to a further recording, if there is one, and to the source itself;
- word error rate (with `recognizer`) against the words of the source.
"source" is the unchanged source, "source, n codebooks" its reconstruction by the codec, "target" the reference itself.
Compare swaps with the reconstruction: a codec that blurs spectra is closer to any voice by MCD than a real other voice.
Failures to score are listed with the reason and do not enter the means; intervals are over pairs. Writes
RESULTS/results.json, pairs.jsonl, report.html and the sounds of some pairs, and prints a Markdown table. Needs
`pip install "speechllm[eval]"`.
"""

import contextlib
import random
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from speechllm.runs.config import parse_config
from tokenizer.settings import NOT_EMPTY, Corpus, Count, Names, Natural, Seed, Settings

MEASURES = ("mcd", "f0_correlation", "speaker_similarity", "source_similarity")
Row = dict[str, Any]
LayerSets = Annotated[list[Annotated[list[Natural], NOT_EMPTY]], NOT_EMPTY]


@dataclass
class EvalConversionConfig(Settings):
    codec: str  # name of a codec, as load_tokenizer takes it
    data: Corpus  # corpus folder with speakers, or several as [A, B]: manifest.jsonl or LibriSpeech's layout
    output: str  # folder for results.json, pairs.jsonl, report.html and audio/
    splits: Names | None = None  # all when null
    pairs: Count = 100  # at most; each recording is the source of at most one pair
    layers: LayerSets | None = None  # sets of layers to take from the target; [1] and [1, ..., last] when null
    speaker: str | None = None  # folder or hub name of a SpeechBrain ECAPA-TDNN, for speaker similarity
    recognizer: str | None = None  # recognizer:NAME, for the word error rate
    freevc: str | None = None  # folder of FreeVC's published files, as a further method
    wavlm: str = "microsoft/wavlm-large"  # folder or hub name, for FreeVC
    seed: Seed = 0  # of the pairs and the bootstrap


if __name__ == "__main__":  # help and mistakes are answered before torch is loaded
    CONFIG = parse_config(EvalConversionConfig)

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
    save_audio,
    swap_layers,
)
from speechllm.evaluation.comparison import conversion_table
from speechllm.evaluation.error_rates import mean_and_interval, recognition_measures
from speechllm.reports.pages import write_results
from speechllm.runs.machine import provenance
from speechllm.runs.recipe import claim_output, run_recipe
from tokenizer.audio import resample
from tokenizer.corpus import load_utterance
from tokenizer.errors import InputError
from tokenizer.files import write_jsonl
from tokenizer.loading import load_recognizer
from tokenizer.metrics.conversion import branches_of, matchings_of
from tokenizer.metrics.evaluators import recognized_text, speaker_embedding
from tokenizer.metrics.freevc import FreeVC
from tokenizer.metrics.prosody import align_voices, mel_cepstral_distortion, pitch_correlation, voice_frames
from tokenizer.metrics.quality import MAX_SCORED_S, resample_to_16_khz
from tokenizer.training.teachers import SpeakerTeacher

SAVED = 5  # pairs whose sounds are saved


@dataclass(frozen=True)
class Pair:
    """Recordings of one conversion, see above; voice: a further recording of the target speaker, for similarity."""

    source: Utterance
    target: Utterance
    reference: Utterance | None
    voice: Utterance | None


def main(config: EvalConversionConfig) -> None:
    started = time.perf_counter()
    folder = claim_output(config.output, config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    codec = load_codec(config.codec).to(device)
    layers = layer_sets(config.layers, codec.num_codebooks)
    recognizer = load_recognizer(config.recognizer).to(device) if config.recognizer else None
    freevc = FreeVC.from_pretrained(config.freevc, config.wavlm).to(device) if config.freevc else None
    pairs = choose_pairs(read_corpus(config.data, config.splits), config.pairs, config.seed)
    speaker = SpeakerTeacher.from_pretrained(config.speaker).to(device) if config.speaker else None

    rows: list[Row] = []
    for pair in tqdm(pairs, "convert", unit="pair"):
        row: Row = {role: recording and recording.id for role, recording in vars(pair).items()}
        row |= {"scores": {}, "failed": []}
        with record_failure(row, None):
            sounds = load_sounds(pair, codec.sample_rate)
            converted = convert(sounds, codec, layers, freevc)
            row["scores"] = score(pair, sounds, converted, codec.sample_rate, speaker, recognizer, row)
            if len(rows) < SAVED:
                save_sounds(folder / "audio", f"{len(rows)}", {**converted, **sounds}, codec.sample_rate)
        rows.append(row)

    results = {
        "codec_fingerprint": codec.fingerprint,
        "pairs": len(rows),
        "splits": dict(Counter(pair.source.split for pair in pairs)),  # pooled; a target may come from another one
        "parallel": sum(pair.reference is not None for pair in pairs),
        "methods": summarize(rows, config.seed),
        "failed": [failure for row in rows for failure in row["failed"]],
        **provenance(config, time.perf_counter() - started, "pyworld"),
    }
    write_jsonl(folder / "pairs.jsonl", rows)
    table = conversion_table({config.codec: {"conversion": results}})
    write_results(folder, f"{config.codec}: voice conversion", results, [table])
    print(table.markdown())
    if not results["parallel"]:
        print("\nNo target speaker says the words of a source: distortion and pitch correlation were not measured.")
    if failed := results["failed"]:
        print(f"{len(failed)} not scored, see {folder / 'results.json'}; the first: {failed[0]['detail']}")


def layer_sets(layers: list[list[int]] | None, codebooks: int) -> list[list[int]]:
    """The given sets of layers, sorted; when None, the second layer alone and all layers but the first."""
    if layers is None:
        layers = [[1]] if codebooks <= 2 else [[1], list(range(1, codebooks))]
    if not layers or not all(chosen and set(chosen) <= set(range(codebooks)) for chosen in layers):
        raise InputError(f"layers must be sets of numbers from 0 to {codebooks - 1}, such as [[1]]; got {layers}")
    return [sorted(set(chosen)) for chosen in layers]


def choose_pairs(utterances: Sequence[Utterance], most: int, seed: int) -> list[Pair]:
    """At most `most` random pairs, each of a source and another speaker."""
    speakers: dict[str, list[Utterance]] = defaultdict(list)
    for utterance in utterances:
        if utterance.speaker:
            speakers[utterance.speaker].append(utterance)
    if len(speakers) < 2:
        raise InputError(f"conversion needs recordings of two speakers, found {len(speakers)}: choose other splits")
    draw = random.Random(seed)
    sources = [utterance for recordings in speakers.values() for utterance in recordings]
    pairs = []
    for source in draw.sample(sources, min(most, len(sources))):
        recordings = speakers[draw.choice([name for name in speakers if name != source.speaker])]
        same = [recording for recording in recordings if source.text and recording.text == source.text]
        target = draw.choice([recording for recording in recordings if recording not in same] or recordings)
        references = [recording for recording in same if recording is not target]
        reference = min(references, key=lambda r: abs(r.duration_s - source.duration_s), default=None)
        others = [recording for recording in recordings if recording not in (target, reference)]
        pairs.append(Pair(source, target, reference, draw.choice(others) if others else None))
    return pairs


@contextlib.contextmanager
def record_failure(row: Row, method: str | None) -> Iterator[None]:
    """Add a failure to score, which ends the block, to the failures of the row; method None: all methods."""
    try:
        yield
    except (AudioError, QualityError) as error:
        failure = {"source": row["source"], "target": row["target"], "method": method}
        row["failed"].append(failure | {"reason": error.reason, "detail": str(error)})


def load_sounds(pair: Pair, rate: int) -> dict[str, Tensor]:
    """The recordings of a pair by role, float [N]; without "reference" or "voice" if the pair has none."""
    recordings = {role: recording for role, recording in vars(pair).items() if recording is not None}
    return {role: load_utterance(recording, rate, MAX_SCORED_S) for role, recording in recordings.items()}


@torch.no_grad()
def convert(
    sounds: dict[str, Tensor], codec: Codec, layers: list[list[int]], freevc: FreeVC | None
) -> dict[str, Tensor]:
    """The converted speech by method, and the two bounds, float [N] on the CPU."""
    device, codebooks, branches = codec.device, codec.codebooks, branches_of(codec)
    source, target = (codec.encode(sounds[role][None].to(device)) for role in ("source", "target"))
    codes = {f"source, {n} codebooks": source.first(n) for n in sorted({max(chosen) + 1 for chosen in layers})}
    for chosen in layers:
        for matching in matchings_of(codec):
            swapped = swap_layers(source, target, chosen, matching, codebooks, branches)
            codes[f"swap {numbers(chosen)}, by {matching}"] = swapped
    converted = {name: codec.decode(one)[0].cpu() for name, one in codes.items()}
    if freevc is not None:
        pair = (resample_to_16_khz(sounds[role], codec.sample_rate).to(device) for role in ("source", "target"))
        converted["FreeVC"] = resample(freevc.convert(*pair).cpu(), freevc.sample_rate, codec.sample_rate)
    return {"source": sounds["source"], **converted, "target": sounds.get("reference", sounds["target"])}


def numbers(layers: Sequence[int]) -> str:
    """Sorted layers in short form: 1-7 for all from 1 to 7."""
    first, last = layers[0], layers[-1]
    return f"{first}-{last}" if last - first == len(layers) - 1 > 0 else ",".join(map(str, layers))


def score(
    pair: Pair,
    sounds: dict[str, Tensor],
    converted: dict[str, Tensor],
    rate: int,
    speaker: SpeakerTeacher | None,
    recognizer: AudioTokenizer | None,
    row: Row,
) -> dict[str, Row]:
    """Scores by method, as far as there are recordings and evaluators for them; failures are added to the row."""
    reference = voice_frames(sounds["reference"], rate) if pair.reference else None
    voice = speaker_embedding(speaker, sounds["voice"], rate) if speaker and pair.voice else None
    origin = speaker_embedding(speaker, sounds["source"], rate) if voice is not None else None
    scores: dict[str, Row] = {name: {} for name in converted}
    for name, sound in converted.items():
        if reference is not None:
            with record_failure(row, name):
                voices = align_voices(voice_frames(sound, rate), reference)
                scores[name]["mcd"] = mel_cepstral_distortion(voices)
                scores[name]["f0_correlation"] = pitch_correlation(voices)
        if voice is not None:
            with record_failure(row, name):
                heard = speaker_embedding(speaker, sound, rate)
                scores[name] |= {"speaker_similarity": float(heard @ voice), "source_similarity": float(heard @ origin)}
        spoken = pair.target if name == "target" and pair.reference is None else pair.source
        if recognizer is not None and spoken.text:
            scores[name] |= {"text": spoken.text, "recognized": recognized_text(recognizer, sound, rate)}
    return scores


def save_sounds(folder: Path, number: str, sounds: dict[str, Tensor], rate: int) -> None:
    """Save sounds under names such as 0_source.wav and 0_swap_1_by_content.wav."""
    for name, sound in sounds.items():
        save_audio(folder / f"{number}_{name.replace(',', '').replace(' ', '_')}.wav", sound, rate)


def summarize(rows: Sequence[Row], seed: int) -> dict[str, Row]:
    """Means by method, with the number of pairs."""
    methods: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        for name, scores in row["scores"].items():
            methods[name].append(scores)
    return {name: {**means(scores, seed), "pairs": len(scores)} for name, scores in methods.items()}


def means(scores: Sequence[Row], seed: int) -> Row:
    """Means of every measure that at least one pair has; the word error rate is over the words of all pairs."""
    found: Row = {}
    for measure in MEASURES:
        if values := [pair[measure] for pair in scores if measure in pair]:
            found[measure] = mean_and_interval(values, seed) | {"pairs": len(values)}
    if recognized := [pair for pair in scores if "recognized" in pair]:
        texts = [pair["text"] for pair in recognized], [pair["recognized"] for pair in recognized]
        measured = recognition_measures(*texts, seed)
        found |= {rate: {**one, "pairs": len(recognized)} for rate, one in measured.items()}
    return found


if __name__ == "__main__":
    run_recipe(main, CONFIG)
