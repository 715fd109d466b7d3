"""Residual vector quantisation with codebooks learnt by exponential moving averages (paper, eq. 2)."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.progress import progress_bar

DEAD_USAGE = 0.1  # a code used less than this fraction of the mean usage is dead and is re-initialised


@dataclass(frozen=True)
class Quantized:
    """Output of the quantiser for latents z [B, D, T].

    ids: long [B, Q, T].
    layers: the quantised residual of each codebook, float [B, D, T]; straight-through, so z receives the gradient of
        every layer unchanged.
    output: the sum of the layers, float [B, D, T]; a single straight-through estimator, so z receives its gradient
        once and not once per layer.
    commitment: scalar, mean over layers of the squared distance between residual and code vector.
    """

    ids: Tensor
    layers: list[Tensor]
    output: Tensor
    commitment: Tensor


class ResidualVectorQuantizer(nn.Module):
    """A cascade of Q codebooks of K vectors; each quantises the residual of the ones before it.

    The residual is detached from the preceding code vectors, never from z, so that a loss on layer k has the same
    gradient at the encoder as a loss on layer 0. (Subtracting the straight-through output instead gives every layer but
    the first a gradient of exactly zero, which silently removes eq. 5 of the paper.)
    Runs in float32 under autocast, because bfloat16 cannot resolve distances between close vectors.
    """

    codebooks: Tensor
    usage: Tensor
    sums: Tensor

    def __init__(self, dimension: int, num_codebooks: int = 8, codebook_size: int = 1024):
        super().__init__()
        self.decay = 0.99  # of the moving averages, per step; short training runs need a smaller one
        self.register_buffer("codebooks", torch.randn(num_codebooks, codebook_size, dimension))
        self.register_buffer("usage", torch.ones(num_codebooks, codebook_size))
        self.register_buffer("sums", self.codebooks.clone())

    @torch.no_grad()
    def initialize(self, latents: Tensor, seed: int = 0) -> None:
        """Initialise the codebooks by k-means on latents float [M, D], each layer on the residual of the one before.

        All processes take the result of the first, because latents computed on GPUs may differ in the last bits.
        Raises ValueError for fewer than 20 vectors per code, which would leave most centroids on single vectors.
        """
        from sklearn.cluster import MiniBatchKMeans

        num_codebooks, size, _ = self.codebooks.shape
        if len(latents) < 20 * size:
            raise ValueError(f"k-means for {size} codes needs at least {20 * size} latent vectors, got {len(latents)}")
        residual = latents.float().cpu()
        for layer in progress_bar(range(num_codebooks), "k-means for the codebooks", unit="codebook"):
            kmeans = MiniBatchKMeans(size, batch_size=4096, n_init=1, max_iter=30, random_state=seed + layer)
            ids = torch.from_numpy(kmeans.fit_predict(residual.numpy())).long()
            centroids = torch.from_numpy(kmeans.cluster_centers_).float()
            counts = torch.bincount(ids, minlength=size).float().clamp(min=1.0)
            self.codebooks[layer] = centroids
            self.usage[layer] = counts / counts.mean()
            self.sums[layer] = self.codebooks[layer] * self.usage[layer, :, None]
            residual = residual - centroids[ids]
        if dist.is_initialized():
            for buffer in self.buffers():
                dist.broadcast(buffer, src=0)

    def nearest(self, vectors: Tensor, layer: int) -> Tensor:
        """Ids long [M] of the code vectors closest to `vectors` float [M, D].

        If two are equally close within float32 rounding, the choice may vary with M, number of threads and processor.
        """
        codebook = self.codebooks[layer]
        # |x - e|^2 = |x|^2 - 2 (x.e - |e|^2 / 2): the first term is the same for every code and is skipped
        return torch.addmm(-0.5 * codebook.square().sum(1), vectors, codebook.T).argmax(1)

    def encode(self, z: Tensor, layers: int | None = None) -> Tensor:
        """Latents float [B, D, T] -> ids long [B, layers, T]; searches the first `layers` codebooks (all when None).

        The ids equal those of `forward`, except for vectors between two codes: see `nearest`.
        """
        batch, _, frames = z.shape
        residual = z.float().transpose(1, 2).flatten(0, 1)
        ids = []
        with torch.autocast(z.device.type, enabled=False):
            for layer in range(len(self.codebooks) if layers is None else layers):
                ids.append(self.nearest(residual, layer))
                residual = residual - self.codebooks[layer][ids[-1]]
        return torch.stack(ids, 1).unflatten(0, (batch, frames)).transpose(1, 2)

    def decode(self, ids: Tensor) -> Tensor:
        """Ids long [B, Q', T], Q' <= Q -> sum of code vectors, float [B, D, T]."""
        vectors = [self.codebooks[layer][ids[:, layer]] for layer in range(ids.shape[1])]
        return torch.stack(vectors).sum(0).transpose(1, 2)

    def forward(self, z: Tensor, mask: Tensor | None = None, num_layers: Tensor | None = None) -> Quantized:
        """Quantise z float [B, D, T] and, in training mode, update the codebooks.

        mask: bool [B, T], frames that hold speech (all when None); the others affect neither codebooks nor loss.
        num_layers: long [B], codebooks summed into `output` per utterance (all when None): quantiser dropout.
        """
        with torch.autocast(z.device.type, enabled=False):
            return self._quantize(z.float(), mask, num_layers)

    def _quantize(self, z: Tensor, mask: Tensor | None, num_layers: Tensor | None) -> Quantized:
        batch, _, frames = z.shape
        num_codebooks = len(self.codebooks)
        mask = torch.ones(batch, frames, dtype=torch.bool, device=z.device) if mask is None else mask
        if num_layers is None:
            num_layers = torch.full((batch,), num_codebooks, device=z.device)
        flat = z.transpose(1, 2).flatten(0, 1)
        valid = mask.flatten()
        subtracted = torch.zeros_like(flat)  # sum of the preceding code vectors, constant for the gradient
        output = torch.zeros_like(flat)
        ids, layers, commitment = [], [], z.new_zeros(())
        for layer in range(num_codebooks):
            residual = flat - subtracted
            chosen = self.nearest(residual.detach(), layer)
            vectors = self.codebooks[layer][chosen]
            if self.training:
                self._update(layer, residual.detach()[valid], chosen[valid])
            used = (num_layers > layer).repeat_interleave(frames)
            commitment = commitment + F.mse_loss(residual[valid & used], vectors[valid & used], reduction="sum")
            output = output + vectors * used[:, None]
            layers.append((residual + (vectors - residual).detach()).unflatten(0, (batch, frames)).transpose(1, 2))
            ids.append(chosen.unflatten(0, (batch, frames)))
            subtracted = subtracted + vectors
        entries = (mask.sum(1) * num_layers).sum().clamp(min=1) * z.shape[1]
        output = flat + (output - flat).detach()
        return Quantized(
            torch.stack(ids, 1), layers, output.unflatten(0, (batch, frames)).transpose(1, 2), commitment / entries
        )

    @torch.no_grad()
    def _update(self, layer: int, vectors: Tensor, ids: Tensor) -> None:
        """Update the moving averages of usage and sums over all processes, then re-initialise dead codes."""
        size, dimension = self.codebooks.shape[1:]
        statistics = vectors.new_zeros(size, dimension + 1)
        statistics.index_add_(0, ids, torch.cat([vectors, torch.ones_like(vectors[:, :1])], 1))
        if dist.is_initialized():
            dist.all_reduce(statistics)
        counts, sums = statistics[:, -1], statistics[:, :-1]
        self.usage[layer].lerp_(counts / counts.mean().clamp(min=1e-6), 1 - self.decay)
        self.sums[layer].lerp_(sums / counts.mean().clamp(min=1e-6), 1 - self.decay)
        self._revive(layer, vectors)
        self.codebooks[layer] = self.sums[layer] / self.usage[layer, :, None].clamp(min=1e-6)

    def _revive(self, layer: int, vectors: Tensor) -> None:
        """Replace dead codes by vectors of this batch.

        Resets usage and sum, because the next update would undo a change of the code vector alone.
        """
        dead = self.usage[layer] < DEAD_USAGE * self.usage[layer].mean()
        if not dead.any():
            return
        pool = vectors if len(vectors) else self.codebooks[layer]
        replacements = pool[torch.randint(len(pool), (int(dead.sum()),), device=pool.device)]
        if dist.is_initialized():
            dist.broadcast(replacements, src=0)
        self.usage[layer, dead] = 1.0
        self.sums[layer, dead] = replacements
