"""Faster kernels for the layers of a language model: compiled by torch.compile, or Liger's."""

from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel
from transformers.integrations.liger import apply_liger_kernel
from transformers.utils import is_liger_kernel_available

from tokenizer.errors import InputError


def require_liger() -> None:
    """Raise InputError where Liger's kernels cannot work."""
    if not torch.cuda.is_available() or not is_liger_kernel_available():
        raise InputError(
            "liger=true needs a CUDA GPU and the package liger-kernel (pip install 'speechllm[liger]'), but there is "
            f"{'no such package' if torch.cuda.is_available() else 'no such GPU'}: set liger=false"
        )


def use_liger(model: PreTrainedModel) -> None:
    """Give a language model Liger's Triton kernels (Hsu et al. 2024, arXiv 2410.10989), where Liger knows its family.

    Those for norms, rotary positions and feed-forward layers; not for its loss, which is of few positions here.
    """
    apply_liger_kernel(model, {"fused_linear_cross_entropy": False, "cross_entropy": False})


def compile_layers(model: PreTrainedModel | PeftModel, **settings: Any) -> None:
    """Compile every decoder layer at its first use, for examples of any length.

    Each by itself: they share what is compiled, and the model's head keeps the hooks of `labelled_logits`.
    settings: of `torch.compile`.
    """
    kinds = set(model._no_split_modules or ())
    for module in model.modules():
        if type(module).__name__ in kinds:
            module.compile(dynamic=True, **settings)
