"""train_repcodec: it resumes as if never killed, and its codes are those of the recordings and of the stored frames."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import soundfile
import torch

from speechllm import DataError, InputError, SpeechCodec, Utterance, load_codes, load_tokenizer
from speechllm.data.shards import encode_shards
from speechllm.runs.run import read_log
from tokenizer.schemes.features import FeatureEncoder
from tokenizer.schemes.repcodec import RepCodec
from tokenizer.training.small_teachers import save_hubert, small_hubert

pytestmark = pytest.mark.usefixtures("new_accelerator")
RATE, CODES = 16_000, 4


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, noise: Callable) -> Path:
    folder = tmp_path_factory.mktemp("repcodec")
    torch.manual_seed(0)
    save_hubert(small_hubert(hidden_size=16, layers=1), folder / "hubert")
    utterances = []
    for i in range(8):
        path, seconds = folder / f"u{i}.wav", 0.6 + 0.05 * i
        soundfile.write(path, noise(round(seconds * RATE), seed=i)[0].numpy(), RATE)
        utterances.append(Utterance(path.stem, path, seconds, speaker="s", split="train" if i < 6 else "dev"))
    encoder = FeatureEncoder.from_pretrained(folder / "hubert", 1)
    encoder.save_pretrained(folder / "encoder")
    list(encode_shards(utterances, encoder, folder / "frames"))
    torch.save(utterances, folder / "utterances.pt")
    return folder


@pytest.fixture
def train(recipe: Callable[[str], ModuleType], work: Path, without_pictures: None) -> Callable[..., Path]:
    module = recipe("train_repcodec.py")

    def train(name: str, **settings: object) -> Path:
        words = {"splits": ["train"], "dev_splits": ["dev"], "depth": 1, "steps": 6, "batch_size": 4, "crop_s": 0.5}
        words |= {"warmup": 1, "validate_every": 3, "save_every": 2, "log_every": 1, "codebook_size": CODES}
        words |= {"codes": str(work / "frames"), "codec": str(work / "encoder"), "output": str(work / name)}
        module.main(module.RepCodecConfig(**(words | settings)))
        return work / name

    train.module = module
    return train


def die(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_killed_training_ends_as_if_it_had_not_been(
    train: Callable[..., Path], work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train("whole")
    with monkeypatch.context() as patch:
        patch.setattr(train.module, "lost_share", die)
        with pytest.raises(KeyboardInterrupt):
            train("killed")
    killed = train("killed")
    assert read_log(killed) == read_log(whole)
    weights = [(run / "model" / "repcodec.safetensors").read_bytes() for run in (whole, killed)]
    assert weights[0] == weights[1]
    assert len([line for line in read_log(whole) if "lost" in line]) == 6
    assert [line["step"] for line in read_log(whole) if "dev_lost" in line] == [3, 6]

    repcodec = load_tokenizer(whole / "model")
    assert isinstance(repcodec, RepCodec) and repcodec.codebooks.shape == (1, CODES, 16)
    list(encode_shards(torch.load(work / "utterances.pt", weights_only=False), repcodec, work / "codes"))
    heard, encoding = load_codes(work / "codes")
    stored, same = load_codes(whole / "codes")  # without reading a recording
    assert same == encoding and encoding.fingerprint == repcodec.fingerprint
    for row, other in zip(heard, stored, strict=True):
        assert {**row, "codes": None} == {**other, "codes": None}
    pairs = [(a["codes"], b["codes"]) for a, b in zip(heard, stored, strict=True)]
    assert sum((a != b).sum() for a, b in pairs) <= 2  # frames are stored as float16


def test_the_crops_of_a_step_do_not_depend_on_the_steps_before(train: Callable[..., Path], work: Path) -> None:
    module, (rows, encoding) = train.module, load_codes(work / "frames", ["train"])
    config = module.RepCodecConfig(codes="-", codec="-", output="-", batch_size=4)
    accelerator = module.make_accelerator()
    batches = [module.read_batches(rows, encoding, 20, config, start, accelerator) for start in (0, 3)]
    for _ in range(3):
        next(batches[0])
    (chosen, (frames, lengths)), (same, (others, _)) = map(next, batches)
    assert chosen == same and torch.equal(frames, others)
    assert frames.shape == (4, 20, 16) and lengths.tolist() == [20] * 4
    whole = [rows[i]["features"].reshape(-1, 16) for i in chosen]
    for crop, one in zip(frames, whole, strict=True):
        places = [i for i in range(len(one) - 19) if (one[i : i + 20] == crop.numpy()).all()]
        assert len(places) == 1


def test_too_little_speech_and_codes_in_place_of_frames_are_refused(
    train: Callable[..., Path], work: Path, small_codec: SpeechCodec
) -> None:
    with pytest.raises(DataError, match="219 frames cannot make codebook_size=64 codes: give at most 10"):
        train("large", codebook_size=64)
    gone = [Utterance("gone", work / "gone.wav", 1.0, split="train")]
    list(encode_shards(gone, load_tokenizer(work / "encoder"), work / "nothing"))
    with pytest.raises(DataError, match="nothing holds no utterance to train on"):
        train("empty", codes=str(work / "nothing"), splits=None, dev_splits=None)
    small_codec.save_pretrained(work / "codec")
    list(encode_shards(torch.load(work / "utterances.pt", weights_only=False), small_codec, work / "of_codec"))
    with pytest.raises(InputError, match="which SpeechCodec does not return"):
        train("codes", codes=str(work / "of_codec"), codec=str(work / "codec"))
    assert not (work / "codes_run").exists()
