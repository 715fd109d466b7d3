"""The forms in which OpenAI's protocol answers a transcription: json, text, verbose_json, srt and vtt."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

Form = Literal["json", "text", "verbose_json", "srt", "vtt"]


@dataclass(frozen=True)
class Segment:
    """What was said from `start_s` to `end_s`."""

    start_s: float
    end_s: float
    text: str


def joined(segments: Sequence[Segment]) -> str:
    """The text of a recording."""
    return " ".join(segment.text for segment in segments if segment.text)


def answer(segments: Sequence[Segment], form: Form, language: str) -> tuple[str, str]:
    """Content and media type of a transcription in a form. language: as the caller named it."""
    if form == "text":
        return joined(segments) + "\n", "text/plain"
    if form == "srt":
        return subtitles(segments, ","), "application/x-subrip"
    if form == "vtt":
        escaped = [replace(part, text=part.text.replace("&", "&amp;").replace("<", "&lt;")) for part in segments]
        return "WEBVTT\n\n" + subtitles(escaped, "."), "text/vtt"
    content: dict[str, Any] = {"text": joined(segments)}
    if form == "verbose_json":
        rows = [
            {"id": i, "start": round(part.start_s, 3), "end": round(part.end_s, 3), "text": part.text}
            for i, part in enumerate(segments)
        ]
        duration_s = round(segments[-1].end_s, 3) if segments else 0.0
        content |= {"task": "transcribe", "language": language, "duration": duration_s, "segments": rows}
    return json.dumps(content, ensure_ascii=False), "application/json"


def subtitles(segments: Sequence[Segment], mark: str) -> str:
    """Numbered subtitles; `mark` stands before the milliseconds: a comma in SRT, a point in WebVTT."""
    shown = [segment for segment in segments if segment.text]
    return "".join(
        f"{i}\n{_clock(part.start_s, mark)} --> {_clock(part.end_s, mark)}\n{_one_line(part.text)}\n\n"
        for i, part in enumerate(shown, 1)
    )


def _clock(seconds: float, mark: str) -> str:
    milliseconds = round(seconds * 1000)
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{rest // 1000:02}{mark}{rest % 1000:03}"


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("-->", "->")  # which would begin another subtitle
