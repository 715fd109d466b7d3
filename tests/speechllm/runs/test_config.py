"""Configurations: types, nesting, near misses, everything wrong at once, and the command line."""

import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Literal

import pytest
import yaml

from speechllm import ConfigError
from speechllm.runs.config import find_config, load_config, override, parse_config, shipped
from speechllm.runs.recipe import run_recipe
from tokenizer.settings import Corpus, Count, Names, Positive, Seed, Settings


@dataclass
class Encoder(Settings):
    width: Count = 32
    strides: tuple[int, ...] = (2, 4)
    kind: Literal["seanet", "log_mel"] = "seanet"

    def contradictions(self) -> Iterable[str]:
        if self.width > 99 and self.kind == "log_mel":
            yield "width must be at most 99 for kind: log_mel"


@dataclass
class Job(Settings):
    data: str  # where the speech is
    steps: Count = 100  # optimizer steps
    rate: Positive = 1e-4
    fresh: bool = False
    splits: Names | None = None
    seeds: list[Seed] = field(default_factory=lambda: [0])
    layer: int | Literal["avg"] = "avg"
    precision: Literal["no", "bf16"] = "bf16"
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])  # of AdamW
    model: str | None = "owner/model"
    encoder: Encoder = field(default_factory=Encoder)


def load(*overrides: str, text: str | None = None, folder: Path | None = None) -> Job:
    if text is None:
        return load_config(Job, None, ["data=x", *overrides])
    file = folder / "job.yaml"
    file.write_text(text, encoding="utf-8")
    return load_config(Job, file, overrides)


def problems(*overrides: str, **more: object) -> list[str]:
    """The lines after the headline, which must count them."""
    with pytest.raises(ConfigError) as error:
        load(*overrides, **more)
    headline, *lines = str(error.value).split("\n")
    assert headline.startswith(f"{len(lines)} problem(s) in the configuration")
    return [line.strip() for line in lines]


# ---- values


def test_what_is_not_given_has_its_default() -> None:
    assert load() == Job(
        "x", 100, 1e-4, False, None, [0], "avg", "bf16", [0.9, 0.99], "owner/model", Encoder(32, (2, 4), "seanet")
    )


def test_a_file_fills_every_kind_of_key(tmp_path: Path) -> None:
    text = """
    data: speech          # comment
    steps: 7
    rate: 3
    fresh: true
    splits: [train, dev]
    layer: -1
    precision: "no"
    betas: [0.5, 1]
    encoder: {width: 4, strides: [3, 5, 7], kind: log_mel}
    """
    config = load(text=text, folder=tmp_path)
    assert config == Job(
        *("speech", 7, 3.0, True, ["train", "dev"], [0], -1, "no", [0.5, 1.0], "owner/model"),
        Encoder(4, (3, 5, 7), "log_mel"),
    )
    assert type(config.rate) is float and type(config.betas[1]) is float


@pytest.mark.parametrize("text", ["2e-4", "2E-4", "0.0002", "2.0e-4", "+2e-4"])
def test_a_small_number_is_read_as_people_write_it(tmp_path: Path, text: str) -> None:
    assert load(f"rate={text}").rate == 2e-4
    assert load(text=f"data: x\nrate: {text}", folder=tmp_path).rate == 2e-4


def test_reading_numbers_so_leaves_yaml_itself_alone() -> None:
    assert yaml.safe_load("2e-4") == "2e-4"


def test_overrides_win_over_the_file_and_later_ones_over_earlier(tmp_path: Path) -> None:
    config = load(
        "steps=8", "steps=9", "encoder.width=5", text="data: x\nsteps: 7\nencoder: {kind: log_mel}", folder=tmp_path
    )
    assert (config.steps, config.encoder) == (9, Encoder(5, (2, 4), "log_mel"))


@pytest.mark.parametrize(
    "override, key, value",
    [
        ("splits=[a, b]", "splits", ["a", "b"]),
        ("splits=null", "splits", None),
        ("layer=avg", "layer", "avg"),
        ("layer=3", "layer", 3),
        ("fresh=true", "fresh", True),
        ("data=a=b", "data", "a=b"),
        ("data='3'", "data", "'3'"),
        ("data=[a", "data", "[a"),
        ("splits=train-clean-100", "splits", ["train-clean-100"]),
        ("splits=a, b", "splits", ["a", "b"]),
        ("splits=2026-11-28,1e3", "splits", ["2026-11-28", "1e3"]),
        ("splits=[2026-11-28, 010, 'a, b', \"c #1\"]", "splits", ["2026-11-28", "010", "a, b", "c #1"]),
        ("splits=[x].txt", "splits", ["[x].txt"]),
        ("seeds=3", "seeds", [3]),
        ("seeds=[1,2]", "seeds", [1, 2]),
        ("model=null", "model", None),
        ("data=null", "data", "null"),  # a key that must have a value takes the word as it is
        ("model=~", "model", str(Path.home())),
        ("encoder.strides=2,4", "encoder", Encoder(32, (2, 4))),
        ("encoder={width: 4, kind: log_mel}", "encoder", Encoder(4, kind="log_mel")),
    ],
)
def test_one_word_sets_one_key(override: str, key: str, value: object) -> None:
    assert getattr(load(override), key) == value


def test_no_is_a_word_where_it_is_a_choice(tmp_path: Path) -> None:
    assert load("precision=no").precision == "no"
    assert load(text="data: x\nprecision: no", folder=tmp_path).precision == "no"


def test_null_takes_a_list_away_that_the_file_gives(tmp_path: Path) -> None:
    assert load("splits=null", text="data: x\nsplits: [a]", folder=tmp_path).splits is None


@pytest.mark.parametrize("text", ["", "# nothing\n"])
def test_an_empty_file_is_no_mistake(tmp_path: Path, text: str) -> None:
    assert load("data=x", text=text, folder=tmp_path) == load()


NAMES = [
    *(
        "/x/exp #2",
        "2026-11-28",
        "12:30",
        "010",
        "1e3",
        "1_000",
        "true",
        "yes",
        "a: b",
        "[x]",
        "{x}",
        "- a",
        "C:\\speech",
    ),
    *(
        "it's",
        '"quoted"',
        "'quoted'",
        "a, b",
        "a=b",
        "=",
        "a\nb",
        " a ",
        "#",
        "%",
        "&a",
        "*a",
        "!a",
        "|",
        ">",
        "?",
        "@",
        "`",
    ),
    *("\u00e9\u2028\U0001f600", "not \udcff UTF-8", "$HOME", "--fresh", "~no-such-user", "x" * 5000),
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_taken_as_it_is_from_a_word_a_list_and_a_file(tmp_path: Path, name: str) -> None:
    assert load(f"data={name}", f"model={name}").data == load(f"model={name}").model == name
    assert load(override("data", name), override("splits", [name, "b"])) == Job(name, splits=[name, "b"])
    text = override("splits", [name]).replace("=", ": ", 1)
    assert load("data=x", text=text, folder=tmp_path).splits == [name]


@pytest.mark.parametrize(
    "name", ["2026-11-28", "12:30", "010", "1e3", "1_000", "3", "yes", "true", "C:\\speech", "a:b", "a#b"]
)
def test_an_unquoted_name_in_a_file_is_taken_as_it_is_written(tmp_path: Path, name: str) -> None:
    text = f"data: {name}\nsplits: [{name}]\nmodel: {name}  # a comment"
    assert load(text=text, folder=tmp_path) == Job(name, splits=[name], model=name)


@dataclass
class Joined(Settings):
    data: Corpus


def test_a_corpus_is_one_folder_as_it_is_written_or_several_in_brackets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def data(word: str) -> object:
        return load_config(Joined, None, [word]).data

    for name in NAMES:
        if not name.startswith("["):
            assert data(f"data={name}") == name
        assert data(override("data", [name, "b"])) == [name, "b"]
    assert data("data=a,b") == "a,b" and data('data=[a, "b, c", ~/d]') == ["a", "b, c", str(Path.home() / "d")]
    (tmp_path / "file.yaml").write_text("data: [a, b]", encoding="utf-8")
    assert load_config(Joined, tmp_path / "file.yaml").data == ["a", "b"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "[x]").mkdir()
    assert data("data=[x]") == "[x]"  # what is there is meant
    with pytest.raises(ConfigError, match=r"data must be not empty, got \[\]"):
        data("data=[]")


def test_the_home_folder_can_be_written_as_a_tilde(tmp_path: Path) -> None:
    runs = str(Path.home() / "runs")
    assert load("data=~/runs").data == load(text='data: "~/runs"', folder=tmp_path).data == runs
    assert load("splits=~/runs,b").splits == [runs, "b"]


def test_a_file_that_exists_is_one_item_of_a_list(tmp_path: Path) -> None:
    for name in ("a,b.txt", "[a]"):
        (tmp_path / name).touch()
        assert load(f"splits={tmp_path / name}").splits == [str(tmp_path / name)]


@pytest.mark.parametrize(
    "hint, value",
    [
        (int | None, None),
        (bool, True),
        (float, -1e-5),
        (list[str] | None, ["a", "b, c", "#"]),
        (list[list[int]], [[1], [1, 2]]),
        (tuple[float, ...], (0.5,)),
    ],
)
def test_an_override_reads_back_as_the_value_it_was_made_of(hint: type, value: object) -> None:
    assert load_config(make_dataclass("One", [("key", hint)]), None, [override("key", value)]).key == value


@pytest.mark.parametrize("text", ["0.5", ".5", "5e-1", "+.5", "00.5"])
def test_a_number_is_what_can_be_read_in_one_way(text: str) -> None:
    if text == "00.5":
        assert problems(f"rate={text}") == ["rate must be float, got 00.5"]
    else:
        assert load(f"rate={text}").rate == 0.5
    assert load("rate=1.").rate == 1.0 and load("steps=10_000").steps == 10_000


@pytest.mark.parametrize("text", ["data: x\nsteps: 1\n\nsteps: 2\n", "data: x\nencoder:\n  width: 3\n  width: 3\n"])
def test_a_key_that_a_file_gives_twice_is_refused_with_its_line(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"job\.yaml: line 4: (steps|width) is given twice$"):
        load(text=text, folder=tmp_path)


@pytest.mark.parametrize(
    "text", ['data: ""', 'data: "a\\0b"', "data: {x: 1}", "data: [x]", "data: !!binary eA==", "data:"]
)
def test_what_is_no_name_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    assert [line.split(", got")[0] for line in problems(text=text, folder=tmp_path)] == ["data must be str"]


def test_problems_of_sections_are_told_with_those_of_the_rest() -> None:
    assert problems("steps=0", "encoder.width=0", "seeds=-1,0", "rate=x") == [
        "rate must be float, got x",
        "encoder.width must be at least 1, got 0",
        "steps must be at least 1, got 0",
        "seeds[0] must be from 0 to 4294967295, got -1",
    ]
    with pytest.raises(ValueError, match=r"^steps must be at least 1, got 0; rate must be above 0, got nan$"):
        Job("x", steps=0, rate=float("nan"))


def test_a_flag_may_have_a_value_like_a_key(tmp_path: Path) -> None:
    assert parse_config(Job, ["--data=x #1", "--fresh", "--steps=3"]) == Job("x #1", 3, fresh=True)


def test_help_and_names_can_be_printed_where_the_encoding_lacks_their_characters(tmp_path: Path) -> None:
    code = (
        "import sys; from dataclasses import dataclass; from speechllm.runs.config import parse_config\n"
        "@dataclass\nclass One:\n    data: str\n"
        "print(parse_config(One).data)"
    )
    command = [
        sys.executable,
        "-c",
        code.replace("@dataclass", "import inspect; inspect.getsource = lambda _: ''\n@dataclass"),
    ]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "1"}
    for word, printed in (("data=\u00e9", b"\\xe9\n"), (b"data=\xff", b"\\udcff\n")):
        ended = subprocess.run([*command, word], env=environment, capture_output=True)
        assert (ended.returncode, ended.stdout, ended.stderr) == (0, printed, b"")


# ---- mistakes


@pytest.mark.parametrize(
    "override, problem",
    [
        ("steps='3'", "steps must be int, got '3'"),
        ("steps=010", "steps must be int, got 010"),
        ("steps=0x10", "steps must be int, got 0x10"),
        ("steps=12:30", "steps must be int, got 12:30"),
        ("steps=1_0", "steps must be int, got 1_0"),
        ("steps=1e3", "steps must be int, got 1e3"),
        ("steps=\u0663", "steps must be int, got \u0663"),
        (f"steps={'9' * 5000}", f"steps must be int, got {'9' * 5000}"),
        ("steps=0", "steps must be at least 1, got 0"),
        ("rate=nan", "rate must be float, got nan"),
        ("rate=.inf", "rate must be float, got .inf"),
        ("rate=1e999", "rate must be float, got 1e999"),
        ("rate=0,5", "rate must be float, got 0,5"),
        ("rate=0", "rate must be above 0, got 0.0"),
        ("data=", "`data=`: expected a value after =, or null for none"),
        ("--data", "data must be str, got true"),
        ("splits=[]", "splits must be not empty, got []"),
        ("splits=a,,b", 'splits must be a list of str (not empty) or null, got ["a", "", "b"]'),
        ("splits=[a, 'b]", "`splits=[a, 'b]`: line 1: found unexpected end of stream"),
        ("seeds=[0,-1]", "seeds[1] must be from 0 to 4294967295, got -1"),
        ("steps=1.5", "steps must be int, got 1.5"),
        ("steps=true", "steps must be int, got true"),
        ("steps=null", "steps must be int, got null"),
        ("rate='1e-3'", "rate must be float, got '1e-3'"),
        ("rate=true", "rate must be float, got true"),
        ("fresh=1", "fresh must be bool, got 1"),
        ("splits=None", "splits: None is Python's word, write null"),
        ("data=None", "data: None is Python's word, write null"),
        ("fresh=True", "fresh: True is Python's word, write true"),
        ("betas=[None]", "betas[0]: None is Python's word, write null"),
        ("layer=max", "layer must be int or one of avg, got max"),
        ("betas=[0.9, x]", "betas[1] must be float, got x"),
        ("encoder=3", "encoder must be Encoder, got 3"),
        ("encoder.kind=mel", "encoder.kind must be one of seanet, log_mel, got mel"),
        ("encoder.strides=[2, a]", "encoder.strides[1] must be int, got a"),
        ("encoder.width=0", "encoder.width must be at least 1, got 0"),
        ("encoder={width: 100, kind: log_mel}", "encoder.width must be at most 99 for kind: log_mel"),
        ("stepps=3", "unknown key stepps: did you mean steps?"),
        ("encoder.widht=3", "unknown key encoder.widht: did you mean encoder.width?"),
        ("encoder.zzz=3", "unknown key encoder.zzz; known keys: width, strides, kind"),
        ("steps", "`steps`: expected key=value"),
        ("=3", "`=3`: expected key=value"),
        ("rate.x=3", 'rate must be float, got {"x": "3"}'),
    ],
)
def test_a_mistake_is_named_with_what_was_expected(override: str, problem: str) -> None:
    assert problems(override) == [problem]


def test_a_key_of_something_that_is_no_section_is_named(tmp_path: Path) -> None:
    assert "`rate.x=3`: rate is not a section" in problems("rate.x=3", text="data: x\nrate: 1.0", folder=tmp_path)


def test_a_missing_key_is_named_with_its_type() -> None:
    with pytest.raises(ConfigError, match=r"missing key data \(str\)"):
        load_config(Job)


def test_all_mistakes_are_told_at_once_and_the_file_is_named(tmp_path: Path) -> None:
    text = "stepps: 3\nrate: fast\nencoder: {widht: 4, strides: 3}\n"
    with pytest.raises(ConfigError, match="job.yaml"):
        load(text=text, folder=tmp_path)
    assert sorted(problems("wrong", text=text, folder=tmp_path)) == [
        "`wrong`: expected key=value",
        "encoder.strides must be a list of int, got 3",
        "missing key data (str)",
        "rate must be float, got fast",
        "unknown key encoder.widht: did you mean encoder.width?",
        "unknown key stepps: did you mean steps?",
    ]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"- a\n- b\n", "expected lines like `key: value`, got list"),
        (b"just text\n", "expected lines like `key: value`, got str"),
        (b"a: [1\n", "cannot read the configuration"),
        (b"a: \xff\xfe\n", "cannot read the configuration"),
    ],
)
def test_a_file_that_is_no_mapping_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match="bad.yaml") as error:
        load_config(Job, file)
    assert message in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*nowhere\.yaml"):
        load_config(Job, tmp_path / "nowhere.yaml")


# ---- configurations that come with the package


@pytest.mark.parametrize("name", ["asr/small.yaml", "configs/asr/small.yaml"])
def test_a_shipped_configuration_is_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config(name) == shipped("configs") / "asr" / "small.yaml"
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_text("steps: 1\n")
    assert find_config(name) == Path(name)  # one's own comes first


def test_a_misspelt_configuration_is_named_with_the_shipped_one_like_it() -> None:
    with pytest.raises(ConfigError, match=r"configs/asr/smal\.yaml: no such file.* did you mean asr/small\.yaml\?"):
        find_config("configs/asr/smal.yaml")


# ---- the command line


def test_the_command_line_takes_a_file_words_and_flags(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("data: x\nsteps: 3\n")
    assert parse_config(Job, ["--config", str(file), "steps=4", "--fresh"]) == Job("x", 4, fresh=True)
    assert parse_config(Job, [f"--config={file}"]) == Job("x", 3)


@pytest.mark.parametrize(
    "words",
    [
        ["steps=4", "--config", "FILE", "rate=0.5"],
        ["--config", "FILE", "steps=4", "--fresh", "rate=0.5"],
    ],
)
def test_words_may_stand_before_and_behind_flags(tmp_path: Path, words: list[str]) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("data: x\n")
    config = parse_config(Job, [str(file) if word == "FILE" else word for word in words])
    assert (config.steps, config.rate, config.fresh) == (4, 0.5, "--fresh" in words)


def test_a_mistake_on_the_command_line_ends_with_2_and_no_traceback(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        parse_config(Job, ["data=x", "stepps=3"])
    assert end.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "1 problem(s) in the configuration:\n  unknown key stepps: did you mean steps?\n"


def test_check_ends_before_anything_is_done() -> None:
    with pytest.raises(SystemExit) as end:
        parse_config(Job, ["data=x", "--check"])
    assert end.value.code == 0


@pytest.mark.parametrize("shares_work", [True, False])
def test_several_processes_need_a_recipe_that_shares_its_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, shares_work: bool
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    parse_config(Job, ["data=x"])  # a job of several machines, say, not of a launcher here
    monkeypatch.setenv("LOCAL_RANK", "0")
    if shares_work:
        parse_config(Job, ["data=x"], shares_work=True)
        return
    with pytest.raises(SystemExit) as end:
        parse_config(Job, ["data=x"])
    assert end.value.code == 2 and "does not share its work" in capsys.readouterr().err


def test_of_several_processes_the_first_tells_what_all_have_found(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)

    def fail(config: Job) -> None:
        raise ConfigError("wrong")

    for rank, told in (("0", 0), ("1", 2)):  # the launcher ends the others before they have waited
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit, match=r"^error: wrong$"):
            run_recipe(fail, Job("x"))
        with pytest.raises(SystemExit):
            parse_config(Job, ["steps=x"])
        assert len(waited) == told


def help_of(cls: type, capsys: pytest.CaptureFixture) -> str:
    with pytest.raises(SystemExit) as end:
        parse_config(cls, ["--help"])
    assert end.value.code == 0
    return capsys.readouterr().out


def test_help_lists_every_key_with_type_default_and_meaning(capsys: pytest.CaptureFixture) -> None:
    lines = help_of(Job, capsys).splitlines()
    assert "  data: str [required]  where the speech is" in lines
    assert "  steps: int (at least 1) [100]  optimizer steps" in lines
    assert "  splits: a list of str (not empty) or null [null]" in lines and "  fresh: bool [false]" in lines
    assert "  encoder:" in lines and "    width: int (at least 1) [32]" in lines
    assert "    kind: one of seanet, log_mel [seanet]" in lines and "    strides: a list of int [[2, 4]]" in lines


@dataclass
class Encoders(Settings):
    encoders: list[Encoder] | None = None  # each with these keys


def test_help_lists_the_keys_of_the_items_of_a_list(capsys: pytest.CaptureFixture) -> None:
    lines = help_of(Encoders, capsys).splitlines()
    place = lines.index("  encoders: a list of Encoder or null [null]  each with these keys")
    width, strides = "      width: int (at least 1) [32]", "      strides: a list of int [[2, 4]]"
    assert lines[place + 1 : place + 3] == [width, strides]


def test_help_shows_a_default_list(capsys: pytest.CaptureFixture) -> None:
    assert "  betas: a list of float [[0.9, 0.99]]  of AdamW" in help_of(Job, capsys).splitlines()
