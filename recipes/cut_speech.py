"""Cut encoded speech at words: short examples, from which a language model learns to read codes, before sentences.

    python recipes/cut_speech.py codes=CODES letters=LETTERS/model output=RUN "splits=[train]"

LETTERS is a run of recipes/train_compressor.py on CODES, whose letters are aligned with the transcripts. RUN/codes
holds every utterance in pieces of 1 to `words` words, encoded as CODES are: train_asr reads it as it reads those.
Utterances that cannot be aligned are left out, and listed in RUN/skipped.jsonl.
"""

import time
from dataclasses import dataclass
from typing import Literal

from speechllm.runs.config import parse_config
from tokenizer.settings import Corpus, Count, Names, Seed, Settings


@dataclass
class CutConfig(Settings):
    codes: Corpus  # folder of encode_speech, or several as [A, B]
    letters: str  # compressor that was trained on them
    output: str  # run folder; the pieces go to its subfolder `codes`
    splits: Names | None = None  # all when null
    normalizer: Literal["librispeech", "whisper_english", "none"] = "librispeech"  # of the transcripts, as in training
    words: Count = 3  # of a piece, at most
    seed: Seed = 0  # of the numbers of words


REASON = "other letters than those of the compressor, or more than there are frames"

if __name__ == "__main__":  # help and mistakes are answered before torch is loaded
    CONFIG = parse_config(CutConfig)

from speechllm import DataError, load_codes
from speechllm.data.encoded import require_texts, transcribed
from speechllm.data.spelling import cut_words, load_letters
from speechllm.runs.machine import provenance
from speechllm.runs.recipe import claim_output, run_recipe
from speechllm.runs.run import report_skipped
from tokenizer.files import atomic_folder, write_json
from tokenizer.utterances import spell_corpora


def main(config: CutConfig) -> None:
    started = time.perf_counter()
    run = claim_output(config.output, config)
    require_texts(config.codes, config.normalizer)
    speech, _ = load_codes(config.codes, config.splits)
    speech = transcribed(speech, normalizer=config.normalizer)
    if not len(speech):
        raise DataError(f"{spell_corpora(config.codes)}: no utterance has a transcript")
    compressor = load_letters(config.letters, speech)
    with atomic_folder(run / "codes") as folder:
        pieces, left_out = cut_words(speech, compressor, config.words, folder, config.seed)
        if not pieces:
            raise DataError(f"{config.letters} aligns no transcript: normalise them as in its training (normalizer)")
    report_skipped(run, [{"id": name, "reason": REASON, "detail": f"{name}: {REASON}"} for name in left_out])
    cut = len(speech) - len(left_out)
    results = {"utterances": cut, "pieces": pieces, "skipped": {REASON: len(left_out)} if left_out else {}}
    write_json(run / "results.json", results | provenance(config, time.perf_counter() - started))
    print(f"{cut} utterances in {pieces} pieces; {len(left_out)} could not be aligned")


if __name__ == "__main__":
    run_recipe(main, CONFIG)
