"""draw_scaling: the points and lines of evaluations, in a picture and a table."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from speechllm import DataError
from speechllm.reports.plots import power_law, scaling_figure
from tokenizer.files import write_json
from tokenizer.settings import SettingsError


@pytest.fixture
def draw(recipe: Callable[[str], ModuleType]) -> ModuleType:
    return recipe("draw_scaling.py")


def evaluation(folder: Path, wer: float, cer: float | None = None, normalizer: str = "librispeech") -> str:
    """Results of eval_asr; with a CER, of texts without spaces, where it leads."""
    folder.mkdir()
    rates = {"primary": "wer", "wer": wer, "ci95": [0.9 * wer, 1.1 * wer], "normalizer": normalizer}
    spelled = {} if cer is None else {"primary": "cer", "cer": cer, "cer_ci95": [cer / 2, 2 * cer]}
    write_json(folder / "results.json", rates | spelled)
    return str(folder)


def test_a_power_law_is_found_and_drawn_on(
    draw: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture, without_pictures: None
) -> None:
    at = [8.0, 2.0, 4.0]  # in any order
    results = [evaluation(tmp_path / f"{place:g}", 0.8 * place**-0.5) for place in at]
    pair = draw.CurveConfig("pair", at[:2], results[:2])
    config = draw.ScalingConfig([draw.CurveConfig("whole", at, results), pair], str(tmp_path / "x.svg"), until=64)
    draw.main(config)
    table = capsys.readouterr().out
    assert "| whole | 2 | 56.6% (50.9% to 62.2%) |\n| whole | 4 | 40.0% (36.0% to 44.0%) |\n| whole | 8 |" in table
    assert "| whole | 64 | 10.0% on the dotted line, if it goes on |" in table and "| pair | 64" not in table
    assert (tmp_path / "x.svg").exists()

    curve = np.array([[at, found["wer"], *found["ci95"]] for at, found in draw.measures(config.curves[0])])
    law = power_law(curve)
    assert law is not None and law(curve[:, 0]) == pytest.approx(curve[:, 1])
    assert power_law(curve[:2]) is None and power_law(curve[[0, 1, 1]]) is None  # three seeds at two places
    (axis,) = scaling_figure({"whole": curve, "pair": curve[:2]}, "hours", 64, "WER").axes
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("hours", "WER (%)")
    dotted = [line for line in axis.lines if line.get_linestyle() == ":"]
    assert len(dotted) == 1 and dotted[0].get_xydata() == pytest.approx(np.array([[2, 56.5685], [64, 10]]), rel=1e-4)
    assert axis.get_xticks().tolist() == [64, 8, 4, 2]
    (axis,) = scaling_figure({"whole": curve}, "hours", 8.5, "WER", laws=()).axes
    assert [line.get_linestyle() for line in axis.lines].count(":") == 0
    assert axis.get_xticks().tolist() == [8, 4, 2]  # no line goes further
    for until, ticks in ((8.5, [8.5, 4, 2]), (3, [8, 4, 3, 2])):  # where there is room
        (axis,) = scaling_figure({"whole": curve}, "hours", until, "WER").axes
        assert axis.get_xticks().tolist() == ticks
    draw.main(
        draw.ScalingConfig([draw.CurveConfig("added", at, results, law=False)], str(tmp_path / "y.svg"), until=64)
    )
    assert "| added | 64" not in capsys.readouterr().out


def test_the_rate_that_leads_is_drawn(
    draw: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture, without_pictures: None
) -> None:
    words, letters = evaluation(tmp_path / "words", 0.5), evaluation(tmp_path / "letters", 1.0, cer=0.1)
    draw.main(draw.ScalingConfig([draw.CurveConfig("c", [1.0], [letters])], str(tmp_path / "x.svg")))
    assert "| c | 1 | 10.0% (5.0% to 20.0%) |" in capsys.readouterr().out
    english = evaluation(tmp_path / "english", 0.5, normalizer="whisper_english")
    for other, message in ((letters, "WER and CER lead"), (english, "librispeech and others with whisper_english")):
        both = draw.CurveConfig("c", [1.0, 2.0], [other, words])
        with pytest.raises(DataError, match=message):
            draw.main(draw.ScalingConfig([both], str(tmp_path / "y.svg")))


def test_what_cannot_be_drawn_is_refused(draw: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="at must hold one place for each of the 2 results, got 1"):
        draw.CurveConfig("c", [1.0], ["a", "b"])
    curve = draw.CurveConfig("c", [1.0], ["a"])
    for curves, message in (([], "curves must be"), ([curve, curve], "curves must have different names")):
        with pytest.raises(SettingsError, match=message):
            draw.ScalingConfig(curves, "x.svg")
    (tmp_path / "empty").mkdir()
    for results, message in (
        (str(tmp_path / "empty"), "no output of eval_asr.py"),
        (evaluation(tmp_path / "none", 0.0), "a rate of 0"),
    ):
        with pytest.raises(DataError, match=message):
            [*draw.measures(draw.CurveConfig("c", [1.0], [results]))]
