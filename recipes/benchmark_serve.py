"""What `speechllm serve` bears on this machine: many callers at once, bad uploads, long recordings, and live speech.

    python recipes/benchmark_serve.py model=RUN/model data=CORPUS output=RESULTS

Starts a server of the model on this machine and, one after the other, asks it for the recordings one by one, for
`requests` of them from `clients` at once (every answer must be the one it had alone), sends `bad` uploads that are no
recordings (each must be refused in one line), speaks `live` recordings into its socket as fast as they were spoken, and
uploads `minutes` of joined recordings. Prints a table and writes RESULTS/results.json and report.html: latencies, the
server's memory after each part, and the delay of live texts. Needs the extra `serve` and httpx.
"""

import io
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from typing import Any

from speechllm.runs.config import parse_config
from tokenizer.settings import Corpus, Count, Names, Natural, NonNegative, Settings

TRANSCRIPTIONS = "/v1/audio/transcriptions"
CHUNK_S = 0.1  # of live speech in a message
RATE = 16_000
PATIENCE_S = 86_400  # hours of recordings may take as long


@dataclass
class ServeConfig(Settings):
    model: str  # folder that train_asr wrote
    data: Corpus  # recordings to ask for: manifest.jsonl or LibriSpeech's layout, or several as [A, B]
    output: str  # folder for results.json and report.html
    splits: Names | None = None  # all when null
    recordings: Count = 20  # that are asked for, evenly chosen
    requests: Natural = 200
    clients: Count = 16
    bad: Natural = 1000
    live: Natural = 3
    minutes: NonNegative = 0.0  # of joined recordings in one upload


if __name__ == "__main__":  # help and mistakes are answered before torch is loaded
    CONFIG = parse_config(ServeConfig)

import httpx
import psutil
import soundfile
import torch
from websockets.sync.client import connect

from speechllm import load_audio, read_corpus
from speechllm.evaluation.tables import DASH, Table
from speechllm.reports.pages import write_results
from speechllm.runs.machine import provenance
from speechllm.runs.recipe import claim_output, run_recipe
from speechllm.runs.signals import child_environment
from tokenizer.corpus import spread
from tokenizer.errors import InputError


def main(config: ServeConfig) -> None:
    started = time.perf_counter()
    folder = claim_output(config.output, config)
    paths = [Path(u.path) for u in spread(read_corpus(config.data, config.splits), config.recordings)]
    with ExitStack() as stack:
        address, name, process = stack.enter_context(served(config.model))
        most = httpx.Limits(max_connections=config.clients)
        client = stack.enter_context(httpx.Client(base_url=address, timeout=None, limits=most))

        def text_of(path: Path) -> tuple[str, float]:
            return transcribed(client, name, path.name, path.read_bytes())

        alone = {path: text_of(path) for path in paths}
        results: dict[str, Any] = {"alone": latencies([seconds for _, seconds in alone.values()])}
        results["alone"]["memory_mb"] = memory_mb(process)
        if config.requests:
            asked = [paths[i % len(paths)] for i in range(config.requests)]
            results["together"] = together(text_of, asked, config.clients, {p: text for p, (text, _) in alone.items()})
            results["together"]["memory_mb"] = memory_mb(process)
        if config.bad:
            results["bad"] = refused(client, name, paths[0].read_bytes(), config.bad, config.clients)
            results["bad"]["memory_mb"] = memory_mb(process)
        if config.live:
            results["live"] = live(address, name, paths[: config.live])
        if config.minutes:
            content = joined(paths, config.minutes)
            text, seconds = transcribed(client, name, "long.flac", content)
            results["long"] = {"minutes": config.minutes, "seconds": seconds, "words": len(text.split())}
            results["long"]["peak_memory_mb"] = peak_memory_mb(process)
    found = table(results)
    results |= {"model": name, **provenance(config, time.perf_counter() - started)}
    write_results(folder, f"Serving {name}", results, [found])
    print(found.markdown())


@contextmanager
def served(model: str) -> Iterator[tuple[str, str, psutil.Process]]:
    """A server of the model in a process of its own: its address, the model's name, and the process."""
    command = [sys.executable, "-m", "speechllm.cli.main", "serve", model, "--port", "0", "--timeout", f"{PATIENCE_S}"]
    environment = os.environ | child_environment()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            name, _, rest = process.stdout.readline().partition(" is served at ")
            if not rest:
                raise InputError(f"no server of {model} could be started")
            yield rest.split()[0].removesuffix("/v1"), name, psutil.Process(process.pid)
        finally:
            process.terminate()


def transcribed(client: httpx.Client, name: str, file: str, content: bytes) -> tuple[str, float]:
    """The text of a recording and the seconds until it came."""
    started = time.perf_counter()
    answer = client.post(TRANSCRIPTIONS, files={"file": (file, content)}, data={"model": name})
    if answer.status_code != 200:
        raise InputError(f"{file}: {answer.json()['error']['message']}")
    return answer.json()["text"], time.perf_counter() - started


def together(
    text_of: Callable[[Path], tuple[str, float]], asked: Sequence[Path], clients: int, alone: dict[Path, str]
) -> dict[str, Any]:
    """The recordings from several clients at once. Raises InputError if an answer is not the one alone."""
    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(text_of, asked))
    seconds = time.perf_counter() - started
    if other := sum(text != alone[path] for path, (text, _) in zip(asked, answers, strict=True)):
        raise InputError(f"{other} of {len(asked)} answers are not those that the recordings have alone")
    return latencies([each for _, each in answers]) | {"requests_per_second": len(asked) / seconds}


def refused(client: httpx.Client, name: str, good: bytes, count: int, clients: int) -> dict[str, Any]:
    """Uploads that are no recordings. Raises InputError for one that is not refused in one line."""
    kinds = [
        {"files": {"file": ("cut.flac", good[: len(good) // 2])}, "data": {"model": name}},
        {"files": {"file": ("empty.wav", b"")}, "data": {"model": name}},
        {"files": {"file": ("text.mp3", b"not a sound " * 99)}, "data": {"model": name}},
        {"files": {"file": ("a.flac", good)}, "data": {"model": "another"}},
        {"files": {"file": ("a.flac", good)}, "data": {"model": name, "temperature": "hot"}},
        {"data": {"model": name}},
        {"content": b"--x", "headers": {"content-type": "multipart/form-data; boundary=x"}},
        {"json": {"model": name}},
    ]

    def status(number: int) -> int:
        answer = client.post(TRANSCRIPTIONS, **kinds[number % len(kinds)])
        if not 400 <= answer.status_code < 500 or "\n" in answer.json()["error"]["message"]:
            raise InputError(f"a bad upload was answered with {answer.status_code}: {answer.text[:200]}")
        return answer.status_code

    with ThreadPoolExecutor(clients) as pool:
        statuses = Counter(pool.map(status, range(count)))
    return {"requests": count, "statuses": {str(code): statuses[code] for code in sorted(statuses)}}


def live(address: str, name: str, paths: Sequence[Path]) -> dict[str, Any]:
    """Recordings spoken into the socket: how long after its speech a text comes, in s."""
    partial, last = [], []
    for path in paths:
        samples = (load_audio(path, RATE) * (2**15 - 1)).short()
        with connect(f"{address.replace('http', 'ws')}/v1/audio/live?model={name}&rate={RATE}") as socket:
            began = time.perf_counter()
            with ThreadPoolExecutor(1) as pool:
                heard = pool.submit(lambda socket=socket: [(json.loads(m), time.perf_counter()) for m in socket])
                for number, chunk in enumerate(samples.split(round(CHUNK_S * RATE)), 1):
                    time.sleep(max(0.0, began + number * CHUNK_S - time.perf_counter()))
                    socket.send(chunk.numpy().tobytes())
                socket.send("end")
                ended = time.perf_counter()
                for event, came in heard.result():
                    if event["type"] == "partial":
                        partial.append(came - began - event["end"])
                    elif event["type"] == "done":
                        last.append(came - ended)
    return {"recordings": len(paths), "partial": latencies(partial), "last": latencies(last)}


def joined(paths: Sequence[Path], minutes: float) -> bytes:
    """The recordings one after the other, again and again, with half a second between them, as a FLAC file."""
    content, pause, left = io.BytesIO(), torch.zeros(RATE // 2), round(minutes * 60 * RATE)
    with soundfile.SoundFile(content, "w", RATE, 1, format="FLAC") as file:
        while left > 0:
            for path in paths:
                waveform = torch.cat([load_audio(path, RATE), pause])[: max(0, left)]
                file.write(waveform.numpy())
                left -= len(waveform)
    return content.getvalue()


def latencies(seconds: Sequence[float]) -> dict[str, Any]:
    """Number, median and 95th percentile."""
    if len(seconds) < 2:
        return {"requests": len(seconds), "p50_s": seconds[0] if seconds else None, "p95_s": None}
    points = quantiles(seconds, n=20, method="inclusive")
    return {"requests": len(seconds), "p50_s": points[9], "p95_s": points[18]}


def memory_mb(process: psutil.Process) -> float:
    return process.memory_info().rss / 1e6


def peak_memory_mb(process: psutil.Process) -> float | None:
    """The most that the process has had; Linux only."""
    status = Path(f"/proc/{process.pid}/status")
    if not status.exists():
        return None
    (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024 / 1e6


def table(results: dict[str, Any]) -> Table:
    """One row per part."""
    rows = []
    for name in ("alone", "together", "bad", "long"):
        if part := results.get(name):
            numbers = [part.get(key) for key in ("requests", "p50_s", "p95_s", "requests_per_second")]
            numbers.append(part.get("memory_mb") or part.get("peak_memory_mb"))
            rows.append([name, *(DASH if number is None else f"{number:.3g}" for number in numbers[:4])])
            rows[-1].append(DASH if numbers[4] is None else f"{numbers[4]:.0f}")
    for kind in ("partial", "last"):
        if part := results.get("live", {}).get(kind):
            rows.append([f"live, {kind}", *(f"{part[key]:.3g}" if part[key] is not None else DASH for key in part)])
            rows[-1] += [DASH, DASH]
    return Table("Serving", ["part", "requests", "median (s)", "95 % (s)", "requests/s", "memory (MB)"], rows)


if __name__ == "__main__":
    run_recipe(main, CONFIG)
