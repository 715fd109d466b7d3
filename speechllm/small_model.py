"""Language models with random weights and small text tokenizers, to train from scratch and to measure speed with."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from tokenizer.settings import Count, Rule, Settings

if TYPE_CHECKING:  # the shape is a part of configurations, which must not wait for torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# of a byte-level BPE: every byte, and three special tokens
TextTokens = Annotated[int, Rule("at least 259", lambda n: n >= 259)]


def small_text_tokenizer(texts: list[str], size: int) -> "PreTrainedTokenizerBase":
    """A byte-level BPE tokenizer like Qwen2's, learnt from `texts`, with up to `size` tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

    # Qwen2's pre-tokenization: transformers applies it to any text tokenizer that is saved with a Qwen2
    qwen2 = Qwen2Tokenizer().backend_tokenizer
    bpe = Tokenizer(models.BPE())
    bpe.normalizer, bpe.pre_tokenizer, bpe.decoder = qwen2.normalizer, qwen2.pre_tokenizer, qwen2.decoder
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=specials[2], pad_token=specials[0])


QWEN2_SHAPES = {
    "1.5b": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151_936,
    },
    "small": {
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1024,
    },
}


@dataclass
class SmallShape(Settings):
    """Sizes of a small Qwen2."""

    hidden_size: Count = 192  # a multiple of twice the attention heads
    intermediate_size: Count = 512
    num_hidden_layers: Count = 4
    num_attention_heads: Count = 4  # a multiple of the key-value heads
    num_key_value_heads: Count = 2

    def contradictions(self) -> Iterable[str]:
        heads, shared = self.num_attention_heads, self.num_key_value_heads
        if heads > 0 and self.hidden_size % (2 * heads):  # the position is a rotation of pairs
            yield f"hidden_size must be a multiple of {2 * heads}, twice num_attention_heads, got {self.hidden_size}"
        if shared > 0 and heads % shared:
            yield f"num_attention_heads must be a multiple of num_key_value_heads = {shared}, got {heads}"


def small_qwen2(text_tokenizer: "PreTrainedTokenizerBase", **settings: int | str) -> "PreTrainedModel":
    """A Qwen2 with random weights for `text_tokenizer`; settings: of Qwen2Config, such as one of QWEN2_SHAPES.

    It has a row per text token, unless vocab_size says otherwise.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        bos_token_id=None,
        eos_token_id=text_tokenizer.eos_token_id,
        pad_token_id=text_tokenizer.pad_token_id,
        tie_word_embeddings=True,
        **{"vocab_size": len(text_tokenizer), **settings},
    )
    return Qwen2ForCausalLM(config)
