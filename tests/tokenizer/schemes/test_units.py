"""Speech units: nearest centroids by independent computation, merged repeats, and the recipe that fits them."""

import functools
import json
from collections import Counter
from collections.abc import Callable
from itertools import groupby, pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from sklearn.cluster import KMeans
from torch import Tensor

from speechllm import InputError, load_tokenizer
from speechllm.runs.config import load_config
from tokenizer.codec.quantizer import ResidualVectorQuantizer
from tokenizer.files import read_jsonl
from tokenizer.pretrained import module_fingerprint
from tokenizer.schemes.features import FeatureEncoder
from tokenizer.schemes.merges import UnitMerges
from tokenizer.schemes.units import UnitTokenizer
from tokenizer.training.small_teachers import save_hubert, small_hubert
from tokenizer.training.teachers import SemanticTeacher

pytestmark = pytest.mark.numeric

Noise = Callable[..., Tensor]
CLUSTERS, WIDTH = 12, 16


@pytest.fixture(scope="module")
def hubert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hubert")
    torch.manual_seed(0)
    save_hubert(small_hubert(hidden_size=WIDTH, layers=2), folder)
    return folder


@pytest.fixture(scope="module")
def encoder(hubert_folder: Path) -> FeatureEncoder:
    return FeatureEncoder.from_pretrained(hubert_folder, 1)


@pytest.fixture(scope="module")
def kmeans(encoder: FeatureEncoder, noise: Noise) -> KMeans:
    frames = encoder.encode(noise(100_000, seed=1)).utterance(0).numpy()
    return KMeans(CLUSTERS, n_init=1, random_state=0).fit(frames)


@pytest.fixture(scope="module")
def units(encoder: FeatureEncoder, kmeans: KMeans) -> UnitTokenizer:
    return UnitTokenizer(encoder, torch.from_numpy(kmeans.cluster_centers_))


def test_units_are_the_nearest_centroids_of_the_layer(
    hubert_folder: Path, units: UnitTokenizer, kmeans: KMeans, noise: Noise, assert_same_codes: Callable[..., None]
) -> None:
    waveform = noise(32_000)
    frames = SemanticTeacher.from_pretrained(hubert_folder, 1)(waveform)
    squares = ((frames[0].double().numpy()[:, None] - kmeans.cluster_centers_.astype(np.float64)) ** 2).sum(2)
    found = units.encode(waveform).ids
    quantizer = ResidualVectorQuantizer(frames.shape[2], 1, CLUSTERS)
    quantizer.codebooks = units.codebooks
    for expected in (squares.argmin(1), kmeans.predict(frames[0].numpy())):
        expected = torch.from_numpy(expected).long()[None, None]
        assert_same_codes(quantizer, frames.transpose(1, 2), found, expected)
    assert len(found.unique()) > CLUSTERS // 2


def test_merged_repeats_are_those_of_the_plain_units(units: UnitTokenizer, noise: Noise) -> None:
    waveform, lengths = noise(32_000, batch=3), torch.tensor([32_000, 3_200, 320])
    merged = UnitTokenizer(units.encoder, units.centroids, deduplicate=True).encode(waveform, lengths)
    plain = units.encode(waveform, lengths)
    for index in range(3):
        expected = [unit for unit, _ in groupby(plain.utterance(index)[0].tolist())]
        assert merged.utterance(index).tolist() == [expected]
    assert merged.lengths[0] < plain.lengths[0] == 100 and plain.lengths.tolist() == [100, 10, 1]


def merged_by_hand(units: list[int], pairs: list[list[int]], codes: dict[tuple[int, ...], int]) -> list[int]:
    """One pair after the other, from left to right; codes: of the sequences of units."""
    texts = {code: text for text, code in codes.items()}
    for left, right in pairs:
        rest, units = units, []
        while rest:
            joined = rest[:2] == [left, right]
            units.append(codes[texts[left] + texts[right]] if joined else rest[0])
            rest = rest[1 + joined :]
    return units


def test_frequent_sequences_become_codes() -> None:
    generator = torch.Generator().manual_seed(0)
    steps = [torch.multinomial(torch.tensor([8.0, 4.0, 2.0, 1.0]), 200, True, generator=generator) for _ in range(5)]
    spoken = [(step + 1).cumsum(0).remainder(6) for step in steps]
    merges = UnitMerges.fit(spoken, clusters=7, size=20)
    assert merges.units[:7] == [[unit] for unit in range(7)] and len(merges.units) == 20  # unit 6 was never heard
    counts = Counter(pair for units in spoken for pair in pairwise(units.tolist()))
    assert counts[tuple(merges.units[7])] == max(counts.values())
    codes = {tuple(units): code for code, units in enumerate(merges.units)}
    assert len(codes) == 20
    for units in [*spoken, torch.tensor([6, 6, 2]), torch.tensor([3])]:
        found = merges.encode(units).tolist()
        assert found == merged_by_hand(units.tolist(), merges.pairs.tolist(), codes)
        assert [unit for code in found for unit in merges.units[code]] == units.tolist()
    assert len(merges.encode(spoken[0])) < 120


def test_a_sequence_that_comes_about_in_two_ways_is_one_code() -> None:
    merges = UnitMerges(torch.tensor([[0, 1], [1, 2], [3, 2], [0, 4]]), clusters=3)
    assert merges.units == [[0], [1], [2], [0, 1], [1, 2], [0, 1, 2]]
    assert merges.encode(torch.tensor([0, 1, 2, 0, 1])).tolist() == [5, 3]


def test_without_anything_frequent_the_codes_are_the_units() -> None:
    merges = UnitMerges.fit([torch.tensor([0, 1, 2])], clusters=3, size=10)
    assert merges.units == [[0], [1], [2]] and merges.pairs.shape == (0, 2)
    assert merges.encode(torch.tensor([0, 1, 2, 0])).tolist() == [0, 1, 2, 0]


def test_merged_units_are_saved_with_their_merges(units: UnitTokenizer, noise: Noise, tmp_path: Path) -> None:
    waveform, lengths = noise(64_000, batch=2), torch.tensor([64_000, 640])
    plain = UnitTokenizer(units.encoder, units.centroids, deduplicate=True)
    spoken = plain.encode(waveform, lengths)
    merges = UnitMerges.fit([spoken.utterance(0)[0]], CLUSTERS, 2 * CLUSTERS)
    merged = UnitTokenizer(units.encoder, units.centroids, True, merges)
    codes = merged.encode(waveform, lengths)
    for index in range(2):
        assert codes.utterance(index).tolist() == [merges.encode(spoken.utterance(index)[0]).tolist()]
    assert merged.codebook_size == 2 * CLUSTERS and merged.codebooks.shape == (1, 2 * CLUSTERS, WIDTH)
    for code, own in enumerate(merges.units):
        assert torch.allclose(merged.codebooks[0, code], torch.stack([units.centroids[unit] for unit in own]).mean(0))
    merged.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.fingerprint == merged.fingerprint != plain.fingerprint
    assert torch.equal(loaded.encode(waveform, lengths).ids, codes.ids)
    with pytest.raises(ValueError, match="expected deduplicate=True"):
        UnitTokenizer(units.encoder, units.centroids, False, merges)


def test_the_codebook_is_the_centroids(units: UnitTokenizer, kmeans: KMeans) -> None:
    assert (units.num_codebooks, units.codebook_size, units.frame_rate) == (1, CLUSTERS, 50.0)
    assert np.array_equal(units.codebooks.numpy(), kmeans.cluster_centers_[None])


def test_centroids_of_another_width_are_refused(encoder: FeatureEncoder) -> None:
    with pytest.raises(ValueError, match=r"expected centroids float \[K, 16\], got shape \(4, 8\)"):
        UnitTokenizer(encoder, torch.zeros(4, 8))


def test_the_folder_contains_its_fingerprint(units: UnitTokenizer, tmp_path: Path) -> None:
    units.save_pretrained(tmp_path)
    held = json.loads((tmp_path / "audio_tokenizer.json").read_text(encoding="utf-8"))
    assert held["kind"] == "units" and held["fingerprint"] == units.fingerprint
    assert UnitTokenizer.from_pretrained(tmp_path).fingerprint == units.fingerprint
    file = tmp_path / f"centroids_{units.fingerprint}.safetensors"
    others = UnitTokenizer(units.encoder, units.centroids + 1)  # centroids and settings of two k-means do not mix
    others.save_pretrained(tmp_path)
    assert file.exists() and torch.equal(UnitTokenizer.from_pretrained(tmp_path).centroids, others.centroids)
    (tmp_path / "audio_tokenizer.json").write_text(json.dumps(held))
    assert torch.equal(UnitTokenizer.from_pretrained(tmp_path).centroids, units.centroids)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="holds no units"):
        UnitTokenizer.from_pretrained(tmp_path)


def test_a_fingerprint_reads_every_weight_once(units: UnitTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[int] = []

    def counting(module: torch.nn.Module, settings: dict) -> str:
        hashed.extend(tensor.numel() for tensor in module.state_dict().values())
        return module_fingerprint(module, settings)

    for module in ("tokenizer.schemes.units", "tokenizer.training.teachers"):
        monkeypatch.setattr(f"{module}.module_fingerprint", counting)
    assert units.fingerprint
    assert sum(hashed) == sum(tensor.numel() for tensor in units.state_dict().values())


def test_units_have_one_layer(units: UnitTokenizer, noise: Noise) -> None:
    with pytest.raises(InputError, match="layers must be 1..1, got 2"):
        units.encode(noise(640), layers=2)


def test_a_folder_without_units_is_refused(hubert_folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match="not the folder of speech units: it lacks audio_tokenizer.json"):
        UnitTokenizer.from_pretrained(hubert_folder)


# ---- the recipe


def write_corpus(folder: Path, noise: Noise) -> None:
    """Eight recordings of noise, one that is missing and one that is silent."""
    folder.mkdir()
    rows = []
    for index in range(10):
        name = f"u{index}.wav"
        sound = noise(8_000, seed=index)[0].numpy() if index < 9 else np.zeros(8_000, np.float32)
        if index != 8:
            soundfile.write(folder / name, sound, 16_000)
        rows.append({"id": name, "path": name, "duration_s": 0.5, "split": "test" if index == 0 else "train"})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def work(hubert_folder: Path, noise: Noise, recipe: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("work")
    write_corpus(work / "corpus", noise)
    words = [f"model={hubert_folder}", f"data={work / 'corpus'}", f"output={work / 'run'}", "splits=[train]"]
    module = recipe("fit_units.py")
    module.main(load_config(module.UnitsConfig, None, [*words, "clusters=10", "layer=1", "deduplicate=true"]))
    return work


def test_the_recipe_reports_results_and_skipped_recordings(work: Path, noise: Noise) -> None:
    results = json.loads((work / "run" / "results.json").read_text(encoding="utf-8"))
    units = load_tokenizer(work / "run" / "model")
    assert isinstance(units, UnitTokenizer) and units.deduplicate and units.codebook_size == 10
    assert results["fingerprint"] == units.fingerprint and "scikit-learn" in results["versions"]
    assert results["config"]["clusters"] == 10 and results["config"]["splits"] == ["train"]
    assert results["frames"] == 7 * 25 and results["skipped"] == {"missing": 1, "silent": 1}
    rows = read_jsonl(work / "run" / "skipped.jsonl")
    assert {(row["id"], row["path"], row["reason"]) for row in rows} == {
        (name, str(work / "corpus" / name), reason) for name, reason in (("u8.wav", "missing"), ("u9.wav", "silent"))
    }
    assert all(row["detail"].startswith(row["path"]) for row in rows)
    frames = torch.cat([units.encoder.encode(noise(8_000, seed=i)).utterance(0) for i in range(1, 8)])
    distances = torch.cdist(frames, units.centroids).square()
    assert results["inertia"] == pytest.approx(distances.amin(1).mean().item(), rel=0.02)  # 16-bit recordings
    assert results["inertia"] < 0.7 * results["variance"]
    shares = torch.bincount(distances.argmin(1), minlength=10) / len(frames)
    assert results["perplexity"] == pytest.approx(torch.special.entr(shares).sum().exp().item(), rel=0.05)
    assert not list((work / "run").glob("*.part"))
    spoken = [units.encode(noise(8_000, seed=i)).utterance(0) for i in range(1, 8)]
    rate = 50 * sum(codes.shape[1] for codes in spoken) / len(frames)
    assert results["codes"] == 10 and results["codes_per_second"] == pytest.approx(rate, rel=0.02)


def test_the_recipe_merges_frequent_sequences(
    hubert_folder: Path, recipe: Callable, work: Path, tmp_path: Path, noise: Noise
) -> None:
    module = recipe("fit_units.py")
    places = {"model": str(hubert_folder), "data": str(work / "corpus"), "output": str(tmp_path / "run"), "layer": 1}
    module.main(module.UnitsConfig(**places, splits=["train"], clusters=5, deduplicate=True, bpe=9))
    results = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    units = load_tokenizer(tmp_path / "run")
    assert isinstance(units, UnitTokenizer) and units.codebook_size == results["codes"] == 9
    found = [units.encode(noise(8_000, seed=i)).ids.shape[2] for i in range(1, 8)]
    assert results["codes_per_second"] == pytest.approx(50 * sum(found) / (7 * 25), rel=0.05) and sum(found) < 120
    for wrong, message in (({"bpe": 9}, "needs deduplicate=true"), ({"bpe": 5, "deduplicate": True}, "more than clus")):
        with pytest.raises(ValueError, match=message):
            module.UnitsConfig(**places, clusters=5, **wrong)


def test_the_seed_determines_the_result_and_frames_can_be_limited(
    hubert_folder: Path, recipe: Callable, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(work)
    module, found = recipe("fit_units.py"), {}
    monkeypatch.setattr(module, "tqdm", functools.partial(module.tqdm, disable=True))  # the limit holds without a bar
    for output, seed in (("a", 1), ("b", 1), ("c", 2)):
        settings = {"clusters": 5, "layer": 1, "max_frames": 60, "splits": ["train"], "seed": seed}
        module.main(module.UnitsConfig(model=str(hubert_folder), data="corpus", output=output, **settings))
        results = json.loads(Path(output, "results.json").read_text(encoding="utf-8"))
        assert results["frames"] == 60
        found[output] = results["fingerprint"]
    assert found["a"] == found["b"] != found["c"]


def test_too_few_frames_end_in_one_line(hubert_folder: Path, recipe: Callable, work: Path) -> None:
    module = recipe("fit_units.py")
    config = module.UnitsConfig(model=str(hubert_folder), data=str(work / "corpus"), output=str(work / "x"), layer=1)
    with pytest.raises(SystemExit, match="200 frames cannot make 500 clusters"):
        module.main(config)


def test_impossible_numbers_of_clusters_are_refused(recipe: Callable) -> None:
    for clusters in (1, 100_000):
        with pytest.raises(ValueError, match="clusters must be from 2 to 65536"):
            recipe("fit_units.py").UnitsConfig(model="m", data="d", output="o", clusters=clusters)
