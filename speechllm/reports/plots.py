"""Figures drawn with matplotlib: as HTML with the embedded image, or as figures to save."""

import base64
import io
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from html import escape
from numbers import Real
from pathlib import Path
from typing import Any, Literal

import numpy as np

from speechllm.reports.html import grid
from tokenizer.errors import InputError
from tokenizer.files import atomic_file

LAYER = re.compile(r"_(\d+)$")  # suffix of a quantity's name


def curves(log: Sequence[Mapping[str, object]]) -> str:
    """HTML: one small plot per logged quantity, by step; empty if the log has no finite number.

    Training values are drawn as a line, validation values of the same quantity, named dev_<quantity>, as points. The
    quantities <name>_0, <name>_1, ... belong to layers and share a plot.
    """
    panels: dict[str, dict[str, np.ndarray]] = {}
    for key, points in _series(log).items():
        panels.setdefault(LAYER.sub("", key.removeprefix("dev_")), {})[key] = points
    if not panels:
        return ""
    pictures = "".join(_curve(name, series) for name, series in panels.items())
    caption = "Line: training by step, in long logs with a running median (dark). Points: validation (dev)."
    return f"<figure>{grid(pictures, 260)}<figcaption>{caption}</figcaption></figure>"


def error_rates(durations: np.ndarray, errors: np.ndarray, words: np.ndarray, rate: str = "WER") -> str:
    """HTML: error rate by duration; float [M]: durations in s in ascending order, errors, reference words.

    rate: WER, or CER, for which words are characters.
    """
    groups = np.array_split(np.arange(len(durations)), min(8, max(1, len(durations) // 10)))
    rates = [100 * errors[group].sum() / words[group].sum() for group in groups]
    top = max(100, 1.2 * max(rates))  # a runaway answer must not compress the scale
    figure, (axis,) = _panels(1, 1, 3.2)
    points = np.minimum(100 * errors / words, top)
    axis.plot(durations, points, "o", color="#1f5f99", alpha=0.25, markersize=5, markeredgewidth=0)
    axis.plot([durations[group].mean() for group in groups], rates, "o-", color="#c4540a")
    axis.set(xlabel="duration (s)", ylabel=f"{rate} (%)", ylim=(-0.03 * top, 1.03 * top))
    axis.grid(alpha=0.25)
    caption = (
        "Points: utterances; those beyond the upper edge are drawn there. Line: error rates over all utterances of "
        f"{len(groups)} equally large groups of utterances, from short to long."
    )
    return _image(figure, f"{'Character' if rate == 'CER' else 'Word'} error rate by duration", caption)


def by_system(measures: Mapping[str, Sequence[float]], label: str) -> str:
    """HTML: a measure of several systems, one per row, by value and bounds of the interval."""
    figure, (axis,) = _panels(1, 1, 0.8 + 0.28 * len(measures))
    for place, (value, low, high) in enumerate(measures.values()):
        bounds = [[max(value - low, 0)], [max(high - value, 0)]]
        axis.errorbar(value, place, xerr=bounds, fmt="o", color="#1f5f99", markersize=5, capsize=3)
    axis.set_yticks(range(len(measures)), measures)
    axis.set(xlabel=label, ylim=(len(measures) - 0.5, -0.5))
    axis.grid(alpha=0.25, axis="x")
    return _image(figure, f"{label} by system", "Bars: 95 % intervals.")


def against_bitrate(series: Mapping[str, np.ndarray], without: Mapping[str, float], label: str) -> str:
    """HTML: a measure by bitrate with one line per system; empty without any point.

    series: float [points, 4] of kbit/s, value and bounds of the interval; without: values without a bitrate.
    """
    from matplotlib import colormaps

    if not series:
        return ""
    figure, (axis,) = _panels(1, 1, 3.6)
    colours = [colormaps["tab10"](i) for i in range(10)]
    for index, (name, points) in enumerate(series.items()):
        rate, value, low, high = points[points[:, 0].argsort()].T
        bounds = np.maximum([value - low, high - value], 0)
        axis.errorbar(rate, value, bounds, fmt="o-", color=colours[index % 10], markersize=4, capsize=2, label=name)
    for index, (name, value) in enumerate(without.items(), len(series)):
        axis.axhline(value, color=colours[index % 10], linestyle="--", lw=1.2, label=f"{name} (no codes)")
    axis.set(xscale="log", xlabel="kbit/s", ylabel=label)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("{x:g}")
    axis.tick_params(axis="x", which="minor", labelsize=7)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8, frameon=False)
    return _image(figure, f"{label} by bitrate", "Bars: 95 % intervals.")


def code_usage(counts: Sequence[np.ndarray]) -> str:
    """`code_usage_figure` as HTML."""
    caption = "Codes sorted by use. A line that ends before the codebook size K shows that the other codes are dead."
    return _image(code_usage_figure(counts), "Sorted code usage per layer", caption)


def code_usage_figure(counts: Sequence[np.ndarray]) -> Any:
    """Share of tokens per used code, most used first; counts: how often each code is used, int [K] per layer."""
    figure, (axis,) = _panels(1, 1, 3.2)
    for index, layer in enumerate(counts):
        shares = np.sort(layer[layer > 0])[::-1] / max(layer.sum(), 1)
        colour = _layer_colour(index, len(counts))
        style = "-" if len(shares) > 1 else "o"  # a line needs two points
        axis.plot(np.arange(1, len(shares) + 1), shares, style, color=colour, lw=1.5, label=f"layer {index}")
    axis.set(yscale="log", xlabel="code, most used first", ylabel="share of tokens")
    axis.set_xlim(0, 1.01 * max(map(len, counts)))
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8, frameon=False, ncols=2)
    return figure


def confusion_matrix(counts: Sequence[Sequence[int]], classes: Sequence[str]) -> str:
    """`confusion_figure` as HTML."""
    caption = "Number of utterances by true class (row) and answer (column); the colour shows the share of the row."
    return _image(confusion_figure(counts, classes), "Confusion matrix", caption)


def confusion_figure(counts: Sequence[Sequence[int]], classes: Sequence[str]) -> Any:
    """Counts int [classes, classes] of answers (columns) by true class (rows), with the row's shares in colour."""
    figure, (axis,) = _panels(1, 1, 1.2 + 0.7 * len(classes), width=2.2 + 0.9 * len(classes))
    table = np.asarray(counts)
    shares = table / np.maximum(table.sum(1, keepdims=True), 1)
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (row, column), count in np.ndenumerate(table):
        share = shares[row, column]
        text = f"{count}\n{share:.0%}"
        axis.text(column, row, text, ha="center", va="center", fontsize=9, color="white" if share > 0.6 else "black")
    axis.set_xticks(range(len(classes)), classes)
    axis.set_yticks(range(len(classes)), classes)
    axis.set(xlabel="answer", ylabel="class")
    figure.colorbar(image, ax=axis, label="share of the row", format="{x:.0%}")
    return figure


def spectrograms(sounds: Mapping[str, np.ndarray], sample_rate: int, caption: str) -> str:
    """`spectrogram_figure` as HTML; the caption is HTML, too."""
    scale = "All panels have the same scale, in dB relative to the maximum of the original."
    figure = spectrogram_figure(sounds, sample_rate)
    return _image(figure, "Spectrograms: " + ", ".join(sounds), f"{caption} {scale}", dpi=100)


def spectrogram_figure(sounds: Mapping[str, np.ndarray], sample_rate: int) -> Any:
    """Log-spectrograms of float [N], one per row, on the scale of the one named `original`."""
    from matplotlib import colormaps

    figure, axes = _panels(len(sounds), 1, 0.5 + 1.6 * len(sounds), sharex=True, sharey=True)
    colours = colormaps["magma"].resampled(32)  # steps of 2.5 dB: halves the size of the PNG
    style = {"origin": "lower", "aspect": "auto", "cmap": colours, "interpolation_stage": "data"}
    loudest = max(_power(sounds["original"], sample_rate).max(), 1e-10)
    for axis, (name, waveform) in zip(axes, sounds.items(), strict=True):
        level = 10 * np.log10(np.maximum(_power(waveform, sample_rate) / loudest, 1e-10))
        extent = (0, len(waveform) / sample_rate, 0, sample_rate / 2000)
        image = axis.imshow(level, extent=extent, vmin=-80, vmax=0, **style)
        axis.set_title(name, fontsize=9, loc="left")
        axis.set_ylabel("kHz", fontsize=8)
    axes[-1].set_xlabel("time (s)", fontsize=8)
    figure.colorbar(image, ax=axes, label="dB", fraction=0.025, pad=0.01)
    return figure


def cost_figure(lines: Mapping[str, np.ndarray]) -> Any:
    """Time against the amount of speech: float [points, 2] of seconds by name; dotted: in proportion to the last."""
    figure, (axis,) = _panels(1, 1, 3.6, 6.5)
    for name, points in lines.items():
        speech_s, took_s = points.T
        (line,) = axis.loglog(speech_s, took_s, "o-", markersize=4, label=name)
        axis.loglog(speech_s, took_s[-1] * speech_s / speech_s[-1], ":", lw=1, color=line.get_color())
    axis.set(xlabel="speech (s)", ylabel="time (s)")
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8, frameon=False)
    return figure


def scaling_figure(
    curves: Mapping[str, np.ndarray], label: str, until: float, rate: str, laws: Collection[str] | None = None
) -> Any:
    """An error rate, WER or CER, on logarithmic axes.

    curves: float [points, 4] of place, value and the bounds of its interval by name.
    Dotted: the `power_law` of each, up to `until`, or of those named by `laws` alone.
    """
    from matplotlib.ticker import LogLocator, NullLocator

    figure, (axis,) = _panels(1, 1, 3.6, 6.5)
    for name, points in curves.items():
        at, value, low, high = points.T
        bounds = 100 * np.maximum([value - low, high - value], 0)
        (line, *_) = axis.errorbar(at, 100 * value, bounds, fmt="o-", markersize=4, capsize=2, label=name)
        if (laws is None or name in laws) and (law := power_law(points)):
            ends = np.array([at.min(), until])
            axis.plot(ends, 100 * law(ends), ":", lw=1, color=line.get_color())
    axis.set(xscale="log", yscale="log", xlabel=label, ylabel=f"{rate} (%)")
    places = {float(place) for line in axis.get_lines() for place in line.get_xdata()}
    ticks: list[float] = []  # where something was measured, or a law ends, if there is room for it
    for place in sorted(places, reverse=True):
        if not ticks or place < 0.8 * ticks[-1]:
            ticks.append(place)
    axis.set_xticks(ticks)
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 6, 8)))
    for both in (axis.xaxis, axis.yaxis):
        both.set_minor_locator(NullLocator())
        both.set_major_formatter("{x:g}")
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8, frameon=False)
    return figure


def power_law(points: np.ndarray) -> Callable[[Any], Any] | None:
    """The power of the place that fits the rates best, by least squares of logarithms; None for fewer than 3 places.

    points: float [points, 2 or more] of place and rate, both above 0.
    """
    if len(set(points[:, 0])) < 3:
        return None
    at, rate = np.log(points[:, :2]).T
    slope, level = np.polyfit(at, rate, 1)
    return lambda at: np.exp(level) * at**slope


def save_figure(figure: Any, path: str | Path) -> None:
    """Write a figure atomically as PNG, PDF or SVG, depending on the file's suffix."""
    kind = figure_format(path)
    with atomic_file(path) as part:
        figure.savefig(part, format=kind, dpi=130)


def figure_format(path: str | Path) -> str:
    """The format of a figure's file name, such as png. Raises InputError for one that cannot be written."""
    kind = Path(path).suffix[1:].lower()
    if kind not in ("png", "pdf", "svg"):
        raise InputError(f"{path}: expected the name of a picture, ending in .png, .pdf or .svg")
    return kind


def _series(log: Sequence[Mapping[str, object]]) -> dict[str, np.ndarray]:
    """Collect float [points, 2] of (step, value) by key, without missing and non-finite values."""
    points: dict[str, list[tuple[float, float]]] = {}
    for index, row in enumerate(log):
        numbers = {key: float(n) for key, n in row.items() if isinstance(n, Real) and math.isfinite(n)}
        step = numbers.pop("step", float(index))
        for key, number in numbers.items():
            points.setdefault(key, []).append((step, number))
    return {key: np.array(sorted(values)) for key, values in points.items()}


def _curve(name: str, series: Mapping[str, np.ndarray]) -> str:
    """The plot of one quantity: float [points, 2] of (step, value) by key."""
    from matplotlib.ticker import EngFormatter

    # fixed margins: the layout engine draws everything twice, and a report has dozens of these
    figure, (axis,) = _panels(1, 1, 2.1, width=3.2, layout=None)
    figure.subplots_adjust(left=0.19, right=0.97, bottom=0.14, top=0.88)
    for key, points in series.items():
        steps, values = points.T
        if layer := LAYER.search(key):
            colour = _layer_colour(int(layer[1]), len(series))
            axis.plot(steps, values, ".-", color=colour, markersize=4, lw=1.2, label=layer[1])
        elif key != name:
            axis.plot(steps, values, "o", color="#c4540a", markersize=4, zorder=3)
        else:
            _draw_line(axis, steps, values, smooth=len(values) >= 60 and name != "lr")
    if axis.get_legend_handles_labels()[0]:
        axis.legend(title="layer", title_fontsize=7, fontsize=7, ncols=4, columnspacing=0.8, handlelength=1)
    everything = np.concatenate([points[:, 1] for points in series.values()])
    if name != "lr" and everything.min() > 0 and everything.max() > 30 * everything.min():
        axis.set_yscale("log")
    else:
        axis.yaxis.set_major_formatter("{x:,.6g}")
    suffix = " (dev)" if all(key.startswith("dev_") for key in series) else ""
    title = name.replace("$", r"\$") + suffix  # a bare dollar starts a formula
    axis.set_title(title, fontsize=9, loc="left", y=1.0)  # where it would be anyway, but without a search for a place
    axis.locator_params(axis="x", nbins=5)
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.grid(alpha=0.25)
    return _picture(figure, f"{name} by step", dpi=150)


def _draw_line(axis: Any, steps: np.ndarray, values: np.ndarray, smooth: bool) -> None:
    axis.plot(steps, values, "-" if len(values) > 1 else ".", color="#1f5f99", alpha=0.3 if smooth else 1, lw=1)
    if smooth:
        half = len(values) // 40
        middles = np.linspace(0, len(values) - 1, 200).astype(int)  # enough for the width of the plot
        medians = [np.median(values[max(0, i - half) : i + half + 1]) for i in middles]
        axis.plot(steps[middles], medians, color="#1f5f99", lw=1.4)


def _layer_colour(layer: int, layers: int) -> Any:
    from matplotlib import colormaps

    return colormaps["viridis"](0.9 * layer / max(layers - 1, 1))


def _power(waveform: np.ndarray, sample_rate: int) -> np.ndarray:
    """Power spectrogram of float [N] with 32 ms windows every 8 ms: float [bins, frames]."""
    window = max(16, round(0.032 * sample_rate))
    frames = np.lib.stride_tricks.sliding_window_view(np.pad(waveform, window // 2), window)[:: window // 4]
    return np.abs(np.fft.rfft(frames * np.hanning(window))).T ** 2


def _panels(
    rows: int,
    columns: int,
    height: float,
    width: float = 9.5,
    layout: Literal["constrained"] | None = "constrained",
    **shared: Any,
) -> tuple[Any, list[Any]]:
    """A figure of `height` and `width` in inches, by default as wide as the page, and its axes row by row."""
    from matplotlib.figure import Figure  # without pyplot, which would need a display or a global backend

    figure = Figure(figsize=(width, height), layout=layout)
    axes = list(figure.subplots(rows, columns, squeeze=False, **shared).ravel())
    for axis in axes:
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _image(figure: Any, description: str, caption: str, dpi: int = 130) -> str:
    """An image as wide as the page, which scrolls sideways on narrow screens. The caption is HTML."""
    picture = f'<div class="scroll">{_picture(figure, description, dpi)}</div>'
    return f"<figure>{picture}<figcaption>{caption}</figcaption></figure>"


def _picture(figure: Any, description: str, dpi: int) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{escape(description)}" src="data:image/png;base64,{data}">'
