"""What one run is asked about a group of validation images: predictions, representations, attention.

Letters: n images of a group, C channels, S image side, P patches of a side.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from diffvit.analysis.arms import FinishedRun
from diffvit.analysis.attention_noise import AttentionNoise
from diffvit.analysis.compositions import Compositions
from diffvit.analysis.features import high_norm_threshold, layer_names, patch_norms, representations
from diffvit.analysis.regroup import Group
from diffvit.analysis.similarity import Representations
from diffvit.analysis.statistics import Values
from diffvit.data.images import normalize

Key = str
"""'clean', or what was done to the images."""


class RunMeasures:
    """A run's answers, added group by group. Models run in float32, but `represents_in_bf16` where that is said."""

    def __init__(self, run: FinishedRun, device: torch.device, represents_in_bf16: bool = False) -> None:
        self.run = run
        self.noise = AttentionNoise()
        self.composed = AttentionNoise()
        self.boxed = AttentionNoise()
        self.model = run.model.to(device).eval()
        self._device = device
        self._autocast = torch.autocast(device.type, torch.bfloat16, enabled=represents_in_bf16)
        self._answers: dict[Key, list[Values]] = {}
        self._threshold: float | None = None
        self._patches = self._high_norm_patches = 0

    def pixels(self, images: npt.NDArray[np.uint8]) -> Tensor:
        """Normalised as the run was trained."""
        data = self.run.config.data
        return normalize(torch.from_numpy(np.array(images)).to(self._device), data.mean, data.std)

    @torch.no_grad()
    def answer(self, images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64], key: Key = "clean") -> None:
        """Classify the images; what comes out is kept under `key`."""
        logits = self.model(self.pixels(images)).double()
        truth = torch.from_numpy(labels).to(self._device)
        confidence, predicted = logits.softmax(dim=1).max(dim=1)
        loss = F.cross_entropy(logits, truth, reduction="none")
        rows = torch.stack([(predicted == truth).double(), confidence, loss])
        self._answers.setdefault(key, []).append(rows.cpu().numpy())

    def answers(self, key: Key = "clean") -> Values:
        """(3, images): 1 where right, confidence of the predicted class, negative log-likelihood in nats."""
        return np.concatenate(self._answers[key], axis=1)

    @torch.no_grad()
    def represent(self, group: Group) -> tuple[Representations, Tensor]:
        """Representations of the group, those of means also 'without high-norm tokens', and the mask of these (n, P P).

        The threshold of a high-norm token is taken from the first group and then stays.
        """
        with self._autocast:
            features = self.model.forward_features(self.pixels(group.images), layer_names(self.model))
        norms = patch_norms(features, self.model)
        if self._threshold is None:
            self._threshold = high_norm_threshold(norms)
        high_norm = norms > self._threshold
        self._patches += high_norm.numel()
        self._high_norm_patches += int(high_norm.sum())
        whole = representations(features, self.model)
        without = representations(features, self.model, high_norm)
        without = {f"{name}, without high-norm tokens": without[name] for name in without if name != "class token"}
        return whole | without, high_norm

    @property
    def high_norm_share(self) -> float:
        """Of the patches seen by `represent`."""
        return self._high_norm_patches / max(self._patches, 1)

    def look(self, group: Group, high_norm: Tensor) -> None:
        """Measure attention on the group."""
        self.noise.update(self.model, self.pixels(group.images), high_norm)

    def look_at_compositions(self, made: Compositions) -> None:
        """Measure what part of attention falls on the object."""
        inside = torch.from_numpy(made.inside).to(self._device)
        self.composed.update(self.model, self.pixels(made.images), inside=inside)

    def look_at_boxes(self, images: npt.NDArray[np.uint8], inside: npt.NDArray[np.bool_]) -> None:
        """Measure what part of attention falls into boxes; `inside` (n, S, S) are their pixels."""
        patch = self.model.config.patch_size
        share = F.avg_pool2d(torch.from_numpy(inside)[:, None].double(), patch).flatten(1).to(self._device)
        self.boxed.update(self.model, self.pixels(images), inside=share)
