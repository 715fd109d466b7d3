"""How much text the codes contain: a small recogniser of fixed size, trained on the codes alone."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.corpus import CorpusError
from tokenizer.errors import text_list

BATCH, WIDTH, PEAK_RATE = 32, 128, 3e-3


class _Recogniser(nn.Module):
    """Codes to scores of characters; label 0 is the CTC blank. The output does not depend on the batch."""

    def __init__(self, codebook_size: int, labels: int):
        super().__init__()
        self.padding = codebook_size
        self.embedding = nn.Embedding(codebook_size + 1, WIDTH, padding_idx=self.padding)
        self.convolutions = nn.ModuleList(nn.Conv1d(WIDTH, WIDTH, 5, padding=2) for _ in range(2))
        self.dropout = nn.Dropout(0.2)
        self.ahead, self.back = (nn.LSTM(WIDTH, WIDTH, batch_first=True) for _ in range(2))
        self.output = nn.Linear(2 * WIDTH, labels)

    def forward(self, codes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Codes long [T_i] -> log probabilities float [T, B, labels] and lengths long [B]."""
        padded = nn.utils.rnn.pad_sequence(list(codes), batch_first=True, padding_value=self.padding)
        lengths = torch.tensor([len(row) for row in codes])
        frames = torch.arange(padded.shape[1])
        speech = frames < lengths[:, None]
        # equals a bidirectional LSTM over packed sequences, whose gradient takes fifteen times as long on a CPU
        mirror = torch.where(speech, lengths[:, None] - 1 - frames, frames)[..., None].expand(-1, -1, WIDTH)
        x = self.dropout(self.embedding(padded)).transpose(1, 2)
        for convolution in self.convolutions:
            x = convolution(x).relu() * speech[:, None]
        x = x.transpose(1, 2)
        x = torch.cat([self.ahead(x)[0], self.back(x.gather(1, mirror))[0].gather(1, mirror)], 2)
        return F.log_softmax(self.output(self.dropout(x)), -1).transpose(0, 1), lengths


@torch.enable_grad()
def ctc_probe(
    train: Sequence[tuple[Tensor, str]], test: Sequence[Tensor], codebook_size: int, steps: int, seed: int = 0
) -> list[str]:
    """Train a small recogniser for `steps` steps on codes and their texts; returns its texts for the test codes.

    Codes are long [T], of one layer. The protocol is fixed, so that error rates of different codes can be compared:
    embedding of 128, two convolutions over 5 frames, a bidirectional LSTM of 128, dropout 0.2; CTC (Graves et al.,
    2006) over the characters of the training texts; AdamW, one cycle up to 3e-3, gradients clipped at norm 1; batches
    of 32 in a new order every epoch; greedy decoding. Runs on the CPU, so that the seed determines the result.
    The idea is DASB's (arXiv 2406.14294): a language model will not recognise what a probe cannot.
    Raises CorpusError if there are no training texts.
    """
    characters = sorted(set("".join(text_list([text for _, text in train], "texts of train"))))
    if not characters:
        raise CorpusError("the probe is trained on texts, but the training utterances have none")
    labels = {character: label for label, character in enumerate(characters, 1)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _Recogniser(codebook_size, len(labels) + 1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=steps)
        order = np.empty(0, int)
        random = np.random.default_rng(seed)
        for _ in range(steps):
            while len(order) < BATCH:
                order = np.concatenate([order, random.permutation(len(train))])
            batch, order = [train[i] for i in order[:BATCH]], order[BATCH:]
            targets = torch.tensor([labels[character] for _, text in batch for character in text])
            sizes = torch.tensor([len(text) for _, text in batch])
            scores, lengths = model([codes for codes, _ in batch])
            optimizer.zero_grad()
            F.ctc_loss(scores, targets, lengths, sizes, zero_infinity=True).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return _read(model.eval(), test, characters)


@torch.no_grad()
def _read(model: _Recogniser, test: Sequence[Tensor], characters: list[str]) -> list[str]:
    """Greedy decoding: the best label of every frame, without repetitions and blanks."""
    texts = []
    for first in range(0, len(test), BATCH):
        scores, lengths = model(test[first : first + BATCH])
        for row, length in zip(scores.argmax(2).T, lengths.tolist(), strict=True):
            best = row[:length].unique_consecutive().tolist()
            texts.append("".join(characters[label - 1] for label in best if label))
    return texts
