"""Train several tokenizers under identical conditions and compare them: speech quality, content, voice, in one table.

    python recipes/compare.py --config configs/compare/tokenizers.yaml data=CORPUS output=RUN

Every step is one of the other recipes, started as its own command (printed before it runs). What is finished is
skipped and a killed step goes on, so the same command can be repeated at any time, also with a system more. Writes
RUN/results.json and RUN/table.md.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from speechllm import Stages, read_log, run_recipe, versions, write_json, write_text

RECIPES = Path(__file__).parent
DASH = "–"


@dataclass
class SystemConfig:
    name: str  # also its folder's
    changes: list[str] = field(default_factory=list)  # key=value, to the configuration all systems share


@dataclass
class CompareConfig:
    data: str  # corpus folder: manifest.jsonl or LibriSpeech's layout
    output: str  # run folder
    train: str  # configuration of train_tokenizer all systems share
    systems: list[SystemConfig]
    semantic_teacher: str = "facebook/hubert-base-ls960"  # folder or hub name, or a .yaml of train_teacher
    speaker_teacher: str = "speechbrain/spkrec-ecapa-voxceleb"  # the same
    train_splits: list[str] = field(default_factory=lambda: ["train"])  # the probes learn on these
    test_splits: list[str] = field(default_factory=lambda: ["test"])  # and are scored on these: content, voice
    quality_splits: list[str] = field(default_factory=lambda: ["test"])  # speech quality is measured on these
    quality_layers: list[int] = field(default_factory=lambda: [1, 2, 4, 8])  # numbers of codebooks to decode from
    quality_utterances: int | None = None  # at most, all when null
    probe_steps: int = 400  # of the CTC probe for the content of layer 0; 0: none

    def __post_init__(self) -> None:
        names = [system.name for system in self.systems]
        if not names or len(set(names)) < len(names) or any(Path(name).name != name for name in names):
            raise ValueError(f"systems need different names that can be names of folders, got {names}")


def main(config: CompareConfig) -> None:
    run, data = Path(config.output), f"data={config.data}"
    run.mkdir(parents=True, exist_ok=True)
    stages = Stages(run, RECIPES)

    # 1. the teachers all systems share, trained here unless they are named
    semantic, speaker = (train_teacher(stages, run, kind, config) for kind in ("semantic", "speaker"))
    teachers = [f"semantic.teacher={semantic}", f"acoustic.teacher={speaker}"]

    # 2. every system: trained, and measured
    splits = [f"train_splits={as_yaml(config.train_splits)}", f"test_splits={as_yaml(config.test_splits)}"]
    both = as_yaml(sorted({*config.train_splits, *config.test_splits}))
    for system in config.systems:
        folder = run / system.name
        codec, codes = f"codec={folder / 'model'}", f"codes={folder / 'codes'}"
        shared = [f"--config={config.train}", data, f"output={folder}", *teachers]
        stages.launch(f"{system.name}: train", ["train_tokenizer.py", *shared, *system.changes])
        encode = ["encode_speech.py", codec, data, f"output={folder / 'codes'}", "layers=2", f"splits={both}"]
        stages.launch(f"{system.name}: encode", encode)
        once = as_yaml(system is config.systems[0])  # the baseline is the same for all
        probe = [f"output={folder / 'content.json'}", f"probe_steps={config.probe_steps}", f"baseline={once}"]
        quality = [
            *(codec, data, f"output={folder / 'quality'}", f"splits={as_yaml(config.quality_splits)}"),
            f"layers={as_yaml(config.quality_layers)}",
            f"max_utterances={as_yaml(config.quality_utterances)}",
        ]
        stages.stage(f"{system.name}: content", ["eval_tokenizer.py", codes, data, *splits, *probe])
        stages.stage(f"{system.name}: quality", ["eval_codec.py", *quality])

    # 3. one table
    results = {system.name: collect(run / system.name) for system in config.systems}
    everything = {"systems": results, "seconds": stages.seconds, "versions": versions()}
    write_json(run / "results.json", everything)
    page = table(results)
    write_text(run / "table.md", page)
    print(page)


def train_teacher(stages: Stages, run: Path, kind: str, config: CompareConfig) -> str:
    """Where the teacher is: as it was named, or trained here from a configuration."""
    source = getattr(config, f"{kind}_teacher")
    if not source.endswith(".yaml"):
        return source
    folder = run / f"{kind}_teacher"
    words = ["train_teacher.py", f"--config={source}", f"data={config.data}", f"output={folder}"]
    stages.launch(f"{kind} teacher", words)
    return str(folder / "model")


def as_yaml(value: Any) -> str:
    """A value as one word of a command line."""
    return json.dumps(value)


def collect(folder: Path) -> dict[str, Any]:
    """Everything measured on one system."""
    quality = read_json(folder / "quality" / "results.json")
    log = [line for line in read_log(folder) if "dev_mel" in line]
    return {
        "fingerprint": quality["codec_fingerprint"],
        "quality": quality["codebooks"],
        "failed": quality["failed"],
        "content": read_json(folder / "content.json"),
        "validation": log[-1] if log else {},
        "training": read_json(folder / "done.json"),
    }


def read_json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


def table(results: dict[str, dict[str, Any]]) -> str:
    """Two Markdown tables: speech quality by number of codebooks, and what layers 0 and 1 hold."""
    lines = ["| system | codebooks | tokens/s | PESQ-WB | PESQ-NB | STOI | utterances |", f"|{'---|' * 7}"]
    for name, result in results.items():
        for count, row in result["quality"].items():
            cells = [interval(row.get(measure)) for measure in ("pesq_wb", "pesq_nb", "stoi")]
            lines.append(
                f"| {name} | {count} | {row['tokens_per_second']:g} | {' | '.join(cells)} | {row['utterances']} |"
            )
    lines += [
        "",
        "| system | semantic teacher cosine | phones in layer 0 (PNMI) | CTC probe of layer 0: CER | WER "
        "| speaker from layer 0 | layer 1 |",
        f"|{'---|' * 7}",
    ]
    for name, result in results.items():
        content, speaker = result["content"], result["content"]["speaker"]
        cells = [
            number(result["validation"].get("dev_semantic_cosine"), ".3f"),
            *content_cells(content, "layer_0"),
            *(number(speaker.get(f"layer_{layer}"), ".1%") for layer in (0, 1)),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    baseline = content_cells(next(iter(results.values()))["content"], "log_mel_kmeans")
    lines.append(f"| log-mel k-means | {DASH} | {' | '.join(baseline)} | {DASH} | {DASH} |")
    return "\n".join(lines) + "\n"


def content_cells(content: dict[str, Any], units: str) -> list[str]:
    """What the units say about phones, and what a probe reads from them."""
    probe = content.get("probe", {}).get(units, {})
    return [
        number(content.get("content", {}).get(units, {}).get("pnmi"), ".2f"),
        *(number(probe.get(measure), ".1%") for measure in ("cer", "wer")),
    ]


def interval(measure: dict[str, Any] | None) -> str:
    if measure is None:
        return DASH
    low, high = measure["ci95"]
    return f"{measure['mean']:.3f} ({low:.3f} to {high:.3f})"


def number(value: float | None, form: str) -> str:
    return DASH if value is None else format(value, form)


if __name__ == "__main__":
    run_recipe(main, CompareConfig)
