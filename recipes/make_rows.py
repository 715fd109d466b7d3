"""Make rows of messages, for train_asr and eval_rows, of what a corpus knows about its recordings.

    python recipes/make_rows.py data=CORPUS output=ROWS task=emotion answer=emotion question="Which emotion is this?"

Each recording with an answer becomes a row: the question, the recording, and the answer, from a column of the manifest;
of several columns (answer=[intent,slots]), or of a column that holds an object, an answer in JSON. Writes one file for
each split: ROWS/train.jsonl, ROWS/test.jsonl, ... The rows name recordings by their ids: encode the same corpus.
"""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speechllm.runs.config import parse_config
from tokenizer.settings import Names, Positive, Settings


@dataclass
class MakeRowsConfig(Settings):
    data: str  # corpus folder with a manifest.jsonl or manifest.csv
    output: str  # folder for the rows
    question: str  # what the model is asked about every recording
    answer: Names  # columns of the manifest; several make an answer in JSON
    task: str  # name under which answers are scored
    weight: Positive = 1.0  # how often a row is read in an epoch


if __name__ == "__main__":
    CONFIG = parse_config(MakeRowsConfig)

from speechllm.runs.recipe import claim_output, run_recipe
from tokenizer.corpus import find_manifest
from tokenizer.errors import InputError
from tokenizer.files import write_jsonl
from tokenizer.tables import optional_name, read_table, required_path
from tokenizer.utterances import default_id


def main(config: MakeRowsConfig) -> None:
    folder = claim_output(config.output, config)
    manifest = find_manifest(Path(config.data))
    if manifest is None:
        raise InputError(f"{config.data} has no manifest.jsonl or manifest.csv, which would hold the answers")
    columns = dict.fromkeys(config.answer, as_is)
    columns |= {"id": optional_name, "path": required_path, "split": optional_name}
    rows: dict[str, list[dict[str, Any]]] = {}
    for _, cells in read_table(manifest, columns):
        if (right := answer_of([cells[name] for name in config.answer], config.answer)) is not None:
            name = cells["id"] or default_id(cells["path"])
            question = [{"type": "text", "text": config.question}, {"type": "audio", "id": name}]
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": right}]
            row = {"messages": messages, "task": config.task, "weight": config.weight}
            rows.setdefault(cells["split"] or "train", []).append(row)
    if not rows:
        raise InputError(f"{manifest}: no row has anything in {', '.join(config.answer)}: name other columns")
    for split, found in rows.items():
        write_jsonl(folder / f"{split}.jsonl", found)
        answers = Counter(row["messages"][1]["content"] for row in found)
        print(f"{folder / split}.jsonl: {len(found)} rows with {len(answers)} different answers")


def as_is(cell: Any) -> Any:
    return cell


def answer_of(cells: list[Any], names: list[str]) -> str | None:
    """The answer by the cells of the named columns; None where one is missing or empty."""
    if any(cell is None or cell == "" for cell in cells):
        return None
    if len(cells) == 1 and not isinstance(cells[0], dict | list):
        return str(cells[0]).strip() or None
    value = cells[0] if len(cells) == 1 else dict(zip(names, cells, strict=True))
    return json.dumps(value, ensure_ascii=False)


if __name__ == "__main__":
    run_recipe(main, CONFIG)
