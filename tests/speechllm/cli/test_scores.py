"""`speechllm wer` and `compare`: what belongs together is matched, what does not is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from speechllm.cli.main import main

Capture = pytest.CaptureFixture[str]
SAID = "61-70968-0000 THE CAT SAT\n61-70968-0001 ON A MAT\n"  # in LibriSpeech's form


@pytest.fixture
def wer(tmp_path: Path, capsys: Capture) -> Callable[..., tuple[int, str, str]]:
    """Score two files with these contents: exit code, stdout, stderr without the folder."""

    def score(reference: str | bytes, hypothesis: str | bytes, *words: str) -> tuple[int, str, str]:
        for name, content in {"said": reference, "heard": hypothesis}.items():
            (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
        code = main(["wer", str(tmp_path / "said"), str(tmp_path / "heard"), *words])
        printed = capsys.readouterr()
        return code, printed.out, printed.err.replace(f"{tmp_path}/", "")

    return score


@pytest.mark.parametrize(
    "said, heard",
    [
        ("b\tTHE CAT SAT\na\tON A MAT\n", "a\ton the mat\nb\tthe cat sat\n"),
        ("b.flac\tTHE CAT SAT\na.flac\tON A MAT\n", "x/a.wav\ton the mat\n\nx/b.wav\tthe cat sat\n"),
        ("v1.b\tTHE CAT SAT\nv1.a\tON A MAT\n", "x/v1.a.wav\ton the mat\nx/v1.b.wav\tthe cat sat\n"),
        (SAID, "x/61-70968-0001.flac\ton the mat\nx/61-70968-0000.flac\tthe cat sat\n"),
        (SAID, "61-70968-0001 on the mat\n61-70968-0000 the cat sat\n"),
        ("b THE CAT SAT\na ON A MAT\n", "a.wav\ton the mat\nb.wav\tthe cat sat\n"),
    ],
)
def test_lines_with_names_are_matched_by_name(wer: Callable, said: str, heard: str) -> None:
    code, out, err = wer(said, heard)
    assert code == 0 and out.startswith("WER 16.67% ") and "in 6 words of 2 utterances" in out
    assert err == "2 utterances matched by name\n"


def test_a_file_that_was_recognised_as_nothing_counts_as_deletions(wer: Callable) -> None:
    code, out, _ = wer("a\tone two\nb\tthree\n", "b\tthree\na\t\n")
    assert code == 0 and "0 substitutions, 2 deletions, 0 insertions in 3 words of 2" in out


@pytest.mark.parametrize(
    "said, heard, message",
    [
        ("the cat\n", "a.wav\tthe cat\n", "each line of heard begins with a name, those of said do not: give both"),
        ("a\tthe cat\n", "the cat\n", "each line of said begins with a name, those of heard do not: give both files"),
        (SAID, "the cat sat\non a mat\n", "each line of said begins with a name, those of heard do not"),
        ("a\tx\nb\ty\n", "a\tx\n", "1 are only in said (b): give both files the same utterances"),
        ("a\tx\n", "a\tx\nc\ty\n", "1 are only in heard (c): give both"),
        ("a\tx\nb\ty\n", "a\tx\na\ty\nb\ty\n", "heard: a stands in line 1 and in line 2: keep one of them"),
        ("a\tx\nb\ty\n", "a x\nb y\nb z\n", "heard: b stands in line 2 and in line 3: keep one of them"),
        ("x/a.wav\tx\ny/a.wav\ty\n", "a\tx\n", "2 are only in said (x/a.wav, y/a.wav)"),
        (
            "a\tx\nb y\n",
            "a\tx\nb\ty\n",
            "said: line 1 holds a tab, line 2 does not: expected a name, a tab and a text on",
        ),
        ("a\nb\n", "a\n", "said has 2 lines, heard has 1: there must be one line per utterance in both, an empty one"),
        ("a\n", b"caf\xe9\n", "heard, line 1: byte e9 is not UTF-8: save the file as UTF-8"),
        ("a\n", "a\n".encode("utf-16-le"), "heard, line 1: a NUL character"),
        ("...\n", "a\n", "the references contain no words"),
        ("", "", "the references contain no words"),
    ],
)
def test_files_that_do_not_belong_together_are_refused(wer: Callable, said: str, heard: str, message: str) -> None:
    code, out, err = wer(said, heard)
    assert code == 1 and out == "" and len(err.splitlines()) == 1 and message in err


@pytest.mark.parametrize(
    "heard",
    [
        b"\xef\xbb\xbfthe cat\r\non a mat\r\n",
        "\ufeffthe cat\non a mat\n".encode("utf-16-le"),
        b"the cat\non a mat",
        b"the cat\non a mat\n\n  \n",
        b"the cat\ron a mat\r",
    ],
)
def test_marks_line_ends_and_blank_lines_at_the_end_do_not_count(wer: Callable, heard: bytes) -> None:
    code, out, _ = wer("the cat\non a mat\n", heard, "--normalizer", "none")
    assert code == 0 and out.startswith("WER 0.00% ") and "in 5 words of 2 utterances" in out


def test_a_blank_line_between_others_is_an_utterance(wer: Callable) -> None:
    code, out, _ = wer("a\n\nb\n", "a\nc\nb\n")
    assert code == 0 and out.startswith("WER 50.00% ") and "of 3 utterances, 1 of them with a reference without" in out


def test_the_cer_leads_where_there_are_no_spaces(wer: Callable) -> None:
    lines = wer("今天天气很好\n", "今天天汽 很好\n")[1].splitlines()
    assert lines[0].startswith("CER 16.67% ") and "characters of 1 utterances" in lines[0]
    assert "the rate to go by" in lines[0] and lines[1].startswith("WER ")


def test_the_help_says_the_format(capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        main(["wer", "--help"])
    assert "as `speechllm transcribe` prints it" in " ".join(capsys.readouterr().out.split())


# ---- compare


@pytest.fixture
def compare(tmp_path: Path, capsys: Capture) -> Callable[..., tuple[int, str, str]]:
    """Compare predictions, rows of (id, reference, hypothesis), in folders with these results.json."""

    def run(a: list[tuple], b: list[tuple], *words: str, results: tuple[dict, dict] = ({}, {})) -> tuple[int, str, str]:
        for name, rows, found in zip("ab", (a, b), results, strict=True):
            (tmp_path / name).mkdir(exist_ok=True)
            lines = [json.dumps(dict(zip(("id", "reference", "hypothesis"), row, strict=True))) for row in rows]
            (tmp_path / name / "p.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
            (tmp_path / name / "results.json").write_text(json.dumps(found), encoding="utf-8")
        code = main(["compare", *(str(tmp_path / name / "p.jsonl") for name in "ab"), *words])
        printed = capsys.readouterr()
        return code, printed.out, printed.err.replace(f"{tmp_path}/", "")

    return run


ROWS = [("u1", "The cat.", "the cat"), ("u2", "A mat", "a hat")]


@pytest.mark.parametrize(
    "row, message",
    [
        (
            ("u1", "The cat.", ""),
            "b/p.jsonl, row 3: id 'u1' is that of b/p.jsonl, row 1, too: give one prediction for each",
        ),
        (("u3", "x", None), "b/p.jsonl, row 3: hypothesis is "),
        ((["u"], "x", "y"), "row 3: id is ['u'], expected text"),
        (("u3", [5.0], "y"), "row 3: reference is [5.0], expected text"),
    ],
)
def test_rows_that_cannot_be_compared_are_named(compare: Callable, row: tuple, message: str) -> None:
    code, out, err = compare(ROWS, [*ROWS, row])
    assert code == 1 and out == "" and message in err


def test_the_normalizer_is_the_one_of_the_results(compare: Callable) -> None:
    librispeech, none = {"normalizer": "librispeech"}, {"normalizer": "none"}
    assert "normaliser none" in compare(ROWS, ROWS, results=(none, none))[1]
    code, _, err = compare(ROWS, ROWS, results=(librispeech, none))
    assert code == 1 and "different normalisers (a/p.jsonl by librispeech, b/p.jsonl by none): choose one with" in err
    assert compare(ROWS, ROWS, "--normalizer", "none", results=(librispeech, none))[0] == 0


def test_references_that_were_stored_normalised_are_compared_by_that_normalizer(compare: Callable) -> None:
    stored = [("u1", "the cat", "the cat"), ("u2", "a mat", "a mat")]
    old = {"normalizer": "librispeech", "encoded": {"normalizer": "librispeech"}}
    code, out, _ = compare(stored, ROWS, results=(old, {"normalizer": "librispeech"}))
    assert code == 0 and "difference +25.00%" in out  # the texts are the same after the normaliser
    code, _, err = compare(stored, ROWS, "--normalizer", "none", results=(old, {}))
    assert code == 1 and "of which none cannot be made: choose --normalizer librispeech" in err


def test_characters_are_compared_where_there_are_no_spaces(compare: Callable) -> None:
    a, b = [("u", "今天天气很好", "今天天汽很好")], [("u", "今天天气很好", "今天 天气很好")]
    lines = compare(a, b)[1].splitlines()
    assert lines[1].startswith("A: CER 16.67%") and lines[2].startswith("B: CER 0.00%")
    assert lines[3].startswith("B - A: difference -16.67%") and lines[3].endswith("normaliser librispeech)")
