"""Joint decoding: a language model's beams, weighed by the letters that a compressor has heard.

A language model that was trained for an hour knows more of the language than of the speech: it leaves out words, and
puts likely ones in the place of those that were said. CTC prefix scores (Graves 2008; Hori, Watanabe and Hershey 2017)
say of the beginning of any answer how well it spells what was heard.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from speechllm.vocabulary import text_token_ids
from tokenizer.errors import InputError
from tokenizer.schemes.compressor import BLANK

MISSED = 0.28  # probability that any letter between two was missed: of what CTC called blank nothing is stored
LEAST = 1e-5  # probability of any letter where another one was heard
KEPT = 48  # spellings of the next token with so many letters that get one more
WORST = -10.0  # log probability that the next token's letters add at least


class Prefixes(NamedTuple):
    """Beginnings of texts: ends float64 [M, 2, T + 1], last long [M], begun float64 [M].

    ends: log probability that the first t frames spell the whole beginning, the last of them its last letter, or
    blank. last: its last letter, blank if it has none. begun: log probability that the speech begins with it.
    """

    ends: Tensor
    last: Tensor
    begun: Tensor

    def at(self, rows: Tensor) -> "Prefixes":
        """Some of them."""
        return Prefixes(*(part[rows] for part in self))


class HeardLetters:
    """The vectors of one utterance as CTC: a frame for each, and one of silence before, between and behind them."""

    def __init__(self, vectors: Tensor, labels: int):
        """vectors: float [P, C], whose last `labels` numbers are probabilities of labels, the blank first."""
        heard = vectors[:, -labels:].double().cpu()
        silence = torch.full((labels,), MISSED / (labels - 1), dtype=torch.float64)
        silence[BLANK] = 1 - MISSED
        frames = torch.cat([torch.stack([silence.expand_as(heard), heard], 1).flatten(0, 1), silence[None]])
        self.frames = frames.clamp(min=LEAST).log()  # [T, V]
        self.sums = F.pad(self.frames.cumsum(0), (0, 0, 1, 0))  # [T + 1, V], of the frames before
        never = torch.full_like(self.sums[:, BLANK], -torch.inf)
        nothing = torch.stack([never, self.sums[:, BLANK]])[None]
        self._known: dict[tuple[int, ...], Prefixes] = {}
        self._known[()] = Prefixes(nothing, torch.tensor([BLANK]), nothing.new_zeros(1))

    def prefix(self, letters: tuple[int, ...]) -> Prefixes:
        """That of one text."""
        if letters not in self._known:
            before, last = self.prefix(letters[:-1]), torch.tensor(letters[-1:])
            begun = self.next_letters(before)[:, letters[-1]]
            self._known[letters] = self.extend(before, last, begun)
        return self._known[letters]

    def end(self, prefixes: Prefixes) -> Tensor:
        """Log probability that the speech ends where the text does, if it begins with it: float64 [M]."""
        ends = prefixes.ends[:, :, -1].logsumexp(1) - prefixes.begun
        return ends.nan_to_num(nan=-torch.inf, neginf=-torch.inf)  # of a text that cannot be

    def next_letters(self, prefixes: Prefixes) -> Tensor:
        """Log probability that the speech begins with each text and one more label: float64 [M, V]."""
        before = prefixes.ends[:, :, :-1]
        scores = _log_matmul(before.logsumexp(1), self.frames)
        last = prefixes.last[:, None]  # the same letter again needs a blank between
        return scores.scatter(1, last, _log_matmul(before[:, 1], self.frames).gather(1, last))

    def extend(self, prefixes: Prefixes, letters: Tensor, begun: Tensor) -> Prefixes:
        """Each text with one more letter, long [M]; begun: what `next_letters` says of it, float64 [M].

        Where the letter begins is summed over: a linear recurrence, computed as a sum of products.
        """
        same = (letters == prefixes.last)[:, None]
        before = torch.where(same, prefixes.ends[:, 1], prefixes.ends.logsumexp(1))
        letter = _accumulate(before, self.sums[:, letters].T)
        blank = _accumulate(letter, self.sums[:, BLANK].expand_as(letter))
        return Prefixes(torch.stack([letter, blank], 1), letters, begun)


def _accumulate(before: Tensor, sums: Tensor) -> Tensor:
    """log of the sum of exp(before[s] + sums[t] - sums[s]) over s < t: float64 [M, T + 1] -> the same."""
    found = sums[:, 1:] + (before - sums)[:, :-1].logcumsumexp(1)
    return F.pad(found, (1, 0), value=-torch.inf)


def _log_matmul(rows: Tensor, columns: Tensor) -> Tensor:
    """log(exp(rows) @ exp(columns)), float64 [M, T] and [T, V] -> [M, V]."""
    largest = rows.amax(1, keepdim=True).clamp(min=torch.finfo(rows.dtype).min)  # of a text that cannot be
    return ((rows - largest).exp() @ columns.exp()).log() + largest


class Spellings:
    """The tokens of a language model that consist of labels only, as a tree of their letters."""

    def __init__(self, text_tokenizer: PreTrainedTokenizerBase, labels: Sequence[str], forbidden: Tensor):
        """labels: V texts, the first one the blank; forbidden: bool [rows], the ids of no text.

        Raises InputError if there is no such token.
        """
        numbers = {label: number for number, label in enumerate(labels) if label}
        self.space = numbers.get(" ")
        self.letters: dict[int, tuple[int, ...]] = {}  # of each token
        table, ends = [[-1] * len(labels)], []
        tokens = (~forbidden).nonzero()[:, 0].tolist()
        (before,) = text_token_ids(text_tokenizer, ["a"])  # behind something, as some drop a first space
        whole = text_tokenizer.batch_decode([[*before, token] for token in tokens])
        for token, text in zip(tokens, whole, strict=True):
            text = text.removeprefix(text_tokenizer.decode(before))
            if text and all(letter in numbers for letter in text):
                self.letters[token], node = tuple(numbers[letter] for letter in text), 0
                for letter in self.letters[token]:
                    if table[node][letter] < 0:
                        table[node][letter] = len(table)
                        table.append([-1] * len(labels))
                    node = table[node][letter]
                ends.append(node)
        if not ends:
            raise InputError("no token of this language model consists of the compressor's letters")
        self.table = torch.tensor(table)  # long [N, V], the node after one more letter, or -1
        self.tokens, self.nodes = torch.tensor([*self.letters]), torch.tensor(ends)  # the nodes where tokens end

    def of(self, tokens: Sequence[int]) -> tuple[int, ...]:
        """The letters of an answer; a space at its beginning is not spoken."""
        letters = tuple(letter for token in tokens for letter in self.letters.get(token, ()))
        return letters[1:] if letters[:1] == (self.space,) else letters

    def scores(self, heard: HeardLetters, texts: Prefixes) -> Tensor:
        """Log probability that each of `tokens` follows each text: float64 [M, tokens], -inf of what was hardly heard.

        Of the spellings with each number of letters the `KEPT` likeliest are followed further.
        """
        count = len(texts.last)
        found = torch.full((count, len(self.table)), -torch.inf, dtype=torch.float64)
        rows, nodes = torch.arange(count), torch.zeros(count, dtype=torch.long)
        if self.space is not None and (spaced := int(self.table[0, self.space])) > 0:
            first = (texts.last == BLANK).nonzero()[:, 0]  # the space of an answer's first token is not spoken
            rows, nodes = torch.cat([rows, first]), torch.cat([nodes, torch.full_like(first, spaced)])
        prefixes = texts.at(rows)
        while len(rows):
            begun = heard.next_letters(prefixes)
            added = begun - texts.begun[rows, None]
            added = added.masked_fill((self.table[nodes] < 0) | (added < WORST), -torch.inf)
            if self.space is not None:
                added[(nodes == 0) & (prefixes.last == BLANK), self.space] = -torch.inf  # as said
            kept = torch.cat([_largest(added, (rows == row).nonzero()[:, 0]) for row in range(count)])
            at, letters = kept.unbind(1)
            prefixes = heard.extend(prefixes.at(at), letters, begun[at, letters])
            rows, nodes = rows[at], self.table[nodes[at], letters]
            found[rows, nodes] = added[at, letters]
        return found[:, self.nodes]


def _largest(values: Tensor, rows: Tensor) -> Tensor:
    """Places long [K, 2] of the largest finite ones in these rows of `values` float [M, V], at most KEPT."""
    own = values[rows].flatten()
    best = own.topk(min(KEPT, len(own))).indices
    best = best[own[best].isfinite()]
    return torch.stack([rows[best // values.shape[1]], best % values.shape[1]], 1)


class LetterScores(LogitsProcessor):
    """Adds to each token's log probability what was heard of its letters, and to the end's that nothing more was."""

    def __init__(self, heard: Sequence[HeardLetters], spellings: Spellings, weight: float, prompt_size: int, end: int):
        """heard: of each prompt, whose beams lie side by side; weight: of what is added."""
        self.heard, self.spellings, self.weight = heard, spellings, weight
        self.prompt_size, self.end = prompt_size, torch.tensor([end])

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        added = torch.full(scores.shape, -torch.inf, dtype=torch.float64)
        answers = input_ids[:, self.prompt_size :].tolist()
        beams = len(answers) // len(self.heard)
        for start, heard in zip(range(0, len(answers), beams), self.heard, strict=True):
            known = [heard.prefix(self.spellings.of(answer)) for answer in answers[start : start + beams]]
            texts = Prefixes(*map(torch.cat, zip(*known, strict=True)))
            rows = torch.arange(start, start + beams)[:, None]
            added[rows, self.spellings.tokens] = self.spellings.scores(heard, texts)
            added[rows, self.end] = heard.end(texts)[:, None]
        return scores.log_softmax(-1) + self.weight * added.to(scores)


@dataclass(frozen=True)
class Letters:
    """What was heard in each utterance, as vectors, and how much it counts beside the language model."""

    heard: Sequence[Tensor]
    labels: Sequence[str]
    spellings: Spellings
    weight: float

    def of(self, utterances: Sequence[int]) -> "Letters":
        """Those of some utterances."""
        return replace(self, heard=[self.heard[number] for number in utterances])

    def scores(self, prompt_size: int, end: int) -> LetterScores:
        """The rule for their answers."""
        heard = [HeardLetters(vectors, len(self.labels)) for vectors in self.heard]  # what they remember ends with them
        return LetterScores(heard, self.spellings, self.weight, prompt_size, end)
