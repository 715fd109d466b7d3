"""The forms of an answer, as their specifications have them."""

import json

import pytest

from speechllm.serving.answers import Segment, answer, subtitles

SEGMENTS = [Segment(0, 29.9996, "hello"), Segment(29.9996, 31, ""), Segment(3661.5, 3662.0004, "a -->\n b")]


def test_texts_are_joined_and_json_holds_what_is_asked_for() -> None:
    assert answer(SEGMENTS, "text", "") == ("hello a -->\n b\n", "text/plain")
    content, kind = answer(SEGMENTS[:2], "json", "en")
    assert (json.loads(content), kind) == ({"text": "hello"}, "application/json")
    content, _ = answer(SEGMENTS[:2], "verbose_json", "en")
    assert json.loads(content) == {
        "text": "hello",
        "task": "transcribe",
        "language": "en",
        "duration": 31,
        "segments": [
            {"id": 0, "start": 0, "end": 30, "text": "hello"},
            {"id": 1, "start": 30, "end": 31, "text": ""},
        ],
    }


@pytest.mark.parametrize("form, mark", [("srt", ","), ("vtt", ".")])
def test_subtitles(form: str, mark: str) -> None:
    expected = (
        f"1\n00:00:00{mark}000 --> 00:00:30{mark}000\nhello\n\n2\n01:01:01{mark}500 --> 01:01:02{mark}000\na -> b\n\n"
    )
    content, _ = answer(SEGMENTS, form, "")
    assert content == {"srt": "", "vtt": "WEBVTT\n\n"}[form] + expected
    assert subtitles([], ",") == ""


@pytest.mark.parametrize("form, text", [("srt", "R&D <b> -> 1 > 0 &lt;"), ("vtt", "R&amp;D &lt;b> -> 1 > 0 &amp;lt;")])
def test_only_webvtt_escapes_what_it_would_take_for_marks(form: str, text: str) -> None:
    content, _ = answer([Segment(0, 1, "R&D <b> --> 1 > 0 &lt;")], form, "")
    assert content.splitlines()[-2:] == [text, ""]
