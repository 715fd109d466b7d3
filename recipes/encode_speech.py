"""Encode a corpus once: Arrow shards of codes, texts and durations that carry the codec's fingerprint.

    python recipes/encode_speech.py codec=RUN/model data=CORPUS output=CODES
    speechllm run encode_speech --processes 8 ...    on 8 GPUs

The codec is any audio tokenizer: `features:NAME` stores continuous features (float16; 100 h of 768 dimensions at 50
frames/s are 28 GB), `recognizer:NAME` the texts of a recogniser.
Runs in several processes, resumes a killed run, and lists skipped recordings with the reason in CODES/skipped.jsonl.
Texts are stored as they are; train_asr and eval_asr normalise them. recipes/import_speech.py imports data sets of the
hub.
"""

from dataclasses import dataclass

from speechllm.runs.config import parse_config
from tokenizer.settings import Corpus, Count, Names, NonNegative, Positive, Settings

GPU_BATCH_S = 60.0  # seconds


@dataclass
class EncodeConfig(Settings):
    codec: str  # audio tokenizer, as `load_tokenizer` takes it: a codec's folder or hub name, features:NAME, ...
    data: Corpus  # corpus folder, or several as [A, B]: manifest.jsonl or LibriSpeech's layout
    output: str  # folder for the shards
    splits: Names | None = None  # all when null
    layers: Count | None = 1  # codebooks to store, all when null
    max_duration_s: Positive = 60.0  # longer recordings are skipped, and counted
    batch_s: NonNegative | None = None  # seconds to encode at a time; 0: one by one; null: 60 on a GPU, 0 on a CPU


if __name__ == "__main__":  # help and mistakes are answered before torch is loaded
    CONFIG = parse_config(EncodeConfig, shares_work=True)

from tqdm import tqdm

from speechllm import DataError, encode_shards, load_tokenizer, read_corpus
from speechllm.data.shards import claim_codes, skipped_of_shards, summarize_shards
from speechllm.runs.machine import make_accelerator
from speechllm.runs.recipe import run_recipe
from speechllm.runs.run import report_skipped
from tokenizer.corpus import require_most
from tokenizer.files import write_json
from tokenizer.utterances import spell_corpora


def main(config: EncodeConfig) -> None:
    accelerator = make_accelerator()
    if accelerator.is_main_process:
        claim_codes(config.output)
    accelerator.wait_for_everyone()
    codec = load_tokenizer(config.codec).to(accelerator.device)
    utterances = read_corpus(config.data, config.splits)
    usual_s = 0.0 if accelerator.device.type == "cpu" else GPU_BATCH_S
    shards = encode_shards(
        utterances,
        codec,
        config.output,
        layers=config.layers,
        max_duration_s=config.max_duration_s,
        process=accelerator.process_index,
        processes=accelerator.num_processes,
        batch_s=usual_s if config.batch_s is None else config.batch_s,
    )
    share = len(utterances) // accelerator.num_processes
    with tqdm(total=share, desc="encode", unit="utt", disable=not accelerator.is_main_process) as bar:
        for done in shards:
            bar.update(done)

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        summary, skipped = summarize_shards(config.output), skipped_of_shards(config.output)
        source = spell_corpora(config.data)
        report_skipped(config.output, skipped)
        if not summary["utterances"]:
            raise DataError(f"{source}: no recording can be used, all are skipped ({summary['skipped']})")
        gone = [row["path"] for row in skipped if row["reason"] in ("missing", "unreadable")]
        require_most(source, "recordings", gone, len(utterances))
        write_json(f"{config.output}/done.json", {**summary, "parameters": sum(p.numel() for p in codec.parameters())})
        print(f"encoded {summary['utterances']} utterances, {summary['hours']:.2f} h; skipped {summary['skipped']}")


if __name__ == "__main__":
    run_recipe(main, CONFIG)
