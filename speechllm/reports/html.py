"""Building blocks of reports: self-contained pages, and tables, tiles and numbers as HTML."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from speechllm.evaluation.tables import Table, number
from tokenizer.files import write_text

NOT_RECORDED = '<p class="muted">not recorded</p>'
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
{style}</style></head><body><main><h1>{title}</h1>
{body}
</main></body></html>
"""


def write_page(path: str | Path, title: str, lead: str, sections: Mapping[str, str]) -> None:
    """Write a page atomically. Title and section names are text, contents are HTML; empty sections are marked."""
    body = lead
    for name, html in sections.items():
        body += f"<section><h2>{escape(name)}</h2>{html or NOT_RECORDED}</section>\n"
    style = resources.files("speechllm.reports").joinpath("report.css").read_text(encoding="utf-8")
    page = PAGE.format(title=escape(title), style=style, body=body)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    # lone surrogates of undecodable input must not make the report fail
    write_text(path, page.encode("utf-8", "replace").decode("utf-8"))


def text(value: object) -> str:
    """A value as HTML: four significant digits, thousands separators, joined lists."""
    if isinstance(value, list | tuple | np.ndarray):
        return ", ".join(map(text, value[:12])) + (f", … ({len(value)} values)" if len(value) > 12 else "")
    finite = number(value)
    if finite is None or isinstance(value, bool):
        return "not recorded" if value is None or isinstance(value, Real) and finite is None else escape(str(value))
    return f"{finite:,.0f}" if abs(finite) >= 1000 or finite == int(finite) else f"{finite:.4g}"


def percent(value: object) -> str:
    """A fraction as HTML."""
    finite = number(value)
    return "not recorded" if finite is None else f"{100 * finite:.1f}\u00a0%"


def duration(seconds: float | None) -> str:
    """A duration as HTML, in seconds or minutes."""
    if seconds is None:
        return "not recorded"
    return f"{seconds:.1f} s" if seconds < 60 else f"{seconds / 60:.1f} min"


def grid(cells: str, min_width: int) -> str:
    """HTML elements side by side, each at least `min_width` pixels wide."""
    return f'<div class="grid" style="--min:{min_width}px">{cells}</div>' if cells else ""


def tiles(rows: Iterable[tuple[str, str, str]]) -> str:
    """One box per figure: name, value and explanation, all of them HTML."""
    boxes = (
        f'<div class="tile"><span>{name}</span><b>{value}</b><span>{note}</span></div>' for name, value, note in rows
    )
    return grid("".join(boxes), 140)


def table(rows: Iterable[Sequence[str]], head: Sequence[str] = ()) -> str:
    """A table of HTML cells; the first cell of a row names it."""
    body = "".join(f'<tr><th scope="row">{r[0]}</th>{"".join(f"<td>{c}</td>" for c in r[1:])}</tr>' for r in rows)
    top = f"<thead><tr>{''.join(f'<th>{h}</th>' for h in head)}</tr></thead>" if head else ""
    return f'<div class="scroll"><table>{top}<tbody>{body}</tbody></table></div>' if body else ""


def result_table(results: Table) -> str:
    """A table of results and its note as HTML."""
    head, rows = results.filled()
    body = table([[escape(cell) for cell in row] for row in rows], [escape(name) for name in head])
    return body + (f"<p>{escape(results.note)}</p>" if results.note else "")


def provenance_sections(results: Mapping[str, Any]) -> dict[str, str]:
    """Sections with configuration, command and duration, and with versions; results: with the keys of `provenance`."""
    made = []
    if "command" in results:
        made.append(("command", f"<code>{escape(results['command'])}</code>"))
    if "seconds" in results:
        made.append(("duration", duration(results["seconds"])))
    named = {**(results.get("versions") or {}), "codec fingerprint": results.get("codec_fingerprint")}
    return {
        "Configuration": table(made) + tables(results.get("config", {})),
        "Versions": table((escape(str(name)), text(value)) for name, value in named.items() if value is not None),
    }


def bar(value: float | None, largest: float) -> str:
    """A bar for a table cell, at full width for the largest value."""
    return f'<div class="bar" style="width:{100 * (value or 0) / (largest or 1):.1f}%"></div>'


def tables(values: Mapping[str, Any]) -> str:
    """The content of a results file as tables side by side."""
    return grid(_tables("", values), 400)


def _tables(name: str, values: Mapping[str, Any]) -> str:
    """One table for the scalars; dicts of scalars inside a named dict become its rows, other dicts their own tables.

    A list of dicts counts as a dict with their numbers, from 1 on, as keys.
    """
    values = {key: _numbered(value) for key, value in values.items()}
    inner = {str(k): v for k, v in values.items() if isinstance(v, Mapping) and v}
    html = table((escape(str(k)), text(v)) for k, v in values.items() if not isinstance(v, Mapping))
    wide = ""
    if name and not any(isinstance(w, Mapping) for v in inner.values() for w in v.values()):
        keys = list(dict.fromkeys(k for v in inner.values() for k in v))
        rows = [(escape(k), *(text(v[c]) if c in v else "–" for c in keys)) for k, v in inner.items()]
        html += table(rows, ["", *(escape(str(k)) for k in keys)])
        wide = " class=wide" if len(keys) > 3 else ""
        inner = {}
    own = f"<div{wide}><h3>{escape(name or 'General')}</h3>{html}</div>" if html else ""
    return own + "".join(_tables(f"{name} / {k}" if name else k, v) for k, v in inner.items())


def _numbered(value: Any) -> Any:
    if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        return {str(number): item for number, item in enumerate(value, 1)}
    return value
