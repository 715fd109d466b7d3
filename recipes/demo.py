"""Everything in one command: speech, teachers, tokenizer, codes, language model, word error rate, report.

    python recipes/demo.py --config configs/demo.yaml                         a small synthetic corpus, made on the spot
    python recipes/demo.py --config configs/demo_data.yaml data=FOLDER        your own speech
    python recipes/demo.py --config configs/demo_real.yaml data=FOLDER        your own speech, with published parts
    ... --fresh                                                               start over

Every stage is one of the other recipes, run as a separate command (printed before it starts). Finished stages are
skipped and a killed one is resumed, so the same command can be repeated at any time. FOLDER has a manifest.jsonl or
LibriSpeech's layout; its splits are recognised by name (train*, dev*, test*), or made by speaker.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from speechllm.runs.config import load_config, parse_config
from tokenizer.settings import Corpus, Count, Positive, Rule, Seed, Settings

RECIPES = Path(os.path.relpath(Path(__file__).parent))
RATES = "primary cer cer_ci95 cer_shuffled_audio cer_shuffled_audio_ci95 training_normalizer".split()  # of eval_asr
PowerOfTwo = Annotated[int, Rule("a power of two", lambda n: n > 0 and n & (n - 1) == 0)]
WRITTEN = (  # in the run folder
    *("corpus", "semantic_teacher", "speaker_teacher", "tokenizer", "codes", "asr", "evaluation", "demo.json"),
    *("stages.json", "tokenizer_results.json", "tokenizer_results.html", "results.json", "predictions.jsonl"),
    "report.html",
)


@dataclass
class DemoConfig(Settings):
    output: str = "runs/demo"  # run folder
    data: Corpus | None = None  # corpus folder, or several as [A, B]; null: synthetic speech
    audio_tokenizer: str | None = None  # a published one, as `load_tokenizer` takes it; null: train teachers and codec
    language_model: str | None = None  # folder or hub name, in place of the one that `asr` names
    fresh: bool = False  # delete what an earlier demo wrote there first
    processes: PowerOfTwo | None = None  # per training without a GPU; null: one per core, at most 8
    semantic_teacher: str = "configs/teacher/semantic_demo.yaml"  # configurations of the stages
    speaker_teacher: str = "configs/teacher/speaker_demo.yaml"
    tokenizer_stage: str = "configs/tokenizer/demo.yaml"
    asr: str = "configs/asr/demo.yaml"
    scale: Positive = 1.0  # factor of all numbers of training steps: 0.5 for a quicker run, 2 for a longer one
    seed: Seed | None = None  # of the trainings; null: those of their configurations
    synthetic_train: Count = 3500  # synthetic utterances
    synthetic_dev: Count = 100
    synthetic_test: Count = 200
    notes: list[str] | None = None  # shown in the report

    def contradictions(self) -> Iterable[str]:
        if self.audio_tokenizer and not self.data:
            yield "audio_tokenizer: published parts are tried on real speech: name a folder of yours with data=FOLDER"


if __name__ == "__main__":  # help and mistakes are answered before torch is loaded
    CONFIG = parse_config(DemoConfig)

import numpy as np

from speechllm import CorpusError, Utterance, read_corpus
from speechllm.evaluation.error_rates import results_verdict
from speechllm.reports.pages import write_report
from speechllm.reports.sounds import read_sounds
from speechllm.runs.machine import available_cpus, provenance
from speechllm.runs.recipe import claim_output, run_recipe
from speechllm.runs.run import read_log
from speechllm.runs.stages import Stages, config_class
from tokenizer.errors import InputError
from tokenizer.files import read_json, read_jsonl, write_json, write_text
from tokenizer.pretrained import check_folder, find_file
from tokenizer.utterances import corpus_folders, spell_corpora


def main(config: DemoConfig) -> None:
    run = Path(config.output)
    for folder in corpus_folders(config.data or []):
        if not folder.is_dir():
            raise CorpusError(f"{folder}: no such corpus folder")
        if folder.resolve().is_relative_to(run.resolve()):
            raise CorpusError(f"{folder} is in the run folder {run}: choose output=FOLDER outside it")
    semantic, speaker = run / "semantic_teacher", run / "speaker_teacher"
    corpus, tokenizer_run, codes, asr = (run / name for name in ("corpus", "tokenizer", "codes", "asr"))
    data, codec = f"data={corpus}", f"codec={config.audio_tokenizer or tokenizer_run / 'model'}"
    teachers = [f"semantic.teacher={semantic / 'model'}", f"acoustic.teacher={speaker / 'model'}"]
    asr_words = [f"codes={codes}", codec, f"output={asr}"]
    if config.language_model:
        asr_words.append(f"model={config.language_model}")
    # made before anything is, so that a mistake in a configuration is found at once
    asr_training = training("train_asr.py", config.asr, config, *asr_words)
    if config.audio_tokenizer:
        asr_config = load_config(config_class(RECIPES / "train_asr.py"), config.asr, asr_words)
        check_published(config.audio_tokenizer, asr_config.model)
    else:
        own = {
            "semantic": training("train_teacher.py", config.semantic_teacher, config, data, f"output={semantic}"),
            "speaker": training("train_teacher.py", config.speaker_teacher, config, data, f"output={speaker}"),
            "tokenizer": training(
                "train_tokenizer.py", config.tokenizer_stage, config, data, f"output={tokenizer_run}", *teachers
            ),
        }
    claim_output(run, config)
    if config.fresh:
        delete(run)
    record_settings(run, config)
    stages = Stages(run, RECIPES)
    print(plan(config))

    if config.data is None:
        counts = [f"--{split}={getattr(config, f'synthetic_{split}')}" for split in ("train", "dev", "test")]
        stages.stage("corpus", ["synthesize_speech.py", str(corpus), *counts, f"--jobs={available_cpus()}"])
    else:
        stages.call("corpus", lambda: gather(config.data, corpus))
    encoding = ["encode_speech.py", codec, data, f"output={codes}", "layers=null"]
    if config.audio_tokenizer is None:
        stages.stage("teachers", own["semantic"], own["speaker"])
        stages.launch("tokenizer", own["tokenizer"], config.processes)
        encoding.append("batch_s=20")  # so small a codec is faster by batches on a CPU, too
    stages.launch("encode", encoding)
    stages.launch("asr", asr_training, config.processes)
    evaluations = [
        ["eval_asr.py", f"model={asr / 'model'}", f"codes={codes}", f"output={run / 'evaluation'}", "splits=[test]"]
    ]
    if config.audio_tokenizer is None:
        words = [f"codes={codes}", data, f"output={run / 'tokenizer_results.json'}"]
        evaluations.append(["eval_tokenizer.py", *words, "train_splits=[train]", "test_splits=[test]"])
    stages.stage("evaluate", *evaluations)
    results = collect(config, run, stages)
    write_json(run / "results.json", results)
    shutil.copy(run / "evaluation" / "predictions.jsonl", run / "predictions.jsonl")
    if config.audio_tokenizer is None:
        report(run, results)
    else:  # there is nothing else to show
        shutil.copy(run / "evaluation" / "report.html", run / "report.html")
    print(summary(run, results))


def training(recipe: str, file: str, config: DemoConfig, *words: str) -> list[str]:
    """The command of a training with configuration `file`, its steps scaled. Raises ConfigError."""
    recipe_config = config_class(RECIPES / recipe)
    if config.seed is not None:
        words = (f"seed={config.seed}", *words)
    if config.scale != 1:
        steps = max(1, round(config.scale * load_config(recipe_config, file, words).steps))
        words = (f"steps={steps}", *words)
    load_config(recipe_config, file, words)
    return [recipe, f"--config={file}", *words]


def check_published(audio_tokenizer: str, language_model: str | None) -> None:
    """Raise InputError for a published part that is no folder and cannot be fetched, before hours of encoding."""
    kind, _, name = audio_tokenizer.partition(":")
    heard_by = name.partition("#")[0] if kind in ("features", "recognizer") else None
    for key, part in {"audio_tokenizer": heard_by, "language_model": language_model}.items():
        if part and not find_file(check_folder(part, ["config.json"], "a published model"), "config.json"):
            raise InputError(f"{part} is no folder of a model and cannot be fetched: name another one with {key}=")


def delete(run: Path) -> None:
    """Delete what a demo has written, and nothing else in its folder."""
    for name in WRITTEN:
        if (path := run / name).is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def record_settings(run: Path, config: DemoConfig) -> None:
    """Write the settings to demo.json; exit if the folder holds a demo with other settings."""
    asked = {name: value for name, value in asdict(config).items() if name not in ("output", "fresh", "processes")}
    file = run / "demo.json"
    if read_json(file) not in ({}, asked):
        raise SystemExit(f"{run} holds a demo with other settings: add --fresh to start over, or set output=FOLDER")
    write_json(file, asked)


def gather(data: str | list[str], output: Path) -> None:
    """Write a manifest of a corpus, or of several, with the splits train, dev and test."""
    utterances = read_corpus(data)
    named = {u.id: u.split for u in utterances}
    found = set(named.values())
    for target in ("train", "dev", "test"):
        if target not in found:  # LibriSpeech: train-clean-100, dev-clean, test-clean; on the hub: validation.clean
            names = (target, "validation") if target == "dev" else (target,)
            named |= {u.id: target for u in utterances if u.split.startswith(names)}
    if missing := {"train", "dev", "test"} - set(named.values()):
        print(f"there is no split {', '.join(sorted(missing))}: splitting by speaker instead, 8 : 1 : 1")
        named = split_by_speaker(utterances)
    lines = [
        json.dumps({**u.row(), "path": str(Path(u.path).resolve()), "split": named[u.id]}, ensure_ascii=False)
        for u in utterances
        if named[u.id] in ("train", "dev", "test") and u.duration_s  # without one there is no recording
    ]
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "manifest.jsonl", "\n".join(lines) + "\n")
    print({split: sum(u_split == split for u_split in named.values()) for split in ("train", "dev", "test")})


def split_by_speaker(utterances: list[Utterance]) -> dict[str, str]:
    """The split of every utterance id: one tenth of the speakers, at least one, for dev and for test each.

    With fewer than three known speakers, utterances are split instead.
    """
    speakers = {u.id: u.speaker or u.id for u in utterances}
    if len(set(speakers.values())) < 3:
        speakers = {u.id: u.id for u in utterances}
    order = sorted(set(speakers.values()), key=lambda name: hashlib.sha256(name.encode()).digest())
    share = max(1, len(order) // 10)
    held_out = dict.fromkeys(order[:share], "dev") | dict.fromkeys(order[share : 2 * share], "test")
    return {name: held_out.get(speaker, "train") for name, speaker in speakers.items()}


def unseen_speakers(manifest: list[dict[str, object]]) -> bool:
    """Whether all speakers are known, and those of the test split in no other."""
    tested, others = (
        {row.get("speaker") for row in manifest if (row["split"] == "test") is test} for test in (True, False)
    )
    return None not in tested | others and tested.isdisjoint(others)


def collect(config: DemoConfig, run: Path, stages: Stages) -> dict[str, object]:
    """The content of results.json."""
    evaluation = read_json(run / "evaluation" / "results.json")
    codec = read_json(run / "tokenizer_results.json")  # of our own, that is: empty with a published one
    encoded = read_json(run / "codes" / "done.json")
    return {
        "wer": evaluation["wer"],
        "wer_ci95": evaluation["ci95"],
        "wer_shuffled_audio": evaluation.get("wer_shuffled_audio"),  # None with a single utterance
        "wer_shuffled_audio_ci95": evaluation.get("wer_shuffled_audio_ci95"),
        **{name: evaluation[name] for name in RATES if name in evaluation},
        "utterances": evaluation["utterances"],
        "words": evaluation["words"],
        "unseen_speakers": unseen_speakers(read_jsonl(run / "corpus" / "manifest.jsonl")),
        "normalizer": evaluation["normalizer"],
        "tokens_per_second": evaluation["tokens_per_second"],
        "corpus": "synthetic speech (espeak-ng)" if config.data is None else spell_corpora(config.data),
        "hours": encoded["hours"],
        "skipped": encoded["skipped"],
        "content": codec.get("content", {}),
        "speaker": codec.get("speaker"),
        "codebooks": [{name: u[name] for name in ("used", "dead", "perplexity")} for u in codec.get("usage", [])],
        "teachers": {name: read_json(run / f"{name}_teacher" / "done.json") for name in ("semantic", "speaker")},
        "seconds_by_stage": stages.seconds,
        "codec_fingerprint": evaluation["codec_fingerprint"],
        **provenance(config, sum(stages.seconds.values())),
        "notes": config.notes or [],
    }


def report(run: Path, results: dict[str, object]) -> None:
    """Write report.html."""
    codec = read_json(run / "tokenizer_results.json")
    write_report(
        run / "report.html",
        title="speechllm demo",
        results=results,
        tokenizer_log=read_log(run / "tokenizer"),
        asr_log=read_log(run / "asr"),
        codebook_counts=[np.array(layer["counts"]) for layer in codec["usage"]],
        reconstruction=read_sounds(run / "tokenizer" / "samples"),
        predictions=read_jsonl(run / "predictions.jsonl"),
    )


def plan(config: DemoConfig) -> str:
    """The stages, as printed at the start."""
    speech = "synthetic speech" if config.data is None else spell_corpora(config.data)
    if config.audio_tokenizer:
        return (
            f"Demo in {config.output} on {available_cpus()} cores: {speech} -> {config.audio_tokenizer} -> "
            f"{config.language_model or 'the language model'} of {config.asr} -> WER -> report.\n"
            "Published parts that are not folders are fetched by their hub names. Finished stages are not repeated."
        )
    return (
        f"Demo in {config.output} on {available_cpus()} cores: {speech} -> two small teachers -> codec (content "
        "distilled into layer 0, voice into layer 1) -> codes -> small Qwen2 with the codes as new tokens -> WER -> "
        "report.\nWith synthetic speech this takes about 4 minutes on two cores. Finished stages are not repeated."
    )


def summary(run: Path, results: dict[str, object]) -> str:
    """The results, as printed at the end."""
    rate = results.get("primary", "wer")  # the rate to go by
    low, high = results[f"{rate}_ci95"]
    lines = [
        f"\n{rate.upper()} {results[rate]:.1%} (95 % interval {low:.1%} to {high:.1%}) on {results['utterances']} "
        f"utterances{' of unseen speakers' * results['unseen_speakers']}, at "
        f"{results['tokens_per_second']:.1f} tokens/s",
    ]
    if (control := results.get(f"{rate}_shuffled_audio")) is not None:
        lines.append(f"{rate.upper()} with another utterance's audio {control:.1%}")
    lines.append(results_verdict(results))
    if content := results["content"]:
        layer0, baseline = content["layer_0"]["pnmi"], content["log_mel_kmeans"]["pnmi"]
        lines.append(f"{content['label']} information (PNMI) in layer 0: {layer0:.2f}; log-mel k-means: {baseline:.2f}")
    if speaker := results["speaker"]:
        parts = [f"{name.replace('_', ' ')} {speaker[name]:.0%}" for name in speaker if name.startswith("layer")]
        lines.append(f"speaker identification from {', '.join(parts)} (chance {speaker['chance']:.0%})")
    lines.append(f"{results['seconds']:.0f} s in total; see {run / 'report.html'}")
    lines.append(f"to speak to it: speechllm page {run / 'asr' / 'model'}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_recipe(main, CONFIG)
