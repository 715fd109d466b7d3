"""Cut encoded speech at words: short examples, from which a language model learns to read codes, before sentences.

    python recipes/cut_speech.py codes=CODES letters=LETTERS/model output=RUN "splits=[train]"

LETTERS is a run of recipes/train_compressor.py on CODES, whose letters are aligned with the transcripts. RUN/codes
holds every utterance in pieces of 1 to `words` words, encoded as CODES are: train_asr reads it as it reads those.
Utterances that cannot be aligned are left out, and listed in RUN/skipped.jsonl. A killed run begins anew.
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


if __name__ == "__main__":  # help and mistakes are answered before torch is loaded
    CONFIG = parse_config(CutConfig)

from speechllm import DataError, load_codes
from speechllm.data.encoded import require_texts, transcribed
from speechllm.data.shards import skipped_of_shards, summarize_shards
from speechllm.data.spelling import cut_words
from speechllm.model import load_letters
from speechllm.runs.machine import make_accelerator, provenance
from speechllm.runs.recipe import claim_output, run_recipe
from speechllm.runs.run import report_skipped
from tokenizer.files import atomic_folder, write_json
from tokenizer.progress import progress_bar
from tokenizer.utterances import spell_corpora


def main(config: CutConfig) -> None:
    started = time.perf_counter()
    run = claim_output(config.output, config)
    require_texts(config.codes, config.normalizer)
    speech, encoding = load_codes(config.codes, config.splits)
    speech = transcribed(speech, normalizer=config.normalizer)
    if not len(speech):
        raise DataError(f"{spell_corpora(config.codes)}: no utterance has a transcript")
    compressor = load_letters(config.letters, speech.encoding).to(make_accelerator().device)
    with atomic_folder(run / "codes") as folder, progress_bar(None, "cut", total=len(speech), unit="utt") as bar:
        for done in cut_words(speech, compressor, config.words, folder, config.normalizer, config.seed):
            bar.update(done)
        summary = summarize_shards(folder)
        if not summary["utterances"]:
            raise DataError(f"{config.letters} aligns no transcript: normalise them as in its training (normalizer)")
    report_skipped(run, skipped_of_shards(run / "codes"))
    results = {"pieces": summary["utterances"], "hours": summary["hours"], "skipped": summary["skipped"]}
    fingerprints = {"codec_fingerprint": encoding.fingerprint, "letters_fingerprint": compressor.fingerprint}
    write_json(run / "results.json", results | fingerprints | provenance(config, time.perf_counter() - started))
    print(f"{results['pieces']} pieces, {results['hours']:.2f} h; skipped {results['skipped']}")


if __name__ == "__main__":
    run_recipe(main, CONFIG)
