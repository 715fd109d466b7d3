"""Draw what happens to one recording: speech, codes, the words a language model reads, the text it answers.

    python recipes/draw_pipeline.py model=RUN/model audio=FILE output=pipeline.svg

Everything in the picture is computed from the recording with a model of recipes/train_asr.py that reads codes. The SVG
has a white card behind it, so that it can be read on light and on dark pages.
"""

import colorsys
from dataclasses import dataclass
from html import escape
from pathlib import Path

import torch
from torch import Tensor

from speechllm import DiscreteTokenizer, load_audio, load_speech_llm, transcribe
from speechllm.runs.recipe import run_recipe
from tokenizer.files import write_text

WIDTH, HEIGHT, LEFT, RIGHT = 960, 470, 150, 930  # of the card; where speech begins and ends
INK, PALE, LINE = "#1f2937", "#6b7280", "#d1d5db"
COLOURS = 24
MEANINGS = ("content", "voice")  # of the first layers
SHOWN = 5  # words spelt out


@dataclass
class DrawConfig:
    model: str  # folder of train_asr
    audio: str  # recording of a few seconds
    output: str  # SVG file
    base: str | None = None  # another place of the language model under an adapter than the recorded one


def main(config: DrawConfig) -> None:
    speech_llm = load_speech_llm(config.model, base=config.base)
    codec = speech_llm.codec
    if not isinstance(codec, DiscreteTokenizer):
        raise SystemExit(f"{config.model} reads no codes: draw a model of a codec or of units")
    waveform = load_audio(config.audio, codec.sample_rate)
    with torch.no_grad():
        codes = codec.encode(waveform[None])
    read = speech_llm.vocabulary.token_ids(
        codes.first(speech_llm.vocabulary.encoding.layers), speech_llm.text_tokenizer
    )
    words = speech_llm.text_tokenizer.convert_ids_to_tokens(read.tolist())
    answer = transcribe([config.audio], speech_llm, fallback=True)[0]
    seconds = len(waveform) / codec.sample_rate
    parts = [
        f'<rect x="1" y="1" width="{WIDTH - 2}" height="{HEIGHT - 2}" rx="14" fill="#fff" stroke="{LINE}"/>',
        label(72, "speech", f"{seconds:.1f} s, {codec.sample_rate / 1000:g} kHz"),
        wave(waveform, 72, 42),
        label(168, "codes", f"{codec.frame_rate:g} frames/s"),
        *cells(codes.ids[0], codec.codebook_size),
        label(298, "new words", "of the vocabulary"),
        *spelt(words, codes.ids[0, 0], codec.codebook_size),
        label(398, "Qwen2", "answers"),
        *dialogue(answer),
    ]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="system-ui, sans-serif">'
    )
    write_text(config.output, "\n".join([head, *parts, "</svg>"]) + "\n")
    print(f"{Path(config.audio).name}: {' '.join(words[: SHOWN + 1])} ... -> {answer}")


def text(x: float, y: float, words: str, size: int = 15, fill: str = INK, extra: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{fill}" {extra}>{escape(words)}</text>'


def label(y: float, name: str, below: str) -> str:
    return text(28, y, name, 17, INK, 'font-weight="600"') + text(28, y + 18, below, 12, PALE)


def wave(waveform: Tensor, middle: float, height: float) -> str:
    """The envelope, as a shape of two outlines."""
    columns = waveform[: len(waveform) // 390 * 390].view(390, -1)
    high, low = (columns.amax(1), columns.amin(1))
    scale = height / float(waveform.abs().max())
    step = (RIGHT - LEFT) / len(columns)
    top = [f"{LEFT + i * step:g},{middle - scale * float(y):.1f}" for i, y in enumerate(high)]
    bottom = [f"{LEFT + i * step:g},{middle - scale * float(y):.1f}" for i, y in enumerate(low)]
    return f'<polygon points="{" ".join(top + bottom[::-1])}" fill="#64748b"/>'


def colour(code: int, codes: int, lightness: float = 0.62) -> str:
    red, green, blue = colorsys.hls_to_rgb(code * COLOURS // codes / COLOURS, lightness, 0.6)
    return f"#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}"


def cells(ids: Tensor, codes: int) -> list[str]:
    """A strip for each layer of ids long [Q, T], one coloured cell a frame; those of one colour are one path."""
    parts, width = [], (RIGHT - LEFT) / ids.shape[1]
    for layer, row in enumerate(ids[:4].tolist()):
        y, height = (148, 28) if layer == 0 else (160 + 20 * layer, 14)
        by_colour: dict[str, list[str]] = {}
        for frame, code in enumerate(row):
            cell = f"M{LEFT + frame * width:.1f} {y}h{width - 0.6:.1f}v{height}h-{width - 0.6:.1f}z"
            by_colour.setdefault(colour(code, codes, 0.62 if layer == 0 else 0.8), []).append(cell)
        parts += [f'<path fill="{fill}" d="{"".join(drawn)}"/>' for fill, drawn in by_colour.items()]
        name = f"layer {layer}" + (f": {MEANINGS[layer]}" if layer < len(MEANINGS) else "")
        parts.append(text(RIGHT, y + height - 3.5, name, 11, INK, 'text-anchor="end" ' + HALO))
    return parts


HALO = 'paint-order="stroke" stroke="#fff" stroke-width="4"'


def spelt(words: list[str], row: Tensor, codes: int) -> list[str]:
    """Markers and the first words in their colours, with lines to the cells they stand for."""
    shown = [*words[: SHOWN + 1], "…", words[-1]]
    parts, x, y = [], float(LEFT), 284
    cell = (RIGHT - LEFT) / len(row)
    for number, word in enumerate(shown):
        width = 14 + 6.7 * len(word)
        plain = not 1 <= number <= SHOWN
        if not plain:
            start, middle = LEFT + (number - 0.5) * cell, x + width / 2
            parts.append(
                f'<path d="M{start:g} 176C{start:g} 240 {middle:g} 236 {middle:g} {y}" fill="none" stroke="{LINE}"/>'
            )
        fill = "#f3f4f6" if plain else colour(int(row[number - 1]), codes, 0.82)
        if word != "…":
            parts.append(f'<rect x="{x:g}" y="{y}" width="{width:g}" height="26" rx="6" fill="{fill}"/>')
        parts.append(text(x + width / 2, y + 17, word, 11, INK, 'text-anchor="middle" font-family="monospace"'))
        x += width + 8
    return parts


def dialogue(answer: str) -> list[str]:
    """The prompt and what is answered."""
    return [
        f'<rect x="{LEFT}" y="372" width="236" height="50" rx="10" fill="{INK}"/>',
        text(LEFT + 118, 402, "Transcribe this speech …", 15, "#fff", 'text-anchor="middle"'),
        f'<path d="M{LEFT + 250} 397h34m-8 -6l8 6l-8 6" fill="none" stroke="{PALE}" stroke-width="2"/>',
        text(LEFT + 300, 403, answer, 19, INK, 'font-weight="600"'),
    ]


if __name__ == "__main__":
    run_recipe(main, DrawConfig)
