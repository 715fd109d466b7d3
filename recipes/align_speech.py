"""Align phones: a copy of a corpus's manifest with a phone alignment for every transcript.

    python recipes/align_speech.py data=CORPUS output=ALIGNED

Forced alignment by PocketSphinx with its English model (`pip install "speechllm[align]"`). With phones, a semantic
teacher can be trained on little speech (train_teacher, objective: alignment), and eval_tokenizer can measure the phone
information in layer 0. Utterances that cannot be aligned stay in the manifest without phones, counted by reason. A
killed run is resumed where it stopped.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from speechllm.runs.config import parse_config
from tokenizer.settings import Corpus, Names, Settings

FRAME_RATE = 100  # of PocketSphinx
AHEAD = 1000  # utterances that wait for a processor, which bounds the memory
Alignment = tuple[list[tuple[str, float]] | None, str | None]  # phones, or the reason why there are none
# beams wide enough for accents; only the first pass, because alignments of the later ones need not match its words
SEARCH = {"beam": 1e-80, "pbeam": 1e-80, "wbeam": 1e-60, "fwdflat": False, "bestpath": False}


@dataclass
class AlignConfig(Settings):
    data: Corpus  # corpus folder, or several as [A, B]: manifest.jsonl or LibriSpeech's layout
    output: str  # folder for manifest.jsonl; the recordings stay where they are
    splits: Names | None = None  # all when null


if __name__ == "__main__":  # help and mistakes are answered before torch is loaded
    CONFIG = parse_config(AlignConfig)

from tqdm import tqdm

from speechllm import AudioError, Utterance, read_corpus
from speechllm.evaluation.normalizers import librispeech_normalizer
from speechllm.runs.machine import available_cpus
from speechllm.runs.recipe import claim_output, run_recipe
from speechllm.runs.signals import follow_parent
from tokenizer.corpus import load_utterance
from tokenizer.errors import InputError
from tokenizer.files import read_journal, write_jsonl
from tokenizer.rates import SAMPLE_RATE


def main(config: AlignConfig) -> None:
    try:
        decoder()
    except ImportError:
        raise ImportError('PocketSphinx is required: pip install "speechllm[align]"') from None
    folder = claim_output(config.output, config)
    utterances = [replace(utterance, phones=None) for utterance in read_corpus(config.data, config.splits)]
    journal = folder / "phones.jsonl"  # what could not be aligned is tried again
    known = {Utterance(**row | {"phones": None}): (row["phones"], None) for row in read_journal(journal)}
    left = [utterance for utterance in utterances if utterance not in known]
    bar = tqdm(align_all(left), "align", len(utterances), initial=len(utterances) - len(left), unit="utt")
    with journal.open("a", buffering=1, encoding="utf-8") as file:  # each line is written right after its alignment
        for utterance, (phones, problem) in zip(left, bar, strict=True):
            known[utterance] = phones, problem
            if phones:
                file.write(json.dumps(utterance.row() | {"phones": phones}) + "\n")
    results = [known[utterance] for utterance in utterances]
    place = os.path.realpath(folder)  # from where the system goes up, should a link lead here
    rows = [
        {**utterance.row(), "path": os.path.relpath(os.path.realpath(utterance.path), place), "phones": phones}
        for utterance, (phones, _) in zip(utterances, results, strict=True)
        if utterance.duration_s  # otherwise there is no recording, and the manifest would be refused
    ]
    write_jsonl(folder / "manifest.jsonl", rows)
    journal.unlink()
    problems = Counter(problem for _, problem in results if problem)
    print(f"aligned {len(results) - problems.total()} of {len(results)} utterances; without phones: {dict(problems)}")


def align_all(utterances: Sequence[Utterance]) -> Iterator[Alignment]:
    """`align` of each, in order, on all processors. Raises InputError if a process is killed."""
    try:
        with ProcessPoolExecutor(available_cpus(), initializer=follow_parent) as pool:
            for start in range(0, len(utterances), AHEAD):
                yield from pool.map(align, utterances[start : start + AHEAD])
    except BrokenProcessPool as error:
        raise InputError("a process was killed, as where memory is short: the same command goes on there") from error


def align(utterance: Utterance) -> Alignment:
    """(symbol, end in s) of every phone in time order, SIL for silence; or None and the reason."""
    text = librispeech_normalizer(utterance.text or "")
    if not text:
        return None, "no transcript"
    try:
        waveform = load_utterance(utterance, SAMPLE_RATE)
    except AudioError as error:
        return None, error.reason
    sound = (32767 * waveform.clamp(-1, 1)).short().numpy().tobytes()
    try:
        decoder().reinit_feat()  # otherwise the mean of the features is that of the recordings before
        decoder().set_align_text(text)
        decode(sound)
        decoder().set_alignment()  # the second pass aligns phones within the words of the first
        decode(sound)
        # the words must not be collected in a list first: they are valid only during the iteration
        spans = [(phone.name, phone.start + phone.duration) for word in decoder().get_alignment() for phone in word]
    except RuntimeError:
        return None, "not aligned"
    # the last window may end a little after the recording
    phones = [(name, min(end / FRAME_RATE, utterance.duration_s)) for name, end in spans]
    return phones, None if phones else "not aligned"


@cache
def decoder() -> Any:
    """The recogniser of this process."""
    from pocketsphinx import Decoder

    return Decoder(samprate=SAMPLE_RATE, loglevel="FATAL", **SEARCH)


def decode(sound: bytes) -> None:
    decoder().start_utt()
    decoder().process_raw(sound, full_utt=True)
    decoder().end_utt()


if __name__ == "__main__":
    run_recipe(main, CONFIG)
