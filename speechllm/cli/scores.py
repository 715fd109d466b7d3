"""The commands that score transcripts: what two text files or two files of predictions hold, utterance by utterance."""

import argparse
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path, PurePath

from tokenizer.errors import InputError
from tokenizer.files import read_json
from tokenizer.tables import TableError, read_lines, read_table, refuse_repeats, required_name, required_text

FORMATS = (
    "One utterance a line: its text alone, and then line 1 of one file belongs to line 1 of the other; or its name, a "
    "tab and its text, as `speechllm transcribe` prints it, and then lines are matched by name (the folder and suffix "
    "of a file may differ). LibriSpeech's NAME TEXT is recognised, too."
)
NAME = re.compile(r"(?=\S*\d)\S*[-_/]\S*")  # how utterances are called in files without tabs
Named = dict[str, str]


def score_files(arguments: argparse.Namespace) -> int:
    """Print the word error rate of two text files; the character error rate, too, where it leads or is asked for."""
    from speechllm.evaluation.error_rates import character_errors, word_error_rate
    from speechllm.evaluation.scripts import primary_rate

    references, hypotheses = read_pairs(arguments.reference, arguments.hypothesis)
    texts = references, hypotheses, arguments.normalizer
    if primary_rate(references) == "cer":
        found = character_errors(*texts).describe("CER", "characters")
        print(f"{found}, the rate to go by: most of these texts are written without spaces")
    print(word_error_rate(*texts))
    if arguments.characters and primary_rate(references) == "wer":
        print(f"CER {character_errors(*texts).wer:.2%}")
    return 0


def compare_files(arguments: argparse.Namespace) -> int:
    """Print the error rate of both files and how sure the difference, B minus A, is."""
    from speechllm.evaluation.error_rates import character_errors, paired_bootstrap, word_error_rate
    from speechllm.evaluation.normalizers import find_normalizer
    from speechllm.evaluation.scripts import primary_rate, spell

    files = [
        str(place / "predictions.jsonl" if place.is_dir() else place) for place in map(Path, (arguments.a, arguments.b))
    ]
    normalizer = arguments.normalizer or _common_normalizer(*files)
    normalize = find_normalizer(normalizer)
    for file in files:
        _require_texts(file, normalizer)
    a, b = map(_predictions, files)
    shared = a.keys() & b.keys()
    _require_same(
        {
            f"are only in {files[0]}": a.keys() - b.keys(),
            f"are only in {files[1]}": b.keys() - a.keys(),
            "have another reference": [name for name in shared if normalize(a[name][0]) != normalize(b[name][0])],
        },
        "give predictions for the same splits of one corpus",
    )
    references = [reference for reference, _ in a.values()]
    texts_a, texts_b = [text for _, text in a.values()], [b[name][1] for name in a]
    if primary_rate(references) == "cer":
        print("Most of these texts are written without spaces: characters are compared")
        for name, texts in {"A": texts_a, "B": texts_b}.items():
            print(f"{name}: {character_errors(references, texts, normalizer).describe('CER', 'characters')}")
        said, spelled_a, spelled_b = (spell(texts, normalizer) for texts in (references, texts_a, texts_b))
        difference = paired_bootstrap(said, spelled_a, spelled_b, "none")
        print(f"B - A: {replace(difference, normalizer=normalizer)}")
        return 0
    print(f"A: {word_error_rate(references, texts_a, normalizer)}")
    print(f"B: {word_error_rate(references, texts_b, normalizer)}")
    print(f"B - A: {paired_bootstrap(references, texts_a, texts_b, normalizer)}")
    return 0


def read_pairs(reference: str, hypothesis: str) -> tuple[list[str], list[str]]:
    """References and hypotheses of two files in one of the `FORMATS`, in the order of the references.

    Raises InputError for files that do not belong together.
    """
    lines = {file: read_lines(file) for file in (reference, hypothesis)}
    references, hypotheses = (_named(file, lines[file]) for file in (reference, hypothesis))
    if references is None and hypotheses is not None:
        references = _named_as(reference, lines[reference], hypotheses)
    elif hypotheses is None and references is not None:
        hypotheses = _named_as(hypothesis, lines[hypothesis], references)
    if references is not None and hypotheses is not None:
        return _matched(reference, references, hypothesis, hypotheses)
    if references is not None or hypotheses is not None:
        named, other = (reference, hypothesis) if hypotheses is None else (hypothesis, reference)
        raise InputError(
            f"each line of {named} begins with a name, those of {other} do not: give both files names, or neither "
            f"(cut -f2 {named} leaves the texts behind tabs)"
        )
    return _same_length(reference, lines[reference], hypothesis, lines[hypothesis])


def _named(file: str, lines: list[str]) -> Named | None:
    """Texts by name; None if the lines hold texts alone. Raises InputError if only some have a name, or for doubles."""
    rows = {number: line for number, line in enumerate(lines, 1) if line.strip()}
    tabbed = [number for number, line in rows.items() if "\t" in line]
    if tabbed and len(tabbed) < len(rows):
        without = next(number for number in rows if number not in tabbed)
        raise InputError(
            f"{file}: line {tabbed[0]} holds a tab, line {without} does not: expected a name, a tab and a text on "
            "every line, or texts without tabs"
        )
    pairs = [line.partition("\t") if tabbed else line.strip().partition(" ") for line in rows.values()]
    if not tabbed and (len(pairs) < 2 or not all(NAME.fullmatch(name) for name, *_ in pairs)):
        return None
    return _by_name(file, {number: (name.strip(), text) for number, (name, _, text) in zip(rows, pairs, strict=True)})


def _named_as(file: str, lines: list[str], others: Named) -> Named | None:
    """Texts by name, if each line without tabs begins with one of the names of another file."""
    pairs = {number: line.strip().partition(" ")[::2] for number, line in enumerate(lines, 1) if line.strip()}
    known = others.keys() | {PurePath(name).stem for name in others}
    return _by_name(file, pairs) if pairs and all(name in known for name, _ in pairs.values()) else None


def _by_name(file: str, pairs: dict[int, tuple[str, str]]) -> Named:
    """Texts by name, of lines by number. Raises InputError for a name that stands in two of them."""
    found: dict[str, tuple[int, str]] = {}
    for number, (name, text) in pairs.items():
        if name in found:
            raise InputError(f"{file}: {name} stands in line {found[name][0]} and in line {number}: keep one of them")
        found[name] = number, text
    return {name: text for name, (_, text) in found.items()}


def _matched(reference: str, references: Named, hypothesis: str, hypotheses: Named) -> tuple[list[str], list[str]]:
    """Texts by name from two files, paired by the name as it is or else without folder and suffix."""
    a, b = references, hypotheses
    for also_a in (False, True):  # an id may hold a dot, so that its last part looks like a suffix
        short_a = {_stem(name): text for name, text in references.items()} if also_a else references
        short_b = {_stem(name): text for name, text in hypotheses.items()}
        whole = (len(short_a), len(short_b)) == (len(references), len(hypotheses))  # no two names became one
        if whole and len(short_a.keys() & short_b.keys()) > len(a.keys() & b.keys()):
            a, b = short_a, short_b
    absent = {f"are only in {reference}": a.keys() - b.keys(), f"are only in {hypothesis}": b.keys() - a.keys()}
    _require_same(absent, "give both files the same utterances")
    print(f"{len(a)} utterances matched by name", file=sys.stderr)
    return list(a.values()), [b[name] for name in a]


def _stem(name: str) -> str:
    return PurePath(name).stem


def _same_length(reference: str, a: list[str], hypothesis: str, b: list[str]) -> tuple[list[str], list[str]]:
    """Both lists, without blank lines at the end of the longer one. Raises InputError if their lengths differ then."""
    count = min(len(a), len(b))
    if any(line.strip() for line in a[count:] + b[count:]):
        raise InputError(
            f"{reference} has {len(a)} lines, {hypothesis} has {len(b)}: there must be one line per utterance in both, "
            "an empty one where nothing was recognised"
        )
    return a[:count], b[:count]


def _require_same(differing: Mapping[str, Iterable[str]], mend: str) -> None:
    """Raise InputError that counts and names the utterances by how they differ."""
    named = {what: sorted(ids) for what, ids in differing.items()}
    found = [
        f"{len(ids)} {what} ({', '.join(ids[:3] + ['...'] * (len(ids) > 3))})" for what, ids in named.items() if ids
    ]
    if found:
        raise InputError(f"of the utterances {'; '.join(found)}: {mend}")


def _common_normalizer(*files: str) -> str:
    """The normaliser in the results beside predictions; the default where there are none. InputError if they differ."""
    found = {file: _results(file).get("normalizer") for file in files}
    names = sorted({name for name in found.values() if name})
    if len(names) > 1:
        what = ", ".join(f"{file} by {name}" for file, name in found.items())
        raise InputError(f"these were scored with different normalisers ({what}): choose one with --normalizer")
    return names[0] if names else "librispeech"


def _require_texts(file: str, normalizer: str) -> None:
    """Raise InputError if the references were normalised by another normaliser, as those of pieces of speech are."""
    stored = (_results(file).get("encoded") or {}).get("normalizer", "none")
    if stored not in ("none", normalizer):
        raise InputError(
            f"{file} holds references that were normalised by {stored} when their speech was written, of which "
            f"{normalizer} cannot be made: choose --normalizer {stored}"
        )


def _results(file: str) -> dict:
    return read_json(Path(file).parent / "results.json")


def _predictions(file: str) -> dict[str, tuple[str, str]]:
    """Reference and hypothesis by utterance, as eval_asr writes them."""
    columns = {"id": required_name, "reference": required_text, "hypothesis": required_text}
    rows = [*read_table(file, columns)]
    if not rows:
        raise TableError(f"{file} is empty, expected predictions.jsonl of eval_asr")
    refuse_repeats([place for place, _ in rows], [row["id"] for _, row in rows], "id", "give one prediction for each")
    return {row["id"]: (row["reference"], row["hypothesis"]) for _, row in rows}
