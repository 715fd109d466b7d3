"""The reports: one file each, escaped texts, worst utterances first, correct totals, no required inputs."""

import base64
import io
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import soundfile
from torch import Tensor

from speechllm import SpeechCodec, Utterance, encode_shards, save_audio, word_error_rate
from speechllm.evaluation.alignment import align
from speechllm.evaluation.tables import Table
from speechllm.reports.pages import (
    finish_training,
    write_codec_report,
    write_recognition_report,
    write_report,
    write_results_report,
)
from speechllm.reports.sounds import Reconstruction
from speechllm.runs.run import Run

RATE = 16_000
SECONDS = 1.0


def inputs() -> dict[str, object]:
    """Small fake inputs of every section."""
    rng = np.random.default_rng(0)
    tone = 0.3 * np.sin(2 * np.pi * 440 * np.arange(int(RATE * SECONDS)) / RATE).astype(np.float32)
    return {
        "title": "Run <1>",
        "results": {
            "wer": 0.0712,
            "wer_ci95": [0.065, 0.078],
            "wer_shuffled_audio": 1.043,
            "wer_shuffled_audio_ci95": [1.01, 1.07],
            "utterances": 2620,
            "tokens_per_second": 50.0,
            "notes": ["<script>alert(1)</script>", "small run"],
            "steps": 4000,
            "content": {"original": {"wer": 0.031}, "8 codebooks": {"wer": 0.0521, "cer": math.nan}},
            "speaker": {"similarity": 0.912345, "trials": {"n": {"same": 10}}},
            "seconds_by_stage": {"tokenizer": 5400.0, "encode & pack": 61.0, "broken": math.nan},
            "versions": {"numpy": "2.4"},
            "codec_fingerprint": "ab12",
            "config": {"data": "<corpus>", "asr": "demo.yaml"},
            "command": "python recipes/demo.py 'data=<corpus>'",
            "seconds": 5461.0,
        },
        "tokenizer_log": [{"step": i, "loss": 5 / (i + 1), "mel$": 1.0} for i in range(80)]
        + [{"step": 40, "dev_loss": 0.4}, {"step": 79, "dev_loss": math.nan}],
        "asr_log": [{"step": 1, "loss": 2.0, "lr": 1e-4}, {"step": 2, "dev_wer": 0.5}],
        "codebook_counts": [rng.integers(0, 50, 64), np.array([0, 7, 7, 0])],
        "reconstruction": Reconstruction("utt <b>", RATE, tone, {1: 0.5 * tone[:-100], 8: tone}),
        "predictions": [
            {"id": f"u{i:02d}", "speaker": f"s{i % 3}", "reference": "a b c d", "hypothesis": "a b c d"}
            for i in range(15)
        ]
        + [
            {"id": "bad", "speaker": "s<9>", "reference": "the cat sat", "hypothesis": "the <i> sat down"},
            {"id": "empty", "speaker": "s0", "reference": "", "hypothesis": ""},
        ],
    }


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(path, **inputs())
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    return path.read_text(encoding="utf-8")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The one pair of axes of every picture, by its description; what is drawn on them goes to no file."""
    from speechllm.reports import plots

    axes = {}

    def watch(figure: Any, description: str, dpi: int) -> str:
        axes[description] = figure.axes[0]
        return ""

    monkeypatch.setattr(plots, "_picture", watch)
    return axes


def section(page: str, title: str) -> str:
    return page.split(f"<h2>{title}</h2>")[1].split("</section>")[0]


def test_page_needs_nothing_from_outside(page: str) -> None:
    assert all(source.startswith("data:") for source in re.findall(r'(?:src|href)\s*=\s*"([^"]*)', page))
    assert not re.search(r"https?://|<link|<script|@import|url\(", page)
    assert len(page) < 2_000_000


def test_texts_are_escaped(page: str) -> None:
    assert "<h1>Run &lt;1&gt;</h1>" in page
    assert "&lt;script&gt;alert(1)" in page
    for raw in ("utt <b>", "s<9>", "<i>", "encode & pack"):
        assert raw not in page


def test_headline_and_sections_in_order(page: str) -> None:
    for text in ("7.1\u00a0%", "6.5\u00a0% to 7.8\u00a0%", "104.3\u00a0%", "101.0\u00a0% to 107.0\u00a0%", "2,620"):
        assert text in page
    assert re.findall("<h2>(.*?)</h2>", page) == [
        "Notes",
        "Results",
        "Tokenizer training",
        "Recogniser training",
        "Codebook usage",
        "Reconstruction",
        "WER by speaker",
        "Worst alignments",
        "Best alignments",
        "Time per stage",
        "Configuration",
        "Versions",
    ]
    for text in ("python recipes/demo.py &#x27;data=&lt;corpus&gt;&#x27;", "91.0 min", "demo.yaml"):
        assert text in section(page, "Configuration")
    for text in ("0.0521", "0.9123", "4,000", "speaker / trials"):
        assert text in section(page, "Results")


def test_worst_come_first_and_errors_have_text_marks(page: str) -> None:
    worst, best = section(page, "Worst alignments"), section(page, "Best alignments")
    assert re.findall(r'class="muted">(\w+), speaker', worst)[0] == "bad"
    assert "<small>sub</small>" in worst and "<small>ins</small>" in worst
    assert "bad, speaker" not in best
    assert re.findall('scope="row">(.*?)<', section(page, "WER by speaker"))[0] == "s&lt;9&gt;"


def test_codebook_usage_counts_dead_codes(page: str) -> None:
    row = section(page, "Codebook usage").split('<th scope="row">layer\u00a01</th>')[1].split("</tr>")[0]
    assert re.findall("<td>(.*?)</td>", row) == ["2\u00a0/\u00a04", "2", "2", "14"]


def test_players_contain_the_sounds(page: str) -> None:
    sounds = re.findall(r"data:audio/wav;base64,([^\"]+)", page)
    waves = [soundfile.read(io.BytesIO(base64.b64decode(s))) for s in sounds]
    assert [len(wave) for wave, _ in waves] == [RATE, RATE, RATE - 100]  # original, most codebooks, fewest
    assert {rate for _, rate in waves} == {RATE}
    np.testing.assert_allclose(waves[0][0], inputs()["reconstruction"].original, atol=1e-4)


def test_long_sound_keeps_the_page_small(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).normal(0, 0.1, 35 * 24_000)
    sounds = Reconstruction("long", 24_000, noise, dict.fromkeys(range(1, 17), noise))
    write_report(tmp_path / "r.html", **{**inputs(), "reconstruction": sounds})
    assert (tmp_path / "r.html").stat().st_size < 2_000_000


def test_alignment_columns() -> None:
    texts = [("a b c", "a x"), ("", "x y"), ("a", ""), ("", "")]
    found = align([{"id": "i", "speaker": "s", "reference": r, "hypothesis": h} for r, h in texts])
    assert [(a.errors, a.words) for a in found] == [(2, 3), (2, 0), (1, 1), (0, 0)]
    assert found[1].columns == [("", "x", "insert"), ("", "y", "insert")]
    assert found[2].columns == [("a", "", "delete")]


@pytest.mark.parametrize("results", [{}, {"wer": math.nan, "wer_ci95": None, "versions": {}, "notes": []}])
def test_nothing_recorded(tmp_path: Path, results: dict[str, object]) -> None:
    write_report(
        tmp_path / "new" / "r.html",
        title="t",
        results=results,
        tokenizer_log=[],
        asr_log=[{"step": 1}],
        codebook_counts=[np.zeros(8, dtype=int)],
        reconstruction=Reconstruction("", RATE, np.zeros(0), {}),
        predictions=[],
    )
    page = (tmp_path / "new" / "r.html").read_text(encoding="utf-8")
    titles = re.findall("<h2>(.*?)</h2>", page)
    assert len(titles) == 12
    assert all("not recorded" in section(page, title) for title in titles)


@pytest.mark.parametrize(
    "control, shown",
    [
        ([0.5, 0.7], True),
        ([0.3, 0.7], False),  # overlaps with the WER's interval
        ([0.1, 0.15], False),
        (None, False),
    ],
)
def test_only_a_control_above_the_wer_shows_that_the_model_uses_the_audio(
    tmp_path: Path, control: list[float] | None, shown: bool
) -> None:
    results = {"wer": 0.3, "ci95": [0.2, 0.4], "wer_shuffled_audio": 0.6, "wer_shuffled_audio_ci95": control}
    write_recognition_report(tmp_path / "r.html", title="t", results=results, predictions=[])
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert ("The model uses the audio" in page) == shown
    assert ("Nothing here shows that the model uses the audio" in page) != shown


def test_failed_write_leaves_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.html"
    path.write_text("old")

    def refuse(*_: object) -> None:
        raise OSError("no")

    monkeypatch.setattr("tokenizer.files.os.replace", refuse)
    with pytest.raises(OSError, match="no"):
        write_report(path, **{**inputs(), "tokenizer_log": [], "asr_log": [], "codebook_counts": []})
    assert path.read_text() == "old"


# ---- of a tokenizer's training


def codec_inputs(layers: int = 3) -> dict[str, Any]:
    """A log of ten steps with validations at 5 and 10, and what belongs to it."""
    log = [{"step": i, "mel": 10.0 - i, "gradient_norm": 1.0} for i in range(1, 11)]
    for step in (5, 10):
        layered = {f"dev_{name}_{q}": float(step * (q + 1)) for name in ("perplexity", "dead") for q in range(layers)}
        log.append({"step": step, "dev_mel": 11.0 - step, "dev_stoi": 0.5 + step / 100, "dev_<new>": 7.25, **layered})
    return {
        "title": "tokenizer <after> 10 steps",
        "metrics": {name: value for name, value in log[-1].items() if name != "step"} | {"dev_pesq_wb": 2.345},
        "log": log,
        "codebook_counts": [np.arange(4)] * layers,
        "reconstruction": inputs()["reconstruction"],
        "provenance": {"command": "train", "seconds": 90.0, "config": {"steps": 10}, "versions": {"torch": "2"}},
    }


def test_the_codec_page_shows_the_last_validation_quality_first(tmp_path: Path) -> None:
    write_codec_report(tmp_path / "r.html", **codec_inputs())
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    shown = re.findall(r'class="tile"><span>(.*?)</span><b>(.*?)</b>', page)
    assert shown == [("PESQ, wide-band", "2.345"), ("STOI", "0.6"), ("Mel distance", "1"), ("&lt;new&gt;", "7.25")]
    assert "<h1>tokenizer &lt;after&gt; 10 steps</h1>" in page
    sections = ["Training", "Codebook usage", "Reconstruction", "Configuration", "Versions"]
    assert re.findall("<h2>(.*?)</h2>", page) == sections and "1.5 min" in section(page, "Configuration")
    assert not re.search(r"https?://|<link|<script|@import|url\(", page)


def test_layers_share_one_picture_with_a_line_each(tmp_path: Path, drawn: dict[str, Any]) -> None:
    write_codec_report(tmp_path / "r.html", **codec_inputs())
    curves = [name.removesuffix(" by step") for name in drawn if name.endswith(" by step")]
    assert curves == ["mel", "gradient_norm", "stoi", "<new>", "perplexity", "dead"]
    lines = drawn["perplexity by step"].get_lines()
    assert [line.get_label() for line in lines] == ["0", "1", "2"]
    assert [line.get_ydata().tolist() for line in lines] == [[5, 10], [10, 20], [15, 30]]
    assert len({line.get_color() for line in lines}) == 3
    assert drawn["perplexity by step"].get_title(loc="left") == "perplexity (dev)"
    training, validation = drawn["mel by step"].get_lines()
    assert training.get_ydata().tolist() == [10.0 - i for i in range(1, 11)]
    assert validation.get_xdata().tolist() == [5, 10] and validation.get_ydata().tolist() == [6, 1]
    assert drawn["mel by step"].get_title(loc="left") == "mel"


def test_the_median_of_a_long_log_ignores_single_jumps(tmp_path: Path, drawn: dict[str, Any]) -> None:
    log = [{"step": i, "mel": 1000.0 if i % 50 == 0 else 2.0} for i in range(1, 5001)]
    write_codec_report(tmp_path / "r.html", **{**codec_inputs(), "log": log})
    values, median = drawn["mel by step"].get_lines()
    assert len(values.get_ydata()) == 5000 and set(median.get_ydata()) == {2.0}
    assert (median.get_xdata()[0], median.get_xdata()[-1]) == (1, 5000)


def test_a_codec_page_before_anything_is_known(tmp_path: Path) -> None:
    nothing = {
        "metrics": {},
        "log": [],
        "codebook_counts": [],
        "reconstruction": Reconstruction("", RATE, np.zeros(0), {}),
        "provenance": {},
    }
    write_codec_report(tmp_path / "r.html", title="t", **nothing)
    assert (tmp_path / "r.html").read_text(encoding="utf-8").count("not recorded") == 5


# ---- of other trainings and evaluations


@dataclass
class Job:
    output: str
    steps: int = 2


def test_a_finished_training_has_a_page_with_summary_curves_and_configuration(tmp_path: Path) -> None:
    run = Run(tmp_path, Job("<here>"))
    run.log(1, loss=2.0)
    run.log(2, loss=1.0)
    finish_training(run, {"loss": 1.0, "dev_wer": 0.25})
    assert run.summary == {"loss": 1.0, "dev_wer": 0.25}
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert re.findall("<h2>(.*?)</h2>", page) == ["Training", "Configuration", "Versions"]
    assert "dev_wer" in page and 'alt="loss by step"' in section(page, "Training")
    assert "&lt;here&gt;" in section(page, "Configuration") and "torch" in section(page, "Versions")


def test_the_page_of_results_holds_tables_failures_and_codebooks(tmp_path: Path) -> None:
    results = {"frames": 7, "failed": [{"id": "a<b", "reason": "silent"}, {"id": "c", "reason": "too short"}]}
    results |= {"command": "python x", "seconds": 3.0, "config": {"data": "corpus"}, "versions": {"torch": "2"}}
    table = Table("Table 1", ["system", "PESQ"], [["ours", "2.5"]], "A note.")
    write_results_report(tmp_path / "r.html", "t", results, [table], codebook_counts=[np.arange(4)])
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    titles = ["Table 1", "Codebook usage", "Results", "Configuration", "Versions"]
    assert re.findall("<h2>(.*?)</h2>", page) == titles
    assert "2.5" in section(page, "Table 1") and "A note." in section(page, "Table 1")
    rows = re.findall(r'row">(\d+)</th><td>(.*?)</td><td>(.*?)</td>', section(page, "Results"))
    assert rows == [("1", "a&lt;b", "silent"), ("2", "c", "too short")]
    assert "3.0 s" in section(page, "Configuration") and "3.0 s" not in section(page, "Results")


# ---- of a recogniser's evaluation


def recognition_inputs() -> dict[str, Any]:
    """Forty utterances of 1 to 4 s; the longer half misses a word of four, the last answer is a runaway."""
    texts = ["one two three four"] * 20 + ["one two three"] * 19 + ["one two three four" + " five" * 401]
    predictions = [
        {
            "id": f"u{i}",
            "speaker": f"s{i % 2}",
            "duration_s": 1 + 3 * i / 39,
            "reference": "One, two three FOUR.",
            "hypothesis": text,
        }
        for i, text in enumerate(texts)
    ]
    score = word_error_rate([p["reference"] for p in predictions], texts)
    return {
        "title": "a/model on <test>",
        "results": {
            "wer": score.wer,
            "ci95": score.ci95,
            "substitutions": score.substitutions,
            "deletions": score.deletions,
            "insertions": score.insertions,
            "words": score.words,
            "utterances": score.utterances,
            "normalizer": score.normalizer,
            "real_time_factor": 0.25,
            "codec_fingerprint": "ab12",
        },
        "predictions": predictions,
        "logs": {"Training of <it>": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]},
    }


def test_the_recognition_page_scores_the_texts_as_the_results_do(tmp_path: Path) -> None:
    write_recognition_report(tmp_path / "r.html", **recognition_inputs())
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert re.findall("<h2>(.*?)</h2>", page) == [
        "Errors",
        "WER by speaker",
        "WER by duration",
        "Worst alignments",
        "Best alignments",
        "Training of &lt;it&gt;",
        "Further results",
        "Configuration",
        "Versions",
    ]
    # 19 deletions and 401 insertions in 160 words; s1 has the text with the insertions and 9 deletions, s0 10 deletions
    assert "<b>262.5\u00a0%</b>" in page and "not recorded" in page.split("Shuffled-audio control")[1][:40]
    errors = re.findall(r'row">(\w+)</th><td>([\d,]+)</td><td>([\d.]+)', section(page, "Errors"))
    assert errors == [("substitutions", "0", "0.0"), ("deletions", "19", "11.9"), ("insertions", "401", "250.6")]
    speakers = re.findall(r'row">(\w+)</th><td>20</td><td>80</td><td>([\d.]+)', section(page, "WER by speaker"))
    assert speakers == [("s1", "512.5"), ("s0", "12.5")]
    assert re.findall(r'class="muted">(\w+), speaker', section(page, "Worst alignments"))[0] == "u39"
    assert "Character error rate" not in page and "0.25" in section(page, "Further results")
    assert "<title>a/model on &lt;test&gt;</title>" in page


def test_error_rates_by_duration_count_all_words_of_a_group(tmp_path: Path, drawn: dict[str, Any]) -> None:
    write_recognition_report(tmp_path / "r.html", **recognition_inputs())
    axis = drawn["Word error rate by duration"]
    points, line = axis.get_lines()
    np.testing.assert_allclose(points.get_xdata(), 1 + 3 * np.arange(40) / 39)
    np.testing.assert_allclose(line.get_xdata(), 1 + 3 * (4.5 + 10 * np.arange(4)) / 39)
    np.testing.assert_allclose(line.get_ydata(), [0, 0, 25, 100 * (9 + 401) / 40])
    # the runaway answer is drawn at the edge, which lies above the line
    bottom, top = axis.get_ylim()
    assert points.get_ydata()[:39].tolist() == [0.0] * 20 + [25.0] * 19
    assert max(line.get_ydata()) < points.get_ydata()[39] < top < 10_000 and bottom < 0


def test_the_recognition_page_shows_what_is_there(tmp_path: Path) -> None:
    given = recognition_inputs()
    predictions = [{**p, "speaker": None, "duration_s": None} for p in given["predictions"]]
    results = {**given["results"], "cer": 0.0123, "wer_shuffled_audio": 0.9}
    write_recognition_report(tmp_path / "r.html", title="t", results=results, predictions=predictions)
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "<span>Character error rate</span><b>1.2\u00a0%</b>" in page and "<b>90.0\u00a0%</b>" in page
    assert "not recorded" in section(page, "WER by duration")
    assert re.findall(r'row">(.*?)</th><td>40</td>', section(page, "WER by speaker")) == ["?"]
    write_recognition_report(tmp_path / "r.html", title="t", results={}, predictions=[])
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert all("not recorded" in section(page, title) for title in re.findall("<h2>(.*?)</h2>", page))


def test_the_page_goes_by_the_cer_where_texts_have_no_spaces(tmp_path: Path) -> None:
    rows = [{"id": f"u{i}", "speaker": "s", "duration_s": 1.0 + i, "reference": "今天 天气"} for i in range(3)]
    results = {"primary": "cer", "wer": 1.0, "ci95": [1, 1], "cer": 0.25, "cer_ci95": [0.2, 0.3], "normalizer": "none"}
    results |= {"cer_shuffled_audio": 0.9, "cer_shuffled_audio_ci95": [0.85, 0.95]}
    predictions = [{**row, "hypothesis": "今天天汽"} for row in rows]
    write_recognition_report(tmp_path / "r.html", title="t", results=results, predictions=predictions)
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert page.index("Character error rate") < page.index("Word error rate") and "the rate to go by" in page
    assert "<b>90.0\u00a0%</b>" in page and "audio the CER is higher" in page
    assert "<th>characters</th>" in section(page, "CER by speaker") and ">12</td>" in section(page, "CER by speaker")
    assert "<img" in section(page, "CER by duration")


def test_eval_asr_writes_the_page_of_its_run(
    tmp_path: Path,
    recipe: Callable[[str], ModuleType],
    make_speech_llm: Callable[..., Any],
    small_codec: SpeechCodec,
    noise: Callable[..., Tensor],
) -> None:
    utterances = []
    for i, samples in enumerate((8_000, 12_345)):
        save_audio(tmp_path / f"{i}.wav", noise(samples, seed=i)[0])
        path = str(tmp_path / f"{i}.wav")
        utterances.append(Utterance(f"u{i}", path, samples / RATE, "test", "RED LAMP", f"s{i}"))
    assert sum(encode_shards(utterances, small_codec, tmp_path / "codes")) == 2
    make_speech_llm().save(tmp_path / "run" / "model")
    (tmp_path / "run" / "log.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 1.5}\n')

    eval_asr, output = recipe("eval_asr.py"), tmp_path / "evaluation"
    eval_asr.main(eval_asr.EvalAsrConfig(str(tmp_path / "run" / "model"), str(tmp_path / "codes"), str(output)))
    lines = (output / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["duration_s"] for line in lines] == [0.5, 0.772]
    page = (output / "report.html").read_text(encoding="utf-8")
    results = json.loads((output / "results.json").read_text())
    assert f"<b>{100 * results['wer']:.1f}\u00a0%</b>" in page
    texts = [json.loads(line) for line in lines]
    low, high = results["wer_shuffled_audio_ci95"]
    assert low <= results["wer_shuffled_audio"] <= high and texts[0]["reference"] == texts[1]["reference"]
    assert results["config"]["output"] == str(output) and results["seconds"] > 0 and results["command"]
    assert 'alt="loss by step"' in section(page, "Training")
    assert "<img" in section(page, "WER by duration")
