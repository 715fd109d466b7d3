"""Recordings that cannot be used: counted by reason, all of them listed in a file."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from speechllm.run import write_jsonl
from tokenizer import AudioError, Utterance

TOLD = 5  # how many are printed


def left_out_row(utterance: Utterance, error: AudioError) -> dict[str, str]:
    """A recording that cannot be used, and why."""
    return {"id": utterance.id, "path": utterance.path, "reason": error.reason, "detail": str(error)}


def report_left_out(folder: str | Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Write FOLDER/left_out.jsonl with a line for every recording that cannot be used, and print the first ones."""
    file = Path(folder) / "left_out.jsonl"
    write_jsonl(file, rows)
    for row in rows[:TOLD]:
        print(f"left out: {row['detail']}")
    if len(rows) > TOLD:
        print(f"left out: {len(rows) - TOLD} more, see {file}")
