"""The campaign: kills at random moments and hostile files, values, folders and situations, each judged by itself.

    python tests/campaign                                     everything, about 25 minutes on two cores
    python tests/campaign --only recordings tables            some sections; `kills` is one of them
    python tests/campaign --match "demo|moved" --kills 12     some cases, by name
    python tests/campaign --resume                            what an interrupted campaign has not done yet
    python tests/campaign --write                             put the table into tests/README.md

Results are printed as they come and collected in WORK/results.json. Not part of `make test`.
"""

import argparse
import json
import queue
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import checkpoints
import folders
import models
import paths
import recordings
import scores
import settings
import tables
import texts
import trainings
from judge import Case, run_case
from kills import JOBS, quotas, run_job
from parts import make_parts
from start import ROOT, Lane

from tokenizer.files import read_json, write_json, write_text

SECTIONS: dict[str, tuple[Case, ...]] = {
    "folders": folders.CASES,
    "paths": paths.CASES,
    "recordings": recordings.CASES,
    "tables": tables.CASES + texts.CASES,
    "scores": scores.CASES,
    "models": models.CASES + checkpoints.CASES,
    "trainings": trainings.CASES,
    "settings": settings.CASES,
}
for name, cases in SECTIONS.items():
    assert len({case.name for case in cases}) == len(cases), f"{name}: a name stands for two cases"
README = ROOT / "tests" / "README.md"
PLACE = re.compile(r"(<!-- campaign -->\n).*(<!-- /campaign -->)", re.DOTALL)


@dataclass(frozen=True)
class Task:
    """Something that a lane does: a case, or all kills of a job."""

    section: str
    name: str
    do: Callable[[Lane], None]


class Campaign:
    """What is to be done, and its results, by section and name."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments, self.work = arguments, arguments.work.resolve()
        self.parts, self.file = self.work / "parts", self.work / "results.json"
        self.results: dict[str, dict] = read_json(self.file)
        self.turn, self.started, self.count, self.before_s = threading.Lock(), time.monotonic(), 0, 0.0
        self.tasks = self.chosen()
        if not self.tasks:
            raise SystemExit("nothing to do: no section or name is like that, or all of it is done")
        if arguments.resume:
            self.before_s = self.results.get("campaign", {}).get("seconds", 0.0)
        else:
            for task in self.tasks:
                self.results.pop(f"{task.section}: {task.name}", None)

    def chosen(self) -> list[Task]:
        tasks = []
        for job in JOBS:
            tasks.append(Task("kills", job.name, lambda lane, job=job: self.kill(job, lane)))
        for section, cases in SECTIONS.items():
            tasks += [
                Task(section, case.name, lambda lane, s=section, c=case: self.judge(s, c, lane)) for case in cases
            ]
        only, match = self.arguments.only, re.compile(self.arguments.match, re.IGNORECASE)
        tasks = [task for task in tasks if not only or task.section in only]
        tasks = [task for task in tasks if match.search(task.name)]
        return [t for t in tasks if not (self.arguments.resume and f"{t.section}: {t.name}" in self.results)]

    def run(self) -> int:
        """How many tries did not end as expected."""
        lanes = [Lane(str(number), self.work) for number in range(self.arguments.processes)]
        make_parts(self.parts, lanes[0])
        waiting: queue.SimpleQueue[Task] = queue.SimpleQueue()
        for task in self.tasks:
            waiting.put(task)

        def work(lane: Lane) -> None:
            while True:
                try:
                    task = waiting.get_nowait()
                except queue.Empty:
                    return
                try:
                    task.do(lane)
                except Exception as error:  # of the campaign itself: it counts as a failure and the others go on
                    self.record(task.section, task.name, "", [{"what": "", "problems": [f"campaign: {error!r}"]}], 0.0)

        threads = [threading.Thread(target=work, args=(lane,), daemon=True) for lane in lanes]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        except KeyboardInterrupt:
            raise SystemExit("interrupted: the same command with --resume goes on") from None
        finally:
            for lane in lanes:
                lane.close()
        rows = [row for task in self.tasks for row in self.results[f"{task.section}: {task.name}"]["tries"]]
        wrong = sum(bool(row["problems"]) for row in rows)
        print(f"{len(rows)} tries, {len(rows) - wrong} as expected, in {self.seconds / 60:.1f} minutes: {self.file}")
        return wrong

    @property
    def seconds(self) -> float:
        return self.before_s + time.monotonic() - self.started

    def judge(self, section: str, case: Case, lane: Lane) -> None:
        started = time.monotonic()
        number = [one.name for one in SECTIONS[section]].index(case.name)  # names may differ in signs alone
        folder = self.work / "cases" / section / f"{number:03} {re.sub(r'[^A-Za-z0-9]+', '-', case.name)[:40]}"
        problems, ended = run_case(case, lane, folder, self.parts)
        if not problems:  # the folders of the others are kept, to look at
            shutil.rmtree(folder, ignore_errors=True)
        said = ended.errors[-1500:] or ended.output[-1500:] if ended and problems else ""
        row = {"what": "", "problems": problems, "said": said}
        self.record(section, case.name, case.outcomes[0].kind, [row], time.monotonic() - started)

    def kill(self, job, lane: Lane) -> None:
        started, quota = time.monotonic(), quotas(self.arguments.kills)[job.name]
        kills = run_job(
            job, quota, lane, self.work / "kills" / re.sub(r"\W+", "-", job.name), self.parts, self.arguments.seed
        )
        rows = []
        for kill in kills:
            rows.append({"what": kill.what, "problems": kill.problems})
            self.say("kills", f"{job.name}, {kill.what}", kill.problems, kill.seconds)
        self.record("kills", job.name, "goes on", rows, time.monotonic() - started, silent=True)

    def record(
        self, section: str, name: str, kind: str, tries: list[dict], seconds: float, silent: bool = False
    ) -> None:
        with self.turn:
            self.count += 1
            self.results[f"{section}: {name}"] = {"section": section, "kind": kind, "tries": tries, "seconds": seconds}
            settings = {"seed": self.arguments.seed, "kills": self.arguments.kills}
            self.results["campaign"] = {**settings, "seconds": self.seconds}
            write_json(self.file, self.results)
        if not silent:
            self.say(section, name, tries[0]["problems"], seconds, tries[0].get("said", ""))

    def say(self, section: str, name: str, problems: list[str], seconds: float, said: str = "") -> None:
        verdict = "WRONG" if problems else "ok"
        text = f"[{self.count:3}/{len(self.tasks)}] {verdict:5} {section}: {name} ({seconds:.1f} s)"
        details = [f"        {part}" for problem in problems for part in problem.splitlines()[-6:]]
        details += [f"      > {line}" for line in said.splitlines()[-5:]] if problems else []
        print("\n".join(ascii_only(line) for line in [text, *details]), flush=True)


def ascii_only(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def write_table(results: dict[str, dict], work: Path) -> None:
    """Put the counts of a complete campaign between the two marks in tests/README.md."""
    campaign = results.pop("campaign")
    expected = {f"kills: {job.name}" for job in JOBS}
    expected |= {f"{section}: {case.name}" for section, cases in SECTIONS.items() for case in cases}
    if absent := expected - results.keys():
        raise SystemExit(f"{len(absent)} of {len(expected)} are not done yet, such as {min(absent)}: add --resume")
    lines = [
        "| section | tried | as expected | refused | skipped | accepted | went on |",
        "|---|---|---|---|---|---|---|",
    ]
    sums = [0] * 6
    for section in (*SECTIONS, "kills"):
        entries = [results[key] for key in sorted(expected) if results[key]["section"] == section]
        tries = [(entry["kind"], row) for entry in entries for row in entry["tries"]]
        right = sum(not row["problems"] for _, row in tries)
        kinds = [sum(kind == name for kind, _ in tries) for name in ("refused", "skipped", "accepted", "goes on")]
        counts = [len(tries), right, *kinds]
        sums = [a + b for a, b in zip(sums, counts, strict=True)]
        lines.append(f"| {section} | " + " | ".join(map(str, counts)) + " |")
    lines.append("| **all** | " + " | ".join(map(str, sums)) + " |")
    command = f"make campaign ARGS='--seed {campaign['seed']} --kills {campaign['kills']} --write'"
    lines.append(f"\n`{command}`, {campaign['seconds'] / 60:.0f} minutes.")
    wrong = {key: row for key in sorted(expected) for row in results[key]["tries"] if row["problems"]}
    if wrong:
        lines.append("Not as expected: " + "; ".join(wrong) + ".")
    text = README.read_text(encoding="utf-8")
    write_text(README, PLACE.sub(lambda found: found[1] + "\n".join(lines) + "\n" + found[2], text))
    print(f"written into {README}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[*SECTIONS, "kills"], metavar="SECTION", help="some sections")
    parser.add_argument("--match", default="", metavar="REGEX", help="cases and jobs whose name matches")
    parser.add_argument("--kills", type=int, default=130, help="about so many, over all jobs (130)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills (0)")
    parser.add_argument("--processes", type=int, default=2, help="lanes side by side (2)")
    parser.add_argument("--resume", action="store_true", help="keep the results that are there")
    parser.add_argument("--list", action="store_true", help="only print what there is")
    parser.add_argument("--write", action="store_true", help="write the table when all is done")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "campaign", help="folder for all of it")
    # ignored in the background of a shell script, and then by all that is started here
    signal.signal(signal.SIGINT, signal.default_int_handler)
    arguments = parser.parse_args()
    if arguments.list:
        for section, cases in SECTIONS.items():
            print(f"{section}: {len(cases)}", *(case.name for case in cases), sep="\n  ")
        print(f"kills: {sum(quotas(arguments.kills).values())}", *(job.name for job in JOBS), sep="\n  ")
        return 0
    campaign = Campaign(arguments)
    wrong = campaign.run()
    if arguments.write:
        write_table(json.loads(campaign.file.read_text(encoding="utf-8")), campaign.work)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
