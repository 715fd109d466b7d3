"""Kills at random moments: after each nothing of the job runs, the user's files are there, the same command goes on,
and the end is bit for bit that of an uninterrupted run.

A sequence is one output folder: started, killed, started again, up to three times, and then left to its end.
"""

import hashlib
import json
import random
import re
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from parts import (
    ALIGNMENT,
    ASR,
    COMPRESSOR,
    CTC,
    CUT,
    EMOTION,
    ENCODE,
    EVAL_ASR,
    EVAL_ROWS,
    MAKE_ROWS,
    REPCODEC,
    SPEAKER,
    TEXT,
    TOKENIZER,
    UNITS,
)
from start import TRACEBACK, Ended, Lane, Process

from speechllm.data.shards import open_shard

KILLS = 3  # at most, in a sequence
END_S = 30  # within which a process ends after a signal: it may save first
MINE = "notes of the user\n"
TIMES = {  # keys of results that another run has otherwise
    *("seconds", "seconds_by_stage", "real_time_factor", "rtf", "minutes", "command", "versions", "started", "time"),
}
LOOKS = {".html", ".png", ".svg"}  # pages and pictures: it counts that they are there
TRAINED = ("checkpoints/step_*.pt", "model*/**", "report.html")
LORA = "train=lora lora.rank=4 lora.alpha=8 model=text/model"
K, T, C = signal.SIGKILL, signal.SIGTERM, signal.SIGINT


@dataclass(frozen=True)
class Job:
    """share: of the kills. aims: every other kill comes when such a file appears. kept: finished work, which must not
    be done again. loose: what differs between two runs anyway. real: started as by a user, or else forked.
    """

    name: str
    command: str
    share: int
    aims: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    loose: tuple[str, ...] = ()
    real: bool = False
    signals: tuple[signal.Signals, ...] = (K,)

    def words(self, output: Path) -> str:
        return self.command.replace("OUT", str(output)) if "OUT" in self.command else f"{self.command} output={output}"


SHARDS = ("codes_*.arrow",)
JOBS = (  # the long ones first
    Job(
        "demo",
        "demo.py data=corpus processes=1 semantic_teacher=tiny/semantic.yaml speaker_teacher=tiny/speaker.yaml "
        "tokenizer_stage=tiny/codec.yaml asr=tiny/asr.yaml",
        2,
        ("speaker_teacher/log.jsonl", "codes/codes_*.arrow", "asr/checkpoints/*"),
        ("*_teacher/model/*", "tokenizer/model/*", "codes/codes_*.arrow"),
        loose=("stages.json",),
        real=True,
        signals=(T, C, K),
    ),
    Job(
        "compare",
        "compare.py --config tiny/compare.yaml data=corpus asr_data=corpus",
        3,
        ("one/asr_0/log.jsonl", "one/asr_1/log.jsonl"),
        ("one/codes/codes_*.arrow", "one/asr_0/model/*"),
        loose=("stages.json", "table.md"),
        real=True,
        signals=(C, T, K),
    ),
    Job(
        "train_tokenizer in two processes",
        f"speechllm run train_tokenizer --processes 2 {TOKENIZER.split(maxsplit=1)[1]} output=OUT",
        4,
        ("checkpoints/step_*.pt",),
        real=True,
        signals=(K, T),
    ),
    Job("train_tokenizer, real", f"{TOKENIZER} num_workers=2", 6, TRAINED, real=True, signals=(T, C, K)),
    Job("train_asr, real", ASR, 6, TRAINED, real=True, signals=(C, T, K)),
    Job("train_teacher, real", f"{SPEAKER} steps=24 save_every=2", 6, TRAINED, real=True, signals=(T, K, C)),
    Job("train_text, real", TEXT, 4, ("checkpoints/checkpoint-*",), real=True, signals=(T, C, K)),
    Job("train_emotion, real", EMOTION, 3, ("folds/*.json",), ("folds/*.json",), real=True, signals=(C, T, K)),
    Job("encode_speech, real", ENCODE, 3, real=True, kept=SHARDS, signals=(C, T, K)),
    Job(
        "synthesize_speech, real",
        "synthesize_speech.py OUT --train 40 --dev 4 --test 4 --jobs 2",
        4,
        ("audio/*/*.flac",),
        loose=("*",),
        real=True,
        signals=(K, T, C),
    ),
    Job("train_teacher, alignment", f"{ALIGNMENT} steps=24 save_every=2", 6, TRAINED),
    Job("train_teacher, ctc", f"{CTC} steps=24 save_every=2", 6, TRAINED),
    Job("train_teacher, speaker", f"{SPEAKER} steps=24 save_every=2", 6, TRAINED),
    Job("train_tokenizer", TOKENIZER, 8, TRAINED),
    Job("train_asr", ASR, 8, TRAINED),
    Job("train_asr, lora", f"{ASR} steps=12 {LORA}", 5, TRAINED),
    Job("train_compressor", COMPRESSOR, 5, TRAINED),
    Job("train_repcodec", REPCODEC, 5, TRAINED),
    Job("train_text", TEXT, 6, ("checkpoints/checkpoint-*/trainer_state.json", "model*/**", "report.html")),
    Job("train_emotion", EMOTION, 6, ("folds/*.json", "results.json"), ("folds/*.json",)),
    Job("encode_speech", ENCODE, 6, ("codes_*.part*", "codes_*.arrow", "request.json"), SHARDS),
    Job("fit_units", UNITS, 5, ("model*/**", "results.json")),
    Job(
        "import_speech", "import_speech.py data=shards", 6, ("rows.jsonl", "audio/train/0000/*50.flac"), ("audio/**/*",)
    ),
    Job(
        "align_speech",
        "align_speech.py data=corpus",
        4,
        ("manifest.jsonl*",),
        loose=("manifest.jsonl",),  # PocketSphinx adapts to what a process has heard before, which is up to chance
    ),
    Job("cut_speech", CUT, 2, ("codes/*", "results.json", "skipped.jsonl")),
    Job("eval_asr", EVAL_ASR, 4, ("predictions.jsonl", "results.json")),
    Job("eval_rows", EVAL_ROWS, 2, ("predictions.jsonl", "results.json")),
    Job("make_rows", MAKE_ROWS, 1, ("*.jsonl",)),
    Job("eval_codec", "eval_codec.py codec=tokenizer/model data=corpus splits=[test]", 4, ("utterances.jsonl",)),
    Job(
        "eval_tokenizer",
        "eval_tokenizer.py codes=codes data=corpus output=OUT/content.json probe_steps=5 train_splits=train "
        "test_splits=test",
        3,
    ),
    Job(
        "benchmark_serve",
        "benchmark_serve.py model=asr/model data=corpus splits=[test] recordings=2 requests=4 clients=2 bad=8 live=0",
        2,
        loose=("*.json",),  # of seconds
    ),
    Job("benchmark", "benchmark.py row=decoding repeats=1", 2, loose=("*.json",)),  # of seconds
    Job("benchmark startup", "benchmark.py row=startup utterances=40", 2, loose=("*.json",)),
    Job("benchmark lm_step", "benchmark.py row=lm_step codes=codes repeats=2", 2, loose=("*.json",)),
    Job(
        "rehearse",
        "rehearse.py tokenizer=null asr=configs/asr/demo.yaml recordings=4 minutes=0.01",
        2,
        loose=("*.json",),  # of seconds
    ),
    Job(
        "draw_scaling",
        'draw_scaling.py "curves=[{name: x, at: [1], results: [evaluation]}]" output=OUT/drawn.svg',
        2,
    ),
    Job("draw_pipeline", "draw_pipeline.py model=asr/model audio=corpus/test/u18.flac output=OUT/drawn.svg", 2),
    Job("eval_conversion", "eval_conversion.py codec=tokenizer/model data=corpus pairs=4", 3, ("audio*",)),
)


@dataclass
class Kill:
    """One kill and what was wrong after it; the last of a sequence also answers for the end."""

    job: str
    what: str
    problems: list[str]
    seconds: float


def quotas(kills: int) -> dict[str, int]:
    """How many kills each job gets of so many."""
    total = sum(job.share for job in JOBS)
    return {job.name: max(1, round(kills * job.share / total)) for job in JOBS}


def run_job(job: Job, quota: int, lane: Lane, folder: Path, parts: Path, seed: int) -> Iterator[Kill]:
    """An uninterrupted run, and sequences of kills until there are enough of them."""
    shutil.rmtree(folder, ignore_errors=True)
    whole = folder / "whole" / "out"  # as deep as those of the sequences: results may hold relative paths
    whole.parent.mkdir(parents=True)
    ended = lane.start(job.words(whole), parts, job.real).wait(600)
    if ended.code or TRACEBACK in ended.errors:
        yield Kill(job.name, "uninterrupted", [f"exit code {ended.code}: {ended.errors[-800:]}"], ended.seconds)
        return
    draw, done, number = random.Random(f"{seed}/{job.name}"), 0, 0
    while done < quota and number < 3 * quota:
        number += 1
        sequence = Sequence(job, lane, folder / str(number), parts, draw)
        kills = list(sequence.run(min(KILLS, quota - done), ended.seconds, whole, first=done))
        done += len(kills)
        yield from kills
        if not any(kill.problems for kill in kills):
            shutil.rmtree(folder / str(number))


class Sequence:
    """One output folder, started and killed until it is finished."""

    def __init__(self, job: Job, lane: Lane, folder: Path, parts: Path, draw: random.Random):
        self.job, self.lane, self.parts, self.draw = job, lane, parts, draw
        self.output = folder / "out"
        self.mine = [folder / "mine.txt"]
        folder.mkdir()
        self.mine[0].write_text(MINE)
        self.done: dict[Path, int] = {}  # finished work, with the time of its writing
        self.marked = False

    def run(self, kills: int, whole_s: float, whole: Path, first: int) -> Iterator[Kill]:
        """whole_s: seconds of the uninterrupted run, `whole`; first: number of kills before."""
        waiting: Kill | None = None
        for number in range(first, first + kills):
            process = self.start()
            what, reached = self.moment(process, number, whole_s)
            if not reached:
                break
            name = self.job.signals[number % len(self.job.signals)]
            process.send(name)
            ended = process.wait(END_S)
            if ended.code in (0, -name) and self.finished(whole):  # all was done, and the interpreter ending
                break
            if waiting:
                yield waiting
            waiting = Kill(self.job.name, f"{name.name} {what}", self.problems(ended, name), ended.seconds)
            self.leave_things()
        else:
            process = self.start()
        ended = process.wait(max(120, 10 * whole_s))
        if waiting:
            waiting.problems += self.problems(ended, None) + self.differences(whole)
            waiting.seconds += ended.seconds
            yield waiting

    def start(self) -> Process:
        return self.lane.start(self.job.words(self.output), self.parts, self.job.real)

    def moment(self, process: Process, number: int, whole_s: float) -> tuple[str, bool]:
        """Wait for the moment of a kill; what it is, and whether the process still ran."""
        if self.job.aims and number % 2:
            pattern = self.job.aims[number // 2 % len(self.job.aims)]
            before = set(self.output.glob(pattern))
            if reached := process.until(lambda: bool(set(self.output.glob(pattern)) - before), 20 + 3 * whole_s):
                return f"at {pattern}", reached
            return f"at {pattern}", False
        after = self.draw.uniform(0, whole_s)
        process.until(lambda: False, after)
        return f"after {after:.2f} s", process.poll() is None

    def problems(self, ended: Ended, sent: signal.Signals | None) -> list[str]:
        """What is wrong with the end of a process after a signal, or without one."""
        found = [ended.trouble] if ended.trouble else []
        if TRACEBACK in ended.output + ended.errors:
            found.append("traceback: " + ended.errors[-300:])
        if sent is None and ended.code:
            found.append(f"does not go on, exit code {ended.code}: {' / '.join(ended.lines[-3:])}")
        if sent == C and not re.search("same command|again|goes on|go on|resume|continue", ended.errors, re.IGNORECASE):
            found.append(f"Ctrl-C does not say how to go on: {' / '.join(ended.lines[-3:])}")
        if sent == C and len(ended.lines) > 6:
            found.append(f"Ctrl-C: {len(ended.lines)} lines")
        found += [f"left running: {command}" for command in self.lane.orphans()]
        found += [f"lost {file.name}" for file in self.mine if not file.is_file() or file.read_text() != MINE]
        return found

    def leave_things(self) -> None:
        """Put a user's file into the output, mark what was logged before the newest checkpoint, note finished work."""
        if self.output.is_dir() and len(self.mine) == 1:
            self.mine.append(self.output / "notes.txt")
            self.mine[1].write_text(MINE)
        steps = [int(name[0]) for file in self.output.glob("checkpoints/*") if (name := re.findall(r"\d+", file.stem))]
        log = self.output / "log.jsonl"
        if steps and log.is_file() and not self.marked:
            head, _, rest = log.read_text().partition("\n")
            if rest and (row := json.loads(head))["step"] <= max(steps):
                log.write_text(json.dumps({**row, "kept": True}) + "\n" + rest)
                self.marked = True
        for pattern in self.job.kept:
            for file in self.output.glob(pattern):
                written = file.parent.name != "model" or (file.parent.parent / "done.json").is_file()
                if file.is_file() and written:  # a run killed behind its model writes the model again
                    self.done.setdefault(file, file.stat().st_mtime_ns)

    def finished(self, whole: Path) -> bool:
        return self.files(self.output).keys() == self.files(whole).keys()

    def differences(self, whole: Path) -> list[str]:
        """How the end differs from the uninterrupted run, and whether finished work was done again."""
        found, expected = self.files(self.output), self.files(whole)
        problems = [f"lacks {name}" for name in sorted(expected.keys() - found.keys())[:3]]
        problems += [f"has {name}" for name in sorted(found.keys() - expected.keys())[:3]]
        problems += [
            f"differs: {name}" for name in sorted(expected) if found.get(name, expected[name]) != expected[name]
        ]
        again = [file.name for file, time in self.done.items() if file.exists() and file.stat().st_mtime_ns != time]
        if len(again) > 1:  # the last one may have been cut
            problems.append(f"done again: {', '.join(again[:3])}")
        if self.marked and '"kept": true' not in (self.output / "log.jsonl").read_text():
            problems.append("began anew instead of going on from its checkpoint")
        return problems

    def files(self, folder: Path) -> dict[str, str]:
        """What the job made, each with its content but for times and the place of the folder."""
        made = (path for path in folder.rglob("*") if path.is_file() and path not in self.mine)
        return {
            name: "" if any(path.match(loose) for loose in self.job.loose) else content(path, folder)
            for path in made
            if not (name := path.relative_to(folder).as_posix()).startswith(".")
        }


def content(file: Path, folder: Path) -> str:
    """The content of a result without what differs between runs: times, and the name of the folder."""
    if file.suffix in LOOKS or file.name == "versions.json":
        return ""
    if file.suffix == ".arrow":
        table = open_shard(file)
        notes = {key: value for key, value in (table.schema.metadata or {}).items() if key != b"seconds"}
        return hashlib.sha1(f"{notes} {table.to_pydict()}".encode()).hexdigest()
    if file.suffix in (".json", ".jsonl"):
        text = file.read_text(encoding="utf-8").replace(str(folder), "OUT")
        rows = [json.loads(text)] if file.suffix == ".json" else [json.loads(line) for line in text.splitlines()]
        return json.dumps([timeless(row) for row in rows], sort_keys=True)
    return hashlib.sha1(file.read_bytes().replace(str(folder).encode(), b"OUT")).hexdigest()


def timeless(value: object) -> object:
    if isinstance(value, dict):
        return {key: timeless(part) for key, part in value.items() if key not in TIMES and key != "kept"}
    return [timeless(part) for part in value] if isinstance(value, list) else value
