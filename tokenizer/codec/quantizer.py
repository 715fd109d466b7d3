"""Residual vector quantisation with codebooks learnt by moving averages (paper, eq. 2)."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

DEAD_USAGE = 0.1  # a code used less than this share of the mean usage is dead and gets a new place


@dataclass(frozen=True)
class Quantized:
    """What the quantiser returns for latents z [B, D, T].

    ids: long [B, Q, T].
    layers: per codebook the quantised residual, float [B, D, T]; its gradient goes to z unchanged for every layer.
    output: their sum, float [B, D, T]; one straight-through estimator over the sum, so its gradient reaches z once.
    commitment: scalar, mean over layers of the squared distance between residual and code vector.
    """

    ids: Tensor
    layers: list[Tensor]
    output: Tensor
    commitment: Tensor


class ResidualVectorQuantizer(nn.Module):
    """A cascade of Q codebooks of K vectors; each quantises what the ones before it left over.

    The residual is detached from the code vectors before it, never from z: a loss on layer k reaches the encoder with
    the same gradient as a loss on layer 0. (Subtracting the straight-through output instead gives every layer but the
    first a gradient of exactly zero, which silently removes eq. 5 of the paper.)
    Runs in float32 under autocast: distances between close vectors do not survive bfloat16.
    """

    codebooks: Tensor
    usage: Tensor
    sums: Tensor

    def __init__(self, dimension: int, num_codebooks: int = 8, codebook_size: int = 1024):
        super().__init__()
        self.decay = 0.99  # of the moving averages, per step; short trainings need faster ones
        self.register_buffer("codebooks", torch.randn(num_codebooks, codebook_size, dimension))
        self.register_buffer("usage", torch.ones(num_codebooks, codebook_size))
        self.register_buffer("sums", self.codebooks.clone())

    @torch.no_grad()
    def initialize(self, latents: Tensor, seed: int = 0) -> None:
        """Place the codebooks by k-means on latents float [M, D], layer by layer on what is left over.

        All processes take the places the first one finds: latents from GPUs need not agree to the last bit.
        Raises ValueError when M is below 20 vectors a code: fewer leave most centroids on single vectors.
        """
        from sklearn.cluster import MiniBatchKMeans

        num_codebooks, size, _ = self.codebooks.shape
        if len(latents) < 20 * size:
            raise ValueError(f"k-means for {size} codes needs at least {20 * size} latent vectors, got {len(latents)}")
        residual = latents.float().cpu()
        for layer in range(num_codebooks):
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

        Where two are equally far within the rounding of float32, M, the threads and the processor decide between them.
        """
        codebook = self.codebooks[layer]
        # |x - e|^2 = |x|^2 - 2 (x.e - |e|^2 / 2): the first term is the same for every code and is skipped
        return torch.addmm(-0.5 * codebook.square().sum(1), vectors, codebook.T).argmax(1)

    def encode(self, z: Tensor, layers: int | None = None) -> Tensor:
        """Latents float [B, D, T] -> ids long [B, layers, T]; only as many layers are searched as are asked for.

        They are those of `forward`, but for vectors between two codes: see `nearest`.
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
        """Quantise z float [B, D, T] and, in training mode, move the codebooks.

        mask: bool [B, T], frames that hold speech (all when None); others neither move codes nor count as loss.
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
        subtracted = torch.zeros_like(flat)  # code vectors of the layers before: a constant for the gradient
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
        """Moving averages of usage and sums over all processes, then new places for dead codes."""
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
        """Move dead codes onto vectors of this batch.

        Usage and sum are both reset; were only the code vector replaced, the next update would put it back.
        """
        dead = self.usage[layer] < DEAD_USAGE * self.usage[layer].mean()
        if not dead.any():
            return
        pool = vectors if len(vectors) else self.codebooks[layer]
        places = pool[torch.randint(len(pool), (int(dead.sum()),), device=pool.device)]
        if dist.is_initialized():
            dist.broadcast(places, src=0)
        self.usage[layer, dead] = 1.0
        self.sums[layer, dead] = places
