"""Emotion recognition: labels in file names, balanced folds, the classifier, and resumed runs."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import soundfile
import torch

from speechllm import Codes, CorpusError, DataError, Encoding, SpeechCodec, load_codes, read_corpus
from speechllm.data.shards import open_shard, write_rows, write_table
from speechllm.reports.plots import confusion_figure
from speechllm.runs.config import load_config
from speechllm.training.emotion import EMOTIONS, EmotionClassifier, actor_folds, emotional_speech, small_bert
from tokenizer.ravdess import parse_ravdess

pytestmark = pytest.mark.usefixtures("module_without_pictures")
RECIPE = "train_emotion.py"
NUMBERS = {"neutral": 1, "happy": 3, "sad": 4, "angry": 5, "calm": 2}
SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
WORDS = [f"bert.{name}={size}" for name, size in SHAPE.items()]
WORDS += ["folds=2", "epochs=12", "batch_size=8", "learning_rate=1e-2", "warmup=5"]
ACTORS = range(1, 9)


def ravdess_id(emotion: str, actor: int, statement: int = 1, repetition: int = 1) -> str:
    return f"03-01-{NUMBERS[emotion]:02}-01-{statement:02}-{repetition:02}-{actor:02}"


def write_codes(folder: Path, rows: list[tuple[str, np.ndarray]], encoding: Encoding) -> Path:
    """Encoded utterances (id, codes int [Q, T]) as encode_speech writes them."""
    table = [
        {"id": name, "split": "train", "duration_s": codes.shape[1] / 50, "codes": codes.flatten().astype(np.uint16)}
        for name, codes in rows
    ]
    write_rows(folder / "codes_00000.arrow", table, encoding, {})
    return folder


def telling_codes(emotion: str, draw: np.random.Generator) -> np.ndarray:
    """Layer 0 takes its codes from four of its own for each emotion; layer 1 is noise."""
    frames = int(draw.integers(6, 12))
    own = 4 * EMOTIONS.index(emotion) + draw.integers(4, size=frames)
    return np.stack([own, draw.integers(16, size=frames)])


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory, small_codec: SpeechCodec) -> Path:
    """Three utterances of each emotion of eight actors, and one of another emotion."""
    draw = np.random.default_rng(0)
    rows = [
        (f"ravdess-{ravdess_id(emotion, actor, *place)}", telling_codes(emotion, draw))
        for actor in ACTORS
        for emotion in EMOTIONS
        for place in ((1, 1), (1, 2), (2, 1))
    ]
    rows.append((ravdess_id("calm", 1), telling_codes("sad", draw)))
    return write_codes(tmp_path_factory.mktemp("emotion") / "codes", rows, Encoding.of(small_codec, 2))


@pytest.fixture(scope="module")
def train(
    recipe: Callable[[str], ModuleType],
    config_class: Callable[[str], type],
    small_codec: SpeechCodec,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., dict]:
    """Run the recipe; the content of its results.json."""
    codec = tmp_path_factory.mktemp("codec")
    small_codec.save_pretrained(codec)

    def run(codes: Path, output: Path, *words: str) -> dict:
        words = (f"codes={codes}", f"codec={codec}", f"output={output}", *WORDS, *words)
        recipe(RECIPE).main(load_config(config_class(RECIPE), None, words))
        return json.loads((output / "results.json").read_text(encoding="utf-8"))

    return run


@pytest.fixture(scope="module")
def finished(train: Callable[..., dict], codes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "run"
    train(codes, output)
    return output


# ---- labels and corpus


def test_the_official_example_name_is_understood() -> None:
    """02-01-06-01-02-01-12 on the data set's page is a video; its sound alone is 03-."""
    name = parse_ravdess("03-01-06-01-02-01-12")
    assert (name.emotion, name.text, name.actor) == ("fearful", "DOGS ARE SITTING BY THE DOOR", 12)


@pytest.mark.parametrize("emotion", NUMBERS)
def test_every_emotion_is_recognised_by_its_number(emotion: str) -> None:
    assert parse_ravdess(f"ravdess-{ravdess_id(emotion, 3)}").emotion == emotion


@pytest.mark.parametrize(
    "name",
    [
        "02-01-06-01-02-01-12",  # with a picture
        "03-02-06-01-02-01-12",  # sung
        "03-01-09-01-02-01-12",
        "03-01-06-01-02-01",
        "03-01-06-01-02-01-12.wav",
        "103-01-06-01-02-01-12",
        "84-121123-0001",
    ],
)
def test_other_names_are_not_spoken_ravdess(name: str) -> None:
    assert parse_ravdess(name) is None


def test_the_official_folder_is_a_corpus(tmp_path: Path) -> None:
    for name in ("Actor_01/03-01-05-01-02-02-01", "Actor_02/03-01-01-01-01-01-02", "Actor_02/03-02-01-01-01-01-02"):
        path = tmp_path / f"{name}.wav"
        path.parent.mkdir(exist_ok=True)
        soundfile.write(path, np.zeros((24_000, 2)), 48_000)
    first, second = read_corpus(tmp_path)
    assert (first.id, first.speaker, first.duration_s) == ("03-01-05-01-02-02-01", "actor01", 0.5)
    assert (first.text, second.text) == ("DOGS ARE SITTING BY THE DOOR", "KIDS ARE TALKING BY THE DOOR")
    assert second.path == str(tmp_path / "Actor_02" / "03-01-01-01-01-01-02.wav")


def test_a_broken_recording_of_the_official_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "03-01-05-01-02-02-01.wav").write_bytes(b"not a sound")
    with pytest.raises(CorpusError, match=r"unreadable, the first is .*03-01-05-01-02-02-01\.wav, .*: fetch them"):
        read_corpus(tmp_path)


# ---- folds


@pytest.mark.parametrize("count, folds", [(24, 5), (22, 5), (8, 3), (5, 5), (24, 2)])
def test_folds_share_all_actors_and_balance_men_and_women(count: int, folds: int) -> None:
    dealt = actor_folds([actor for actor in range(1, count + 1) for _ in range(3)], folds, seed=1)
    assert sorted(actor for fold in dealt for actor in fold) == list(range(1, count + 1))
    for counted in (len, lambda fold: sum(actor % 2 for actor in fold)):
        sizes = [counted(fold) for fold in dealt]
        assert max(sizes) - min(sizes) <= 1


def test_folds_follow_the_seed() -> None:
    assert actor_folds(range(1, 25), 5, seed=1) == actor_folds(range(24, 0, -1), 5, seed=1)
    assert actor_folds(range(1, 25), 5, seed=1) != actor_folds(range(1, 25), 5, seed=2)


# ---- the classifier


def make_classifier(codebooks: torch.Tensor, init: str = "codebook") -> EmotionClassifier:
    torch.manual_seed(0)
    return EmotionClassifier(small_bert(**SHAPE, initializer_range=0.5), codebooks, init).eval()


@torch.no_grad()
def test_logits_do_not_depend_on_the_batch() -> None:
    draw = torch.Generator().manual_seed(0)
    classifier = make_classifier(torch.randn(2, 16, 8, generator=draw))
    utterances = [torch.randint(16, (2, frames), generator=draw) for frames in (3, 9, 1)]
    together = classifier(Codes.from_utterances(utterances))
    alone = torch.cat([classifier(Codes.from_utterances([one])) for one in utterances])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 1e-2


@torch.no_grad()
def test_embeddings_of_layers_are_summed() -> None:
    """So their order does not matter, and every frame keeps one position."""
    draw = torch.Generator().manual_seed(0)
    codebooks, codes = torch.randn(2, 16, 8, generator=draw), torch.randint(16, (1, 2, 3), generator=draw)
    lengths = torch.tensor([3])
    logits = make_classifier(codebooks)(Codes(codes, lengths))
    turned = make_classifier(codebooks.flip(0))(Codes(codes.flip(1), lengths))
    torch.testing.assert_close(logits, turned, rtol=0, atol=1e-5)
    tight = EmotionClassifier(small_bert(**SHAPE, max_position_embeddings=3), codebooks)
    assert tight(Codes(codes, lengths)).shape == (1, len(EMOTIONS))


@torch.no_grad()
def test_the_mean_of_the_outputs_is_classified() -> None:
    """Without layers and positions the logits of frames are the mean of what each of them alone gives."""
    bert = small_bert(**SHAPE | {"num_hidden_layers": 0}, initializer_range=0.5)
    bert.embeddings.position_embeddings.weight.zero_()
    classifier = EmotionClassifier(bert, torch.randn(1, 16, 8, generator=torch.Generator().manual_seed(0))).eval()
    three, five, both = (classifier(Codes.from_utterances([torch.tensor([ids])])) for ids in ([3], [5], [3, 3, 5]))
    torch.testing.assert_close(both, (2 * three + five) / 3, rtol=0, atol=1e-5)


def test_embeddings_are_initialised_with_the_code_vectors() -> None:
    codebooks = torch.randn(1, 16, 8, generator=torch.Generator().manual_seed(0))
    codebooks[0, 5] = codebooks[0, 9]
    same = {}
    for init in ("codebook", "random"):
        table = make_classifier(codebooks, init).bert.get_input_embeddings().weight
        assert table.shape == (16, SHAPE["hidden_size"])
        same[init] = torch.equal(table[5], table[9])
    assert same == {"codebook": True, "random": False}


def test_the_figure_shows_the_counts() -> None:
    axis = confusion_figure([[3, 1], [0, 5]], ["sad", "happy"]).axes[0]
    shown = {text.get_position(): text.get_text() for text in axis.texts}
    assert shown == {(0, 0): "3\n75%", (1, 0): "1\n25%", (0, 1): "0\n0%", (1, 1): "5\n100%"}


# ---- the recipe


def test_informative_codes_are_learnt_and_permuted_labels_are_not(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text(encoding="utf-8"))
    assert results["accuracy"] == results["unweighted_average_recall"] == 1
    assert results["ci95"] == results["ci95_actors"] == [1, 1]
    assert results["confusion"] == (24 * np.eye(4, dtype=int)).tolist()
    assert results["classes"] == list(EMOTIONS)
    assert results["accuracy_shuffled_labels"] <= 0.5  # of 48 utterances: 4 standard errors above chance
    assert (results["chance"], results["utterances"], results["skipped"]) == (0.25, 96, 1)
    assert results["tokens_per_second"] == pytest.approx(50)
    assert {path.name for path in finished.iterdir()} >= {"confusion.png", "report.html", "done.json"}


def test_every_utterance_is_tested_once_in_the_fold_of_its_actor(finished: Path) -> None:
    lines = (finished / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    folds = json.loads((finished / "results.json").read_text(encoding="utf-8"))["folds"]
    assert len(rows) == len({row["id"] for row in rows}) == 96
    for row in rows:
        name = parse_ravdess(row["id"])
        assert (row["emotion"], row["actor"]) == (name.emotion, name.actor)
        assert name.actor in folds[int(row["fold"])]["actors"]


def test_a_killed_run_keeps_finished_folds_and_gives_the_same_result(
    train: Callable[..., dict],
    recipe: Callable[[str], ModuleType],
    codes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train(codes, tmp_path / "whole", "epochs=2")
    run_fold, answered = recipe(RECIPE).run_fold, []

    def killed_at(folds: int) -> Callable[..., dict]:
        def run(name: str, *rest: object) -> dict:
            if len(answered) == folds:
                raise KeyboardInterrupt
            answered.append(name)
            return run_fold(name, *rest)

        return run

    monkeypatch.setattr(recipe(RECIPE), "run_fold", killed_at(1))
    with pytest.raises(KeyboardInterrupt):
        train(codes, tmp_path / "run", "epochs=2")
    assert not (tmp_path / "run" / "results.json").exists()
    monkeypatch.setattr(recipe(RECIPE), "run_fold", killed_at(3))
    train(codes, tmp_path / "run", "epochs=2")
    assert answered == ["0", "1", "shuffled labels"]
    for name in ("predictions.jsonl", "folds/1.json"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    found, whole = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("run", "whole"))
    made = {"config", "command", "seconds"}  # how each was made
    assert found.keys() == whole.keys() >= made and found["config"]["epochs"] == 2
    assert all(found[name] == whole[name] for name in found.keys() - made)


@pytest.mark.usefixtures("new_accelerator")
def test_folds_of_other_codes_are_not_taken_for_these(
    train: Callable[..., dict], codes: Path, finished: Path, tmp_path: Path
) -> None:
    """A corpus that was encoded again at the same place."""
    shutil.copytree(codes, tmp_path / "codes")
    shutil.copytree(finished, tmp_path / "run")
    config = (tmp_path / "run" / "config.yaml").read_text().replace(str(codes), str(tmp_path / "codes"))
    (tmp_path / "run" / "config.yaml").write_text(config.replace(str(finished), str(tmp_path / "run")))
    before = (tmp_path / "run" / "results.json").read_text()
    train(tmp_path / "codes", tmp_path / "run")
    file = tmp_path / "codes" / "codes_00000.arrow"
    table = open_shard(file)
    write_table(file, table.slice(0, len(table) - 8))
    with pytest.raises(DataError, match="holds answers about other codes"):
        train(tmp_path / "codes", tmp_path / "run")
    assert json.loads(before)["accuracy"] == json.loads((tmp_path / "run" / "results.json").read_text())["accuracy"]


@pytest.mark.usefixtures("new_accelerator")
def test_a_pretrained_bert_and_two_layers_in_bfloat16(
    train: Callable[..., dict], codes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, lowered = EmotionClassifier.forward, Counter()

    def watched(self: EmotionClassifier, codes: Codes) -> torch.Tensor:
        lowered[self.training, torch.is_autocast_enabled("cpu")] += 1
        return forward(self, codes)

    monkeypatch.setattr(EmotionClassifier, "forward", watched)
    small_bert(**SHAPE).save_pretrained(tmp_path / "bert")
    words = [f"model={tmp_path / 'bert'}", "layers=[0,1]", "epochs=1", "folds=3", "precision=bf16"]
    results = train(codes, tmp_path / "run", *words)
    assert {*lowered} == {(True, True), (False, True)}
    assert results["tokens_per_second"] == pytest.approx(100)
    assert [len(fold["actors"]) for fold in results["folds"]] == [3, 3, 2]


def test_bad_input_is_reported(
    train: Callable[..., dict], codes: Path, small_codec: SpeechCodec, other_codec: SpeechCodec, tmp_path: Path
) -> None:
    draw = np.random.default_rng(0)
    encoding = Encoding.of(small_codec, 1)
    one = [(ravdess_id(emotion, 1), telling_codes(emotion, draw)[:1]) for emotion in EMOTIONS]

    def refused(name: str, rows: list, message: str, encoding: Encoding = encoding, *words: str) -> None:
        with pytest.raises(DataError, match=message):
            train(write_codes(tmp_path / name, rows, encoding), tmp_path / "run", *words)

    refused("unlabelled", [("84-121123-0001", one[0][1])], "as ids, such as .*, found '84-121123-0001'")
    refused("other", [(ravdess_id("calm", 1), one[0][1])], "no utterance has one of the emotions neutral, hap")
    refused("alone", one, "2 folds need at least as many actors, found 1")
    refused("shallow", one, r"the codes have 1 layer\(s\), counted from 0, but not layer 1", encoding, "layers=[1]")
    refused("foreign", one, "encode the speech with the same codec", Encoding.of(other_codec, 1))
    many = [(ravdess_id(emotion, actor), np.zeros((1, 513))) for emotion in EMOTIONS for actor in ACTORS]
    refused("long", many, "an utterance has 513 frames, but this BERT has room for 512", encoding)
    rows, encoding = load_codes(codes)
    with pytest.raises(DataError, match="encoded as features"):
        emotional_speech(rows, Encoding("x", 16_000, 50.0, 1, 1, "features", 8), [0])


@pytest.mark.parametrize("words", ["layers=[]", "layers=[0,0]", "layers=[-1]", "folds=1", "epochs=0", "init=mean"])
def test_bad_settings_are_refused(words: str, config_class: Callable[[str], type]) -> None:
    with pytest.raises(ValueError, match=words.partition("=")[0]):
        load_config(config_class(RECIPE), None, ["codes=a", "codec=b", "output=c", words])
