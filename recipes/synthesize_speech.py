# SPDX-License-Identifier: GPL-3.0-or-later
#
# This file is GPL because it loads the espeak-ng engine, which is GPL-3.0-or-later, into its own process. The rest of
# the project is Apache-2.0 and only starts this file as a separate process. Neither imports anything from the other.
"""Make the demo's corpus: short spoken commands in many synthetic voices, with transcripts and phone times.

    python recipes/synthesize_speech.py OUT --train 4000 --dev 200 --test 200 --seed 0 --jobs 2
    python recipes/synthesize_speech.py OUT --train 2000 --texts FILE      a training split of your own sentences

OUT receives audio/<voice>/<id>.flac (16 kHz, mono, 16 bit), corpus.json (the arguments) and finally manifest.jsonl,
with one utterance per line: a folder with a manifest is complete. The seed determines sentences, voices and speaking
styles, independent of --jobs, but not every sample, because the engine adds random noise.

All voices are variants of one rule-based synthesiser. An unseen voice is far easier to recognise than an unseen person,
so results on this corpus say nothing about human speech.
"""

import argparse
import ctypes
import hashlib
import importlib.util
import itertools
import multiprocessing
import random
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from speechllm.runs.signals import catch_early_interrupts, follow_parent

if __name__ == "__main__":  # before slow imports
    catch_early_interrupts()

import numpy as np
import soundfile
from tqdm import tqdm

from speechllm.runs.recipe import run_recipe
from tokenizer.claims import claim_folder
from tokenizer.errors import InputError
from tokenizer.files import read_json, write_json, write_jsonl
from tokenizer.reading import reading
from tokenizer.settings import Count, Seed, argument

# The grammar: a word in capitals is spoken as it is, a word in small letters stands for any word of that slot.
# TO and FOR are avoided because they sound like TWO and FOUR.
TEMPLATES = (
    "TURN state THE colour room device",
    "action THE colour room opening",
    "LET'S DIAL number number number",
    "PLAY day music AT number",
    "WAKE name day AT number",
    "CALL name day order number",
    "SEND name number gift",
    "BUY number food AND drink",
)
SLOTS = {
    "state": "ON OFF",
    "colour": "RED BLUE GREEN YELLOW PURPLE BLACK",
    "room": "KITCHEN BEDROOM GARAGE OFFICE GARDEN NURSERY CELLAR ATTIC",
    "device": "LAMP HEATER RADIO FAN CAMERA",
    "action": "OPEN SHUT LOCK",
    "opening": "DOOR WINDOW GATE CURTAIN",
    "number": "TWO THREE FOUR FIVE SIX SEVEN EIGHT NINE TEN ELEVEN TWENTY THIRTY FIFTY",
    "order": "BEFORE AFTER",
    "day": "MONDAY TUESDAY WEDNESDAY THURSDAY FRIDAY SATURDAY SUNDAY",
    "music": "JAZZ ROCK OPERA PIANO DISCO FOLK",
    "name": "ANNA PETER OLIVIA GEORGE MARTHA HUGO",
    "gift": "ROSES BALLOONS CANDLES POSTCARDS FLOWERS BOOKS",
    "food": "APPLES LEMONS POTATOES COOKIES CARROTS EGGS",
    "drink": "MILK JUICE COFFEE WATER SODA",
}

# Voice variants of espeak-ng, without its robots, whispers, distorted voices and near twins of a dev or test voice.
VOICES = {
    "train": "Alex Alicia Andrea Andy Annie Denis Gene Lee Mario adam anika benjamin boris david edward f1 f2 f3 f5 "
    "grandma m1 m2 m4 m5 m6 m8 norbert pablo quincy robert sandro shelby",
    "dev": "belinda m3",
    "test": "f4 m7 Michael steph2",
}

# Training voices are also used with a longer and a shorter vocal tract (all times and frequencies scaled), each as a
# separate speaker, and every training utterance has a random microphone (gains in dB at these frequencies in Hz):
# otherwise models would overfit to the engine's few voices. Dev and test voices are unchanged.
STRETCHES = {"train": (1.0, 0.94, 1.07), "dev": (1.0,), "test": (1.0,)}
MICROPHONE_HZ = (100, 400, 1000, 2000, 3500, 6000)
MICROPHONE_DB = {"train": (12.0, 4.0), "dev": (0.0, 0.0), "test": (0.0, 0.0)}  # maximum of the tilt, of each band

SAMPLE_RATE = 16_000
PEAK = 0.7  # of full scale
SILENCE = "_"


@dataclass(frozen=True)
class Utterance:
    """A text and how to speak it: everything that the seed determines."""

    id: str
    split: str
    text: str
    voice: str
    stretch: float
    microphone: tuple[float, ...]
    rate: int  # words per minute
    pitch: int  # 50 is the voice's default, also for the range
    pitch_range: int
    lead_s: float  # silence before the first phone
    tail_s: float  # silence after the last phone

    @property
    def speaker(self) -> str:
        """The voice, and its stretch unless that is 1."""
        return self.voice if self.stretch == 1 else f"{self.voice}-{self.stretch}"

    @property
    def path(self) -> str:
        """The audio file in the corpus folder."""
        return f"audio/{self.speaker}/{self.id}.flac"


# 1. The plan: sentences, voices and styles


def sentences(template: str) -> list[str]:
    """Every sentence of one template."""
    choices = [SLOTS.get(word, word).split() for word in template.split()]
    return [" ".join(words) for words in itertools.product(*choices)]


def draw_texts(counts: dict[str, int], rng: random.Random, own: Sequence[str] = ()) -> dict[str, list[str]]:
    """Choose the texts of each split, from each template in turn; texts of dev and test are in no other split.

    own: sentences for the training split, taken at random, all of them before one is taken again.
    """
    decks = [rng.sample(deck, len(deck)) for deck in map(sentences, TEMPLATES)]
    limit = len(decks) * min(map(len, decks)) // 2
    if counts["dev"] + counts["test"] > limit:
        sys.exit(f"error: the grammar is too small for more than {limit} utterances in --dev and --test together")
    texts = {split: [decks[i % len(decks)].pop() for i in range(counts[split])] for split in ("dev", "test")}
    if own:
        decks = [rng.sample(own, len(own))]
    rounds = [itertools.cycle(deck) for deck in decks]  # train cycles through the remaining ones
    texts["train"] = [next(rounds[i % len(rounds)]) for i in range(counts["train"])]
    for split in texts.values():
        rng.shuffle(split)  # otherwise the cycles of templates and voices would be synchronous
    return texts


def make_plan(seed: int, own: Sequence[str] = (), **counts: int) -> list[Utterance]:
    """Plan every utterance, `counts` per split; the same arguments always give the same plan. own: see `draw_texts`."""
    rng = random.Random(seed)
    texts = draw_texts(counts, rng, own)
    plan = []
    for split in VOICES:
        speakers = itertools.cycle(itertools.product(STRETCHES[split], VOICES[split].split()))
        for i, (text, (stretch, voice)) in enumerate(zip(texts[split], speakers, strict=False)):
            most, band = MICROPHONE_DB[split]
            tilt = rng.uniform(-most, most)
            microphone = tuple(
                tilt * slope + rng.uniform(-band, band) for slope in np.linspace(-1, 1, len(MICROPHONE_HZ))
            )
            style = rng.randint(140, 190), rng.randint(30, 70), rng.randint(30, 70)
            silences = rng.uniform(0.05, 0.10), rng.uniform(0.05, 0.10)
            plan.append(Utterance(f"{split}-{i:05d}", split, text, voice, stretch, microphone, *style, *silences))
    return plan


# 2. The engine; names and constants as in espeak-ng's speak_lib.h

ENGINE_RATE = 22_050
SYNCHRONOUS, PHONEME_EVENTS, DONT_EXIT, CHARS_UTF8 = 2, 0x0001, 0x8000, 1
LIST_TERMINATED, PHONEME = 0, 7
RATE, VOLUME, PITCH, RANGE = 1, 2, 3, 4
LOW_VOLUME = 40  # at the default of 100, the louder voices reach the engine's limiter

Phones = list[tuple[str, int]]  # symbol and sample: its start, as reported by the engine, or later its end


class Event(ctypes.Structure):
    """espeak_EVENT, with only the member of its union that is read here."""

    _fields_ = [
        *((name, ctypes.c_int) for name in ("type", "identifier", "text_position", "length", "milliseconds", "sample")),
        ("user_data", ctypes.c_void_p),
        ("string", ctypes.c_char * 8),
    ]


def phone_symbol(mnemonic: str) -> str:
    """The engine's name of a phone without stress marks (prefix) and marks of reduced or flapped variants (suffix)."""
    return SILENCE if mnemonic.startswith(SILENCE) else mnemonic.lstrip("',%=").rstrip("#2-")


class Engine:
    """espeak-ng in this process; its state is global, so there can be only one per process."""

    def __init__(self) -> None:
        import espeakng_loader  # imported late, so that main can report if it is missing

        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        data = espeakng_loader.get_data_path().encode()
        rate = self._library.espeak_Initialize(SYNCHRONOUS, 0, data, PHONEME_EVENTS | DONT_EXIT)
        if rate != ENGINE_RATE:
            raise RuntimeError(f"espeak-ng failed to start: expected {ENGINE_RATE} Hz, got {rate}")
        self._sound = bytearray()
        self._phones: Phones = []
        callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.POINTER(Event))
        self._callback = callback(self._receive)  # a reference, so that Python does not free it
        self._library.espeak_SetSynthCallback(self._callback)

    def speak(self, utterance: Utterance) -> tuple[np.ndarray, Phones]:
        """int16 samples at the engine's rate, and the phones with the samples at which they start."""
        self._sound.clear()
        self._phones.clear()
        text = utterance.text.lower().encode() + b"\0"  # some words in capitals would be spelt out
        errors = [self._library.espeak_SetVoiceByName(f"en-us+{utterance.voice}".encode())]
        style = {RATE: utterance.rate, VOLUME: LOW_VOLUME, PITCH: utterance.pitch, RANGE: utterance.pitch_range}
        errors += [self._library.espeak_SetParameter(name, value, 0) for name, value in style.items()]
        errors += [self._library.espeak_Synth(text, ctypes.c_size_t(len(text)), 0, 1, 0, CHARS_UTF8, None, None)]
        if any(errors):
            raise RuntimeError(f"espeak-ng failed for {utterance}: errors {errors}")
        return np.frombuffer(bytes(self._sound), np.int16), list(self._phones)

    def _receive(self, samples: int | None, count: int, events: "ctypes._Pointer[Event]") -> int:
        """Collect a piece of sound and its events; returning 0 makes the engine continue."""
        if samples and count > 0:
            self._sound += ctypes.string_at(samples, 2 * count)
        for event in itertools.takewhile(lambda event: event.type != LIST_TERMINATED, events):
            if event.type == PHONEME:
                self._phones.append((phone_symbol(event.string.decode()), event.sample))
        return 0


engine = cache(Engine)  # one per process, started on first use


# 3. From the plan to the folder


def frame_speech(wave: np.ndarray, phones: Phones, utterance: Utterance) -> tuple[np.ndarray, Phones]:
    """Surround the speech with exactly the planned silence; returns the samples, and the phones with their ends.

    Raises InputError for a text without anything to say, such as a dash.
    """
    ends = [start for _, start in phones[1:]] + [len(wave)]
    spans = [(symbol, start, end) for (symbol, start), end in zip(phones, ends, strict=True) if end > start]
    spoken = [span for span in spans if span[0] != SILENCE]
    if not spoken:
        raise InputError(f"espeak-ng finds nothing to say in {utterance.text!r}")
    first, last = spoken[0][1], spoken[-1][2]
    lead, tail = round(utterance.lead_s * ENGINE_RATE), round(utterance.tail_s * ENGINE_RATE)
    framed = np.pad(wave, (lead, tail))[first : last + lead + tail]  # the engine may produce less silence than planned
    inside = [(symbol, lead + end - first) for symbol, start, end in spans if first <= start and end <= last]
    return framed, [(SILENCE, lead), *inside, (SILENCE, len(framed))]


def record(wave: np.ndarray, utterance: Utterance) -> np.ndarray:
    """Resample to 16 kHz, stretch, apply the microphone; exact for sound that ends in silence."""
    padded = -(-len(wave) // 2205) * 2205  # a size with a fast transform
    factor = SAMPLE_RATE / ENGINE_RATE * utterance.stretch
    size = round(padded * factor / 2) * 2
    spectrum = np.fft.rfft(wave, padded)[: size // 2 + 1]
    frequency = np.arange(len(spectrum)) * SAMPLE_RATE / size
    spectrum *= 10 ** (np.interp(np.log(frequency + 1), np.log(MICROPHONE_HZ), utterance.microphone) / 20)
    return np.fft.irfft(spectrum, size)[: int(len(wave) * factor)]  # the caller normalises the level


def synthesize(out: Path, utterance: Utterance) -> dict:
    """Synthesise one utterance to its file; returns its line of the manifest."""
    wave, phones = frame_speech(*engine().speak(utterance), utterance)
    audio = record(wave, utterance)
    path = out / utterance.path
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, audio * (PEAK / np.abs(audio).max()), SAMPLE_RATE, subtype="PCM_16")
    duration_s = len(audio) / SAMPLE_RATE
    ends = [(symbol, round(end / ENGINE_RATE * utterance.stretch, 4)) for symbol, end in phones[:-1]]
    line = {key: getattr(utterance, key) for key in ("id", "path", "text", "speaker", "split")}
    line |= {"duration_s": duration_s, "license": "synthetic", "source": "espeak-ng"}
    return line | {"phones": [*ends, (SILENCE, duration_s)]}


def synthesize_all(out: Path, plan: list[Utterance], jobs: int) -> list[dict]:
    """Synthesise the plan in several processes; returns the manifest's lines in the same order."""
    spawn = multiprocessing.get_context("spawn")  # new processes, each with its own engine
    with ProcessPoolExecutor(jobs, spawn, initializer=follow_parent) as pool:
        lines = pool.map(partial(synthesize, out), plan, chunksize=32)
        return list(tqdm(lines, total=len(plan), desc="speaking", unit="utt", disable=None))


def read_sentences(file: Path | None) -> list[str]:
    """The lines of a file that are not empty; none without a file. Raises InputError where there are none."""
    if file is None:
        return []
    with reading(file, "sentences, one a line"):
        lines = file.read_text(encoding="utf-8").splitlines()
    if not (own := [text for line in lines if (text := line.strip())]):
        raise InputError(f"{file} holds no sentences: expected one a line")
    return own


def prepare_folder(out: Path, arguments: dict[str, int | str]) -> bool:
    """Claim the folder for the corpus; False if it already holds exactly this one, complete."""
    record = out / "corpus.json"
    claim_folder(out, "synthesize_speech")
    made = read_json(record)
    if made and made != arguments:
        raise InputError(f"{out} holds a corpus made with {made}: choose another folder or delete this one")
    write_json(record, arguments)
    return not (out / "manifest.jsonl").exists()


def folder(word: str) -> Path:
    """The folder OUT; `output=OUT`, as other recipes take it, is a mistake."""
    key, _, value = word.partition("=")
    if key in ("out", "output") and value:
        raise argparse.ArgumentTypeError(f"give the folder alone, {value}, and options as --train 100")
    return Path(word)


def main() -> None:
    """Make the corpus, unless the folder already holds it."""
    style = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=style)
    parser.add_argument("out", type=folder, metavar="OUT", help="folder for the corpus; created if needed")
    for split, count in {"train": 4000, "dev": 200, "test": 200}.items():
        parser.add_argument(f"--{split}", type=argument(Count), default=count, help=f"utterances of the {split} split")
    parser.add_argument("--texts", type=Path, metavar="FILE", help="sentences of the train split, one a line")
    parser.add_argument("--seed", type=argument(Seed), default=0, help="of sentences, voices and speaking styles")
    parser.add_argument(
        "--jobs", type=argument(Count), default=2, help="number of processes; does not change the result"
    )
    args = parser.parse_args()
    if importlib.util.find_spec("espeakng_loader") is None:
        raise ImportError('the speech synthesiser is missing: pip install "speechllm[demo]"')
    arguments = {name: getattr(args, name) for name in (*VOICES, "seed")}
    own = read_sentences(args.texts)
    plan = make_plan(**arguments, own=own)
    if own:
        arguments["texts"] = hashlib.sha256("\n".join(own).encode()).hexdigest()[:16]
    if not prepare_folder(args.out, arguments):
        print(f"{args.out} already holds this corpus, complete: nothing to do")
        return
    lines = synthesize_all(args.out, plan, args.jobs)
    write_jsonl(args.out / "manifest.jsonl", lines)
    print(f"{len(lines)} utterances, {sum(line['duration_s'] for line in lines) / 3600:.2f} hours, in {args.out}")


if __name__ == "__main__":
    run_recipe(lambda _: main(), None)
