"""Configurations: types, nesting, near misses, everything wrong at once, and the command line."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import yaml

from speechllm import ConfigError
from speechllm.runs.config import find_config, load_config, parse_config, shipped
from speechllm.runs.recipe import run_recipe


@dataclass
class Encoder:
    width: int = 32
    strides: tuple[int, ...] = (2, 4)
    kind: Literal["seanet", "log_mel"] = "seanet"

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"width must be positive, got {self.width}")


@dataclass
class Job:
    data: str  # where the speech is
    steps: int = 100  # optimizer steps
    rate: float = 1e-4
    fresh: bool = False
    splits: list[str] | None = None
    layer: int | Literal["avg"] = "avg"
    precision: Literal["no", "bf16"] = "bf16"
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])  # of AdamW
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
    assert load() == Job("x", 100, 1e-4, False, None, "avg", "bf16", [0.9, 0.99], Encoder(32, (2, 4), "seanet"))


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
        "speech", 7, 3.0, True, ["train", "dev"], -1, "no", [0.5, 1.0], Encoder(4, (3, 5, 7), "log_mel")
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
        ("splits=[]", "splits", []),
        ("splits=null", "splits", None),
        ("layer=avg", "layer", "avg"),
        ("layer=3", "layer", 3),
        ("fresh=true", "fresh", True),
        ("data=a=b", "data", "a=b"),
        ("data='3'", "data", "3"),
        ("data=C:\\speech", "data", "C:\\speech"),
        ("data=[a", "data", "[a"),
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


# ---- mistakes


@pytest.mark.parametrize(
    "override, problem",
    [
        ("steps='3'", "steps must be int, got '3'"),
        ("steps=1.5", "steps must be int, got 1.5"),
        ("steps=true", "steps must be int, got true"),
        ("steps=null", "steps must be int, got null"),
        ("rate='1e-3'", "rate must be float, got '1e-3'"),
        ("rate=true", "rate must be float, got true"),
        ("fresh=1", "fresh must be bool, got 1"),
        ("data=3", "data must be str, got 3"),
        ("splits=train", "splits must be a list of str or null, got 'train'"),
        ("splits=[1]", "splits must be a list of str or null, got [1]"),
        ("splits=None", "splits: None is Python's word, write null"),
        ("data=None", "data: None is Python's word, write null"),
        ("fresh=True", "fresh: True is Python's word, write true"),
        ("betas=[None]", "betas[0]: None is Python's word, write null"),
        ("layer=max", "layer must be int or one of avg, got 'max'"),
        ("betas=[0.9, x]", "betas[1] must be float, got 'x'"),
        ("encoder=3", "encoder must be Encoder, got 3"),
        ("encoder.kind=mel", "encoder.kind must be one of seanet, log_mel, got 'mel'"),
        ("encoder.strides=[2, a]", "encoder.strides[1] must be int, got 'a'"),
        ("encoder.width=0", "width must be positive, got 0"),
        ("stepps=3", "unknown key stepps: did you mean steps?"),
        ("encoder.widht=3", "unknown key encoder.widht: did you mean encoder.width?"),
        ("encoder.zzz=3", "unknown key encoder.zzz; known keys: width, strides, kind"),
        ("steps", "`steps`: expected key=value"),
        ("=3", "`=3`: expected key=value"),
        ("rate.x=3", 'rate must be float, got {"x": 3}'),
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
        "rate must be float, got 'fast'",
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


# ---- keys that had another name


@dataclass
class Scoring:
    recognizer: str | None = None


@dataclass
class Comparison:
    recognizer: str | None = None
    evaluation_recognizer: str | None = None
    evaluation_speaker: str | None = None
    part: Scoring = field(default_factory=Scoring)


@pytest.mark.parametrize(
    "cls, word, problem",
    [
        (Scoring, "judge=x", "judge is called recognizer now"),
        (Comparison, "judge=x", "judge is called evaluation_recognizer now"),
        (Comparison, "speaker_judge=x", "speaker_judge is called evaluation_speaker now"),
        (Comparison, "judge_speaker=x", "judge_speaker is called evaluation_speaker now"),
        (Comparison, "part.judge=x", "part.judge is called part.recognizer now"),
        (Scoring, "speaker_judge=x", "unknown key speaker_judge; known keys: recognizer"),
    ],
)
def test_a_renamed_key_is_refused_with_its_new_name(cls: type, word: str, problem: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(cls, None, [word])
    assert str(error.value) == f"1 problem(s) in the configuration:\n  {problem}"


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
            parse_config(Job, ["data=3"])
        assert len(waited) == told


def help_of(cls: type, capsys: pytest.CaptureFixture) -> str:
    with pytest.raises(SystemExit) as end:
        parse_config(cls, ["--help"])
    assert end.value.code == 0
    return capsys.readouterr().out


def test_help_lists_every_key_with_type_default_and_meaning(capsys: pytest.CaptureFixture) -> None:
    lines = help_of(Job, capsys).splitlines()
    assert "  data: str [required]  where the speech is" in lines
    assert "  steps: int [100]  optimizer steps" in lines
    assert "  splits: a list of str or null [null]" in lines and "  fresh: bool [false]" in lines
    assert "  encoder:" in lines and "    width: int [32]" in lines
    assert "    kind: one of seanet, log_mel [seanet]" in lines and "    strides: a list of int [[2, 4]]" in lines


def test_help_shows_a_default_list(capsys: pytest.CaptureFixture) -> None:
    assert "  betas: a list of float [[0.9, 0.99]]  of AdamW" in help_of(Job, capsys).splitlines()
