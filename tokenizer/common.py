"""What tokenizers made of other models share: utterances one at a time, and the files that say what a folder is."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SETTINGS_FILE = "audio_tokenizer.json"


def split_utterances(waveform: Tensor, lengths: Tensor | None = None) -> list[Tensor]:
    """Waveforms float [B, N] of `lengths` [B] samples, all of N when None -> each without its padding, float [N_i].

    A model that hears one utterance at a time cannot make an answer depend on the batch.
    Raises ValueError for another shape, impossible lengths or samples that are not finite.
    """
    if waveform.ndim != 2 or waveform.shape[1] == 0:
        raise ValueError(f"expected waveforms float [B, N] with N > 0, got shape {tuple(waveform.shape)}")
    sizes = [waveform.shape[1]] * len(waveform) if lengths is None else lengths.tolist()
    if len(sizes) != len(waveform) or min(sizes) < 1 or max(sizes) > waveform.shape[1]:
        raise ValueError(f"lengths must be 1..{waveform.shape[1]} for {len(waveform)} waveforms, got {sizes}")
    utterances = [row[:size] for row, size in zip(waveform, sizes, strict=True)]
    if not all(torch.isfinite(samples).all() for samples in utterances):
        raise ValueError("the waveform holds NaN or infinite samples")
    return utterances


def write_settings(folder: str | Path, kind: str, **settings: Any) -> None:
    """Write what `load_tokenizer` must know beside the model's own files."""
    text = json.dumps({"kind": kind, **settings}, indent=2)
    (Path(folder) / SETTINGS_FILE).write_text(text + "\n", encoding="utf-8")


def find_file(name: str | Path, file: str) -> Path | None:
    """A file of a folder or of a model of the hub, None where there is none."""
    if Path(name).is_dir():
        path = Path(name) / file
        return path if path.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError

    try:
        return Path(hf_hub_download(str(name), file))
    except (EntryNotFoundError, HFValidationError, RepositoryNotFoundError):
        return None


def read_json(name: str | Path, file: str) -> dict[str, Any]:
    """The contents of a JSON file of a folder or of a model of the hub, nothing where there is no such file."""
    path = find_file(name, file)
    return json.loads(path.read_text(encoding="utf-8")) if path else {}


def load_whole(model_class: Any, name: str | Path) -> Any:
    """A frozen transformers model in float32 whose weights all come from the checkpoint.

    transformers fills what a checkpoint lacks with random numbers; here that is a ValueError.
    """
    model, report = model_class.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    masks = {key for key in report["missing_keys"] if key.endswith("masked_spec_embed")}  # of training only
    for key in masks:
        nn.init.zeros_(model.get_parameter(key))  # but part of every fingerprint
    if missing := sorted(set(report["missing_keys"]) - masks):
        raise ValueError(f"{name} lacks {len(missing)} weights of a {type(model).__name__}, {missing[0]} first")
    return model.eval().requires_grad_(False)
