"""Draw what happens to one recording: speech, codes, the words a language model reads, the text it answers.

    python recipes/draw_pipeline.py model=RUN/model audio=FILE output=pipeline.svg

Everything in the picture is computed from the recording with a model of recipes/train_asr.py that reads codes. The SVG
has a white card behind it, so that it can be read on light and on dark pages.
"""

import colorsys
from dataclasses import dataclass
from html import escape

from speechllm.runs.config import parse_config

WIDTH, HEIGHT, LEFT, RIGHT = 980, 404, 206, 956  # of the card; where speech begins and ends
INK, PALE, LINE = "#1f2937", "#6b7280", "#cbd5e1"
COLOURS = 24
MEANINGS = ("content", "voice")  # of the first layers
SHOWN = 3  # words spelt out
LAYERS = 4  # at most
BOTTOM = 238  # of the cells; layer 0 is the lowest, beside its words


@dataclass
class DrawConfig:
    model: str  # folder of train_asr
    audio: str  # recording of a few seconds
    output: str  # SVG file; an existing one is not overwritten
    base: str | None = None  # another place of the language model under an adapter than the recorded one


if __name__ == "__main__":  # help and mistakes are answered before torch is loaded
    CONFIG = parse_config(DrawConfig)

import torch
from torch import Tensor

from speechllm import DiscreteTokenizer, load_audio, load_speech_llm, transcribe
from speechllm.runs.recipe import run_recipe
from tokenizer.claims import claim_file
from tokenizer.files import write_text


def main(config: DrawConfig) -> None:
    claim_file(config.output)
    speech_llm = load_speech_llm(config.model, base=config.base)
    codec = speech_llm.codec
    if not isinstance(codec, DiscreteTokenizer):
        raise SystemExit(f"{config.model} reads no codes: draw a model of a codec or of units")
    waveform = load_audio(config.audio, codec.sample_rate)
    with torch.no_grad():
        codes = codec.encode(waveform[None])
    ids = speech_llm.vocabulary.token_ids(codes.first(speech_llm.vocabulary.encoding.layers))
    frames = codes.ids.shape[2]
    places = speech_llm.vocabulary.arrangement(frames).argsort()[:frames].tolist()
    words = speech_llm.text_tokenizer.convert_ids_to_tokens(ids.tolist())
    name = speech_llm.model.config.model_type.capitalize()
    answer = transcribe([config.audio], speech_llm)[0]
    seconds = len(waveform) / codec.sample_rate
    parts = [
        f'<rect x="1" y="1" width="{WIDTH - 2}" height="{HEIGHT - 2}" rx="14" fill="#fff" stroke="{LINE}"/>',
        label(62, "speech", f"{seconds:.1f} s, {codec.sample_rate / 1000:g} kHz"),
        wave(waveform, 66, 42),
        label(172, "codes", f"{codec.frame_rate:g} frames/s"),
        *cells(codes.ids[0, :LAYERS], codec.codebook_size),
        label(294, "prompt", "with new words"),
        *prompt(words, codes.ids[0, 0], places, codec.codebook_size),
        label(358, "text", f"answer of {name}"),
        f'<path d="M{LEFT} 360h30m-8 -6l8 6l-8 6" fill="none" stroke="{PALE}" stroke-width="2"/>',
        text(LEFT + 46, 368, answer, 24, INK, 'font-weight="600"'),
    ]
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="system-ui, DejaVu Sans, sans-serif">'
    write_text(config.output, "\n".join([head, *parts, "</svg>"]) + "\n")
    print(f"{config.audio}: {answer}\n{config.output} drawn")


def text(x: float, y: float, words: str, size: float = 15, fill: str = INK, extra: str = "") -> str:
    shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in words)  # XML allows no others
    return f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" fill="{fill}" {extra}>{escape(shown)}</text>'


def label(y: float, name: str, below: str) -> str:
    return text(26, y, name, 17, INK, 'font-weight="600"') + text(26, y + 18, below, 12, PALE)


def wave(waveform: Tensor, middle: float, height: float) -> str:
    """The envelope, as a shape of two outlines."""
    columns = waveform[: len(waveform) // 360 * 360].view(360, -1)
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
    for layer, row in enumerate(ids.tolist()):
        height = 14 if layer else 26
        y = BOTTOM - 26 - 20 * layer
        by_colour: dict[str, list[str]] = {}
        for frame, code in enumerate(row):
            cell = f"M{LEFT + frame * width:.1f} {y}h{width - 0.6:.1f}v{height}h-{width - 0.6:.1f}z"
            by_colour.setdefault(colour(code, codes, 0.8 if layer else 0.62), []).append(cell)
        parts += [f'<path fill="{fill}" d="{"".join(drawn)}"/>' for fill, drawn in by_colour.items()]
        name = f"layer {layer}" + (f", {MEANINGS[layer]}" if layer < len(MEANINGS) else "")
        parts.append(text(LEFT - 8, y + height / 2 + 4, name, 11, PALE, 'text-anchor="end"'))
    return parts


def prompt(words: list[str], row: Tensor, places: list[int], codes: int) -> list[str]:
    """The prompt with some words from the middle in their colours, and lines from the cells they stand for.

    places: of the word of each frame's code in layer 0, behind the marker.
    """
    first = len(row) * 4 // 7
    spelt = range(first, min(first + SHOWN, len(row)))
    shown = [("Transcribe this speech", None), (words[0], None), ("…", None)]
    shown += [(words[1 + places[frame]], frame) for frame in spelt] + [("…", None), (words[-1], None)]
    parts, x, y = [], float(LEFT), 276
    cell = (RIGHT - LEFT) / len(row)
    for word, frame in shown:
        width = 12 + 6.35 * len(word)
        fill = "#f1f5f9"
        if frame is not None:
            start, middle, fill = LEFT + (frame + 0.5) * cell, x + width / 2, colour(int(row[frame]), codes, 0.82)
            curve = f"M{start:.1f} {BOTTOM}C{start:.1f} {BOTTOM + 22} {middle:.1f} {y - 22} {middle:.1f} {y}"
            parts.append(f'<path d="{curve}" fill="none" stroke="{PALE}"/>')
        if word != "…":
            parts.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="28" rx="6" fill="{fill}"/>')
        parts.append(text(x + width / 2, y + 18, word, 10.5, INK, 'text-anchor="middle" font-family="monospace"'))
        x += width + 6
    return parts


if __name__ == "__main__":
    run_recipe(main, CONFIG)
