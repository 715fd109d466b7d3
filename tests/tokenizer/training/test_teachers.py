"""The frozen teachers: their frames, that they stay frozen, and that they load from local folders."""

import copy
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    HubertConfig,
    HubertModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
    WavLMConfig,
    WavLMModel,
)

from tokenizer.errors import InputError
from tokenizer.training.small_teachers import FrameClassifier, save_ecapa, save_hubert, small_hubert
from tokenizer.training.teachers import SemanticTeacher, SpeakerTeacher

pytestmark = pytest.mark.numeric

Noise = Callable[..., Tensor]
FAMILY = {
    "hubert": (HubertConfig, HubertModel),
    "wav2vec2": (Wav2Vec2Config, Wav2Vec2Model),
    "wavlm": (WavLMConfig, WavLMModel),
}
MELS, WIDTH = 20, 24
ECAPA = {
    "channels": [8, 8, 8, 8, WIDTH],
    "kernel_sizes": [5, 3, 3, 3, 1],
    "dilations": [1, 2, 3, 4, 1],
    "attention_channels": 8,
    "lin_neurons": 6,
    "se_channels": 8,
    "res2net_scale": 4,
}


def published(kind: str = "hubert", **settings: object) -> nn.Module:
    """A tiny model with the kernels and strides of the published ones."""
    config, model = FAMILY[kind]
    torch.manual_seed(0)
    tiny = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "conv_dim": (8,) * 7,
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 2,
        "vocab_size": 32,
    }
    return model(config(**{**tiny, **settings}))


@pytest.fixture(scope="module")
def small() -> HubertModel:
    torch.manual_seed(0)
    return small_hubert(hidden_size=16, layers=2)


@pytest.fixture(scope="module")
def hubert_folder(small: HubertModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hubert")
    save_hubert(small, folder)
    return folder


@pytest.mark.parametrize("samples", [320, 321, 3_200, 3_333])
def test_a_saved_hubert_returns_one_frame_per_started_hop(hubert_folder: Path, noise: Noise, samples: int) -> None:
    teacher = SemanticTeacher.from_pretrained(hubert_folder)
    features = teacher(noise(samples, batch=2))
    assert features.shape == (2, math.ceil(samples / 320), 16)
    assert teacher.width == 16
    assert features.std() > 0


def test_a_saved_hubert_returns_the_same_features(small: HubertModel, hubert_folder: Path, noise: Noise) -> None:
    waveform = noise(3_200)
    before, loaded = SemanticTeacher(small)(waveform), SemanticTeacher.from_pretrained(str(hubert_folder))(waveform)
    torch.testing.assert_close(loaded, before, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", FAMILY)
def test_every_model_of_the_family_returns_features(kind: str, noise: Noise, tmp_path: Path) -> None:
    published(kind).save_pretrained(tmp_path)
    Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(tmp_path)
    teacher = SemanticTeacher.from_pretrained(tmp_path)
    assert type(teacher.model) is FAMILY[kind][1]
    assert teacher.normalize is False
    for samples in (321, 1_600):
        features = teacher(noise(samples, batch=2))
        assert features.shape == (2, math.ceil(samples / 320), 16)
        assert torch.isfinite(features).all()


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")  # WavLM's own
@pytest.mark.parametrize("layer", ["avg", 0, -1])
@pytest.mark.parametrize("norm", ["group", "layer"])  # the first normalises over time
@pytest.mark.parametrize("kind", FAMILY)
def test_several_utterances_at_once_have_the_features_of_each(
    kind: str, norm: str, layer: int | str, noise: Noise
) -> None:
    model = published(kind, feat_extract_norm=norm, do_stable_layer_norm=norm == "layer")
    teacher = SemanticTeacher(model, layer, normalize=norm == "layer")
    waveforms = [noise(samples, seed=samples)[0] + 0.1 for samples in (3_333, 320, 9_000)]
    for waveform, features in zip(waveforms, teacher.forward_each(waveforms), strict=True):
        torch.testing.assert_close(features, teacher(waveform[None])[0], rtol=1e-4, atol=1e-5)


def test_the_published_shape_needs_40_samples_on_either_side() -> None:
    assert SemanticTeacher(published()).margin == 80


@pytest.mark.parametrize("which, reach", [("published", 200), ("small", 520)])
def test_every_teacher_frame_is_centred_on_its_codec_frame(which: str, reach: int) -> None:
    """One changed sample changes exactly the frames that see `reach` samples on either side of their centre to it."""
    if which == "published":
        model = published(feat_extract_norm="layer")  # "group" normalises over time: every frame sees every sample
    else:
        model = small_hubert(hidden_size=16, layers=1)
        nn.init.normal_(model.feature_extractor.conv_layers[0].conv.weight)  # the window of its filters ends in zeros
    teacher = SemanticTeacher(model, normalize=False)
    assert (320 + teacher.margin) // 2 == reach
    seen: list[Tensor] = []
    model.feature_extractor.register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
    waveform = torch.randn(1, 10 * 320, generator=torch.Generator().manual_seed(0))
    centre = 4 * 320 + 160
    for sample in (centre, centre - reach, centre - reach - 1, centre + reach - 1, centre + reach):
        seen.clear()
        changed = waveform.clone()
        changed[0, sample] += 3
        assert teacher(waveform).shape == teacher(changed).shape == (1, 10, 16)
        moved = (seen[0] - seen[1]).abs().amax(0) > 1e-6
        assert moved.tolist() == [-reach <= sample - (320 * frame + 160) < reach for frame in range(10)]


def test_the_average_layer_is_the_mean_of_all_hidden_states(noise: Noise) -> None:
    model, waveform = published(), noise(3_200, batch=2)
    states = [SemanticTeacher(model, layer)(waveform) for layer in range(3)]
    torch.testing.assert_close(SemanticTeacher(model, "avg")(waveform), sum(states) / 3)
    assert torch.equal(SemanticTeacher(model, -1)(waveform), states[2])
    assert torch.equal(SemanticTeacher(model, -3)(waveform), states[0])
    assert not torch.allclose(states[0], states[1]) and not torch.allclose(states[1], states[2])


@pytest.mark.parametrize("layer, computed", [(0, 0), (1, 1), (-2, 1), (2, 2), ("avg", 2)])
def test_no_layer_is_computed_behind_the_one_that_is_needed(noise: Noise, layer: int | str, computed: int) -> None:
    model, calls = published(), []
    for one in model.encoder.layers:
        one.register_forward_hook(lambda *_: calls.append(1))
    SemanticTeacher(model, layer)(noise(3_200))
    assert len(calls) == computed


def test_the_last_layer_is_what_the_model_returns(noise: Noise) -> None:
    model, waveform = published().eval(), noise(3_200)
    with torch.no_grad():
        expected = model(torch.nn.functional.pad(waveform, (40, 40))).last_hidden_state
    torch.testing.assert_close(SemanticTeacher(model, 2, normalize=False)(waveform), expected)


def test_a_normalising_teacher_ignores_level_and_offset(noise: Noise) -> None:
    model, waveform = published(feat_extract_norm="layer"), noise(3_200, batch=2)
    other = torch.tensor([[3.0], [0.5]]) * waveform + 0.1
    teacher = SemanticTeacher(model, normalize=True)
    torch.testing.assert_close(teacher(waveform), teacher(other), atol=1e-3, rtol=0)
    teacher = SemanticTeacher(model, normalize=False)
    assert not torch.allclose(teacher(waveform), teacher(other), atol=1e-2)


def test_the_folder_says_whether_to_normalise(hubert_folder: Path) -> None:
    assert SemanticTeacher.from_pretrained(hubert_folder).normalize is True


def test_padding_does_not_change_how_speech_is_normalised(noise: Noise) -> None:
    """After the last frame the model receives silence, as at the end of a single utterance."""
    waveform = noise(3_200, batch=2) + 0.1
    waveform[1, 1_600:] = 0
    for model in (published(feat_extract_norm="layer"), small_hubert(hidden_size=16, layers=1)):
        teacher = SemanticTeacher(model)
        seen: list[Tensor] = []
        hook = model.feature_extractor.register_forward_pre_hook(lambda module, inputs, seen=seen: seen.extend(inputs))
        teacher(waveform, torch.tensor([3_200, 1_600]))
        for row, length in enumerate((3_200, 1_600)):
            teacher(waveform[row : row + 1, :length])
            torch.testing.assert_close(seen[0][row, : seen[-1].shape[1]], seen[-1][0], atol=1e-5, rtol=1e-5)
        assert not seen[0][1, 1_600 + teacher.margin // 2 :].any()
        hook.remove()


def test_speech_of_full_length_is_what_no_lengths_mean(noise: Noise) -> None:
    teacher, waveform = SemanticTeacher(published()), noise(3_200, batch=2)
    assert torch.equal(teacher(waveform, torch.tensor([3_200, 3_200])), teacher(waveform))


def test_a_loss_on_features_reaches_the_waveform_and_nothing_else(noise: Noise) -> None:
    teacher, waveform = SemanticTeacher(published()), noise(3_200, batch=2).requires_grad_()
    features = teacher.features(waveform, torch.tensor([3_200, 1_600]))
    torch.testing.assert_close(features, teacher(waveform, torch.tensor([3_200, 1_600])))  # without a gradient
    features.square().mean().backward()
    assert waveform.grad[0].abs().max() > 0
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_the_gradient_of_the_features_is_the_slope(noise: Noise) -> None:
    model = published(feat_extract_norm="layer").double()
    teacher, waveform = SemanticTeacher(model), noise(700).double().requires_grad_()
    torch.manual_seed(0)
    direction = torch.randn_like(waveform)

    def loss(x: Tensor) -> Tensor:
        return teacher.features(x, torch.tensor([600])).sin().sum()

    (gradient,) = torch.autograd.grad(loss(waveform), waveform)
    with torch.no_grad():
        slope = (loss(waveform + 1e-5 * direction) - loss(waveform - 1e-5 * direction)) / 2e-5
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-4, atol=1e-6)


def test_a_fingerprint_is_of_weights_layer_and_normalisation(small: HubertModel, hubert_folder: Path) -> None:
    teacher = SemanticTeacher(small)
    assert teacher.fingerprint == SemanticTeacher.from_pretrained(hubert_folder).fingerprint
    assert re.fullmatch("[0-9a-f]{16}", teacher.fingerprint)
    other = copy.deepcopy(small)
    with torch.no_grad():
        next(reversed(list(other.parameters()))).view(-1)[0] += 1e-3
    others = [SemanticTeacher(small, 1), SemanticTeacher(small, normalize=False), SemanticTeacher(other)]
    assert len({teacher.fingerprint, *(t.fingerprint for t in others)}) == 4


@pytest.mark.parametrize("layer", [3, -4, "last", 1.0])
def test_a_layer_there_is_not_is_refused(layer: object) -> None:
    with pytest.raises(InputError, match='layer must be "avg" or an index up to 2'):
        SemanticTeacher(published(), layer)


def test_another_frame_rate_is_refused() -> None:
    model = published(conv_stride=(5, 2, 2, 2, 2, 2, 1))
    with pytest.raises(InputError, match="one frame per 320 samples, this one per 160"):
        SemanticTeacher(model)


@pytest.mark.parametrize("teacher", [SemanticTeacher, SpeakerTeacher])
def test_a_missing_folder_is_not_looked_for_on_the_hub(teacher: type, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        teacher.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize("teacher, file", [(SemanticTeacher, "config.json"), (SpeakerTeacher, "hyperparams.yaml")])
def test_an_empty_folder_says_what_it_lacks(teacher: type, file: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"it lacks {file}"):
        teacher.from_pretrained(tmp_path)


@pytest.mark.parametrize("normalize", [True, False])
def test_the_settings_may_be_those_of_a_processor(tmp_path: Path, normalize: bool) -> None:
    """As transformers 5 saves them."""
    published(feat_extract_norm="layer").save_pretrained(tmp_path)
    settings = Wav2Vec2FeatureExtractor(do_normalize=normalize).to_dict()
    (tmp_path / "processor_config.json").write_text(json.dumps({"feature_extractor": settings}))
    assert SemanticTeacher.from_pretrained(tmp_path).normalize == normalize


def test_a_text_model_is_refused(tmp_path: Path) -> None:
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
    BertModel(config).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{}")
    with pytest.raises(InputError, match="is a bert model: expected HuBERT, WavLM or wav2vec 2.0"):
        SemanticTeacher.from_pretrained(tmp_path)


def save_changed(folder: Path, change: Callable[[nn.Module], dict[str, Tensor]]) -> None:
    """Save a teacher's folder whose checkpoint is the state dict that `change` returns."""
    model = published(feat_extract_norm="layer")
    model.save_pretrained(folder, state_dict=change(model))
    Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(folder)


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    """They would be initialised randomly, so that every run had another teacher."""
    save_changed(tmp_path, lambda model: {k: v for k, v in model.state_dict().items() if "layers.1.attention" not in k})
    with pytest.raises(InputError, match=r"lacks 8 weights of a HubertModel, encoder\.layers\.1\.attention"):
        SemanticTeacher.from_pretrained(tmp_path)


def test_what_only_training_needs_may_be_absent_and_changes_no_fingerprint(tmp_path: Path) -> None:
    save_changed(tmp_path, lambda model: {k: v for k, v in model.state_dict().items() if k != "masked_spec_embed"})
    assert len({SemanticTeacher.from_pretrained(tmp_path).fingerprint for _ in range(2)}) == 1


def test_a_checkpoint_in_half_precision_runs_in_single(tmp_path: Path, noise: Noise) -> None:
    save_changed(tmp_path, lambda model: model.half().state_dict())
    teacher = SemanticTeacher.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.float32}
    assert teacher(noise(640)).dtype == torch.float32


def assert_frozen(teacher: nn.Module, waveform: Tensor) -> None:
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    first = teacher(waveform)
    assert teacher.train() is teacher
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    again = teacher(waveform.clone().requires_grad_())
    assert not again.requires_grad
    assert torch.equal(first, again)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_a_semantic_teacher_stays_frozen(noise: Noise) -> None:
    model = published(hidden_dropout=0.5, layerdrop=0.5).train()
    assert_frozen(SemanticTeacher(model), noise(3_200))


@pytest.fixture(scope="module")
def ecapa_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN

    folder = tmp_path_factory.mktemp("ecapa")
    torch.manual_seed(0)
    save_ecapa(ECAPA_TDNN(MELS, **ECAPA), ECAPA, MELS, ["a", "b"], folder)
    return folder


@pytest.mark.parametrize("samples", [1_600, 3_200, 3_333])
def test_a_saved_ecapa_gives_a_frame_every_10_ms(ecapa_folder: Path, noise: Noise, samples: int) -> None:
    teacher = SpeakerTeacher.from_pretrained(ecapa_folder)
    assert teacher.width == WIDTH  # read from the model, not from its class's default
    frames = teacher(noise(samples, batch=2))
    assert frames.shape == (2, samples // 160 + 1, WIDTH)
    assert frames.std() > 0


def test_a_saved_ecapa_has_the_saved_weights_and_the_output_before_pooling(ecapa_folder: Path, noise: Noise) -> None:
    from speechbrain.lobes.features import Fbank
    from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN

    ecapa = ECAPA_TDNN(MELS, **ECAPA).eval()
    ecapa.load_state_dict(torch.load(ecapa_folder / "embedding_model.ckpt"))
    waveform = noise(3_200, batch=2)
    with torch.no_grad():
        features = Fbank(n_mels=MELS)(waveform)
        x = (features - features.mean(1, keepdim=True)).transpose(1, 2)  # as ECAPA_TDNN.forward up to its `mfa`
        outputs = []
        for block in ecapa.blocks:
            x = block(x)
            outputs.append(x)
        expected = ecapa.mfa(torch.cat(outputs[1:], 1)).transpose(1, 2)
    frames = SpeakerTeacher.from_pretrained(ecapa_folder)(waveform)
    torch.testing.assert_close(frames, expected, atol=1e-5, rtol=1e-4)


def test_the_speaker_embedding_is_that_of_speechbrain(ecapa_folder: Path, noise: Noise) -> None:
    from speechbrain.inference.classifiers import EncoderClassifier

    waveform = noise(3_200, batch=2)
    expected = EncoderClassifier.from_hparams(str(ecapa_folder), savedir=str(ecapa_folder)).encode_batch(waveform)
    embedding = SpeakerTeacher.from_pretrained(ecapa_folder).embedding(waveform)
    assert embedding.shape == (2, ECAPA["lin_neurons"])
    torch.testing.assert_close(embedding, expected[:, 0])


def test_a_speaker_teacher_does_not_average_over_padding(ecapa_folder: Path, noise: Noise) -> None:
    teacher = SpeakerTeacher.from_pretrained(ecapa_folder)
    waveform = noise(32_000)
    alone, padded = teacher(waveform), nn.functional.pad(waveform, (0, 32_000))
    torch.testing.assert_close(teacher(waveform, torch.tensor([32_000])), alone, atol=1e-6, rtol=0)
    far = slice(0, 201 - 60)  # frames that do not see the end
    known = teacher(padded, torch.tensor([32_000]))[:, far]
    torch.testing.assert_close(known, alone[:, far], atol=0.02, rtol=0)
    assert (teacher(padded)[:, far] - alone[:, far]).abs().max() > 0.2


def test_the_fingerprint_of_a_speaker_teacher_is_of_its_weights(ecapa_folder: Path) -> None:
    teacher, again = (SpeakerTeacher.from_pretrained(ecapa_folder) for _ in range(2))
    assert teacher.fingerprint == again.fingerprint
    with torch.no_grad():
        again.ecapa.mfa.conv.conv.bias[0] += 1
    assert teacher.fingerprint != again.fingerprint


def test_frames_of_teachers_come_every_hop(ecapa_folder: Path, hubert_folder: Path, noise: Noise) -> None:
    for teacher in (SemanticTeacher.from_pretrained(hubert_folder), SpeakerTeacher.from_pretrained(ecapa_folder)):
        frames = [teacher(noise(samples)).shape[1] for samples in (3_200, 6_400)]
        assert frames[1] - frames[0] == 3_200 // teacher.hop


def test_a_speaker_teacher_stays_frozen(ecapa_folder: Path, noise: Noise) -> None:
    assert_frozen(SpeakerTeacher.from_pretrained(ecapa_folder), noise(3_200, batch=2))


PUBLISHED = """\
pretrained_path: speechbrain/spkrec-ecapa-voxceleb
n_mels: {mels}
left_frames: 0
right_frames: 0
deltas: False
out_n_neurons: 3
compute_features: !new:speechbrain.lobes.features.Fbank
    n_mels: !ref <n_mels>
    left_frames: !ref <left_frames>
    right_frames: !ref <right_frames>
    deltas: !ref <deltas>
mean_var_norm: !new:speechbrain.processing.features.InputNormalization
    norm_type: sentence
    std_norm: False
embedding_model: !new:speechbrain.lobes.models.ECAPA_TDNN.ECAPA_TDNN
    input_size: !ref <n_mels>
    {settings}
classifier: !new:speechbrain.lobes.models.ECAPA_TDNN.Classifier
    input_size: {embedding}
    out_neurons: !ref <out_n_neurons>
mean_var_norm_emb: !new:speechbrain.processing.features.InputNormalization
    norm_type: global
    std_norm: False
modules:
    compute_features: !ref <compute_features>
    mean_var_norm: !ref <mean_var_norm>
    embedding_model: !ref <embedding_model>
    mean_var_norm_emb: !ref <mean_var_norm_emb>
    classifier: !ref <classifier>
label_encoder: !new:speechbrain.dataio.encoder.CategoricalEncoder
pretrainer: !new:speechbrain.utils.parameter_transfer.Pretrainer
    loadables:
        embedding_model: !ref <embedding_model>
        mean_var_norm_emb: !ref <mean_var_norm_emb>
        classifier: !ref <classifier>
        label_encoder: !ref <label_encoder>
    paths:
        embedding_model: !ref <pretrained_path>/embedding_model.ckpt
        mean_var_norm_emb: !ref <pretrained_path>/mean_var_norm_emb.ckpt
        classifier: !ref <pretrained_path>/classifier.ckpt
        label_encoder: !ref <pretrained_path>/label_encoder.txt
"""


def test_a_downloaded_folder_is_read_locally_though_it_names_the_hub(
    ecapa_folder: Path, noise: Noise, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As downloaded from the hub, with a file that still refers to it. Accessing it fails here without a network."""
    from speechbrain.dataio.encoder import CategoricalEncoder
    from speechbrain.lobes.models.ECAPA_TDNN import Classifier
    from speechbrain.processing.features import InputNormalization

    settings = "\n    ".join(f"{name}: {value}" for name, value in ECAPA.items())
    text = PUBLISHED.format(mels=MELS, settings=settings, embedding=ECAPA["lin_neurons"])
    folder = tmp_path / "teacher"
    folder.mkdir()
    (folder / "hyperparams.yaml").write_text(text, encoding="utf-8")
    (folder / "embedding_model.ckpt").write_bytes((ecapa_folder / "embedding_model.ckpt").read_bytes())
    torch.save(Classifier(ECAPA["lin_neurons"], out_neurons=3).state_dict(), folder / "classifier.ckpt")
    InputNormalization(norm_type="global", std_norm=False)._save(folder / "mean_var_norm_emb.ckpt")
    encoder = CategoricalEncoder()
    encoder.update_from_iterable("abc")
    encoder.save(folder / "label_encoder.txt")
    before = sorted(tmp_path.rglob("*"))

    monkeypatch.chdir(tmp_path)
    teacher = SpeakerTeacher.from_pretrained("teacher")
    waveform = noise(3_200)
    torch.testing.assert_close(teacher(waveform), SpeakerTeacher.from_pretrained(ecapa_folder)(waveform))
    assert sorted(tmp_path.rglob("*")) == before  # and no cache is left in the working directory


def test_another_embedding_model_is_refused(ecapa_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(ecapa_folder, tmp_path, dirs_exist_ok=True)
    text = (tmp_path / "hyperparams.yaml").read_text().replace("ECAPA_TDNN.ECAPA_TDNN", "ECAPA_TDNN.Classifier")
    (tmp_path / "hyperparams.yaml").write_text(text)
    with pytest.raises(InputError, match="makes embedding_model from .*Classifier: expected .*ECAPA_TDNN"):
        SpeakerTeacher.from_pretrained(tmp_path)


# what HyperPyYAML, SpeechBrain's own loader, would do with a file
RUN_BY_SPEECHBRAIN = {
    "a call": "x: !apply:os.mkdir [{place}]",
    "a call deeper down": "x: {{y: [1, !apply:os.mkdir [{place}]]}}",
    "an object": "x: !new:pathlib.Path [{place}]",
    "a name": "x: !name:os.mkdir",
    "a module": "x: !module:os",
    "another file": "x: !include:other.yaml",
    "a Python object": "x: !!python/object/apply:os.mkdir [{place}]",
    "a key": "!apply:os.mkdir {place}: 1",
}


@pytest.mark.parametrize("line", RUN_BY_SPEECHBRAIN.values(), ids=RUN_BY_SPEECHBRAIN)
def test_the_settings_of_a_speaker_teacher_run_nothing(ecapa_folder: Path, tmp_path: Path, line: str) -> None:
    shutil.copytree(ecapa_folder, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "hyperparams.yaml"
    number = len(file.read_text().splitlines()) + 1
    file.write_text(file.read_text() + line.format(place=tmp_path / "made") + "\n")
    with pytest.raises(InputError, match=rf"hyperparams\.yaml, line {number}: .* is not followed"):
        SpeakerTeacher.from_pretrained(tmp_path)
    assert not (tmp_path / "made").exists()


def _lacking(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if not name.startswith("mfa.")}


SPOILED_ECAPA = {
    "missing": (_lacking, r"lacks \d+ weights of a ECAPA_TDNN, mfa\."),
    "renamed": (lambda state: {f"module.{name}": value for name, value in state.items()}, "lacks .* and has .* module"),
    "another shape": (lambda s: s | {"mfa.conv.conv.bias": torch.zeros(3)}, "other shapes .* mfa.conv.conv.bias first"),
    "no numbers": (lambda s: s | {"mfa.conv.conv.bias": torch.full((WIDTH,), math.nan)}, "bias is not finite"),
    "none": (lambda state: list(state), "holds a list: expected the weights"),
}


@pytest.mark.parametrize("kind", SPOILED_ECAPA)
def test_an_incomplete_ecapa_is_refused(ecapa_folder: Path, tmp_path: Path, kind: str) -> None:
    """SpeechBrain's own loader leaves what is missing random."""
    shutil.copytree(ecapa_folder, tmp_path, dirs_exist_ok=True)
    spoil, message = SPOILED_ECAPA[kind]
    torch.save(spoil(torch.load(ecapa_folder / "embedding_model.ckpt")), tmp_path / "embedding_model.ckpt")
    with pytest.raises(InputError, match=f"embedding_model.ckpt.*{message}"):
        SpeakerTeacher.from_pretrained(tmp_path)


def test_settings_whose_parts_do_not_fit_are_refused(ecapa_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(ecapa_folder, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "hyperparams.yaml"
    file.write_text(file.read_text().replace(f"n_mels: {MELS}", "n_mels: 40"))
    with pytest.raises(InputError, match="hyperparams.yaml is not .* whose parts fit together"):
        SpeakerTeacher.from_pretrained(tmp_path)


def test_another_model_in_place_of_a_speaker_teacher_is_named(hubert_folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds a hubert model and not an ECAPA-TDNN"):
        SpeakerTeacher.from_pretrained(hubert_folder)


def test_a_frame_classifier_scores_every_codec_frame_and_learns(noise: Noise) -> None:
    hubert = small_hubert(hidden_size=16, layers=1)
    classifier = FrameClassifier(hubert, labels=5).train()
    scores = classifier(noise(3_333, batch=2), torch.tensor([3_333, 1_280]))
    assert scores.shape == (2, 11, 5)
    scores.square().mean().backward()
    for part in (classifier.head, hubert.feature_extractor, hubert.encoder):
        assert max(parameter.grad.abs().max() for parameter in part.parameters()) > 0


def test_a_waveform_in_a_padded_batch_has_the_scores_it_has_alone(noise: Noise) -> None:
    torch.manual_seed(0)
    classifier = FrameClassifier(small_hubert(hidden_size=16, layers=1), labels=5).eval()
    waveform = noise(6_400)
    alone = classifier(waveform, torch.tensor([6_400]))
    padded = classifier(F.pad(waveform, (0, 3_200)), torch.tensor([6_400]))[:, :20]
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=0)
    assert not torch.allclose(classifier(F.pad(waveform, (0, 3_200)), torch.tensor([9_600]))[:, :20], alone, atol=1e-3)
