"""The figures of the report page, drawn with matplotlib; each function returns HTML with the picture inside."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from html import escape
from numbers import Real
from typing import Any

import numpy as np


def curves(log: Sequence[Mapping[str, object]]) -> str:
    """Small multiples by step, one panel per quantity, or nothing if no row of the log holds a finite number.

    Training values are a line; the validation values of the same quantity, named dev_<quantity>, are points.
    """
    panels: dict[str, dict[str, np.ndarray]] = {}
    for key, points in _series(log).items():
        panels.setdefault(key.removeprefix("dev_"), {})[key] = points
    if not panels:
        return ""
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, axes = _panels(rows, columns, 0.3 + 2.1 * rows)
    for axis, (name, series) in zip(axes, panels.items(), strict=False):
        _draw_curve(axis, name, series)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    caption = "By step. Line: training (dark: running median of long logs). Points: validation (dev)."
    return _image(figure, "Training curves: " + ", ".join(panels), caption)


def code_usage(shares: Sequence[np.ndarray], sizes: Sequence[int]) -> str:
    """Share of tokens per used code, most used first: float [used] per layer, whose codebook sizes are `sizes`."""
    from matplotlib import colormaps

    figure, (axis,) = _panels(1, 1, 3.2)
    for index, layer in enumerate(shares):
        colour = colormaps["viridis"](0.9 * index / max(len(shares) - 1, 1))
        axis.plot(np.arange(1, len(layer) + 1), layer, color=colour, lw=1.5, label=f"layer {index}")
    axis.set(yscale="log", xlabel="code, most used first", ylabel="share of tokens")
    axis.set_xlim(0, 1.01 * max(sizes))
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8, frameon=False, ncols=2)
    caption = "Codes sorted by use: where a line ends before its K, the remaining codes are dead."
    return _image(figure, "Sorted code usage per layer", caption)


def spectrograms(sounds: Mapping[str, np.ndarray], sample_rate: int, caption: str) -> str:
    """Spectrograms of float [N], one above the other on one colour scale; the caption is HTML."""
    from matplotlib import colormaps

    figure, axes = _panels(len(sounds), 1, 0.5 + 1.6 * len(sounds), sharex=True, sharey=True)
    colours = colormaps["magma"].resampled(32)  # steps of 2.5 dB: a PNG of noisy pixels packs half as large
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
    scale = "All panels share one scale, in dB below the loudest point of the original."
    return _image(figure, "Spectrograms: " + ", ".join(sounds), f"{caption} {scale}", dpi=100)


def _series(log: Sequence[Mapping[str, object]]) -> dict[str, np.ndarray]:
    """Collect float [points, 2] of (step, value) per key, leaving out values that are missing or not finite."""
    points: dict[str, list[tuple[float, float]]] = {}
    for index, row in enumerate(log):
        numbers = {key: float(n) for key, n in row.items() if isinstance(n, Real) and math.isfinite(n)}
        step = numbers.pop("step", float(index))
        for key, number in numbers.items():
            points.setdefault(key, []).append((step, number))
    return {key: np.array(sorted(values)) for key, values in points.items()}


def _draw_curve(axis: Any, name: str, series: Mapping[str, np.ndarray]) -> None:
    for key, points in series.items():
        steps, values = points.T
        long = len(values) >= 60 and name != "lr"
        if key != name:
            axis.plot(steps, values, "o", color="#c4540a", markersize=4, zorder=3)
            continue
        axis.plot(steps, values, "-" if len(values) > 1 else ".", color="#1f5f99", alpha=0.3 if long else 1, lw=1)
        if long:
            half = len(values) // 40
            middle = [np.median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]
            axis.plot(steps, middle, color="#1f5f99", lw=1.4)
    everything = np.concatenate([points[:, 1] for points in series.values()])
    if name != "lr" and everything.min() > 0 and everything.max() > 30 * everything.min():
        axis.set_yscale("log")
    else:
        axis.yaxis.set_major_formatter("{x:,.6g}")
    suffix = "" if name in series else " (dev)"
    axis.set_title(name.replace("$", r"\$") + suffix, fontsize=9, loc="left")  # a bare dollar starts a formula
    axis.locator_params(axis="x", nbins=5)
    axis.grid(alpha=0.25)


def _power(waveform: np.ndarray, sample_rate: int) -> np.ndarray:
    """Power spectrogram of float [N] with 32 ms windows every 8 ms: float [bins, frames]."""
    window = max(16, round(0.032 * sample_rate))
    frames = np.lib.stride_tricks.sliding_window_view(np.pad(waveform, window // 2), window)[:: window // 4]
    return np.abs(np.fft.rfft(frames * np.hanning(window))).T ** 2


def _panels(rows: int, columns: int, height: float, **shared: Any) -> tuple[Any, list[Any]]:
    """A figure of page width, `height` in inches, and its axes row by row."""
    from matplotlib.figure import Figure  # drawn without pyplot, so no display or global backend is touched

    figure = Figure(figsize=(9.5, height), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, **shared).ravel())
    for axis in axes:
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _image(figure: Any, description: str, caption: str, dpi: int = 130) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    picture = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return f'<figure><img alt="{escape(description)}" src="{picture}"><figcaption>{caption}</figcaption></figure>'
