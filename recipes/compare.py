"""Compare tokenizers: chosen systems, chosen tasks, identical conditions, one page.

    python recipes/compare.py --config configs/compare/tokenizers.yaml data=CORPUS output=RUN

Tasks: content (what the codes hold), quality (the paper's Table 1), conversion (2), emotion (3), asr (4). Every step is
one of the other recipes, started as its own command (printed before it runs); all commands are checked before the first
one runs. What is finished is skipped and a killed step goes on, so the same command can be repeated at any time, also
with a system, a task or a seed more; what would change a finished step is refused. Writes RUN/results.json,
RUN/table.md and RUN/report.html. More: configs/compare/schemes.yaml, configs/compare/initialization.yaml.
"""

import json
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args

from speechllm.runs.config import parse_config

RECIPES = Path(__file__).parent
Task = Literal["content", "quality", "conversion", "emotion", "asr"]
TASKS = get_args(Task)
ENCODED = ("content", "emotion", "asr")  # tasks that read encoded speech
# keys that "{...}" may stand for
NAMED = ("tokenizer", "recognizer", "evaluation_speaker", "speaker_teacher", "semantic_teacher")
SHARED = ("train_teacher.py", "train_tokenizer.py", "encode_speech.py", "train_asr.py")  # processes share the work
SINGLE = ("eval_tokenizer.py", "train_emotion.py", "train_asr.py", "eval_asr.py")  # one would leave cores idle
Commands = dict[str, list[str]]  # recipe and words, by stage


@dataclass
class SystemConfig:
    name: str  # also its folder's
    train: list[str] | None = None  # a codec trained here: changes key=value to the configuration all codecs share
    units: list[str] | None = None  # k-means units fitted here: key=value for fit_units, besides model, data, output
    tokenizer: str | None = None  # what load_tokenizer takes; "features:{semantic_teacher}" and the like, see NAMED
    like: str | None = None  # another system, whose encoded speech is read in another way
    asr: list[str] = field(default_factory=list)  # changes key=value to the configuration of the task
    emotion: list[str] = field(default_factory=list)
    conversion: list[str] = field(default_factory=list)
    tasks: list[Task] | None = None  # only these; null: all it can do

    @property
    def able(self) -> tuple[str, ...]:
        """Tasks that make sense; of what a name stands for only the prefix is known here."""
        if self.like or (self.tokenizer or "").startswith(("features:", "recognizer:")):
            return ("emotion", "asr") if self.like and self.emotion else ("asr",)
        return ENCODED if self.units is not None else TASKS  # units do not decode


@dataclass
class CompareConfig:
    data: str  # corpus folder: manifest.jsonl or LibriSpeech's layout
    output: str  # run folder
    systems: list[SystemConfig]
    tasks: list[Task]
    codec: str | None = None  # configuration of train_tokenizer that all codecs trained here share
    asr: str | None = None  # configuration of train_asr that all systems share
    emotion: str | None = None  # configuration of train_emotion that all systems share
    asr_data: str | None = None  # corpus of the task, here and below; data when null
    emotion_data: str | None = None
    conversion_data: str | None = None
    tokenizer: str | None = None  # what "{tokenizer}" stands for, so that the command line can name one
    language_model: str | None = None  # folder or hub name that the task asr fine-tunes; null: what `asr` says
    semantic_teacher: str = "facebook/hubert-base-ls960"  # folder or hub name, or a .yaml of train_teacher
    speaker_teacher: str = "speechbrain/spkrec-ecapa-voxceleb"  # the same
    recognizer: str | None = None  # the same; a .yaml learns from asr_data, from the semantic teacher on
    evaluation_recognizer: str | None = None  # recognizer:NAME, for the WER of decoded and converted speech
    evaluation_speaker: str | None = (
        "{speaker_teacher}"  # tells how alike voices are; better one that no system learnt from
    )
    train_splits: list[str] = field(default_factory=lambda: ["train"])  # of data, for units and probes
    test_splits: list[str] = field(default_factory=lambda: ["test"])  # of data, for content and voice
    quality_splits: list[str] = field(default_factory=lambda: ["test"])  # of data
    conversion_splits: list[str] = field(default_factory=lambda: ["test"])
    asr_splits: list[str] = field(default_factory=lambda: ["test"])  # scored; those to learn from are named in asr
    quality_layers: list[int] | None = None  # numbers of codebooks to decode from; 1, 2, 4, ... and all when null
    quality_utterances: int | None = None  # at most, all when null
    conversion_pairs: int = 100
    probe_steps: int = 400  # of the CTC probe for the content of layer 0; 0: none
    seeds: list[int] = field(default_factory=lambda: [0])  # the tasks asr and emotion are learnt once with each

    def __post_init__(self) -> None:
        if problems := find_problems(self):
            raise ValueError("\n  ".join(problems))


def find_problems(config: CompareConfig) -> list[str]:
    """Everything that can be told from the configuration alone."""
    names, problems = [system.name for system in config.systems], []
    if not names or len(set(names)) < len(names) or any(Path(name).name != name for name in names):
        problems.append(f"systems need different names that can be names of folders, got {names}")
    for key in ("tasks", "seeds"):
        if not (values := getattr(config, key)) or len(set(values)) < len(values):
            problems.append(f"{key}: expected at least one, each once, got {values}")
    wanted = {task for system in config.systems for task in tasks_of(system, config)}
    needed = {key: key in wanted for key in ("asr", "emotion")}
    needed |= {"codec": any(system.train is not None for system in config.systems)}
    text = json.dumps([vars(system) for system in config.systems]) + str(config.evaluation_recognizer)
    needed |= {key: "{" + key + "}" in text for key in ("tokenizer", "recognizer")}
    absent = [key for key in needed if needed[key] and not getattr(config, key)]
    problems += [f"missing key {key}: the systems or tasks need it" for key in absent]
    for system in config.systems:
        given = [key for key in ("train", "units", "tokenizer", "like") if getattr(system, key) is not None]
        if len(given) != 1:
            problems.append(f"{system.name}: expected one of train, units, tokenizer, like, got {given or 'none'}")
        if system.like and not any(other.name == system.like and not other.like for other in config.systems):
            problems.append(f"{system.name}: like must name a system that has its own tokenizer, got {system.like}")
        if unable := [task for task in system.tasks or [] if task not in system.able]:
            problems.append(f"{system.name}: cannot do {', '.join(unable)}; it can do {', '.join(system.able)}")
    return problems


def tasks_of(system: SystemConfig, config: CompareConfig) -> list[str]:
    """The tasks of the comparison that this system takes part in."""
    return [task for task in config.tasks if task in (system.able if system.tasks is None else system.tasks)]


if __name__ == "__main__":  # help and mistakes are answered before torch is loaded
    CONFIG = parse_config(CompareConfig)

import numpy as np

from speechllm.evaluation.comparison import comparison_markdown, pool_emotion, pool_recognition
from speechllm.reports.comparison_page import write_comparison
from speechllm.runs.machine import versions
from speechllm.runs.recipe import run_recipe
from speechllm.runs.run import read_log
from speechllm.runs.stages import Stages
from tokenizer.files import read_json, read_jsonl, write_json, write_text


def main(config: CompareConfig) -> None:
    run = Path(config.output)
    commands, stages = plan(config, run), Stages(run, RECIPES)
    stages.check(commands)
    run.mkdir(parents=True, exist_ok=True)
    try:
        stages.run(commands, SHARED, SINGLE)
    finally:  # also after a failure: what there is
        results = {system.name: collect(system, config, run, stages.seconds) for system in config.systems}
        write_json(run / "results.json", {"systems": results, "seconds": stages.seconds, "versions": versions()})
        write_text(run / "table.md", comparison_markdown(results))
        write_comparison(run / "report.html", title="Systems compared", results=results, versions=versions())
    print(comparison_markdown(results))


def plan(config: CompareConfig, run: Path) -> Commands:
    """All commands of the comparison, in the order in which they can run."""
    doing = {task: [s for s in config.systems if task in tasks_of(s, config)] for task in TASKS}
    commands: Commands = {}
    for system in config.systems:
        commands |= make_tokenizer(system, config, run)
    for task in ENCODED:
        for system in doing[task]:  # one that is like another reads the same folder
            data, folder = encoded(system, task, config, run)
            words = [f"codec={codec_of(system, config, run)}", f"data={data}", f"output={folder}", "layers=null"]
            commands[f"{owner(system, config).name}: {folder.name}"] = ["encode_speech.py", *words]
    host = baseline_host(doing["content"], run)
    for system in doing["content"]:
        commands[f"{system.name}: content"] = content(system, config, run, baseline=system is host)
    for make in (quality, conversion):
        for system in doing[make.__name__]:
            commands[f"{system.name}: {make.__name__}"] = make(system, config, run)
    for task in ("emotion", "asr"):
        for system, seed in product(doing[task], config.seeds):
            commands[f"{system.name}: {task} {seed}"] = training(system, task, config, run, seed)
    for system, seed in product(doing["asr"], config.seeds):
        commands[f"{system.name}: asr {seed}, test"] = eval_asr(system, config, run, seed)
    return with_teachers(commands, config, run)


def make_tokenizer(system: SystemConfig, config: CompareConfig, run: Path) -> Commands:
    output = f"output={run / system.name / 'tokenizer'}"
    if system.train is not None:
        teachers = ["semantic.teacher={semantic_teacher}", "acoustic.teacher={speaker_teacher}"]
        shared = [f"--config={config.codec}", f"data={config.data}", output, *teachers]
        return {f"{system.name}: tokenizer": ["train_tokenizer.py", *shared, *system.train]}
    if system.units is not None:
        shared = ["model={semantic_teacher}", f"data={config.data}", output, word("splits", config.train_splits)]
        return {f"{system.name}: tokenizer": ["fit_units.py", *shared, *system.units]}
    return {}


def owner(system: SystemConfig, config: CompareConfig) -> SystemConfig:
    """The system whose tokenizer it uses."""
    return next(other for other in config.systems if other.name == (system.like or system.name))


def codec_of(system: SystemConfig, config: CompareConfig, run: Path) -> str:
    """The name by which a system's tokenizer is loaded."""
    return (own := owner(system, config)).tokenizer or str(run / own.name / "tokenizer" / "model")


def encoded(system: SystemConfig, task: str, config: CompareConfig, run: Path) -> tuple[str, Path]:
    """The corpus of a task, and the folder of what the tokenizer makes of it; tasks on the same corpus share it."""
    data = getattr(config, f"{task}_data", None) or config.data
    return data, run / owner(system, config).name / ("codes" if data == config.data else f"{task}_codes")


def word(key: str, value: Any) -> str:
    """key=value for a command line."""
    return f"{key}={json.dumps(value)}"


def baseline_host(systems: list[SystemConfig], run: Path) -> SystemConfig | None:
    """The system that log-mel k-means, the same for all, is measured beside: where it was, or the first one."""
    found = {system.name: read_json(run / system.name / "content.json").get("config", {}) for system in systems}
    done = [system for system in systems if found[system.name].get("baseline")]
    return next(iter(done or systems), None)


def content(system: SystemConfig, config: CompareConfig, run: Path, baseline: bool) -> list[str]:
    folder = run / system.name
    probe = [f"output={folder / 'content.json'}", f"probe_steps={config.probe_steps}", word("baseline", baseline)]
    splits = [word("train_splits", config.train_splits), word("test_splits", config.test_splits)]
    return ["eval_tokenizer.py", f"codes={folder / 'codes'}", f"data={config.data}", *splits, *probe]


def quality(system: SystemConfig, config: CompareConfig, run: Path) -> list[str]:
    settings = [word("splits", config.quality_splits), word("layers", config.quality_layers)]
    limit = word("max_utterances", config.quality_utterances)
    shared = [
        f"codec={codec_of(system, config, run)}",
        f"data={config.data}",
        f"output={run / system.name / 'quality'}",
    ]
    return ["eval_codec.py", *shared, *settings, limit, *evaluators(config)]


def conversion(system: SystemConfig, config: CompareConfig, run: Path) -> list[str]:
    shared = [f"codec={codec_of(system, config, run)}", f"data={config.conversion_data or config.data}"]
    settings = [word("splits", config.conversion_splits), f"pairs={config.conversion_pairs}"]
    output = f"output={run / system.name / 'conversion'}"
    return ["eval_conversion.py", *shared, output, *settings, *evaluators(config), *system.conversion]


def evaluators(config: CompareConfig) -> list[str]:
    """Who listens to decoded and converted speech."""
    speaker = ["speaker={evaluation_speaker}"] if config.evaluation_speaker else []
    return speaker + ([f"recognizer={config.evaluation_recognizer}"] if config.evaluation_recognizer else [])


def training(system: SystemConfig, task: str, config: CompareConfig, run: Path, seed: int) -> list[str]:
    source = [f"codes={encoded(system, task, config, run)[1]}", f"codec={codec_of(system, config, run)}"]
    output = [f"output={run / system.name / f'{task}_{seed}'}", f"seed={seed}"]
    model = [f"model={config.language_model}"] if config.language_model else []
    own = [*model, *system.asr] if task == "asr" else system.emotion
    return [f"train_{task}.py", f"--config={getattr(config, task)}", *source, *output, *own]


def eval_asr(system: SystemConfig, config: CompareConfig, run: Path, seed: int) -> list[str]:
    folder, codes = run / system.name / f"asr_{seed}", encoded(system, "asr", config, run)[1]
    words = [f"model={folder / 'model'}", f"codes={codes}", f"output={folder / 'test'}"]
    return ["eval_asr.py", *words, word("splits", config.asr_splits)]


def with_teachers(commands: Commands, config: CompareConfig, run: Path) -> Commands:
    """The same with names in the place of "{...}", behind the trainings of those teachers that are needed."""
    for name in NAMED:  # the recogniser starts from the semantic teacher, which therefore comes last
        mark, value = "{" + name + "}", str(getattr(config, name))
        if value.endswith(".yaml") and any(mark in part for words in commands.values() for part in words):
            data = config.asr_data if name == "recognizer" else None
            words = [f"--config={value}", f"data={data or config.data}", f"output={run / name}"]
            words += ["init={semantic_teacher}"] if name == "recognizer" else []
            commands = {name.replace("_", " "): ["train_teacher.py", *words], **commands}
            value = str(run / name / "model")
        commands = {stage: [part.replace(mark, value) for part in words] for stage, words in commands.items()}
    return commands


def collect(system: SystemConfig, config: CompareConfig, run: Path, seconds: dict[str, float]) -> dict[str, Any]:
    """Everything measured on one system so far."""
    folder = run / system.name
    notes = (read_json(encoded(system, task, config, run)[1] / "done.json") for task in ENCODED[::-1])
    note = next(filter(None, notes), {})  # that of asr, where there is one
    log = [line for line in read_log(folder / "tokenizer") if "dev_mel" in line]
    trainings = {task: [f"{system.name}: {task} {seed}" for seed in config.seeds] for task in ("asr", "emotion")}
    trainings["tokenizer"] = [f"{owner(system, config).name}: tokenizer"]
    taken = {what: [seconds[stage] for stage in found if stage in seconds] for what, found in trainings.items()}
    return {
        "like": system.like,
        "encoding": note.get("encoding", {}),
        "parameters": note.get("parameters"),
        "rtf": note.get("real_time_factor"),
        "content": read_json(folder / "content.json"),
        "quality": read_json(folder / "quality" / "results.json"),
        "conversion": read_json(folder / "conversion" / "results.json"),
        "emotion": pool_emotion({s: read_json(folder / f"emotion_{s}" / "results.json") for s in config.seeds}),
        "asr": pool_recognition(
            {s: read_json(folder / f"asr_{s}" / "test" / "results.json") for s in config.seeds},
            {s: read_jsonl(folder / f"asr_{s}" / "test" / "predictions.jsonl") for s in config.seeds},
        ),
        "validation": log[-1] if log else {},
        "minutes": {what: float(np.mean(found)) / 60 for what, found in taken.items() if found},
    }


if __name__ == "__main__":
    run_recipe(main, CONFIG)
