"""Reads SpeechBrain's hyperparams.yaml, which its own loader would run: HyperPyYAML calls whatever the file names."""

from pathlib import Path
from typing import Any

import yaml

from tokenizer.errors import InputError
from tokenizer.reading import reading

NEEDED = {  # what a speaker teacher consists of, by its name in the file: the tag it must have
    "compute_features": "!new:speechbrain.lobes.features.Fbank",
    "mean_var_norm": "!new:speechbrain.processing.features.InputNormalization",
    "embedding_model": "!new:speechbrain.lobes.models.ECAPA_TDNN.ECAPA_TDNN",
}
REFERENCE = "!ref"
IGNORED = {  # what else the published file makes; nothing here needs it, so it is not made
    REFERENCE,
    "!new:speechbrain.lobes.models.ECAPA_TDNN.Classifier",
    "!new:torch.nn.Identity",
    "!new:speechbrain.dataio.encoder.CategoricalEncoder",
    "!new:speechbrain.utils.parameter_transfer.Pretrainer",
}
PLAIN = "tag:yaml.org,2002:"
SCALARS = {PLAIN + name for name in ("str", "int", "float", "bool", "null")}
EXPECTED = "the hyperparams.yaml of an ECAPA-TDNN, laid out as in speechbrain/spkrec-ecapa-voxceleb"


def speechbrain_settings(file: Path) -> dict[str, dict[str, Any]]:
    """The arguments of each of the NEEDED objects. Nothing is executed: what is not known raises InputError."""
    with reading(file, EXPECTED):
        return _settings(file, yaml.compose(file.read_text(encoding="utf-8"), yaml.SafeLoader))


def _settings(file: Path, root: yaml.Node | None) -> dict[str, dict[str, Any]]:
    if not isinstance(root, yaml.MappingNode):
        raise InputError(f"{file} holds no settings: expected {EXPECTED}")
    _check_tags(file, root)
    sections = {key.value: value for key, value in root.value if isinstance(key, yaml.ScalarNode)}
    found = {}
    for name, tag in NEEDED.items():
        if name not in sections or sections[name].tag != tag:
            made = f"makes {name} from {sections[name].tag}" if name in sections else f"has no {name}"
            raise InputError(f"{file} {made}: expected {tag}, as in speechbrain/spkrec-ecapa-voxceleb")
        found[name] = _value(file, sections[name], sections)
    if found["mean_var_norm"].get("norm_type") != "sentence":
        raise InputError(f"{file} normalises over more than an utterance: expected norm_type: sentence")
    return found


def _check_tags(file: Path, node: yaml.Node) -> None:
    """Raise InputError at the first tag, anywhere in the file, that the published one does not use."""
    known = IGNORED | set(NEEDED.values()) | SCALARS | {PLAIN + "seq", PLAIN + "map"}
    if node.tag not in known:
        raise InputError(
            f"{file}, line {node.start_mark.line + 1}: {node.tag} may run code and is not followed: expected {EXPECTED}"
        )
    if isinstance(node, yaml.CollectionNode):
        for item in node.value:
            for part in item if isinstance(item, tuple) else (item,):
                _check_tags(file, part)


def _value(file: Path, node: yaml.Node, sections: dict[str, yaml.Node]) -> Any:
    """A number, text, list or mapping; a reference stands for the number or text of that name."""
    if node.tag == REFERENCE:
        name = str(node.value).strip("<> ")
        node = sections.get(name, node)
    if isinstance(node, yaml.SequenceNode):
        return [_value(file, item, sections) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        return {key.value: _value(file, value, sections) for key, value in node.value}
    if node.tag not in SCALARS:
        raise InputError(f"{file}, line {node.start_mark.line + 1}: {node.value} cannot be followed: expected a number")
    return yaml.SafeLoader("").construct_object(node)
