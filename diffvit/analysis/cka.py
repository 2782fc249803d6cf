"""How alike the layers of two models are: unbiased minibatch linear CKA, every layer pair in one pass over the images.

K = X X' and L = Y Y' are the Gram matrices of two layers' activations X, Y on the same n images, with zeroed diagonals.
U-centred, for i != j (and 0 for i = j):

    K~_ij = K_ij - (row_i + row_j) / (n - 2) + total / ((n - 1) (n - 2)),  row_i = sum_j K_ij, total = sum_i row_i
    HSIC(K, L) = sum_ij K~_ij L~_ij / (n (n - 3)),  an unbiased estimate from one batch
    CKA = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)),  each HSIC summed over the batches first, one division at the end

A batch weighs by its number of images, so a short last batch counts for what it is. A CKA divided batch by batch, or
made of biased HSIC, would rise with smaller batches: independent noise would look alike.

Sources: arXiv 2010.15327, section 2.2 (minibatch CKA); 1905.00414 (linear CKA); Song et al., JMLR 13 (2012), theorem 5
(unbiased HSIC); 1310.2926 (U-centring).

Letters: n images of a batch, La and Lb layers of the two models.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

MIN_BATCH = 4
"""Images below which HSIC has no unbiased estimate."""


class CKA:
    """Sums over batches; their size does not depend on how many images are seen. float64 throughout, on the device.

    >>> cka = CKA()
    >>> for images in batches:
    ...     cka.update(model_a.forward_features(images), model_b.forward_features(images))
    >>> cka.compute()  # (La, Lb)
    """

    def __init__(self) -> None:
        self.layers_a: tuple[str, ...] = ()
        self.layers_b: tuple[str, ...] = ()
        self.images = 0
        self._self_a = self._self_b = self._cross = torch.zeros(0, dtype=torch.float64)

    def update(self, features_a: Mapping[str, Tensor], features_b: Mapping[str, Tensor]) -> None:
        """Add a batch: activations (n, ...) by layer, of the same n images in the same order.

        The same layers come in every batch. Handing the same object twice compares a set of layers with itself, at
        half the work.

        Raises:
            ValueError: fewer than 4 images, layers with different n, or other layers than before.
        """
        n = _batch_size(features_a, features_b)
        self._require_layers(tuple(features_a), tuple(features_b))
        a = _centred_grams(features_a)
        b = a if features_b is features_a else _centred_grams(features_b)
        weight = 1 / (n - 3)  # the n of HSIC's n (n - 3) is cancelled by the weight of the batch
        if self.images == 0:
            self._self_a, self._self_b = a.new_zeros(len(a)), a.new_zeros(len(b))
            self._cross = a.new_zeros(len(a), len(b))
        self._self_a += a.square().sum(1) * weight
        self._self_b += b.square().sum(1) * weight
        self._cross += a @ b.T * weight
        self.images += n

    def merge(self, other: CKA) -> None:
        """Add what another worker summed over other images.

        Raises:
            ValueError: the other was fed other layers.
        """
        if other.images == 0:
            return
        self._require_layers(other.layers_a, other.layers_b)
        device = self._cross.device if self.images else other._cross.device
        theirs = [t.to(device) for t in (other._self_a, other._self_b, other._cross)]
        if self.images:
            theirs = [s + t for s, t in zip((self._self_a, self._self_b, self._cross), theirs, strict=True)]
        self._self_a, self._self_b, self._cross = theirs
        self.images += other.images

    def compute(self) -> Tensor:
        """(La, Lb), float64 on the CPU. About 0 for independent layers (also slightly below), 1 for the same.

        NaN where a layer has no HSIC with itself: its activations do not differ between images.

        Raises:
            ValueError: there was no batch.
        """
        if self.images == 0:
            raise ValueError("CKA needs at least one batch before compute(), got none; call update() first")
        scale = (self._self_a.clamp(min=0)[:, None] * self._self_b.clamp(min=0)[None, :]).sqrt()
        return torch.where(scale > 0, self._cross / scale, torch.nan).cpu()

    def _require_layers(self, layers_a: tuple[str, ...], layers_b: tuple[str, ...]) -> None:
        if self.images == 0:
            self.layers_a, self.layers_b = layers_a, layers_b
        for before, now in ((self.layers_a, layers_a), (self.layers_b, layers_b)):
            if before != now:
                raise ValueError(
                    "the layers must be the same in every batch, "
                    f"got {', '.join(before)} before and {', '.join(now)} now"
                )


def _batch_size(features_a: Mapping[str, Tensor], features_b: Mapping[str, Tensor]) -> int:
    sizes = {
        f"{model} {name}": t.shape[0] for model, f in (("a", features_a), ("b", features_b)) for name, t in f.items()
    }
    if not features_a or not features_b:
        raise ValueError("both models need at least one layer, got none")
    smallest, largest = min(sizes, key=sizes.__getitem__), max(sizes, key=sizes.__getitem__)
    if sizes[smallest] != sizes[largest]:
        raise ValueError(
            "all layers must hold the activations of the same images, "
            f"got {sizes[smallest]} of {smallest} and {sizes[largest]} of {largest}"
        )
    n = sizes[smallest]
    if n < MIN_BATCH:
        raise ValueError(
            f"a batch must have at least {MIN_BATCH} images for an unbiased estimate, got {n}; "
            "join a short last batch to the one before it"
        )
    return n


def _centred_grams(features: Mapping[str, Tensor]) -> Tensor:
    """(L, n n), float64: the U-centred Gram matrix of each layer."""
    grams = torch.stack([_gram(activation) for activation in features.values()])
    n = grams.shape[1]
    grams.diagonal(dim1=1, dim2=2).zero_()
    rows = grams.sum(2)
    total = rows.sum(1) / ((n - 1) * (n - 2))
    rows /= n - 2
    grams -= rows[:, :, None]
    grams -= rows[:, None, :]
    grams += total[:, None, None]
    grams.diagonal(dim1=1, dim2=2).zero_()
    return grams.flatten(1)


def _gram(activation: Tensor) -> Tensor:
    """(n, ...) -> (n, n), float64."""
    x = activation.detach().flatten(1)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    # U-centring removes any shift; taking it out first keeps the digits that a large common mean would cost in float32
    x = x - x.mean(0)
    return (x @ x.T).double()
