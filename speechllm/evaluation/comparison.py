"""Tables that compare tokenizers: the paper's tables, costs, and the best system for each purpose.

Results are dicts as collected by recipes/compare.py, one per system; whatever was not measured is a dash.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from types import MappingProxyType
from typing import Any

import numpy as np

from speechllm.evaluation.error_rates import error_shares, paired_shares, seeds_error_rate
from speechllm.evaluation.guidance import guidance
from speechllm.evaluation.scripts import primary_rate, spell
from speechllm.evaluation.tables import DASH, Measure, Result, Results, Table, cell, plain, primary_measure
from tokenizer.errors import InputError

QUALITY = {  # measures of eval_codec: label and format
    "pesq_wb": ("PESQ-WB", ".3f"),
    "pesq_nb": ("PESQ-NB", ".3f"),
    "stoi": ("STOI", ".3f"),
    "si_sdr": ("SI-SDR (dB)", ".2f"),
    "mel_distance": ("mel distance", ".3f"),
    "speaker_similarity": ("speaker similarity", ".3f"),
    "wer": ("WER", ".1%"),
    "cer": ("CER", ".1%"),  # measured only where it steers
}
RATES = ("wer", "cer")
CONVERSION = {  # those of eval_conversion
    "mcd": ("MCD (dB)", ".2f"),
    "f0_correlation": ("log-F0 correlation", ".3f"),
    "speaker_similarity": ("speaker similarity", ".3f"),
    "source_similarity": ("to the source", ".3f"),
    "wer": ("WER", ".1%"),
    "cer": ("CER", ".1%"),  # measured only where it steers
}


def comparison_tables(results: Results) -> list[Table]:
    """The tables with something measured, the guidance first."""
    makers = (
        *(guidance, quality_table, conversion_table, emotion_table, recognition_table, difference_table),
        *(content_table, cost_table),
    )
    return [table for table in (make(results) for make in makers) if table.rows]


def pool_recognition(results: Mapping[int, Result], predictions: Mapping[int, list[Result]]) -> dict[str, Any]:
    """Pooled evaluations of eval_asr, given by seed: "mean" and "ci95" of the WER (`seeds_error_rate`), WER by seed.

    Also "cer_ci95", "primary", the rate to go by, and its "each", see `paired_shares`. predictions: of the same
    utterances in the same order. Seeds without a result are ignored. Raises InputError if the seeds were not scored on
    the same texts in the same way.
    """
    done = {seed: found for seed, found in results.items() if found}
    if not done:
        return {}
    rows = [predictions[seed] for seed in done]
    scored = {seed: [(row.get("id"), row["reference"]) for row in predictions[seed]] for seed in done}
    for what, by_seed in {
        "the predictions are of other utterances": scored,
        "another normaliser was used": {seed: found["normalizer"] for seed, found in done.items()},
    }.items():
        if other := [seed for seed in done if by_seed[seed] != by_seed[next(iter(done))]]:
            raise InputError(
                f"seed {other[0]} cannot be pooled with seed {next(iter(done))}: {what}; evaluate it again"
            )
    references = [row["reference"] for row in rows[0]]
    hypotheses = [[row["hypothesis"] for row in one] for one in rows]
    first = next(iter(done.values()))
    kept = {key: first[key] for key in ("tokens_per_second", "words", "utterances", "normalizer")}
    for rate in ("cer", "wer_shuffled_audio", "wer_recognizer", "wer_letters"):
        if all(rate in found for found in done.values()):
            kept[rate] = float(np.mean([found[rate] for found in done.values()]))
    seeds = {str(seed): found["wer"] for seed, found in done.items()}
    normalizer = first["normalizer"]
    spelled = seeds_error_rate(spell(references, normalizer), [spell(one, normalizer) for one in hypotheses], "none")
    kept |= {"cer_ci95": spelled["ci95"], "primary": primary_rate(references), "splits": _split_means(done)}
    names = [row.get("id", str(place)) for place, row in enumerate(rows[0])]
    shares = error_shares(references, hypotheses, normalizer, kept["primary"])
    kept["each"] = dict(zip(names, shares, strict=True))
    return {**seeds_error_rate(references, hypotheses, normalizer), **kept, "seeds": seeds}


def _split_means(done: Mapping[int, Result]) -> dict[str, dict[str, float]]:
    """By split, the mean WER and CER over the seeds; without the splits that have no words."""
    first, *_ = done.values()
    measured = [split for split, found in first.get("splits", {}).items() if found["words"]]
    return {
        split: {rate: float(np.mean([found["splits"][split][rate] for found in done.values()])) for rate in RATES}
        for split in measured
    }


def pool_emotion(
    results: Mapping[int, Result], predictions: Mapping[int, Sequence[Result]] = MappingProxyType({})
) -> dict[str, Any]:
    """Pooled results of train_emotion, given by seed: the mean accuracy, the lowest and highest bound over actors.

    "control": the same of those with shuffled labels. predictions: from them "each", the correct answers by actor, of
    each seed, see `paired_shares`.
    """
    done = {seed: found for seed, found in results.items() if found}
    if not done:
        return {}
    seeds = {str(seed): found["accuracy"] for seed, found in done.items()}
    pooled: dict[str, Any] = {"mean": float(np.mean(list(seeds.values()))), "seeds": seeds}
    pooled["ci95"] = _bounds(done, "ci95_actors")
    control = "accuracy_shuffled_labels"
    if all(control in found for found in done.values()):
        mean = float(np.mean([found[control] for found in done.values()]))
        pooled["control"] = {"mean": mean, "ci95": _bounds(done, f"{control}_ci95")}
    each: dict[str, tuple[list[int], int]] = {}
    for number, seed in enumerate(done):
        for row in predictions.get(seed, []):
            correct, asked = each.get(str(row["actor"]), ([0] * len(done), 0))
            correct[number] += row["answer"] == row["emotion"]
            each[str(row["actor"])] = correct, asked + (number == 0)
    return {**next(iter(done.values())), **pooled, "each": each}


def _bounds(done: Mapping[int, Result], interval: str) -> list[float]:
    """The lowest and the highest bound of the intervals of several trainings."""
    low, high = zip(*(found[interval] for found in done.values()), strict=True)
    return [min(low), max(high)]


def add_shares(measured: Mapping[str, Any], scores: Mapping[str, Result]) -> dict[str, Any]:
    """Mean measures, with the scores that they are means of as "each", see `paired_shares`.

    scores: by utterance or pair, each with its measures, or text and what was recognized.
    """
    heard = {name: one for name, one in scores.items() if "recognized" in one}
    texts = [one["text"] for one in heard.values()], [[one["recognized"] for one in heard.values()]]
    found = dict(measured)
    for measure, mean in measured.items():
        if measure in RATES:
            shares = error_shares(*texts, mean["normalizer"], measure) if heard else []
            found[measure] = {**mean, "each": dict(zip(heard, shares, strict=True))}
        elif isinstance(mean, Mapping):
            each = {name: (one[measure], 1) for name, one in scores.items() if measure in one}
            found[measure] = {**mean, "each": each}
    return found


def without_shares(results: Any) -> Any:
    """Results without "each", which the files of the single evaluations hold, too."""
    if not isinstance(results, Mapping):
        return results
    return {key: without_shares(value) for key, value in results.items() if key != "each"}


def bits(encoding: Mapping[str, Any], tokens_per_second: float | None) -> float | None:
    """Bitrate in kbit/s of a token rate; None for speech that is not encoded as codes."""
    if tokens_per_second is None or encoding.get("kind", "codes") != "codes" or not encoding.get("codebook_size"):
        return None
    return tokens_per_second * math.log2(encoding["codebook_size"]) / 1000


def owners(results: Results) -> dict[str, Result]:
    """The systems that have their own tokenizer."""
    return {name: result for name, result in results.items() if not result.get("like")}


def quality_table(results: Results) -> Table:
    """Speech quality by number of codebooks (the paper's Table 1)."""

    def row(name: str, count: int | str, found: Mapping[str, Any]) -> list[str]:
        rates = [plain(found.get("tokens_per_second")), plain(found.get("kbps"))]
        cells = [cell(found.get(measure), form) for measure, (_, form) in QUALITY.items()]
        return [name, f"{count}", *rates, *cells, plain(found.get("utterances"))]

    measured = {name: result["quality"] for name, result in results.items() if result.get("quality")}
    bound = next((quality["original"] for quality in measured.values() if quality.get("original")), None)
    rows = [row("original recording", DASH, bound)] if bound else []
    for name in owners(results) if measured else ():
        codebooks = measured.get(name, {}).get("codebooks", {})
        rows += [row(name, count, found) for count, found in codebooks.items()] or [row(name, DASH, {})]
    lost = {name: len(quality["failed"]) for name, quality in measured.items() if quality.get("failed")}
    note = "Not scored: " + ", ".join(f"{count} of {name}" for name, count in lost.items()) + "." if lost else ""
    head = ["system", "codebooks", "tokens/s", "kbps", *(label for label, _ in QUALITY.values()), "utterances"]
    return Table("Table 1: speech quality", head, rows, note)


def conversion_table(results: Results) -> Table:
    """Voice conversion by method, with bounds from real recordings (the paper's Table 2)."""
    measured = {name: result["conversion"]["methods"] for name, result in results.items() if result.get("conversion")}
    rows, bounds = [], set()
    for name in owners(results) if measured else ():
        for method, found in measured.get(name, {DASH: {}}).items():
            bound = method in ("source", "target")  # real recordings, the same for all systems
            if bound and method in bounds:
                continue
            bounds |= {method} if bound else set()
            cells = [
                _over_pairs(found.get(measure), found.get("pairs", 0), form)
                for measure, (_, form) in CONVERSION.items()
            ]
            rows.append(["any" if bound else name, method, *cells, plain(found.get("pairs"))])
    rows.sort(key=lambda row: row[0] != "any")  # the bounds first
    head = ["system", "method", *(label for label, _ in CONVERSION.values()), "pairs"]
    note = "In brackets: the number of pairs behind a measure that some pairs lack."
    return Table("Table 2: voice conversion", head, rows, note if any("[" in "".join(row) for row in rows) else "")


def _over_pairs(measure: Measure | None, pairs: int, form: str) -> str:
    """A cell, with the number of pairs if not all pairs have the measure."""
    return cell(measure, form) + (f" [{measure['pairs']}]" if measure and measure["pairs"] < pairs else "")


def emotion_table(results: Results) -> Table:
    """Emotion recognition from the tokens (the paper's Table 3)."""
    measured = {name: result["emotion"] for name, result in results.items() if result.get("emotion")}
    rows = []
    for name in {**owners(results), **measured} if measured else ():
        found = measured.get(name, {})
        seeds = ", ".join(f"{value:.1%}" for value in found.get("seeds", {}).values()) or DASH
        controls = [cell(found.get("control"), ".1%"), plain(found.get("chance"), ".1%")]
        rows.append([name, cell(found, ".1%"), seeds, *controls, plain(found.get("utterances"))])
    head = ["system", "accuracy", "by seed", "with shuffled labels", "chance", "utterances"]
    note = (
        "Intervals resample actors, those with shuffled labels the utterances of one fold. With several seeds: the "
        "mean, and the lowest and highest bound."
    )
    return Table("Table 3: emotion recognition", head, rows, note)


def recognition_table(results: Results) -> Table:
    """Speech recognition by a language model that reads the tokens (the paper's Table 4)."""
    rows = []
    for name, result in results.items() if any(result.get("asr") for result in results.values()) else ():
        found = result.get("asr", {})
        seeds = list(found.get("seeds", {}).values())
        rates = [plain(found.get("tokens_per_second"), ".1f"), plain(kbps(result), ".2f")]
        spread = f"{np.std(seeds, ddof=1):.1%}" if len(seeds) > 1 else DASH
        control = plain(found.get("wer_shuffled_audio"), ".1%")
        by_seed = ", ".join(f"{wer:.1%}" for wer in seeds) or DASH
        cer, words = plain(found.get("cer"), ".1%"), plain(found.get("words"))
        if found.get("primary") == "cer":
            cer = f"{cell(primary_measure(found), '.1%')}, the rate to go by"
        splits = {
            split: f"WER {one['wer']:.1%}, CER {one['cer']:.1%}" for split, one in found.get("splits", {}).items()
        }
        by_split = "; ".join(f"{split}: {rates}" for split, rates in splits.items()) if len(splits) > 1 else DASH
        alone = plain(found.get("wer_recognizer", found.get("wer_letters")), ".1%")
        rows.append([name, *rates, cell(found, ".1%"), by_seed, spread, cer, control, alone, words, by_split])
    head = ["system", "tokens/s", "kbps", "WER", "by seed", "standard deviation of seeds", "CER"]
    head += ["WER with another utterance's audio", "WER of the recogniser, or letters, alone", "words", "by split"]
    note = (
        "The WER of several seeds is their mean. Its 95 % interval comes from 1,000 bootstrap samples of seeds and "
        "test utterances; with few seeds it is too narrow, so the WER of each seed is given, too. Only codes have a "
        "bitrate, features and texts have none. All but the last column pool the splits. CER leads where texts are "
        "written without spaces between words."
    )
    return Table("Table 4: speech recognition", head, rows, note)


def difference_table(results: Results) -> Table:
    """Every two systems on the same utterances, in what the paper's tables compare."""
    rows: dict[str, list[list[str]]] = {}  # by measure
    for (name, result), (other, against) in combinations(results.items(), 2):
        measures = {measure: found for measure, _, found in compared(against)}
        for measure, form, one in compared(result):
            two = measures.get(measure, {})
            same = one.get("normalizer") == two.get("normalizer")
            if same and (found := paired_shares(two.get("each", {}), one.get("each", {}))):
                low, high = (format(bound, "+" + form) for bound in found.ci95)
                values = [f"{found.difference:+{form}}", f"{low} to {high}", f"{found.p_value:.3f}"]
                rows.setdefault(measure, []).append([name, other, measure, *values, f"{found.utterances}"])
    head = ["system", "compared with", "measure", "difference", "95 % interval", "p", "utterances"]
    note = (
        "Paired bootstrap (Bisani & Ney 2004): 1,000 samples of the utterances that both were tested on (of "
        "conversions: pairs, of emotions: actors) and of the seeds of each; p two-sided, not corrected for the number "
        "of rows. Of a single seed it speaks of this training, of two or three it is too narrow: how much others would "
        "differ, the standard deviation of the seeds says."
    )
    return Table("Differences on the same utterances", head, [row for own in rows.values() for row in own], note)


def compared(result: Result) -> Iterator[tuple[str, str, Measure]]:
    """What the paper's tables compare, with the format of the values: of conversions the first that swaps codes."""
    for count, row in result.get("quality", {}).get("codebooks", {}).items():
        if "pesq_wb" in row:
            yield f"PESQ-WB, codebooks: {count}", ".3f", row["pesq_wb"]
    methods = result.get("conversion", {}).get("methods", {})
    swap = next((method for method in methods if method.startswith("swap")), None)
    for measure in ("mcd", "f0_correlation"):
        if swap and measure in methods[swap]:
            label, form = CONVERSION[measure]
            yield f"{label}, {swap}", form, methods[swap][measure]
    if result.get("emotion"):
        yield "accuracy of emotions", ".1%", result["emotion"]
    if result.get("asr"):
        yield result["asr"].get("primary", "wer").upper(), ".1%", result["asr"]


def kbps(result: Result) -> float | None:
    """Bitrate of what the language model reads."""
    return bits(result.get("encoding", {}), result.get("asr", {}).get("tokens_per_second"))


def content_table(results: Results) -> Table:
    """Content and voice in layers 0 and 1."""
    measured = {name: result["content"] for name, result in results.items() if result.get("content")}
    rows = []
    for name in owners(results) if measured else ():
        found = measured.get(name, {})
        voice = [plain(found.get("speaker", {}).get(f"layer_{layer}"), ".1%") for layer in (0, 1)]
        cosine = plain(results[name].get("validation", {}).get("dev_semantic_cosine"), ".3f")
        rows.append([name, cosine, *_content(found, "layer_0"), *voice])
    baselines = [_content(found, "log_mel_kmeans") for found in measured.values()]
    rows += [["log-mel k-means", DASH, *one, DASH, DASH] for one in baselines if set(one) != {DASH}]
    head = ["system", "semantic teacher cosine", "phones in layer 0 (PNMI)", "CTC probe of layer 0: CER", "WER"]
    return Table("Content and voice", [*head, "speaker from layer 0", "from layer 1"], rows)


def _content(content: Mapping[str, Any], units: str) -> list[str]:
    """Phone information in the units, and error rates of a probe on them."""
    probe, found = content.get("probe", {}).get(units, {}), content.get("content", {}).get(units, {})
    interval = {"ci95": found["pnmi_ci95"]} if "pnmi_ci95" in found else {}
    pnmi = cell({"mean": found["pnmi"], **interval}) if found else DASH
    return [pnmi, *(plain(probe.get(rate), ".1%") for rate in ("cer", "wer"))]


def cost_table(results: Results) -> Table:
    """Size, bitrate and time of each system."""
    rows = []
    for name, result in results.items():
        encoding, minutes = result.get("encoding", {}), result.get("minutes", {})
        rate = result.get("asr", {}).get("tokens_per_second")
        if rate is None and encoding.get("kind") == "codes":
            rate = encoding["frame_rate"] * encoding["layers"]
        millions = None if result.get("parameters") is None else result["parameters"] / 1e6
        taken = [plain(minutes.get(what), ".1f") for what in ("tokenizer", "asr", "emotion")]
        made = [
            encoding.get("kind", DASH),
            plain(millions, ".2f"),
            plain(rate, ".1f"),
            plain(bits(encoding, rate), ".2f"),
        ]
        rows.append([name, *made, plain(result.get("rtf"), ".4f"), *taken])
    head = ["system", "kind", "tokenizer, M parameters", "tokens/s", "kbps", "encoding, s per s of speech"]
    head += ["training, min: tokenizer", "recogniser, per seed", "emotions, per seed"]
    rows = rows if any(set(row[1:]) != {DASH} for row in rows) else []
    return Table("Cost", head, rows, "Minutes of wall-clock time on this machine; trainings may have shared its cores.")
