"""Answer rows of messages with a speech language model and count the right answers, task by task.

    python recipes/eval_rows.py model=RUN/model codes=CODES rows=ROWS.jsonl output=RESULTS splits=test

ROWS.jsonl: rows of messages as train_asr reads them (recipes/README.md). Where the last message is the assistant's, it
is the right answer, which the model does not see: its own is right if it equals that; where that is an object or a list
in JSON, if it is the same value. Rows that end with a question are answered and not counted. Writes
RESULTS/results.json, RESULTS/predictions.jsonl and RESULTS/report.html.
"""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from speechllm.runs.config import parse_config
from tokenizer.settings import Count, Names, Settings


@dataclass
class EvalRowsConfig(Settings):
    model: str  # folder of train_asr, or one that `SpeechLLM.save` wrote
    codes: str  # folder of encode_speech
    rows: Names  # JSONL files
    output: str  # folder for results.json, predictions.jsonl and report.html
    base: str | None = None  # location of an adapter's language model, if not the recorded one
    splits: Names | None = None  # whose utterances the rows may name; all when null
    answer_tokens: Count = 128  # at most
    beams: Count = 1  # 1: greedy
    precision: Literal["no", "bf16"] | None = None  # of the language model; null: bf16 on a GPU, no on a CPU
    batch_tokens: Count = 32_768  # of prompts and answers decoded at a time; a beam counts as an answer
    static_cache: bool = False  # on a GPU, compile the steps of greedy decoding (beams=1); takes a while first


if __name__ == "__main__":  # help and mistakes are answered before torch is loaded
    CONFIG = parse_config(EvalRowsConfig)

from speechllm import load_codes, load_speech_llm, merge
from speechllm.data.conversations import Conversations, Row
from speechllm.data.rows import canonical_answer, read_rows, same_answer
from speechllm.decoding import Transcription, answer
from speechllm.evaluation.error_rates import mean_and_interval
from speechllm.evaluation.tables import Table, cell, markdown
from speechllm.messages import ConversationWriter
from speechllm.reports.pages import write_results
from speechllm.runs.machine import decoding_device, provenance
from speechllm.runs.recipe import claim_output, run_recipe
from tokenizer.files import write_jsonl


def main(config: EvalRowsConfig) -> None:
    started = time.perf_counter()
    folder = claim_output(config.output, config)
    device, dtype = decoding_device(config.precision)
    speech, encoding = load_codes(config.codes, config.splits)
    numbers = {name: number for number, name in enumerate(speech["id"])}
    rows = [row for file in config.rows for row in read_rows(file, numbers, learnt=False)]
    speech_llm = merge(load_speech_llm(config.model, device=device, dtype=dtype, base=config.base, with_codec=False))
    speech_llm.vocabulary.require(encoding)
    writer = ConversationWriter(speech_llm.vocabulary, speech_llm.text_tokenizer)
    conversations = Conversations(rows, speech, writer)
    found = answer(
        [conversations.prompt(place) for place in range(len(rows))],
        [config.answer_tokens] * len(rows),
        speech_llm,
        config.batch_tokens,
        progress=True,
        beams=config.beams,
        static_cache=config.static_cache,
    )
    predictions = [prediction(row, given) for row, given in zip(rows, found, strict=True)]
    counted = [one for one in predictions if "correct" in one]
    tasks = sorted({one["task"] for one in counted})
    results: dict[str, Any] = {
        "tasks": {task: score([one for one in counted if one["task"] == task]) for task in tasks},
        "cut_off": sum(given.runaway == "bound" for given in found),
        "unanswered": len(predictions) - len(counted),  # rows without a right answer to compare with
        "codec_fingerprint": encoding.fingerprint,
        **provenance(config, time.perf_counter() - started),
    }
    write_jsonl(folder / "predictions.jsonl", predictions)
    tables = [table(results["tasks"])] if tasks else []
    write_results(folder, f"{config.model}: answers", results, tables)
    if cut := results["cut_off"]:
        print(f"{cut} of {len(found)} answers were cut off at answer_tokens={config.answer_tokens}: try more")
    print(markdown(tables) + f"answers in {folder / 'predictions.jsonl'}")


def prediction(row: Row, given: Transcription) -> dict[str, Any]:
    """The answer to a row, what is wrong with it, and whether it is right, where the row says what is."""
    expected = row.answers[-1] if row.answered else None
    right = {"reference": expected, "correct": same_answer(expected, given.text)} if row.answered else {}
    wrong = {"runaway": given.runaway} if given.runaway else {}
    return {"row": row.name, "task": row.task, "hypothesis": given.text, **wrong, **right}


def score(predictions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Share of right answers, and that of always giving the most frequent one."""
    correct = mean_and_interval([one["correct"] for one in predictions])
    most = Counter(canonical_answer(one["reference"]) for one in predictions).most_common(1)[0][1]
    return {
        "rows": len(predictions),
        "correct": correct["mean"],
        "ci95": correct["ci95"],
        "most_frequent": most / len(predictions),
    }


def table(tasks: dict[str, dict[str, Any]]) -> Table:
    """The scores, a row for each task."""
    head = ["task", "rows", "correct", "most frequent answer"]
    rows = [
        [task, str(one["rows"]), cell({**one, "mean": one["correct"]}, ".1%"), f"{one['most_frequent']:.1%}"]
        for task, one in tasks.items()
    ]
    return Table("Answers", head, rows)


if __name__ == "__main__":
    run_recipe(main, CONFIG)
