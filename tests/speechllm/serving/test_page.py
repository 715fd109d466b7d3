"""The page: what it shows of a recording, and that a browser shows it."""

import importlib
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from speechllm import SpeechLLM, convert_voice, load_audio, save_audio, transcribe
from speechllm.cli import serve
from speechllm.cli.main import main
from speechllm.encoding import Encoding
from speechllm.pauses import quietest
from speechllm.serving import engine as engine_module
from speechllm.serving.engine import Engine

RATE = 16_000


@pytest.fixture(scope="module")
def page() -> ModuleType:
    """The module; not imported above, because Gradio takes seconds, and every process of the tests reads this file."""
    pytest.importorskip("gradio", reason="needs the page extra")
    return importlib.import_module("speechllm.serving.page")


def test_a_recording_becomes_tokens_then_text_then_sounds(
    page: ModuleType, engine: Engine, recording: Path, speech_llm: SpeechLLM
) -> None:
    first, second, last = page.heard(engine, str(recording), quietest)
    (text,) = transcribe([recording], speech_llm)
    assert first[0] == "" and first[2].count("<span") == 50 and "Layer 0: 50 tokens, 50 a second" in first[2]
    assert second[0] == text and second[1].count("<span") == len(text.split())
    assert last[:3] == second[:3] and last[3].count("<audio") == 3 and "<img" in last[3]  # original, 1, 2 codebooks


def test_a_long_recording_comes_piece_by_piece(
    page: ModuleType, engine: Engine, recording: Path, speech_llm: SpeechLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "SHOWN_S", 0.7)
    asked = []
    cut = lambda waveform, rate: asked.append(rate) or quietest(waveform, rate)  # noqa: E731
    texts = [text for text, *_ in page.heard(engine, str(recording), cut)]
    assert asked == [RATE]
    assert len(texts) == 4 and texts[2].startswith(texts[1]) and texts[2] != texts[1]


def test_codes_and_words_tell_what_they_are(page: ModuleType) -> None:
    codes, encoding = torch.tensor([[5, 7], [5, 0]]), Encoding("", RATE, 50.0, layers=2, codebook_size=8)
    shown = page.coloured_codes(codes, encoding, 0.03)
    assert re.findall('title="(.*?)"', shown) == ["0.00 s: 5", "0.02 s: 7", "0.00 s: 5", "0.02 s: 0"]
    assert re.findall("<p>(.*?)</p>", shown) == [f"Layer {layer}: 2 tokens, 50 a second" for layer in (0, 1)]
    assert shown.count("background: hsl(328 65% 55%)") == 2  # 5 times the golden angle
    shown = page.coloured_codes(codes, replace(encoding, deduplicated=True), 0.3)  # without repeats, they have no times
    assert re.findall('title="(.*?)"', shown) == ["5", "7", "5", "0"]
    assert re.findall("<p>(.*?)</p>", shown) == [f"Layer {layer}: 2 tokens, 6.7 a second" for layer in (0, 1)]
    words = page.coloured_words([("<b>", 0.5)])
    assert words.count('title="50%"') == 1 and "&lt;b&gt;" in words


def test_faults_are_told_without_the_place_of_the_file(page: ModuleType, engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "no.wav").write_bytes(b"no sound")
    answer = page._answer(engine, quietest)
    with pytest.raises(page.gr.Error, match="^'the recording: not a readable audio file"):
        next(answer(str(tmp_path / "no.wav")))
    assert list(answer(None)) == [("", "", "", "")]  # taken away


def test_a_voice_is_changed(
    page: ModuleType,
    engine: Engine,
    recording: Path,
    speech_llm: SpeechLLM,
    tmp_path: Path,
    noise: Callable[..., Tensor],
) -> None:
    save_audio(tmp_path / "b.wav", noise(9_000, seed=5)[0])
    convert = page._converted(engine)
    rate, samples = convert(str(recording), str(tmp_path / "b.wav"), "1", "position")
    expected = convert_voice(
        speech_llm.codec, load_audio(recording), load_audio(tmp_path / "b.wav"), [1], "position"
    ).clamp(-1, 1)
    assert rate == RATE and np.allclose(samples / 2**15, expected.detach().numpy(), atol=1e-3)
    for layers in ("9", "one"):
        with pytest.raises(page.gr.Error):
            convert(str(recording), str(tmp_path / "b.wav"), layers, "position")
    with pytest.raises(page.gr.Error, match="give two recordings"):
        convert(str(recording), None, "1", "position")


def test_a_page_is_for_this_machine_only(capsys: pytest.CaptureFixture) -> None:
    assert main(["page", "model", "--host", "0.0.0.0"]) == 1
    assert "can be reached by others, and a page asks for no key" in capsys.readouterr().err


@pytest.mark.skipif(not shutil.which("chromedriver"), reason="needs Chromium and its driver")
def test_a_browser_shows_what_becomes_of_a_recording(
    page: ModuleType, engine: Engine, recording: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # choosing where recordings come from is an event, too, without one yet: what comes meanwhile must not be lost
    answer_of = page._answer

    def slowly_without(*settings: Any) -> Callable[[str | None], Iterator[tuple[str, str, str, str]]]:
        def answer(path: str | None) -> Iterator[tuple[str, str, str, str]]:
            if path is None:
                time.sleep(2)
            yield from answer_of(*settings)(path)

        return answer

    monkeypatch.setattr(page, "_answer", slowly_without)
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    options = webdriver.ChromeOptions()
    for word in ("--headless=new", "--no-sandbox", "--window-size=420,1400"):  # as wide as a phone
        options.add_argument(word)
    options.binary_location = shutil.which("chromium")
    shown = page.make_page({"tiny": engine})
    _, address, _ = page.launch(shown, "127.0.0.1", None, wait=False)
    browser = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        browser.get(address)
        wait = WebDriverWait(browser, 60)
        wait.until(lambda it: it.find_elements(By.CSS_SELECTOR, "button[aria-label*=pload]"))[0].click()
        wait.until(lambda it: it.find_elements(By.CSS_SELECTOR, "input[type=file]"))[0].send_keys(str(recording))
        wait.until(lambda it: len(it.find_elements(By.CSS_SELECTOR, ".codes span")) == 50)
        wait.until(lambda it: len(it.find_elements(By.CSS_SELECTOR, "audio[controls]")) >= 3)
        text = browser.find_element(By.CSS_SELECTOR, "textarea").get_property("value")
        fits = browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    finally:
        browser.save_screenshot(str(tmp_path / "page.png"))
        browser.quit()
        shown.close()
    assert text == next(iter(transcribe([recording], engine.speech_llm))) and fits
    assert (tmp_path / "page.png").stat().st_size > 10_000


def test_beams_and_letters_reach_what_decodes_until_ctrl_c(page: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []
    closed: list[object] = []

    class Told:
        def __init__(self, model: str, **decoding: object):
            told.append((model, decoding))

        def close(self) -> None:
            closed.append(self)

    def ctrl_c(*_: object) -> None:
        assert not closed
        raise KeyboardInterrupt

    monkeypatch.setattr(serve, "loaded", lambda model, arguments: (model, arguments.letters))
    monkeypatch.setattr(engine_module, "Engine", Told)
    monkeypatch.setattr(page, "make_page", lambda *_: None)
    monkeypatch.setattr(page, "launch", ctrl_c)
    assert main(["page", "a", "b", "--beams", "3", "--letters-weight", "0.5", "--letters", "l"]) == 130
    assert len(closed) == 2  # a process that ends while a thread of it computes is aborted
    assert told == [((model, "l"), {"beams": 3, "letters_weight": 0.5}) for model in ("a", "b")]
