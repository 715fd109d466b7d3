"""Speech units: the frames of a self-supervised model, quantised to their nearest centroids (HuBERT, GSLM)."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tokenizer.interface import Codes, require_layers
from tokenizer.pretrained import (
    SETTINGS_FILE,
    check_folder,
    find_file,
    module_fingerprint,
    read_pretrained_json,
    read_weights,
    write_settings,
)
from tokenizer.reading import reading
from tokenizer.schemes.features import FeatureEncoder
from tokenizer.schemes.merges import UnitMerges

CENTROIDS_FILE = "centroids_{}.safetensors"  # with the fingerprint, so that the file always matches the settings


class UnitTokenizer(nn.Module):
    """A `DiscreteTokenizer` of one codebook: k-means over the features of an encoder (Lakhotia et al., 2102.01192).

    deduplicate: merge repeated units, as in GSLM; then the rate of the codes varies, and `frame_rate` is its maximum.
    merges: of the units that are left, with more codes than units.
    """

    num_codebooks = 1
    batched = True
    centroids: Tensor
    codebooks: Tensor  # float [1, codes, C]: the centroids, and of a sequence of units the mean of theirs

    def __init__(
        self,
        encoder: FeatureEncoder,
        centroids: Tensor,
        deduplicate: bool = False,
        merges: UnitMerges | None = None,
    ):
        """centroids: float [K, C], C the width of the encoder."""
        super().__init__()
        if centroids.ndim != 2 or centroids.shape[1] != encoder.width:
            raise ValueError(f"expected centroids float [K, {encoder.width}], got shape {tuple(centroids.shape)}")
        if merges and not deduplicate:
            raise ValueError("merges are of units whose repeats are merged: expected deduplicate=True")
        self.encoder, self.deduplicate, self.merges = encoder, deduplicate, merges
        self.register_buffer("centroids", centroids)
        codebook = centroids if merges is None else torch.stack([centroids[own].mean(0) for own in merges.units])
        self.register_buffer("codebooks", codebook[None], persistent=False)

    @classmethod
    def from_pretrained(cls, name: str | Path) -> "UnitTokenizer":
        """Load units from a folder or hub name; raises FileNotFoundError if it holds none."""
        name = check_folder(name, [SETTINGS_FILE], "speech units")
        settings = read_pretrained_json(name, SETTINGS_FILE)
        centroids = find_file(name, CENTROIDS_FILE.format(settings.get("fingerprint")))
        if settings.get("kind") != "units" or centroids is None:
            raise FileNotFoundError(f"{name} holds no units: expected a folder that recipes/fit_units.py has written")
        with reading(Path(name) / SETTINGS_FILE, "the settings of units"):
            layer, deduplicate = settings["layer"], bool(settings["deduplicate"])
        encoder = FeatureEncoder.from_pretrained(name, layer)
        with reading(centroids, f"centroids of width {encoder.width}"):
            weights = read_weights(centroids, "the centroids of units")
            clusters = weights["centroids"]
            merges = UnitMerges(weights["merges"], len(clusters)) if "merges" in weights else None
            return cls(encoder, clusters, deduplicate, merges)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the encoder, its preprocessor settings, the centroids with the merges, and the settings."""
        self.encoder.save_pretrained(folder)
        fingerprint = self.fingerprint
        weights = {"centroids": self.centroids.cpu().contiguous()}
        if self.merges:
            weights["merges"] = self.merges.pairs
        save_file(weights, Path(folder) / CENTROIDS_FILE.format(fingerprint))
        settings = {"layer": self.encoder.layer, "deduplicate": self.deduplicate, "fingerprint": fingerprint}
        write_settings(folder, "units", **settings)

    @property
    def sample_rate(self) -> int:
        return self.encoder.sample_rate

    @property
    def frame_rate(self) -> float:
        return self.encoder.frame_rate

    @property
    def codebook_size(self) -> int:
        return self.codebooks.shape[1]

    @property
    def device(self) -> torch.device:
        return self.encoder.device

    @property
    def fingerprint(self) -> str:
        """Hash of centroids, encoder, merges and settings."""
        settings = {"encoder": self.encoder.fingerprint, "deduplicate": self.deduplicate}
        if self.merges:
            settings["merges"] = self.merges.pairs.tolist()
        return module_fingerprint(nn.ParameterDict({"centroids": self.centroids}), settings)

    @torch.no_grad()
    def encode(self, waveform: Tensor, lengths: Tensor | None = None, layers: int | None = None) -> Codes:
        """Waveforms float [B, N] at 16 kHz -> units long [B, 1, T]; one per 320 samples, or fewer (`shorten`)."""
        require_layers(layers, 1)
        features = self.encoder.encode(waveform, lengths)
        units = (self.nearest(features.utterance(index)) for index in range(len(features.lengths)))
        return Codes.from_utterances([self.shorten(row)[None] for row in units])

    def nearest(self, frames: Tensor) -> Tensor:
        """The index of the nearest centroid of each frame, float [T, C] -> long [T]."""
        return torch.cdist(frames.to(self.centroids), self.centroids).argmin(1)

    def shorten(self, units: Tensor) -> Tensor:
        """The unit of each frame, long [T] -> codes long [S], S <= T: without repeats, and merged, if it is set so."""
        if self.deduplicate:
            units = units.unique_consecutive()
        return self.merges.encode(units) if self.merges else units
