"""Reading tables that users write: JSON lines, CSV, lines of text. Errors name file and row. Does not import torch."""

import csv
import gzip
import io
import json
import logging
import math
import os
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizer.errors import InputError

# byte order marks; that of UTF-32 begins with that of UTF-16
MARKS = {
    b"\xef\xbb\xbf": "utf-8-sig",
    b"\xff\xfe\0\0": "utf-32",
    b"\0\0\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
Convert = Callable[[Any], Any]  # a cell to its value; raises ValueError with what was expected

logger = logging.getLogger(__name__)


class TableError(InputError):
    """A file of rows that cannot be read; the message names the file and the row."""


def read_table(file: str | Path, columns: Mapping[str, Convert]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a file, each with its place for messages ("manifest.csv, row 2 (line 3)") and the named columns.

    A .csv file has a header; any other file one JSON object per line, and row 2 is line 2. Blank lines are skipped,
    other columns ignored. A cell that is missing is None to its converter. Raises TableError for the first bad row.
    """
    yield from convert_rows(read_text(file), str(file), columns)


def convert_rows(text: str, file: str, columns: Mapping[str, Convert]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of `text`, which was read from `file`, as in `read_table`."""
    ignored: dict[str, None] = {}
    for place, cells in (_csv_rows if file.lower().endswith(".csv") else json_rows)(file, text):
        row = {}
        for name, convert in columns.items():
            try:
                row[name] = convert(cells.get(name))
            except (ValueError, OverflowError) as error:
                expected = "a smaller number" if isinstance(error, OverflowError) else error
                found = (
                    f"{name} is {shown(cells[name])}"
                    if name in cells
                    else f"no {name} (there is {', '.join(cells) or 'nothing'})"
                )
                raise TableError(f"{place}: {found}, expected {expected}") from error
        if not cells.keys() <= columns.keys():
            ignored.update(dict.fromkeys(cells))
        yield place, row
    if unread := [name for name in ignored if name not in columns]:
        logger.info("%s: columns that are not read: %s", file, ", ".join(unread))


def json_rows(file: str, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The JSON objects in the lines of `text`, which was read from `file`, each with its place."""
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines, which also splits at what texts may hold
        if not line or line.isspace():
            continue
        place = f"{file}, row {number}"
        try:
            cells = json.loads(line)
        except json.JSONDecodeError as error:
            message = f"{place}: not JSON ({error.msg} at character {error.colno}), expected one JSON object per line"
            raise TableError(message) from error
        except (ValueError, RecursionError) as error:  # numbers of thousands of digits, thousands of brackets
            raise TableError(f"{place}: not JSON that can be read ({error})") from error
        if not isinstance(cells, dict):
            raise TableError(f"{place}: found {shown(cells)}, expected one JSON object per line")
        yield place, cells


def _csv_rows(file: str, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True)
    header: list[str] = []
    number, line = 0, 1
    while True:
        place = f"{file}, row {number} (line {line})" if header else f"{file}, header"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            message = f"{place}: not CSV ({error}): close every quote, and double those within a quoted cell"
            raise TableError(message) from error
        if cells is None:
            return
        line = reader.line_num + 1
        if not any(cell.strip() for cell in cells):  # a blank line, or one of commas only
            continue
        if not header:
            header = [cell.strip() for cell in cells]
            if repeated := [name for name in header if header.count(name) > 1]:
                raise TableError(f"{place}: column {repeated[0]} occurs more than once")
        else:
            _require_whole_row(place, header, cells)
            yield place, dict(zip(header, cells, strict=True))
        number += 1


def _require_whole_row(place: str, header: list[str], cells: list[str]) -> None:
    if len(cells) != len(header):
        raise TableError(
            f"{place}: {len(cells)} cells, expected {len(header)} ({', '.join(header)}): put a text that holds a comma "
            'into double quotes, "yes, please"'
        )
    for name, cell in zip(header, cells, strict=True):
        lines = cell.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        if any("," in line for line in lines[1:]):  # a quote left open makes one cell of the rows up to the next quote
            raise TableError(
                f"{place}: {name} goes on for {len(lines)} lines with commas: close the quote that it opens, or write "
                "it in one line"
            )


def read_text(file: str | Path) -> str:
    """The text of a file in UTF-8, or in UTF-16 or UTF-32 with a byte order mark. Raises TableError for any other."""
    return decode(Path(file).read_bytes(), str(file))


def decode(content: bytes, file: str) -> str:
    """`content`, which was read from `file`, as text; see `read_text`."""
    encoding = next((name for mark, name in MARKS.items() if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise _undecodable(file, content.count(b"\n", 0, error.start) + 1, error) from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise TableError(f"{file}, line {line}: a NUL character: the file is damaged, or not UTF-8; save it as UTF-8")
    return text


def _undecodable(file: str, line: int, error: UnicodeDecodeError) -> TableError:
    found = error.object[error.start : error.start + 1].hex()
    return TableError(
        f"{file}, line {line}: byte {found} is not {error.encoding.upper()}: save the file as UTF-8, for example with "
        "iconv -f WINDOWS-1252 -t UTF-8 if it comes from Windows"
    )


def read_lines(file: str | Path) -> list[str]:
    """The lines of a text file, without their ends; empty ones are kept. Raises TableError as `read_text`."""
    return [line.rstrip("\n") for line in io.StringIO(read_text(file), newline=None)]


def require_utf8(file: str | Path) -> None:
    """Raise TableError unless a text file, .gz or not and of any size, is whole and UTF-8 without NUL characters."""
    try:
        with gzip.open(file) if str(file).endswith(".gz") else open(file, "rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    decoded = line.decode()
                except UnicodeDecodeError as error:
                    raise _undecodable(str(file), number, error) from error
                if "\0" in decoded:
                    raise TableError(f"{file}, line {number}: a NUL character, expected text in UTF-8")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise TableError(f"{file}: not a whole gzip file ({error}): fetch it again") from error


def refuse_repeats(places: Iterable[str], values: Collection[str], what: str, mend: str) -> None:
    """Raise TableError that names both places of the first value that occurs twice."""
    if len(set(values)) == len(values):
        return
    first: dict[str, str] = {}
    for place, value in zip(places, values, strict=True):
        if value in first:
            raise TableError(f"{place}: {what} {shown(value)} is that of {first[value]}, too: {mend}")
        first[value] = place


def shown(value: object) -> str:
    """A value in a message, cut where it is long."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def optional_text(cell: Any) -> str | None:
    """Text, None for an empty or missing cell; a number, such as a speaker's, as its digits."""
    if isinstance(cell, str):
        if not cell.isascii() or "\0" in cell:
            _require_characters(cell)
        return cell if cell and not cell.isspace() else None
    if cell is None:
        return None
    if isinstance(cell, bool) or not isinstance(cell, int | float) or not math.isfinite(cell):
        raise ValueError("text")
    return str(int(cell) if cell == int(cell) else cell)  # pandas writes 84.0 where a column has gaps


def optional_name(cell: Any) -> str | None:
    """As `optional_text`, without spaces around it."""
    found = optional_text(cell)
    return found and found.strip()


def required_text(cell: Any) -> str:
    """Text, which may be empty, but not missing."""
    if cell is None:
        raise ValueError("text")
    return optional_text(cell) or ""


def required_name(cell: Any) -> str:
    """Text that is neither missing nor empty."""
    found = optional_name(cell)
    if found is None:
        raise ValueError("text that is not empty")
    return found


def required_path(cell: Any) -> str:
    """As `required_name`; bytes of a file name that are not UTF-8 may stand there as Python reads them (surrogates)."""
    if not isinstance(cell, str):
        raise ValueError("the name of a file")
    if cell.isascii() or "\0" in cell:
        return required_name(cell)
    try:
        os.fsencode(cell)
    except UnicodeEncodeError as error:
        raise ValueError("the name of a file") from error
    return cell.strip()


def positive_seconds(cell: Any) -> float:
    """A duration in s."""
    try:
        value = float("nan" if isinstance(cell, bool) or cell is None else cell)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not 0 < value < math.inf:
        raise ValueError("seconds above 0, such as 1.5")
    return value


def _require_characters(cell: str) -> None:
    """Raise ValueError for what no text in UTF-8 holds: half characters (surrogates) and NUL."""
    try:
        cell.encode()
    except UnicodeEncodeError as error:
        raise ValueError("whole characters (no lone surrogates)") from error
    if "\0" in cell:
        raise ValueError("text without NUL characters")
