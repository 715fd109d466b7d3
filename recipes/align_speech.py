"""Align phones: a copy of a corpus's manifest with a phone alignment for every transcript.

    python recipes/align_speech.py data=CORPUS output=ALIGNED

Forced alignment by PocketSphinx with its English model (`pip install "speechllm[align]"`). With phones, a semantic
teacher can be trained on little speech (train_teacher, objective: alignment), and eval_tokenizer can measure the phone
information in layer 0. Utterances that cannot be aligned stay in the manifest without phones, counted by reason.
"""

import os
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from speechllm.runs.config import parse_config
from tokenizer.settings import Corpus, Names, Settings

FRAME_RATE = 100  # of PocketSphinx
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
from tokenizer.files import write_jsonl
from tokenizer.rates import SAMPLE_RATE


def main(config: AlignConfig) -> None:
    try:
        decoder()
    except ImportError:
        raise ImportError('PocketSphinx is required: pip install "speechllm[align]"') from None
    folder = claim_output(config.output, config)
    utterances = read_corpus(config.data, config.splits)
    with ProcessPoolExecutor(available_cpus(), initializer=follow_parent) as pool:
        results = list(tqdm(pool.map(align, utterances, chunksize=8), "align", len(utterances), unit="utt"))
    place = os.path.realpath(folder)  # from where the system goes up, should a link lead here
    rows = [
        {**asdict(utterance), "path": os.path.relpath(os.path.realpath(utterance.path), place), "phones": phones}
        for utterance, (phones, _) in zip(utterances, results, strict=True)
        if utterance.duration_s  # otherwise there is no recording, and the manifest would be refused
    ]
    write_jsonl(folder / "manifest.jsonl", rows)
    problems = Counter(problem for _, problem in results if problem)
    print(f"aligned {len(results) - problems.total()} of {len(results)} utterances; without phones: {dict(problems)}")


def align(utterance: Utterance) -> tuple[list[tuple[str, float]] | None, str | None]:
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
