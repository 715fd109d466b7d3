"""Pretrained models: files from a folder or the hub, complete weights, and fingerprints."""

import contextlib
import functools
import hashlib
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tokenizer.errors import InputError
from tokenizer.files import write_json
from tokenizer.reading import AGAIN, read_json_object, reading, unreachable


class IncompleteError(InputError):
    """A checkpoint without all the weights of its model; the message says which are missing."""


HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)


def module_fingerprint(module: nn.Module, settings: dict[str, Any]) -> str:
    """SHA-256 over the settings (as JSON) and all weights of a module: 16 hexadecimal digits."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def check_folder(name: str | Path, files: Sequence[str], what: str) -> str:
    """The folder or hub name of `what`: `name`, or RUN/model for a finished run RUN, which lacks these files itself.

    Raises FileNotFoundError if `name` is clearly meant as a folder but does not hold the files, NotADirectoryError for
    a file. Hub libraries answer a mistyped path with a message about repository ids, after twenty seconds without a
    network.
    """
    name = os.path.expanduser(name)
    if os.path.isdir(name):
        folder = Path(name)
        missing = [file for file in files or ["config.json"] if not (folder / file).is_file()]
        if missing and (folder / "model").is_dir():
            return check_folder(folder / "model", files, what)
        if missing and files:
            started = "; it holds a run that has not finished" if (folder / "config.yaml").is_file() else ""
            raise FileNotFoundError(f"{folder} is not the folder of {what}: it lacks {', '.join(missing)}{started}")
    elif os.path.exists(name):
        raise NotADirectoryError(f"{name} is a file (expected {what}, which is a folder or a hub name)")
    elif name.startswith((".", "/", "~")) or name.count("/") > 1 or not HUB_NAME.fullmatch(name):
        raise FileNotFoundError(f"{name}: no such folder (expected {what}, or a hub name like owner/model)")
    return name


SETTINGS_FILE = "audio_tokenizer.json"


def write_settings(folder: str | Path, kind: str, **settings: Any) -> None:
    """Write what `load_tokenizer` needs besides the model's own files."""
    write_json(Path(folder) / SETTINGS_FILE, {"kind": kind, **settings})


def find_file(name: str | Path, file: str) -> Path | None:
    """The path of a file in a folder or a hub model, or None if there is no such file or the hub cannot be reached."""
    if Path(name).is_dir():
        path = Path(name) / file
        return path if path.is_file() else None
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    try:
        if not constants.HF_HUB_OFFLINE and not _hub_answers():  # the download would try again for half a minute
            cached = try_to_load_from_cache(str(name), file)
            return Path(cached) if isinstance(cached, str) else None
        return Path(hf_hub_download(str(name), file))
    except (EntryNotFoundError, HFValidationError, OSError):  # OSError: no such model, no network
        return None


@functools.cache
def _hub_answers() -> bool:
    """Whether there is a way to the hub; asked once in a process."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # of the library that it happens to use
        return False
    return True


def read_pretrained_json(name: str | Path, file: str) -> dict[str, Any]:
    """The object in a JSON file in a folder or a hub model, or an empty dict if there is no such file."""
    path = find_file(name, file)
    return read_json_object(path, f"the {file} of a model") if path else {}


def describe(name: str | Path) -> str:
    """What lies in a folder or a hub model, for messages: "a hubert model", "a speech codec", ..."""
    if kind := read_pretrained_json(name, SETTINGS_FILE).get("kind"):
        return f"an audio tokenizer of kind {kind}"
    config = read_pretrained_json(name, "config.json")
    if "model_type" in config:
        return f"a {config['model_type']} model"
    if "num_codebooks" in config or "n_q" in config:
        return "a speech codec"
    if find_file(name, "hyperparams.yaml"):
        return "a model of SpeechBrain"
    if find_file(name, "adapter_config.json"):
        return "an adapter"
    return "no model"


def load_config(name: str | Path, expected: str) -> Any:
    """The configuration of a transformers model in a folder (`check_folder`) or on the hub, to be read before the rest.

    Raises FileNotFoundError for a hub name that cannot be had, InputError for another kind of thing than a transformers
    model; expected: what should be there.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    config = read_pretrained_json(name, "config.json")
    if not config and not Path(name).is_dir():
        raise FileNotFoundError(unreachable(name, expected))
    if "model_type" not in config:
        raise InputError(f"{name} holds {describe(name)}: expected {expected}")
    if config["model_type"] not in CONFIG_MAPPING_NAMES:
        raise InputError(
            f"{name} is a {config['model_type']} model, which this version of transformers does not know, and code "
            f"that comes with a model is never run: expected {expected}"
        )
    with reading(name, expected):
        return AutoConfig.from_pretrained(name, trust_remote_code=False)


def load_complete(
    model_class: Any,
    name: str | Path,
    expected: str,
    dtype: torch.dtype | str = torch.float32,
    **settings: Any,
) -> Any:
    """Load a transformers model, all of whose weights come from the checkpoint, in eval mode.

    transformers initialises missing weights randomly; here they raise InputError, as does whatever else is wrong with
    the files. expected: what should be there.
    """
    _require_weights(Path(name), expected)
    with reading(name, expected), _quiet_transformers():  # which prints a table of what is missing
        model, report = model_class.from_pretrained(
            name,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are reported, and refused below
            trust_remote_code=False,
            **settings,
        )
    missing, unlike = set(report["missing_keys"]), {key for key, *_ in report["mismatched_keys"]}
    masks = {key for key in missing if key.endswith("masked_spec_embed")}  # used in training only
    for key in masks:
        nn.init.zeros_(model.get_parameter(key))  # but included in every fingerprint
    absent = missing - masks
    prefix = f"{model.base_model_prefix}."  # which checkpoints of the base alone do not have
    names = {_numberless(key.removeprefix(prefix)) for key in model.state_dict()}
    # a checkpoint may have a head beside what is wanted, but not more layers
    left_over = [key for key in report["unexpected_keys"] if absent or _numberless(key.removeprefix(prefix)) in names]
    _require_complete(name, model, absent, unlike, left_over)
    _require_finite(name, model)
    return model.eval()


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    from transformers.utils import logging

    held = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(held)


def _require_weights(folder: Path, expected: str) -> None:
    """Raise FileNotFoundError if a folder lacks the weights of a transformers model, or one of their parts."""
    if not folder.is_dir():
        return
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).exists():
            return
        if (index := folder / f"{name}.index.json").exists():
            with reading(index, "the list of the parts of a model's weights"):
                parts = set(
                    read_json_object(index, "the list of the parts of a model's weights")["weight_map"].values()
                )
            if absent := sorted(part for part in parts if not (folder / part).exists()):
                raise FileNotFoundError(
                    f"{folder} lacks {len(absent)} of {len(parts)} parts in {index.name}, {absent[0]} first: {AGAIN}"
                )
            return
    raise FileNotFoundError(f"{folder} holds no weights: expected model.safetensors of {expected}")


def load_frozen(model_class: Any, name: str | Path, expected: str) -> Any:
    """`load_complete` in float32 for a model that is never trained."""
    return load_complete(model_class, name, expected).requires_grad_(False)


def load_part(auto_class: Any, name: str | Path, expected: str) -> Any:
    """Load a text tokenizer, processor or feature extractor of transformers; InputError if that fails."""
    with reading(name, expected):
        return auto_class.from_pretrained(name, trust_remote_code=False)


def read_weights(file: str | Path, expected: str, mend: str = AGAIN, mmap: bool = False) -> Any:
    """What `torch.save` or safetensors wrote, on the CPU. Nothing in the file is executed.

    Raises InputError, which names the file, for one that is damaged, cut short or holds other things than weights.
    """
    with reading(file, expected, mend):
        if Path(file).suffix == ".safetensors":
            return load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)


def fill_weights(module: nn.Module, weights: Any, source: str | Path) -> None:
    """`load_state_dict`, but whatever is missing, left over or of another shape is one line of InputError."""
    own = module.state_dict()
    if not isinstance(weights, Mapping) or not all(isinstance(weight, Tensor) for weight in weights.values()):
        raise InputError(f"{source} holds a {type(weights).__name__}: expected the weights of a {_kind(module)}")
    unlike = [key for key in own if key in weights and own[key].shape != weights[key].shape]
    absent = [key for key in own if key not in weights]
    _require_complete(source, module, absent, unlike, [key for key in weights if key not in own])
    module.load_state_dict(weights)
    _require_finite(source, module)


def _require_complete(
    source: str | Path, module: nn.Module, absent: Collection[str], unlike: Collection[str], left_over: Collection[str]
) -> None:
    """Raise IncompleteError for weights that are missing, of another shape, or left over."""
    found = []
    if absent:
        found.append(f"lacks {len(absent)} weights of a {_kind(module)}, {min(absent)} first")
    if unlike:
        found.append(f"has {len(unlike)} weights of other shapes than its configuration, {min(unlike)} first")
    if left_over:
        found.append(f"has {len(left_over)} weights that a {_kind(module)} has not, {min(left_over)} first")
    if found:
        raise IncompleteError(
            f"{source}: the parameters are not those of its configuration: it {' and '.join(found)}; "
            f"expected all {len(module.state_dict())}, {AGAIN}"
        )


def _require_finite(source: str | Path, module: nn.Module) -> None:
    """Raise InputError for weights that are NaN or infinite, as after a training that failed."""
    for name, weight in module.state_dict().items():
        if weight.is_floating_point() and not torch.isfinite(weight).all():
            raise InputError(f"{source}: the weight {name} is not finite: use another checkpoint of this model")


def _kind(module: nn.Module) -> str:
    return type(module).__name__


def _numberless(key: str) -> str:
    """The name of a weight, the same for all layers."""
    return re.sub(r"\.\d+\.", ".N.", key)
