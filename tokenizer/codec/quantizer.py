"""Residual vector quantisation with codebooks learnt by exponential moving averages (paper, eq. 2)."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.progress import progress_bar

LEAST_USAGE = 1e-6  # of the mean, below which a code that is not revived stays where it is
DEAD_USAGE = 0.1  # a code used less than this fraction of the mean usage is dead and is re-initialised


@dataclass(frozen=True)
class Quantized:
    """Output of the quantiser for latents z [B, D, T].

    ids: long [B, Q, T].
    layers: the quantised residual of each codebook, float [B, D, T] (D / 2 of split branches); straight-through, so z
        receives the gradient of every layer unchanged.
    output: what all layers stand for, float [B, D, T]; a single straight-through estimator, so z receives its gradient
        once and not once per layer.
    commitment: scalar, mean over layers of the squared distance between residual and what its code stands for.
    """

    ids: Tensor
    layers: list[Tensor]
    output: Tensor
    commitment: Tensor


class ResidualVectorQuantizer(nn.Module):
    """A cascade of Q codebooks of K vectors; each quantises the residual of the ones before it.

    With `split`, the first codebook has a branch of its own beside the cascade of the others (as in Mimi): both
    quantise the same latents, each behind its own projection to half of their dimensions, and what they give is
    projected back and added. So the first code can be about content, without having to be the best first approximation
    of the sound, and a loss on one branch reaches the other only through the encoder. The projections begin as the
    first and the second half of the latents.

    With `codebook_dim`, each codebook searches in a space of its own: `reduce` projects the residual to that few
    dimensions and to length 1, where the codes lie as well, and `restore` projects the code back (the factorised,
    normalised codes of ViT-VQGAN, arXiv 2110.04627, and DAC, arXiv 2306.06546). The codes still follow moving averages
    and not DAC's gradients; the projections learn from the commitment and from every loss on layers and output,
    straight through the code.

    The codes of layer 0 may come from elsewhere (`first`), such as the units of an encoder: then its vectors are the
    mean latents of each code, and the next codebook quantises what these leave.

    The residual is detached from the preceding code vectors, never from z, so that a loss on layer k has the same
    gradient at the encoder as a loss on layer 0. (Subtracting the straight-through output instead gives every layer but
    the first a gradient of exactly zero, which silently removes eq. 5 of the paper.)
    Runs in float32 under autocast, because bfloat16 cannot resolve distances between close vectors.
    """

    codebooks: Tensor
    usage: Tensor
    sums: Tensor

    def __init__(
        self,
        dimension: int,
        num_codebooks: int = 8,
        codebook_size: int = 1024,
        split: bool = False,
        codebook_dim: int | None = None,
    ):
        super().__init__()
        self.branches = [range(1), range(1, num_codebooks)] if split else [range(num_codebooks)]  # layers of each
        self.dimension = dimension // len(self.branches)  # of the vectors that a branch quantises
        parts = torch.eye(dimension).split(self.dimension)[: len(self.branches)]
        self.inward = nn.ModuleList(_linear(part) if split else nn.Identity() for part in parts)
        self.outward = nn.ModuleList(_linear(part.T) if split else nn.Identity() for part in parts)
        factors = [_factors(self.dimension, codebook_dim) for _ in range(num_codebooks)]
        self.reduce, self.restore = (nn.ModuleList(side) for side in zip(*factors, strict=True))
        self.normalized = codebook_dim is not None
        self.decay = 0.99  # of the moving averages, per step; short training runs need a smaller one
        codebooks = torch.randn(num_codebooks, codebook_size, codebook_dim or self.dimension)
        self.register_buffer("codebooks", self._placed(codebooks))
        self.register_buffer("usage", torch.ones(num_codebooks, codebook_size))
        self.register_buffer("sums", self.codebooks.clone())

    @torch.no_grad()
    def initialize(self, latents: Tensor | None, seed: int = 0, first: Tensor | None = None) -> None:
        """Initialise the codebooks by k-means on latents float [M, D], each layer on the residual of the one before.

        first: long [M], the codes of layer 0, if they come from elsewhere: a vector becomes the mean of its latents.
        All processes take the result of the first, and may call this with None.
        Raises ValueError for fewer than 20 vectors per code, which would leave most centroids on single vectors.
        """
        if latents is not None:
            self._cluster(latents, seed, first)
        if dist.is_initialized():
            for buffer in self.buffers():
                dist.broadcast(buffer, src=0)

    def _cluster(self, latents: Tensor, seed: int, first: Tensor | None) -> None:
        from sklearn.cluster import MiniBatchKMeans

        num_codebooks, size, _ = self.codebooks.shape
        if len(latents) < 20 * size:
            raise ValueError(f"k-means for {size} codes needs at least {20 * size} latent vectors, got {len(latents)}")
        latents = latents.float()
        for layer in progress_bar(range(num_codebooks), "k-means for the codebooks", unit="codebook"):
            if (start := self._start(layer)) is not None:
                residual = start(latents)
            vectors = self.reduce[layer](residual).cpu()
            if layer == 0 and first is not None:
                ids = first.cpu()
                centroids = vectors.mean(0).repeat(size, 1)  # of a code that does not occur
                for code in ids.unique().tolist():
                    centroids[code] = vectors[ids == code].mean(0)
            else:
                kmeans = MiniBatchKMeans(size, batch_size=4096, n_init=1, max_iter=30, random_state=seed + layer)
                ids = torch.from_numpy(kmeans.fit_predict(vectors.numpy())).long()
                centroids = torch.from_numpy(kmeans.cluster_centers_).float()
            counts = torch.bincount(ids, minlength=size).float().clamp(min=1.0)
            codes = self._placed(centroids)
            self.codebooks[layer] = codes
            self.usage[layer] = counts / counts.mean()
            self.sums[layer] = self.codebooks[layer] * self.usage[layer, :, None]
            residual = residual - self.restore[layer](codes[ids].to(residual.device))

    def _placed(self, vectors: Tensor) -> Tensor:
        """Vectors float [..., D] where codes may lie: anywhere, or on the unit sphere."""
        return F.normalize(vectors, dim=-1) if self.normalized else vectors

    def _restored(self, ids: Tensor, layer: int) -> Tensor:
        """What the codes long [...] of a layer stand for, float [..., D]."""
        return self.restore[layer](self.codebooks[layer][ids])

    def nearest(self, vectors: Tensor, layer: int) -> Tensor:
        """Ids long [M] of the code vectors closest to `vectors`, float [M, D] or [M, codebook_dim] after `reduce`.

        If two are equally close within float32 rounding, the choice may vary with M, number of threads and processor.
        """
        codebook = self.codebooks[layer]
        # |x - e|^2 = |x|^2 - 2 (x.e - |e|^2 / 2): the first term is the same for every code and is skipped
        return torch.addmm(-0.5 * codebook.square().sum(1), vectors, codebook.T).argmax(1)

    def encode(self, z: Tensor, layers: int | None = None, first: Tensor | None = None) -> Tensor:
        """Latents float [B, D, T] -> ids long [B, layers, T]; searches the first `layers` codebooks (all when None).

        The ids equal those of `forward`, except for vectors between two codes: see `nearest`.
        first: as in `forward`.
        """
        batch, _, frames = z.shape
        flat = z.float().transpose(1, 2).flatten(0, 1)
        ids = []
        with torch.autocast(z.device.type, enabled=False):
            for layer in range(len(self.codebooks) if layers is None else layers):
                if (start := self._start(layer)) is not None:
                    residual = start(flat)
                given = first if layer == 0 else None
                ids.append(self.nearest(self.reduce[layer](residual), layer) if given is None else given.flatten())
                residual = residual - self._restored(ids[-1], layer)
        return torch.stack(ids, 1).unflatten(0, (batch, frames)).transpose(1, 2)

    def _start(self, layer: int) -> nn.Module | None:
        """The projection of the latents with which a branch begins, if it begins with this layer."""
        return next((inward for inward, own in zip(self.inward, self.branches, strict=True) if own[0] == layer), None)

    def decode(self, ids: Tensor) -> Tensor:
        """Ids long [B, Q', T], Q' <= Q -> the sum of what they stand for, float [B, D, T]."""
        total = torch.zeros(())
        with torch.autocast(ids.device.type, enabled=False):
            for own, outward in zip(self.branches, self.outward, strict=True):
                if vectors := [self._restored(ids[:, layer], layer) for layer in own if layer < ids.shape[1]]:
                    total = total + outward(torch.stack(vectors).sum(0)).transpose(1, 2)
        return total

    def forward(
        self,
        z: Tensor,
        mask: Tensor | None = None,
        num_layers: Tensor | None = None,
        first: Tensor | None = None,
    ) -> Quantized:
        """Quantise z float [B, D, T] and, in training mode, update the codebooks.

        mask: bool [B, T], frames that hold speech (all when None); the others affect neither codebooks nor loss.
        num_layers: long [B], codebooks summed into `output` per utterance (all when None): quantiser dropout.
        first: long [B, T], the codes of layer 0, if they come from elsewhere; z is not committed to these.
        """
        with torch.autocast(z.device.type, enabled=False):
            return self._quantize(z.float(), mask, num_layers, first)

    def _quantize(self, z: Tensor, mask: Tensor | None, num_layers: Tensor | None, first: Tensor | None) -> Quantized:
        batch, _, frames = z.shape
        num_codebooks = len(self.codebooks)
        mask = torch.ones(batch, frames, dtype=torch.bool, device=z.device) if mask is None else mask
        if num_layers is None:
            num_layers = torch.full((batch,), num_codebooks, device=z.device)
        latents = z.transpose(1, 2).flatten(0, 1)
        valid = mask.flatten()
        output = torch.zeros_like(latents)
        ids, layers, commitment = [], [], z.new_zeros(())
        for own, inward, outward in zip(self.branches, self.inward, self.outward, strict=True):
            flat = inward(latents)
            subtracted = torch.zeros_like(flat)  # what the preceding codes stand for, constant for the gradient
            decoded = torch.zeros_like(flat)
            for layer in own:
                residual = flat - subtracted
                searched = self.reduce[layer](residual.detach())
                given = first if layer == 0 else None
                chosen = self.nearest(searched.detach(), layer) if given is None else given.flatten()
                vectors = self.restore[layer](_straight_through(self.codebooks[layer][chosen], searched))
                if self.training:
                    self._update(layer, searched.detach(), chosen, valid, revive=given is None)
                used = (num_layers > layer).repeat_interleave(frames)
                if given is None:
                    commitment = commitment + ((residual - vectors).square().sum(1) * (valid & used)).sum()
                decoded = decoded + vectors * used[:, None]
                layers.append(_straight_through(vectors, residual).unflatten(0, (batch, frames)).transpose(1, 2))
                ids.append(chosen.unflatten(0, (batch, frames)))
                subtracted = subtracted + vectors.detach()
            # a branch without any codebook in use is silent: neither its bias nor its gradient
            here = (num_layers > own[0]).repeat_interleave(frames)[:, None]
            output = output + outward(_straight_through(decoded, flat)) * here
        entries = (mask.sum(1) * (num_layers - int(first is not None))).sum().clamp(min=1) * self.dimension
        return Quantized(
            torch.stack(ids, 1), layers, output.unflatten(0, (batch, frames)).transpose(1, 2), commitment / entries
        )

    @torch.no_grad()
    def _update(self, layer: int, vectors: Tensor, ids: Tensor, valid: Tensor, revive: bool) -> None:
        """Update the moving averages of usage and sums over all processes, then perhaps re-initialise dead codes.

        vectors: float [M, D] with their codes long [M]; valid: bool [M], those that count. Nothing is selected by a
        mask, because a GPU would have to tell the processor how much that is.
        """
        size, dimension = self.codebooks.shape[1:]
        statistics = vectors.new_zeros(size, dimension + 1)
        counted = torch.cat([vectors, torch.ones_like(vectors[:, :1])], 1) * valid[:, None]
        statistics.index_add_(0, ids, counted)
        if dist.is_initialized():
            dist.all_reduce(statistics)
        counts, sums = statistics[:, -1], statistics[:, :-1]
        self.usage[layer].lerp_(counts / counts.mean().clamp(min=1e-6), 1 - self.decay)
        self.sums[layer].lerp_(sums / counts.mean().clamp(min=1e-6), 1 - self.decay)
        if revive:
            self._revive(layer, vectors, valid)
        usage = self.usage[layer, :, None]
        vectors = self._placed(self.sums[layer] / usage.clamp(min=LEAST_USAGE))
        self.codebooks[layer] = torch.where(usage > LEAST_USAGE, vectors, self.codebooks[layer])

    def _revive(self, layer: int, vectors: Tensor, valid: Tensor) -> None:
        """Replace dead codes by vectors of this batch.

        Resets usage and sum, because the next update would undo a change of the code vector alone.
        """
        dead = self.usage[layer] < DEAD_USAGE * self.usage[layer].mean()
        chances = valid.float() + 1e-9  # of a batch without speech anything is taken
        replacements = vectors[torch.multinomial(chances, len(dead), replacement=True)]
        if dist.is_initialized():
            dist.broadcast(replacements, src=0)
        self.usage[layer] = torch.where(dead, 1.0, self.usage[layer])
        self.sums[layer] = torch.where(dead[:, None], replacements, self.sums[layer])


def _straight_through(value: Tensor, x: Tensor) -> Tensor:
    """`value`, with a gradient that x receives unchanged, as well as whatever value was computed from."""
    return value + (x - x.detach())


class _Normalize(nn.Module):
    """Vectors float [..., C] scaled to length 1."""

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1)


def _factors(dimension: int, codebook_dim: int | None) -> tuple[nn.Module, nn.Module]:
    """The projection to the space of a codebook, and the one back, which begins as its transpose."""
    if codebook_dim is None:
        return nn.Identity(), nn.Identity()
    reduce, restore = nn.Linear(dimension, codebook_dim), nn.Linear(codebook_dim, dimension)
    with torch.no_grad():
        nn.init.orthogonal_(reduce.weight)
        restore.weight.copy_(reduce.weight.T)
        restore.bias.zero_()
    return nn.Sequential(reduce, _Normalize()), restore


def _linear(weight: Tensor) -> nn.Linear:
    """A projection that begins with this matrix."""
    projection = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        projection.weight.copy_(weight)
        projection.bias.zero_()
    return projection
