"""The report page: one file, safe texts, worst utterances first, nothing required."""

import base64
import io
import math
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile

from speechllm.report import Reconstruction, align, write_report

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
            "utterances": 2620,
            "tokens_per_second": 50.0,
            "notes": ["<script>alert(1)</script>", "small run"],
            "steps": 4000,
            "content": {"original": {"wer": 0.031}, "8 codebooks": {"wer": 0.0521, "cer": math.nan}},
            "speaker": {"similarity": 0.912345, "trials": {"n": {"same": 10}}},
            "seconds_by_stage": {"tokenizer": 5400.0, "encode & pack": 61.0, "broken": math.nan},
            "versions": {"numpy": "2.4"},
            "codec_fingerprint": "ab12",
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
    for text in ("7.1\u00a0%", "6.5\u00a0% to 7.8\u00a0%", "104.3\u00a0%", "2,620", "the model listens"):
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
        "Versions",
    ]
    for text in ("0.0521", "0.9123", "4,000", "speaker / trials"):
        assert text in section(page, "Results")


def test_worst_come_first_and_errors_have_text_marks(page: str) -> None:
    worst, best = section(page, "Worst alignments"), section(page, "Best alignments")
    assert re.findall(r'class="muted">(\w+), speaker', worst)[0] == "bad"
    assert "<small>sub</small>" in worst and "<small>ins</small>" in worst
    assert "bad, speaker" not in best
    assert re.findall('scope="row">(.*?)<', section(page, "WER by speaker"))[0] == "s&lt;9&gt;"


def test_codebook_usage_counts_dead_codes(page: str) -> None:
    row = section(page, "Codebook usage").split('<th scope="row">layer 1</th>')[1].split("</tr>")[0]
    assert re.findall("<td>(.*?)</td>", row) == ["2 / 4", "2", "2", "14"]


def test_players_hold_the_sounds(page: str) -> None:
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
    assert len(titles) == 11
    assert all("not recorded" in section(page, title) for title in titles)


def test_failed_write_leaves_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.html"
    path.write_text("old")

    def refuse(*_: object) -> None:
        raise OSError("no")

    monkeypatch.setattr("speechllm.report.os.replace", refuse)
    with pytest.raises(OSError, match="no"):
        write_report(path, **inputs())
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]
    assert path.read_text() == "old"
