"""A language model that hears: model, text tokenizer, audio vocabulary and codec as one small object."""

from dataclasses import dataclass
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from speechllm.prompt import IGNORED
from speechllm.vocabulary import AudioVocabulary
from tokenizer import SpeechCodec, check_folder


@dataclass
class SpeechLLM:
    """What `transcribe` needs. `codec` may be None where only codes are decoded."""

    model: PreTrainedModel
    text_tokenizer: PreTrainedTokenizerBase
    vocabulary: AudioVocabulary
    codec: SpeechCodec | None = None

    def save(self, folder: str | Path) -> None:
        """Write everything into one folder: the model as transformers knows it, the codec in its subfolder `codec`."""
        self.model.save_pretrained(folder)
        self.text_tokenizer.save_pretrained(folder)
        self.vocabulary.save(folder)
        if self.codec is not None:
            self.codec.save_pretrained(Path(folder) / "codec")


def load_speech_llm(folder: str | Path, codec: str | Path | None = None, device: str = "cpu") -> SpeechLLM:
    """Load what `SpeechLLM.save` wrote; `codec`: another place of the codec than the subfolder.

    Raises FileNotFoundError, VocabularyError or DataError (a codec with another fingerprint) with the remedy.
    """
    check_folder(folder, ["config.json"], "a speech language model")
    vocabulary = AudioVocabulary.load(folder)
    place = Path(folder) / "codec" if codec is None else codec
    if codec is None and not Path(place).is_dir():
        raise FileNotFoundError(f"{place}: no such folder; name the place of the codec")
    loaded_codec = SpeechCodec.from_pretrained(place)
    vocabulary.encoding.require(loaded_codec.fingerprint, "the codec")
    model = AutoModelForCausalLM.from_pretrained(folder).to(device).eval()
    return SpeechLLM(model, AutoTokenizer.from_pretrained(folder), vocabulary, loaded_codec.to(device))


class LabelledLoss(nn.Module):
    """The language model as a function of a batch to its summed loss, with logits computed only where there is a label.

    Speech is most of every sequence and carries no label, so this saves nearly all of the head's work and memory.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor) -> Tensor:
        """long [B, S] each -> sum of the cross entropies over all labels (position t predicts the label at t + 1)."""
        hidden = self.model.get_decoder()(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        labelled = targets != IGNORED
        logits = self.model.get_output_embeddings()(hidden[labelled])
        return F.cross_entropy(logits.float(), targets[labelled], reduction="sum")


def small_text_tokenizer(texts: list[str], size: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer of Qwen2's kind, learnt from `texts`, with up to `size` tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

    # Qwen2's own way of cutting text into words: beside a Qwen2 it will be loaded with that, whatever is made here
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


def small_qwen2(text_tokenizer: PreTrainedTokenizerBase, **shape: int) -> PreTrainedModel:
    """A Qwen2 with random weights for `text_tokenizer`; `shape` are Qwen2Config's sizes."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=len(text_tokenizer),
        bos_token_id=None,
        eos_token_id=text_tokenizer.eos_token_id,
        pad_token_id=text_tokenizer.pad_token_id,
        tie_word_embeddings=True,
        **shape,
    )
    return Qwen2ForCausalLM(config)
