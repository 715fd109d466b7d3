"""A page to speak into: the text as it comes, the tokens that the model read, and what the codec makes of it."""

from collections.abc import Iterator
from functools import partial
from html import escape
from typing import Any

import gradio as gr
import numpy as np
import torch
from torch import Tensor

from speechllm.confidence import word_confidences
from speechllm.encoding import Encoding
from speechllm.pauses import Cut, quietest
from speechllm.pieces import pieces
from speechllm.reports.sounds import Reconstruction, spectrograms_and_players
from speechllm.serving.engine import Engine
from tokenizer.audio import load_audio
from tokenizer.errors import InputError
from tokenizer.interface import Codec
from tokenizer.metrics.conversion import MATCHINGS, convert_voice
from tokenizer.metrics.quality import layer_counts, reconstruct
from tokenizer.settings import layer_numbers

SHOWN_S = 30.0  # of a recording, as tokens and as sound
SWEEP_S, KEPT_S = 3600, 86_400  # how often recordings and sounds are deleted, and how old they are: some are in use
GOLDEN_ANGLE = 137.508  # degrees between the hues of neighbouring codes
STYLE = """
.codes { line-height: 1.1; word-break: break-all } .codes span { display: inline-block; width: 0.55em; height: 1.3em }
.words span { padding: 0 0.15em; border-radius: 0.2em }
"""


def make_page(engines: dict[str, Engine], cut: Cut = quietest) -> gr.Blocks:
    """The page of one or several models by name; their answers to the same recording stand beside each other.

    cut: says where long recordings have pauses.
    """
    with gr.Blocks(title="speechllm", analytics_enabled=False, delete_cache=(SWEEP_S, KEPT_S)) as page:
        gr.Markdown(f"# {' and '.join(engines)}\nSpeak, or drop a recording. Everything stays on this machine.")
        with gr.Tab("Transcribe"):
            _transcribe_tab(engines, cut)
        decoders = {name: engine for name, engine in engines.items() if isinstance(engine.codec, Codec)}
        if decoders:
            with gr.Tab("Change the voice"):
                _convert_tab(decoders)
    return page


def launch(page: gr.Blocks, host: str, port: int | None, wait: bool = True) -> tuple[Any, str, str]:
    """Serve the page, without fonts from elsewhere; `wait`: until Ctrl-C. Its second result is the address."""
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    return page.launch(
        server_name=host, server_port=port, theme=theme, css=STYLE, prevent_thread_lock=not wait, footer_links=[]
    )


def _recording(label: str) -> gr.Audio:
    return gr.Audio(label=label, sources=["microphone", "upload"], type="filepath")


def _transcribe_tab(engines: dict[str, Engine], cut: Cut) -> None:
    sound = _recording("Recording")
    start = gr.Button("Transcribe", variant="primary")
    for name, engine in engines.items():
        with gr.Column():
            if len(engines) > 1:
                gr.Markdown(f"### {name}")
            text = gr.Textbox(label="Text", lines=2)
            words, codes, sounds = gr.HTML(label="Words"), gr.HTML(label="Tokens"), gr.HTML(label="Reconstruction")
        outputs = [text, words, codes, sounds]
        gr.on(
            [start.click, sound.input],
            _answer(engine, cut),
            [sound],
            outputs,
            api_name=f"transcribe_{name}",
            trigger_mode="always_last",  # not Gradio's "once": a recording that comes during an answer is answered next
        )


def _answer(engine: Engine, cut: Cut) -> Any:
    def answer(path: str | None) -> Iterator[tuple[str, str, str, str]]:
        """Text so far, its words by confidence, tokens, and reconstruction, as each of them comes."""
        if path is None:  # taken away
            yield "", "", "", ""
            return
        try:
            yield from heard(engine, path, cut)
        except InputError as error:
            raise gr.Error(str(error).replace(path, "the recording")) from error

    return answer


def heard(engine: Engine, path: str, cut: Cut) -> Iterator[tuple[str, str, str, str]]:
    """Text, words, tokens and reconstruction of a recording, again and again with more of it."""
    texts: list[str] = []
    words, tokens, encoding = "", "", engine.speech_llm.vocabulary.encoding
    beginning: Tensor | None = None
    for piece in pieces(path, engine.codec.sample_rate, SHOWN_S, cut=cut):
        speech = engine.call(partial(encoding.encode, engine.codec, piece.waveform)).result()
        if beginning is None:
            beginning = piece.waveform
            if encoding.kind == "codes" and isinstance(speech, Tensor):
                tokens = coloured_codes(speech, encoding, piece.duration_s)
            yield "", "", tokens, ""
        text = engine.recognize(speech, piece.duration_s).result().text
        texts.append(text)
        sure = engine.call(partial(word_confidences, speech, text, engine.speech_llm)).result()
        words += coloured_words(sure)
        yield " ".join(filter(None, texts)), words, tokens, ""
    codec = engine.codec
    if isinstance(codec, Codec) and beginning is not None:
        counts = layer_counts(codec)
        decoded = engine.call(lambda: reconstruct(codec, beginning, counts)).result()
        waves = {count: wave.numpy() for count, wave in decoded.items()}
        sounds = spectrograms_and_players(Reconstruction("recording", codec.sample_rate, beginning.numpy(), waves))
        yield " ".join(filter(None, texts)), words, tokens, sounds


def coloured_codes(codes: Tensor, encoding: Encoding, duration_s: float) -> str:
    """HTML: a stripe a token in the colour of its code, long [Q, T], that tells its time, if it has one, and code."""
    rows, tokens, timed = [], codes.shape[1], not encoding.deduplicated
    rate = encoding.frame_rate if timed else round(tokens / duration_s, 1)
    times = [f"{i / rate:.2f} s: " if timed else "" for i in range(tokens)]
    for layer, row in enumerate(codes.tolist()):
        stripes = "".join(
            f'<span title="{time}{code}" style="background: {_colour(code)}"></span>'
            for time, code in zip(times, row, strict=True)
        )
        rows.append(f"<p>Layer {layer}: {tokens} tokens, {rate:g} a second</p><div class=codes>{stripes}</div>")
    return "".join(rows)


def _colour(code: int) -> str:
    return f"hsl({code * GOLDEN_ANGLE % 360:.0f} 65% 55%)"


def coloured_words(words: list[tuple[str, float]]) -> str:
    """HTML: words, the paler the less probable, with their probability."""
    spans = (
        f'<span title="{share:.0%}" style="background: hsl(140 60% 45% / {share:.2f})">{escape(word)}</span>'
        for word, share in words
    )
    return f"<p class=words>{' '.join(spans)}</p>"


def _convert_tab(engines: dict[str, Engine]) -> None:
    source, target = _recording("What is said"), _recording("In this voice")
    layers = gr.Textbox("1", label="Layers taken from the voice (the first is 0; 1 is the paper's)")
    matching = gr.Radio(
        list(MATCHINGS), value="position", label="The frame at the same position, of the nearest content, or the mean"
    )
    for name, engine in engines.items():
        start = gr.Button(f"Convert with {name}" if len(engines) > 1 else "Convert", variant="primary")
        result = gr.Audio(label="Result", interactive=False)
        start.click(_converted(engine), [source, target, layers, matching], result, api_name=f"convert_{name}")


def _converted(engine: Engine) -> Any:
    def convert(source: str | None, target: str | None, layers: str, matching: str) -> tuple[int, np.ndarray]:
        """The source in the voice of the target: rate and 16-bit samples."""
        codec = engine.codec
        assert isinstance(codec, Codec)
        if source is None or target is None:
            raise gr.Error("give two recordings: what is said, and the voice")
        try:
            taken = layer_numbers(layers)
            said, voice = (load_audio(path, codec.sample_rate, max_duration_s=SHOWN_S) for path in (source, target))
            sound = engine.call(lambda: convert_voice(codec, said, voice, taken, matching)).result()
        except InputError as error:
            raise gr.Error(str(error).replace(source, "what is said").replace(target, "the voice")) from error
        return codec.sample_rate, (sound.clamp(-1, 1) * torch.iinfo(torch.int16).max).short().numpy()

    return convert
