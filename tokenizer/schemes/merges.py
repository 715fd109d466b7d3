"""Byte-pair encoding of units: sequences of units that are frequent become one code (Sennrich et al., 1508.07909)."""

import json
from collections.abc import Iterable

import torch
from tokenizers import Tokenizer, models, trainers
from torch import Tensor

FIRST = 0x10000  # units are spelled as characters from here on: 65,536 that may stand beside each other in any order


class UnitMerges:
    """Units long [T] -> fewer codes, as ESPnet has it for discrete tokens: codes below K are units, others sequences.

    units: of each code, those that it stands for.
    """

    def __init__(self, pairs: Tensor, clusters: int):
        """pairs: long [M, 2], codes that become one, in the order in which they do; clusters: K."""
        self.pairs = pairs
        texts = [_text([unit]) for unit in range(clusters)]
        codes = {text: code for code, text in enumerate(texts)}
        merges = []
        for left, right in pairs.tolist():
            merges.append((texts[left], texts[right]))
            text = texts[left] + texts[right]
            if text not in codes:  # a sequence may come about in two ways
                codes[text] = len(texts)
                texts.append(text)
        self.units = [[ord(character) - FIRST for character in text] for text in texts]
        self._bpe = Tokenizer(models.BPE(codes, merges))

    @classmethod
    def fit(cls, sequences: Iterable[Tensor], clusters: int, size: int) -> "UnitMerges":
        """Learn from the units of utterances, long [T_i] below `clusters`, up to `size` codes; fewer if none recurs."""
        bpe = Tokenizer(models.BPE())
        alphabet = [_text([unit]) for unit in range(clusters)]
        trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, min_frequency=2, show_progress=False)
        bpe.train_from_iterator((_text(sequence.tolist()) for sequence in sequences), trainer)
        merges, codes = json.loads(bpe.to_str())["model"]["merges"], bpe.get_vocab()
        return cls(torch.tensor([[codes[left], codes[right]] for left, right in merges]).reshape(-1, 2), clusters)

    def encode(self, units: Tensor) -> Tensor:
        """Units long [T] -> codes long [S], S <= T, on the same device."""
        return torch.tensor(self._bpe.encode(_text(units.tolist())).ids, dtype=torch.long, device=units.device)


def _text(units: Iterable[int]) -> str:
    return "".join(chr(FIRST + unit) for unit in units)
