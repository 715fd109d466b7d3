"""Fine-tune a language model to transcribe: audio tokens in, text out.

    accelerate launch recipes/train_asr.py --config configs/asr/qwen2-1.5b.yaml codes=CODES codec=CODEC output=RUN

Extends the vocabulary with the codec's codes, then learns "Transcribe this speech" on utterances encoded by
recipes/encode_speech.py. A killed run started again with the same words goes on from its newest checkpoint and ends
as if never interrupted. The model lands in RUN/model, with its text tokenizer, audio vocabulary and codec.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Literal

import torch
from accelerate.utils import set_seed
from transformers import AutoModelForCausalLM, AutoTokenizer

from speechllm import (
    DataError,
    Encoding,
    Example,
    LabelledLoss,
    Run,
    SpeechCodec,
    SpeechLLM,
    codes_of,
    collate,
    describe_rows,
    endless_batches,
    extend_vocabulary,
    load_codes,
    make_accelerator,
    run_recipe,
    seed_step,
    set_learning_rate,
    small_qwen2,
    small_text_tokenizer,
    substitute_neighbours,
    text_example,
    transcribe_codes,
    transcription_example,
    warmup_cosine,
    whole_folder,
    word_error_rate,
)


@dataclass
class SmallModelConfig:
    """A Qwen2 with random weights and a text tokenizer learnt from the transcripts."""

    text_tokens: int = 400  # byte-level BPE vocabulary
    text_steps: int = 50  # first steps, on sentences without audio: the model must learn its language too
    hidden_size: int = 192
    intermediate_size: int = 512
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2


@dataclass
class AsrConfig:
    codes: str  # folder of encode_speech
    codec: str  # the codec the codes were made with: folder or hub name
    output: str  # run folder; the model goes to its subfolder `model`
    model: str | None = "Qwen/Qwen2-1.5B"  # language model, folder or hub name; null: a small one made here
    small: SmallModelConfig = field(default_factory=SmallModelConfig)  # its shape, used when model is null
    splits: list[str] | None = None  # training splits, all when null
    dev_splits: list[str] | None = None  # for the WER while training, none when null
    layers: int = 1  # codebooks the model reads; 1 is 50 tokens/s
    init: Literal["codebook", "mean", "random"] = "codebook"  # of the new rows
    substitute: float = 0.0  # share of codes replaced by close ones in training, against dependence on voices
    steps: int = 10_000
    batch_size: int = 32  # utterances per optimizer step, over all processes
    accumulate: int = 1  # parts a process cuts its share into, to save memory
    learning_rate: float = 5e-5
    weight_decay: float = 0.01
    warmup: int = 500  # steps
    clip: float = 1.0  # largest gradient norm
    precision: Literal["no", "bf16"] = "bf16"
    validate_every: int = 1000  # steps
    dev_utterances: int = 100  # at most, for the WER while training
    log_every: int = 10  # steps
    save_every: int = 1000  # steps between checkpoints
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = ("steps", "batch_size", "accumulate", "warmup", "validate_every", "log_every", "save_every", "layers")
        if problems := [f"{name} must be at least 1" for name in sizes if getattr(self, name) < 1]:
            raise ValueError("; ".join(problems))
        if not 0 <= self.substitute < 1:
            raise ValueError(f"substitute must be at least 0 and below 1, got {self.substitute}")


def main(config: AsrConfig) -> None:
    accelerator = make_accelerator(config.precision)

    # 1. encoded speech of one codec, and that codec
    train, encoding = load_codes(config.codes, config.splits)
    train = train.filter(lambda text: bool(text), input_columns="text")
    if min(len(train), config.batch_size) < accelerator.num_processes:
        raise DataError(
            f"{len(train)} utterances with transcripts, {config.batch_size} a batch: "
            f"each of {accelerator.num_processes} processes needs one at least"
        )
    dev = load_codes(config.codes, config.dev_splits)[0].select_columns(["text", "codes"]) if config.dev_splits else []
    dev = [row for row in dev if row["text"]][: config.dev_utterances]
    codec = SpeechCodec.from_pretrained(config.codec)
    encoding.require(codec.fingerprint, config.codec)
    run = Run(config.output, config, accelerator)
    if run.summary:
        accelerator.print(f"{config.output} is finished: {run.summary}")
        return
    set_seed(config.seed)

    # 2. a language model whose vocabulary the codes extend
    if config.model is None:
        text_tokenizer = small_text_tokenizer(train["text"], config.small.text_tokens)
        shape = {name: size for name, size in asdict(config.small).items() if not name.startswith("text_")}
        model = small_qwen2(text_tokenizer, **shape)
    else:
        text_tokenizer = AutoTokenizer.from_pretrained(config.model)
        model = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32)
    vocabulary = extend_vocabulary(model, text_tokenizer, codec, config.layers, config.init, config.seed)
    vocabulary.require(encoding)
    speech_llm = SpeechLLM(model, text_tokenizer, vocabulary, codec)
    examples = [
        transcription_example(codes_of(row, encoding), row["text"], vocabulary, text_tokenizer) for row in train
    ]
    sentences = [text_example(text, text_tokenizer) for text in train["text"]] if config.model is None else []
    neighbours = vocabulary.neighbours(codec.codebooks) if config.substitute else None
    accelerator.print(plan(config, examples, speech_llm))

    # 3. go on where a killed run stopped
    optimizer = torch.optim.AdamW(
        model.parameters(), config.learning_rate, betas=(0.9, 0.95), weight_decay=config.weight_decay
    )
    loss_of = accelerator.prepare(LabelledLoss(model))
    start = 0
    if state := run.resume():
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]

    # 4. train. The loss of a step is the mean over all labels of the whole batch, however it is cut into processes
    # and parts: each part's sum is divided by the global count, times the processes whose gradients get averaged
    text_steps = config.small.text_steps if sentences else 0
    text_batches = batches(sentences, config, start)
    audio_batches = batches(examples, config, max(start, text_steps))
    model.train()
    for step in (bar := run.steps(start, config.steps, "asr")):
        seed_step(config.seed, step, accelerator.process_index)
        set_learning_rate(optimizer, warmup_cosine(step, config.steps, config.warmup))
        batch = next(text_batches if step < text_steps else audio_batches)
        count = sum(int((example.labels[1:] >= 0).sum()) for example in batch)
        share = batch[accelerator.process_index :: accelerator.num_processes]
        parts = [share[i :: config.accumulate] for i in range(config.accumulate) if share[i :: config.accumulate]]
        total = torch.zeros((), device=accelerator.device)
        optimizer.zero_grad()
        for i, part in enumerate(parts):
            tensors = collate(part, text_tokenizer.pad_token_id)
            if neighbours is not None:
                tensors["input_ids"] = substitute_neighbours(tensors["input_ids"], neighbours, config.substitute)
            with accelerator.no_sync(loss_of) if i + 1 < len(parts) else nullcontext():
                loss = loss_of(**{name: x.to(accelerator.device) for name, x in tensors.items()}) / count
                accelerator.backward(loss * accelerator.num_processes)
            total += loss.detach()
        accelerator.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()

        # 5. say how it goes, and leave a place to resume from
        done = step + 1
        if done % config.log_every == 0 or done == config.steps:
            mean = float(accelerator.reduce(total))
            run.log(done, loss=mean, lr=optimizer.param_groups[0]["lr"], tokens=sum(map(len, batch)))
            bar.set_postfix(loss=f"{mean:.3f}")
        if dev and run.main and (done % config.validate_every == 0 or done == config.steps):
            run.log(done, dev_wer=dev_wer(dev, encoding, speech_llm))
        if done % config.save_every == 0 and done < config.steps:
            run.save(done, {"model": model.state_dict(), "optimizer": optimizer.state_dict()})

    # 6. export
    model.eval()
    if run.main:
        with whole_folder(run.folder / "model") as folder:
            speech_llm.save(folder)
        run.finish({"steps": config.steps, "loss": mean, "codec_fingerprint": codec.fingerprint})
        print(f"speech language model saved in {run.folder / 'model'}")
    accelerator.wait_for_everyone()


def batches(examples: list[Example], config: AsrConfig, start: int) -> Iterator[list[Example]]:
    """The examples of one optimizer step after the other, the same in every process and after every resume."""
    for indices in endless_batches(list(map(len, examples)), config.batch_size, config.seed, start):
        yield [examples[i] for i in indices]


def dev_wer(dev: list[dict[str, object]], encoding: Encoding, speech_llm: SpeechLLM) -> float:
    """WER on a few unseen utterances, for the curve."""
    hypotheses = transcribe_codes([codes_of(row, encoding) for row in dev], speech_llm, batch_size=50)
    return word_error_rate([row["text"] for row in dev], hypotheses).wer


def plan(config: AsrConfig, examples: list[Example], speech_llm: SpeechLLM) -> str:
    """What is about to happen, in three lines."""
    tokens = sum(map(len, examples))
    labels = sum(int((example.labels >= 0).sum()) for example in examples)
    rows = describe_rows(speech_llm.model, speech_llm.vocabulary)
    passes = config.steps * config.batch_size / len(examples)
    return (
        f"asr: {len(examples)} utterances, {tokens:,} tokens of which {labels:,} are learnt; "
        f"{config.steps} steps of {config.batch_size} utterances ({passes:.1f} passes)\n"
        f"model: {speech_llm.model.num_parameters() / 1e6:.1f} M parameters, {len(speech_llm.vocabulary.new_ids)} new "
        f"rows from id {speech_llm.vocabulary.offset} ({config.init})\n"
        f"rows: norm {rows['text_row_norm']:.3f} of text, {rows['new_row_norm']:.3f} of new; "
        f"mean cosine between new rows {rows['new_row_cosine']:.3f}"
    )


if __name__ == "__main__":
    run_recipe(main, AsrConfig)
