"""Pretrained models: files from a folder or the hub, complete weights, and fingerprints."""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tokenizer.errors import InputError

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
    text = json.dumps({"kind": kind, **settings}, indent=2)
    (Path(folder) / SETTINGS_FILE).write_text(text + "\n", encoding="utf-8")


def find_file(name: str | Path, file: str) -> Path | None:
    """The path of a file in a folder or a hub model, or None if there is no such file."""
    if Path(name).is_dir():
        path = Path(name) / file
        return path if path.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError

    try:
        return Path(hf_hub_download(str(name), file))
    except (EntryNotFoundError, HFValidationError, RepositoryNotFoundError):
        return None


def read_pretrained_json(name: str | Path, file: str) -> dict[str, Any]:
    """The contents of a JSON file in a folder or a hub model, or an empty dict if there is no such file."""
    path = find_file(name, file)
    return json.loads(path.read_text(encoding="utf-8")) if path else {}


def load_complete(model_class: Any, name: str | Path) -> Any:
    """Load a frozen transformers model in float32, all of whose weights come from the checkpoint.

    transformers initialises missing weights randomly; here they raise InputError.
    """
    model, report = model_class.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    masks = {key for key in report["missing_keys"] if key.endswith("masked_spec_embed")}  # used in training only
    for key in masks:
        nn.init.zeros_(model.get_parameter(key))  # but included in every fingerprint
    if missing := sorted(set(report["missing_keys"]) - masks):
        raise InputError(f"{name} lacks {len(missing)} weights of a {type(model).__name__}, {missing[0]} first")
    return model.eval().requires_grad_(False)
