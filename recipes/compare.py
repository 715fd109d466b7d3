"""Compare tokenizers: chosen systems, chosen tasks, identical conditions, one page.

    python recipes/compare.py --config configs/compare/tokenizers.yaml data=CORPUS output=RUN

Tasks: content (of the codes), quality (the paper's Table 1), conversion (2), emotion (3), asr (4). Every step is one of
the other recipes, run as a separate command (printed before it starts); all commands are checked before the first one
runs. Finished steps are skipped and a killed step is resumed, so the same command can be repeated at any time, also
with another system, task or seed; changes to a finished step are refused. Writes RUN/results.json, RUN/table.md and
RUN/report.html, of the systems, tasks and seeds that are asked for. More: configs/compare/schemes.yaml,
configs/compare/initialization.yaml.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from speechllm.runs.config import override, parse_config
from tokenizer.settings import DISTINCT, NOT_EMPTY, Corpus, Count, Counts, Names, Natural, Seed, Settings

RECIPES = Path(__file__).parent
Task = Literal["content", "quality", "conversion", "emotion", "asr"]
Changes = list[str]  # key=value
Seeds = Annotated[list[Seed], NOT_EMPTY, DISTINCT]
TASKS = get_args(Task)
ENCODED = ("content", "emotion", "asr")  # tasks that read encoded speech
RESULTS = {  # of a system, in its folder
    "content": "content.json",
    "quality": "quality/results.json",
    "conversion": "conversion/results.json",
    "emotion": "emotion_{seed}/results.json",
    "asr": "asr_{seed}/test/results.json",
}
# keys that may be used as placeholders, such as "{tokenizer}"
NAMED = ("tokenizer", "recognizer", "evaluation_speaker", "speaker_teacher", "semantic_teacher")
SHARED = ("train_teacher.py", "train_tokenizer.py", "encode_speech.py", "train_asr.py")  # run in several processes
SINGLE = ("eval_tokenizer.py", "train_emotion.py", "train_asr.py", "eval_asr.py")  # several run in parallel
CHANGES = "what all systems share is set by keys such as quality_splits or changes.STAGE=KEY=VALUE: see --help"
Commands = dict[str, list[str]]  # recipe and arguments, by stage


@dataclass
class SystemConfig:
    name: str  # also the name of its folder
    train: list[str] | None = None  # a codec trained here: key=value changes to the shared configuration
    units: list[str] | None = None  # k-means units fitted here: key=value for fit_units, except model, data, output
    tokenizer: str | None = None  # as for load_tokenizer, with placeholders: "features:{semantic_teacher}", see NAMED
    like: str | None = None  # another system whose encoded speech is used with other settings
    asr: list[str] = field(default_factory=list)  # key=value changes to the configuration of the task
    emotion: list[str] = field(default_factory=list)
    conversion: list[str] = field(default_factory=list)
    tasks: list[Task] | None = None  # all that it supports when null

    @property
    def supported(self) -> tuple[str, ...]:
        """The tasks that the system supports; of a tokenizer only the prefix of the name is known here."""
        if self.like or (self.tokenizer or "").startswith(("features:", "recognizer:")):
            return ("emotion", "asr") if self.like and self.emotion else ("asr",)
        return ENCODED if self.units is not None else TASKS  # units do not decode


@dataclass
class ChangesConfig:
    """Changes to a stage of all systems; those of a system itself come after them."""

    codec: Changes = field(default_factory=list)  # key=value for train_tokenizer, after the configuration `codec`
    units: Changes = field(default_factory=list)  # for fit_units
    codes: Changes = field(default_factory=list)  # for encode_speech on data, such as splits=a,b to encode no others
    asr_codes: Changes = field(default_factory=list)  # for encode_speech on asr_data
    emotion_codes: Changes = field(default_factory=list)  # for encode_speech on emotion_data
    content: Changes = field(default_factory=list)  # for eval_tokenizer
    quality: Changes = field(default_factory=list)  # for eval_codec
    conversion: Changes = field(default_factory=list)  # for eval_conversion
    emotion: Changes = field(default_factory=list)  # for train_emotion, after the configuration `emotion`
    asr: Changes = field(default_factory=list)  # for train_asr, after the configuration `asr`
    asr_test: Changes = field(default_factory=list)  # for eval_asr
    semantic_teacher: Changes = field(default_factory=list)  # for train_teacher, where the key of this name is a .yaml
    speaker_teacher: Changes = field(default_factory=list)  # the same
    recognizer: Changes = field(default_factory=list)  # the same
    evaluation_speaker: Changes = field(default_factory=list)  # the same


@dataclass
class CompareConfig(Settings):
    data: Corpus  # corpus folder, or several as [A, B]: manifest.jsonl or LibriSpeech's layout
    output: str  # run folder
    systems: list[SystemConfig]  # each with these keys
    tasks: Annotated[list[Task], NOT_EMPTY, DISTINCT]
    codec: str | None = None  # configuration of train_tokenizer, shared by all codecs trained here
    asr: str | None = None  # configuration of train_asr, shared by all systems
    emotion: str | None = None  # configuration of train_emotion, shared by all systems
    asr_data: Corpus | None = None  # corpus of the task, as in the next two; data when null
    emotion_data: Corpus | None = None
    conversion_data: Corpus | None = None
    tokenizer: str | None = None  # value of "{tokenizer}", so that it can be set on the command line
    language_model: str | None = None  # fine-tuned in the task asr; null: the one in `asr`
    semantic_teacher: str = "facebook/hubert-base-ls960"  # folder or hub name, or a .yaml of train_teacher
    speaker_teacher: str = "speechbrain/spkrec-ecapa-voxceleb"  # the same
    recognizer: str | None = None  # the same; a .yaml fine-tunes the semantic teacher on asr_data
    evaluation_recognizer: str | None = None  # recognizer:NAME, for the WER of decoded and converted speech
    evaluation_speaker: str | None = "{speaker_teacher}"  # ideally not a teacher of a system
    train_splits: Names = field(default_factory=lambda: ["train"])  # of data, for units, probes and voices
    test_splits: Names = field(default_factory=lambda: ["test"])  # of data, for content and codebook use
    quality_splits: Names = field(default_factory=lambda: ["test"])  # of data
    conversion_splits: Names = field(default_factory=lambda: ["test"])
    asr_splits: Names = field(default_factory=lambda: ["test"])  # for evaluation; training splits are set in `asr`
    quality_layers: Counts | None = None  # numbers of codebooks to decode from; 1, 2, 4, ... and all when null
    quality_utterances: Count | None = None  # at most, all when null
    conversion_pairs: Count = 100
    probe_steps: Natural = 400  # of the CTC probe for the content of layer 0; 0: none
    seeds: Seeds = field(default_factory=lambda: [0])  # asr and emotion are trained once with each
    changes: ChangesConfig = field(default_factory=ChangesConfig)  # to stages of all systems, before their own

    def contradictions(self) -> list[str]:
        return find_problems(self)


def find_problems(config: CompareConfig) -> list[str]:
    """All problems that the configuration alone shows."""
    names, problems = [system.name for system in config.systems], []
    if not names or len(set(names)) < len(names) or any(Path(name).name != name or name == ".." for name in names):
        problems.append(f"systems need different names that are valid folder names, got {names}")
    wanted = {task for system in config.systems for task in tasks_of(system, config)}
    needed = {key: key in wanted for key in ("asr", "emotion")}
    needed |= {"codec": any(system.train is not None for system in config.systems)}
    text = json.dumps([vars(system) for system in config.systems]) + str(config.evaluation_recognizer)
    needed |= {key: "{" + key + "}" in text for key in ("tokenizer", "recognizer")}
    absent = [key for key in needed if needed[key] and not getattr(config, key)]
    problems += [f"missing key {key}: required by the systems or tasks" for key in absent]
    for system in config.systems:
        given = [key for key in ("train", "units", "tokenizer", "like") if getattr(system, key) is not None]
        if len(given) != 1:
            problems.append(f"{system.name}: expected one of train, units, tokenizer, like, got {given or 'none'}")
        if system.like and not any(other.name == system.like and not other.like for other in config.systems):
            problems.append(f"{system.name}: like must name a system with its own tokenizer, got {system.like}")
        if unsupported := [task for task in system.tasks or [] if task not in system.supported]:
            found, possible = ", ".join(unsupported), ", ".join(system.supported)
            problems.append(f"{system.name}: does not support {found}, only {possible}")
    return problems


def tasks_of(system: SystemConfig, config: CompareConfig) -> list[str]:
    """The tasks of the comparison in which this system takes part."""
    return [task for task in config.tasks if task in (system.supported if system.tasks is None else system.tasks)]


if __name__ == "__main__":  # help and mistakes are answered before torch is loaded
    CONFIG = parse_config(CompareConfig)

import numpy as np

from speechllm.evaluation.comparison import (
    add_shares,
    comparison_tables,
    pool_emotion,
    pool_recognition,
    without_shares,
)
from speechllm.evaluation.tables import markdown
from speechllm.reports.comparison_page import write_comparison
from speechllm.runs.machine import provenance
from speechllm.runs.recipe import claim_output, run_recipe
from speechllm.runs.run import RunError, read_log
from speechllm.runs.stages import Stages
from tokenizer.corpus import CorpusError, read_corpus
from tokenizer.files import read_json, read_jsonl, write_json, write_text
from tokenizer.ravdess import parse_ravdess
from tokenizer.utterances import spell_corpora


def main(config: CompareConfig) -> None:
    run = Path(config.output)
    claim_output(run, config)
    commands, stages = plan(config, run), Stages(run, RECIPES)
    stages.check(commands, CHANGES)
    if mixed := [found for system in config.systems if (found := mixture(system, config, run))]:
        raise RunError("\n".join(mixed))
    if any("emotion" in tasks_of(system, config) for system in config.systems):
        require_emotions(config.emotion_data or config.data)
    try:
        stages.run(commands, SHARED, SINGLE)
    finally:  # also after a failure: with the results so far
        results = {system.name: collect(system, config, run, stages.seconds) for system in config.systems}
        made = provenance(config, sum(stages.seconds.values()))
        systems = without_shares(results)
        write_json(run / "results.json", {"systems": systems, "seconds_by_stage": stages.seconds, **made})
        tables = comparison_tables(results)
        write_text(run / "table.md", page := markdown(tables))
        title = "Comparison of tokenizers"
        write_comparison(run / "report.html", title=title, results=results, tables=tables, provenance=made)
    print(page)


def require_emotions(data: Corpus) -> None:
    """Raise CorpusError, before the hours of training, for a corpus without the names by which RAVDESS is labelled."""
    if not any(parse_ravdess(utterance.id) for utterance in read_corpus(data)):
        raise CorpusError(f"{spell_corpora(data)}: no name of RAVDESS, which the task emotion needs: set emotion_data")


def plan(config: CompareConfig, run: Path) -> Commands:
    """All commands of the comparison, in an order that respects their dependencies."""
    doing = {task: [s for s in config.systems if task in tasks_of(s, config)] for task in TASKS}
    commands: Commands = {}
    for system in config.systems:
        commands |= make_tokenizer(system, config, run)
    for task in ENCODED:
        for system in doing[task]:  # a system that is like another uses the same folder
            data, folder = encoded(system, task, config, run)
            arguments = [f"codec={codec_of(system, config, run)}", override("data", data), f"output={folder}"]
            arguments += ["layers=null", *getattr(config.changes, folder.name)]
            commands[f"{owner(system, config).name}: {folder.name}"] = ["encode_speech.py", *arguments]
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
        shared = [f"--config={config.codec}", override("data", config.data), output, *teachers]
        return {f"{system.name}: tokenizer": ["train_tokenizer.py", *shared, *config.changes.codec, *system.train]}
    if system.units is not None:
        shared = ["model={semantic_teacher}", override("data", config.data), output]
        shared += [override("splits", config.train_splits), *config.changes.units]
        return {f"{system.name}: tokenizer": ["fit_units.py", *shared, *system.units]}
    return {}


def owner(system: SystemConfig, config: CompareConfig) -> SystemConfig:
    """The system whose tokenizer this one uses."""
    return next(other for other in config.systems if other.name == (system.like or system.name))


def codec_of(system: SystemConfig, config: CompareConfig, run: Path) -> str:
    """The name of a system's tokenizer for load_tokenizer."""
    return (own := owner(system, config)).tokenizer or str(run / own.name / "tokenizer" / "model")


def encoded(system: SystemConfig, task: str, config: CompareConfig, run: Path) -> tuple[Corpus, Path]:
    """The corpus of a task and the folder with its encoded speech, which tasks on the same corpus share."""
    data = getattr(config, f"{task}_data", None) or config.data
    return data, run / owner(system, config).name / ("codes" if data == config.data else f"{task}_codes")


def baseline_host(systems: list[SystemConfig], run: Path) -> SystemConfig | None:
    """The system whose evaluation includes the common baseline, log-mel k-means: as before, or the first one."""
    found = {system.name: read_json(run / system.name / "content.json").get("config", {}) for system in systems}
    done = [system for system in systems if found[system.name].get("baseline")]
    return next(iter(done or systems), None)


def content(system: SystemConfig, config: CompareConfig, run: Path, baseline: bool) -> list[str]:
    folder = run / system.name
    probe = [f"output={folder / 'content.json'}", f"probe_steps={config.probe_steps}", override("baseline", baseline)]
    splits = [override("train_splits", config.train_splits), override("test_splits", config.test_splits)]
    source = [f"codes={folder / 'codes'}", override("data", config.data)]
    return ["eval_tokenizer.py", *source, *splits, *probe, *config.changes.content]


def quality(system: SystemConfig, config: CompareConfig, run: Path) -> list[str]:
    settings = [override("splits", config.quality_splits), override("layers", config.quality_layers)]
    limit = override("max_utterances", config.quality_utterances)
    shared = [
        f"codec={codec_of(system, config, run)}",
        override("data", config.data),
        f"output={run / system.name / 'quality'}",
    ]
    return ["eval_codec.py", *shared, *settings, limit, *evaluators(config), *config.changes.quality]


def conversion(system: SystemConfig, config: CompareConfig, run: Path) -> list[str]:
    shared = [f"codec={codec_of(system, config, run)}", override("data", config.conversion_data or config.data)]
    settings = [override("splits", config.conversion_splits), f"pairs={config.conversion_pairs}"]
    output = f"output={run / system.name / 'conversion'}"
    own = [*config.changes.conversion, *system.conversion]
    return ["eval_conversion.py", *shared, output, *settings, *evaluators(config), *own]


def evaluators(config: CompareConfig) -> list[str]:
    """Arguments for the models that evaluate decoded and converted speech."""
    speaker = ["speaker={evaluation_speaker}"] if config.evaluation_speaker else []
    return speaker + ([f"recognizer={config.evaluation_recognizer}"] if config.evaluation_recognizer else [])


def training(system: SystemConfig, task: str, config: CompareConfig, run: Path, seed: int) -> list[str]:
    source = [f"codes={encoded(system, task, config, run)[1]}", f"codec={codec_of(system, config, run)}"]
    output = [f"output={run / system.name / f'{task}_{seed}'}", f"seed={seed}"]
    model = [f"model={config.language_model}"] if config.language_model else []
    shared = [*(model if task == "asr" else []), *getattr(config.changes, task)]
    return [f"train_{task}.py", f"--config={getattr(config, task)}", *source, *output, *shared, *getattr(system, task)]


def eval_asr(system: SystemConfig, config: CompareConfig, run: Path, seed: int) -> list[str]:
    folder, codes = run / system.name / f"asr_{seed}", encoded(system, "asr", config, run)[1]
    arguments = [f"model={folder / 'model'}", f"codes={codes}", f"output={folder / 'test'}"]
    return ["eval_asr.py", *arguments, override("splits", config.asr_splits), *config.changes.asr_test]


def with_teachers(commands: Commands, config: CompareConfig, run: Path) -> Commands:
    """The commands with all placeholders replaced, after the trainings of the teachers that are needed."""
    for name in NAMED:  # the recogniser is initialised with the semantic teacher, which therefore comes last
        placeholder, value = "{" + name + "}", str(getattr(config, name))
        if value.endswith(".yaml") and any(placeholder in part for parts in commands.values() for part in parts):
            data = config.asr_data if name == "recognizer" else None
            arguments = [f"--config={value}", override("data", data or config.data), f"output={run / name}"]
            if name == "recognizer":
                arguments.append("init={semantic_teacher}")
            arguments += getattr(config.changes, name)
            commands = {name.replace("_", " "): ["train_teacher.py", *arguments], **commands}
            value = str(run / name / "model")
        commands = {stage: [part.replace(placeholder, value) for part in parts] for stage, parts in commands.items()}
    return commands


def collect(system: SystemConfig, config: CompareConfig, run: Path, seconds: dict[str, float]) -> dict[str, Any]:
    """All results of one system so far, of the tasks that are asked for: of others the settings are not known."""
    folder, tasks = run / system.name, tasks_of(system, config)
    if mixed := mixture(system, config, run):  # since this comparison was started
        print(f"left out: {mixed}")
        tasks = []
    notes = (read_json(encoded(system, task, config, run)[1] / "done.json") for task in ENCODED[::-1])
    note = next(filter(None, notes), {})  # preferably that of asr
    log = [line for line in read_log(folder / "tokenizer") if "dev_mel" in line]
    trainings = {task: [f"{system.name}: {task} {seed}" for seed in config.seeds] for task in ("asr", "emotion")}
    trainings["tokenizer"] = [f"{owner(system, config).name}: tokenizer"]
    durations = {what: [seconds[stage] for stage in found if stage in seconds] for what, found in trainings.items()}
    read: dict[str, Callable[[], dict[str, Any]]] = {
        "content": lambda: read_json(folder / RESULTS["content"]),
        "quality": lambda: scored(folder / RESULTS["quality"], "codebooks", "utterances.jsonl", ("id",)),
        "conversion": lambda: scored(folder / RESULTS["conversion"], "methods", "pairs.jsonl", ("source", "target")),
        "emotion": lambda: pool_emotion(*of_seeds(folder, RESULTS["emotion"], config.seeds)),
        "asr": lambda: pool_recognition(*of_seeds(folder, RESULTS["asr"], config.seeds)),
    }
    return {
        "like": system.like,
        "encoding": note.get("encoding", {}),
        "parameters": note.get("parameters"),
        "rtf": note.get("real_time_factor"),
        **{task: read[task]() if task in tasks else {} for task in read},
        "validation": log[-1] if log else {},
        "minutes": {what: float(np.mean(found)) / 60 for what, found in durations.items() if found},
    }


def mixture(system: SystemConfig, config: CompareConfig, run: Path) -> str:
    """What is wrong if results of a system are of several tokenizers, one having been put in another's place."""
    files = [RESULTS[task].format(seed=seed) for task in tasks_of(system, config) for seed in config.seeds]
    read = {file: read_json(run / system.name / file).get("codec_fingerprint") for file in files}
    found = {file: fingerprint for file, fingerprint in read.items() if fingerprint}
    if len(set(found.values())) < 2:
        return ""
    told = ", ".join(f"{file} of {fingerprint[:8]}" for file, fingerprint in found.items())
    return f"{run / system.name}: results of several tokenizers ({told}): compare in a new output folder"


def scored(file: Path, settings: str, beside: str, names: Sequence[str]) -> dict[str, Any]:
    """The results of an evaluation, with the scores behind the means of each of its settings (`add_shares`).

    beside: the file with the scores; names: the keys by which a row of it is the same one as in the evaluation of
    another system.
    """
    results = read_json(file)
    found = read_jsonl(file.with_name(beside)) if results else []
    rows = {json.dumps([row[name] for name in names]): row for row in found}
    for setting, measured in results.get(settings, {}).items():
        scores = {name: row["scores"].get(setting, {}) for name, row in rows.items()}
        for name, row in rows.items():
            if setting in row.get("recognized", {}):
                scores[name] = {**scores[name], "text": row["text"], "recognized": row["recognized"][setting]}
        results[settings][setting] = add_shares(measured, scores)
    return results


def of_seeds(folder: Path, place: str, seeds: Sequence[int]) -> tuple[dict[int, Any], dict[int, Any]]:
    """Results and predictions by seed; empty where there are none yet. place: of the results, see RESULTS."""
    files = {seed: folder / place.format(seed=seed) for seed in seeds}
    results = {seed: read_json(one) for seed, one in files.items()}
    return results, {seed: read_jsonl(one.with_name("predictions.jsonl")) for seed, one in files.items()}


if __name__ == "__main__":
    run_recipe(main, CONFIG)
