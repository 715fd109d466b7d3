"""Scores: no rate is computed from what is not a list of utterances, and none depends on how an apostrophe is typed."""

import json
from pathlib import Path

from judge import Case, Outcome, accepted, refused
from parts import EVAL_ASR, read_json
from tables import jsonl
from texts import both, predictions

from speechllm.data.shards import open_shard

ZERO = r"\b0\.00 ?%|^0\.0\b"
IMPORTS = "from speechllm import character_error_rate, paired_bootstrap, word_error_rate; "


def python(name: str, code: str, *outcomes: Outcome) -> Case:
    return Case(name, ["python", IMPORTS + code], outcomes)


def alike(name: str, reference: str, hypothesis: str, normalizer: str = "librispeech") -> Case:
    """Two spellings of the same words."""
    code = f"print(word_error_rate([{reference!a}], [{hypothesis!a}], {normalizer!r}).wer == 0)"
    return python(f"{name} ({normalizer})", code, accepted(pattern="True"))


def different(name: str, reference: str, hypothesis: str) -> Case:
    """Two texts of other words."""
    code = f"print(word_error_rate([{reference!a}], [{hypothesis!a}]).wer > 0)"
    return python(name, code, accepted(pattern="True"))


def wer(name: str, reference: str, hypothesis: str, *outcomes: Outcome, options: str = "") -> Case:
    write = both(predictions("a.txt", reference), predictions("b.txt", hypothesis))
    return Case(f"wer of {name}", f"speechllm wer a.txt b.txt {options}", outcomes, "", write)


def stored_raw(folder: Path, _: str) -> bool:
    rows = [row for file in (folder / "new").glob("*.arrow") for row in open_shard(file).to_pylist()]
    return "3.5 Percent, Dr. Smith!" in [row["text"] for row in rows]


def named(*words: str) -> Outcome:
    """The results name what they were scored with, and each split for itself."""

    def check(folder: Path, _: str) -> bool:
        results = (folder / "new" / "results.json").read_text()
        return all(word in results for word in words)

    return accepted(check)


def split_rates(folder: Path, _: str) -> bool:
    """Somewhere in the results each split has a rate of its own."""
    results = read_json(folder / "new" / "results.json")
    parts = [value for value in results.values() if isinstance(value, dict) and {"dev", "test"} <= value.keys()]
    return bool(parts) and "wer" in json.dumps(parts[0])


WITHOUT_TEXTS = (
    "import json, pathlib; file = pathlib.Path('mine/manifest.jsonl'); rows = map(json.loads, open(file)); "
    "file.write_text(''.join(json.dumps({**row, 'text': None}) + chr(10) for row in [*rows]))"
)
THIRD = "0.33"
CASES = (
    python(
        "texts for lists of utterances",
        'print(word_error_rate("the cat sat", "the bat sat").wer)',
        refused("list|sequence|str"),
        accepted(pattern=THIRD),
    ),
    python(
        "texts for lists, characters",
        'print(character_error_rate("the cat sat", "the bat sat"))',
        refused("list|sequence|str"),
        accepted(pattern="0.09"),
    ),
    python(
        "texts for lists, bootstrap",
        'print(paired_bootstrap("the cat", "the bat", "the rat"))',
        refused("list|sequence|str"),
    ),
    python("a text for one of the lists", 'print(word_error_rate(["a", "b"], "ab").wer)', refused("list|sequence|str")),
    python("bytes for a list", 'print(word_error_rate(b"ab", b"ab").wer)', refused("list|sequence|str|bytes")),
    python("None among the hypotheses", 'print(word_error_rate(["a", "b"], ["a", None]).wer)', refused("None")),
    python(
        "a number among the references", 'print(word_error_rate(["a", 5], ["a", "b"]).wer)', refused("5|int|number")
    ),
    python("lists of other lengths", 'print(word_error_rate(["a", "b"], ["a"]).wer)', refused("2 references.*1 hyp")),
    python(
        "empty lists", "print(word_error_rate([], []).wer)", refused("no (words|utterance|reference)|empty|nothing")
    ),
    python(
        "references without words",
        'print(word_error_rate(["", "..."], ["a", "b"]).wer)',
        refused("no words|without words|nothing"),
    ),
    python(
        "one reference without words",
        'print(word_error_rate(["one", "..."], ["one", "b"]))',
        accepted(pattern="without|empty|no words|insert|1 ins|1 utt"),
    ),
    python(
        "an unknown normaliser",
        'print(word_error_rate(["a"], ["a"], "whisper").wer)',
        refused("whisper.*(librispeech|choose)"),
    ),
    python("lists of lists", 'print(word_error_rate([["a", "b"]], [["a", "b"]]).wer)', refused("list|str|text")),
    python(
        "generators",
        'print(word_error_rate((w for w in ["a"]), (w for w in ["a"])).wer)',
        accepted(pattern="0"),
        refused("list|sequence"),
    ),
    # ---- spellings
    alike("a right single quote", "don't", "don\u2019t"),
    alike("a left single quote", "don't", "don\u2018t"),
    alike("a modifier apostrophe", "don't", "don\u02bct"),
    alike("a full-width apostrophe", "don't", "don\uff07t"),
    alike("an acute accent for an apostrophe", "don't", "don\u00b4t"),
    alike("a prime for an apostrophe", "don't", "don\u2032t"),
    alike("quotes around a word", "yes", "'yes'"),
    alike("typographic quotes around a word", "yes", "\u2018yes\u2019"),
    alike("a soft hyphen", "coordinate", "co\u00adordinate"),
    alike("a zero-width space", "yes sir", "yes\u200b sir"),
    alike("a zero-width joiner", "yes", "y\u200des"),
    alike("a byte order mark in a text", "yes", "\ufeffyes"),
    alike("a ligature", "find the office", "\ufb01nd the o\ufb03ce"),
    alike("full width", "abc 12", "\uff41\uff42\uff43 \uff11\uff12"),
    alike("an accent of its own", "caf\u00e9", "cafe\u0301"),
    alike("a space that does not break", "one two", "one\u00a0two"),
    alike("an ideographic space", "one two", "one\u3000two"),
    alike("a dash", "well known", "well\u2014known"),
    alike("an ellipsis", "well known", "well\u2026 known"),
    alike("a line separator", "one two", "one\u2028two"),
    alike("Turkish letters stay one word", "DO\u011eRU", "do\u011fru"),
    alike("3.5 percent against itself", "3.5 percent", "3.5 percent", "whisper_english"),
    alike("a plural possessive", "the dogs' house", "the dogs\u2019 house"),
    different("an accent that is missing", "r\u00e9sum\u00e9", "resume"),
    different("a word that is missing", "one two", "one"),
    different("another number", "12", "13"),
    # ---- speechllm wer
    wer(
        "what speechllm transcribe prints, against itself",
        "a.wav\tone two\nb.wav\tthree",
        "x/a.wav\tone two\nx/b.wav\tthree",
        accepted(pattern=ZERO),
        refused("tab|file name|transcribe"),
    ),
    wer(
        "plain references and what speechllm transcribe prints",
        "one two\nthree",
        "a.wav\tone two\nb.wav\tthree",
        accepted(pattern=ZERO),
        refused("tab|file name|transcribe"),
    ),
    wer(
        "a language without spaces",
        "\u4f60\u597d\u4e16\u754c\n\u8c22\u8c22\u4f60",
        "\u4f60\u597d\u4e16\u754c\n\u8c22\u8c22\u60a8",
        accepted(pattern="CER"),
        options="--normalizer none",
    ),
    wer("references without words", "\n", "a\nb", refused("no words|nothing|without words")),
    wer("empty files", "", "", refused("no words|nothing|empty")),
    wer("texts by an unknown normaliser", "a", "a", refused("librispeech"), options="--normalizer whisper"),
    # ---- recipes
    Case(
        "texts are stored as they are",
        "encode_speech.py codec=tokenizer/model data=mine output=new",
        accepted(stored_raw),
        "tokenizer",
        jsonl({"path": "u2.wav", "duration_s": 0.5, "text": "3.5 Percent, Dr. Smith!"}),
    ),
    Case(
        "both normalisers are named in the results",
        f"{EVAL_ASR} normalizer=whisper_english output=new",
        named("whisper_english", "librispeech"),
        "asr codes",
    ),
    Case(
        "several splits have rates of their own",
        f"{EVAL_ASR} splits=[dev,test] output=new",
        accepted(split_rates),
        "asr codes",
    ),
    Case(
        "a split without transcripts",
        "eval_asr.py model=asr/model codes=new output=new_results",
        refused("transcript"),
        "asr tokenizer",
        jsonl(),
        (
            ["python", WITHOUT_TEXTS],
            "encode_speech.py codec=tokenizer/model data=mine layers=null output=new",
        ),
    ),
    Case(
        "eval_asr on a split that is not there",
        f"{EVAL_ASR} splits=[nowhere] output=new",
        refused("nowhere.*(has|train)"),
        "asr codes",
    ),
    Case(
        "eval_tokenizer with a probe on its training split",
        "eval_tokenizer.py codes=codes data=corpus probe_steps=5 output=new.json",
        refused("overlap|tested on"),
        "codes corpus",
    ),
    Case(
        "eval_tokenizer on another corpus",
        "eval_tokenizer.py codes=codes data=actors output=new.json",
        refused("corpus|utterance|u00|not in"),
        "codes actors",
    ),
    Case(
        "eval_conversion with one speaker",
        "eval_conversion.py codec=tokenizer/model data=mine output=new",
        refused("speaker|pair"),
        "tokenizer",
        jsonl({"path": "u2.wav", "duration_s": 0.5, "text": "ONE TWO", "speaker": "s0"}, name="manifest.jsonl"),
        then=lambda at: (at / "mine/manifest.jsonl").write_text(
            (at / "mine/manifest.jsonl").read_text().replace("s1", "s0")
        ),
    ),
)
