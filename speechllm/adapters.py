"""Adapters: only LoRA updates and the new rows of a language model, or the new rows alone, are trained and saved."""

import hashlib
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils import load_peft_weights
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from speechllm.encoding import DataError
from speechllm.extension import resize_rows
from speechllm.projector import NAME as PROJECTOR
from speechllm.projector import add_projector
from speechllm.vocabulary import AudioVocabulary
from tokenizer.files import write_json
from tokenizer.pretrained import IncompleteError, check_folder, load_complete, load_config
from tokenizer.reading import AGAIN, read_json_object, reading

BASE_FILE = "base_model.json"
ROWS = "trainable_tokens_delta"  # what PEFT calls the rows' parameters
SAMPLES = 64  # values per weight in a fingerprint


def prepare_adapter(
    model: PreTrainedModel,
    vocabulary: AudioVocabulary,
    form: Literal["lora", "rows"] = "lora",
    rank: int = 64,
    alpha: int = 128,
    dropout: float = 0.0,
) -> PeftModel:
    """Freeze a language model except for an adapter's parameters. Changes the model in place.

    form "lora": low-rank updates of all linear layers except the head (Hu et al. 2021, scale alpha / rank) and the new
    rows; "rows": the new rows alone. The rows are those of `vocabulary.new_ids` in the input embedding and, if the
    head is untied, in the head; no other row changes. They and LoRA are float32, whatever the model's type. A
    projector is trained in full in both forms.
    Raises DataError for a model that was not loaded from a folder or the hub: an adapter is saved without it.
    """
    if form not in ("lora", "rows"):
        raise ValueError(f'form must be "lora" or "rows", got {form!r}')
    if not model.name_or_path:
        raise DataError(
            "an adapter is saved without its language model, but this one was not loaded from a folder or the hub: "
            "save it with save_pretrained and load it again before extending its vocabulary"
        )
    matrices = [model.get_input_embeddings(), model.get_output_embeddings()]
    if matrices[1].weight is matrices[0].weight:
        del matrices[1]  # PEFT lets a tied head use the rows of the embedding
    ids = vocabulary.new_ids.tolist()
    decoder = set(model.get_decoder().modules())
    beside = [  # a projector, and what a multimodal model sees and hears with
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module not in decoder and module is not model.get_output_embeddings()
    ]
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules="all-linear" if form == "lora" else DUMMY_TARGET_MODULES,  # PEFT's name for none
        exclude_modules=beside if form == "lora" and beside else None,
        modules_to_save=[PROJECTOR] if hasattr(model, PROJECTOR) else None,
        trainable_token_indices={name: ids for name, module in model.named_modules() if module in matrices},
    )
    return keep_bias(get_peft_model(model, config))


def keep_bias(model: PeftModel) -> PeftModel:
    """Add the bias of a head (Phi's, GPT-J's), which PEFT leaves out of the logits where it trains rows of the head."""
    for layer in model.modules():
        if isinstance(layer, TrainableTokensLayer) and getattr(layer.base_layer, "bias", None) is not None:
            layer.register_forward_hook(_add_bias)
    return model


def _add_bias(layer: Any, inputs: tuple[Tensor], logits: Tensor) -> Tensor:
    return logits if layer.merged or layer.disable_adapters else logits + layer.base_layer.bias


def save_adapter(model: PeftModel, vocabulary: AudioVocabulary, folder: str | Path) -> None:
    """Write only the trained parameters, and the name and fingerprint of the language model they belong to."""
    model.save_pretrained(folder, save_embedding_layers=False)  # PEFT would write the resized matrices in full
    (Path(folder) / "README.md").unlink()  # PEFT's empty model card
    name = model.get_base_model().name_or_path
    if Path(name).is_dir():
        name = str(Path(name).resolve())  # a relative path depends on the working directory
    fingerprint = base_fingerprint(model, vocabulary.offset)
    write_json(Path(folder) / BASE_FILE, {"name_or_path": name, "fingerprint": fingerprint})


def load_adapter(folder: str | Path, vocabulary: AudioVocabulary, base: str | Path | None = None) -> PeftModel:
    """Load an adapter that `save_adapter` wrote, on the recorded language model or on `base`, in float32.

    Raises FileNotFoundError, or DataError for a language model other than the one it was trained on.
    """
    if not any((Path(folder) / f"adapter_model.{ending}").is_file() for ending in ("safetensors", "bin")):
        raise FileNotFoundError(f"{folder} lacks adapter_model.safetensors, the weights of an adapter: {AGAIN}")
    file = Path(folder) / BASE_FILE
    recorded = read_json_object(file, "the language model that an adapter belongs to")
    if not {"name_or_path", "fingerprint"} <= recorded.keys():
        raise DataError(f"{file} lacks name_or_path or fingerprint: expected what `save_adapter` wrote")
    name = recorded["name_or_path"] if base is None else base
    name = check_folder(name, ["config.json"], "the language model that the adapter was trained on; set `base` to it")
    model = load_causal(name)  # in float32, as in train_asr
    resize_rows(model, vocabulary.offset, vocabulary.size)  # the adapter holds the new rows
    if (found := base_fingerprint(model, vocabulary.offset)) != recorded["fingerprint"]:
        raise DataError(
            f"{folder} was trained on a language model with fingerprint {recorded['fingerprint']} "
            f"({recorded['name_or_path']}), but {name} has {found}: set `base` to the right one"
        )
    add_projector(model, vocabulary)
    with reading(folder, "an adapter of this language model"):
        adapted = keep_bias(PeftModel.from_pretrained(model, folder))
        stored = load_peft_weights(str(folder), device="cpu")
        own = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    if absent := sorted(own.keys() - stored.keys()):  # PEFT would leave them as they were initialised
        raise IncompleteError(
            f"the adapter {folder} lacks {len(absent)} of {len(own)} weights, {absent[0]} first; {AGAIN}"
        )
    return adapted


def load_causal(name: str | Path, dtype: torch.dtype | str = torch.float32) -> PreTrainedModel:
    """A causal language model of transformers from a folder or the hub, complete, in eval mode.

    Of a multimodal one, what it sees and hears with is kept where transformers keeps it, and frozen.
    Raises FileNotFoundError, or InputError for another kind of model or a checkpoint that is damaged or incomplete.
    """
    expected = "a causal language model of transformers"
    config = load_config(name, expected)
    known = str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type))
    found = config.architectures or [known]  # transformers would load a BERT, but it does not predict the next word
    names = {known.lower(), known.lower().replace("forcausallm", "forconditionalgeneration")}  # Qwen3.5 with eyes
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or not names & set(map(str.lower, found)):
        raise DataError(f"{name} is a {config.model_type} model ({', '.join(found)}): expected {expected}")
    # a chat model's own settings are not even read: they would change, or prevent, what it answers
    model = load_complete(AutoModelForCausalLM, name, expected, dtype=dtype, generation_config=GenerationConfig())
    if model.config.get_text_config() is not model.config:
        model.requires_grad_(False)
        for part in (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings()):
            part.requires_grad_(True)
    return model


def base_fingerprint(model: nn.Module, texts: int) -> str:
    """Identity of a language model's weights, 16 hexadecimal digits; unchanged by extending its vocabulary.

    SHA-256 over the shapes and 64 evenly spaced values of every weight, limited to the first `texts` rows; an
    adapter's own parameters are skipped. The values are compared in bfloat16, since a model may be trained and loaded
    in different precisions. Further training changes every matrix, so a sample is enough.
    """
    digests = []
    for name, parameter in model.named_parameters():
        if ROWS in name or "lora_" in name or PROJECTOR in name:
            continue
        rows = parameter.detach()[:texts]
        places = torch.arange(SAMPLES, device=rows.device) * (rows.numel() - 1) // (SAMPLES - 1)
        values = rows.flatten()[places].to(torch.bfloat16).view(torch.int16).cpu().numpy()
        digests.append(hashlib.sha256(str(tuple(rows.shape)).encode() + values.tobytes()).hexdigest())
    return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()[:16]
