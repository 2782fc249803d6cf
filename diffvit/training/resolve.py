"""A run's config, completed by what its images and the weights that it starts from decide."""

from __future__ import annotations

import dataclasses
from contextlib import suppress

import torch

from diffvit.config import RunConfig
from diffvit.data.datasets import SAMPLE, Dataset
from diffvit.models.origin import IMAGENET_STATISTICS
from diffvit.models.pretrained import UnknownOriginError, origin_of
from diffvit.models.vit import VisionTransformer
from diffvit.models.weights import HUB
from diffvit.storage import absolute
from diffvit.training.initial import load_initial
from diffvit.training.optim import require_no_decay


def resolve(config: RunConfig, dataset: Dataset) -> RunConfig:
    """Fill in what the data decides, and make paths hold in the workers' own working directories."""
    found, asked = len(dataset.classes), config.model.num_classes
    if asked not in (0, found):
        raise ValueError(
            f"model.num_classes must be the number of classes in the data, {found}, got {asked}; to train "
            "a recipe on other data than its own, --model.num-classes 0 takes as many as the data has"
        )
    if config.data.classes not in ((), dataset.classes):
        raise ValueError(f"data.classes must be those of the data, {dataset.classes}; got {config.data.classes}")
    path = config.data.path
    if path != SAMPLE:
        path = absolute(path)
    weights = config.init.weights
    if weights and not weights.startswith(HUB):
        weights = absolute(weights)
    mean, std = (config.data.mean, config.data.std) if config.data.mean else _channel_statistics(config, dataset)
    model = dataclasses.replace(config.model, num_classes=found)
    with torch.device("meta"):
        require_no_decay(VisionTransformer(model), config.optim)
    return dataclasses.replace(
        config,
        storage=config.storage if config.is_remote else str(config.folder.parent),
        data=dataclasses.replace(config.data, path=path, mean=mean, std=std, classes=dataset.classes),
        init=dataclasses.replace(config.init, weights=weights),
        model=model,
    )


def require_weights(config: RunConfig) -> None:
    """Load what the run starts from once before any worker does."""
    if config.init.weights:
        load_initial(VisionTransformer(config.model), config)


def _channel_statistics(config: RunConfig, dataset: Dataset) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Those that the weights were trained with, else those counted in the data, else ImageNet's.

    Their average where the model sees grey.
    """
    if config.init.weights:
        with suppress(UnknownOriginError):
            origin = origin_of(config.init.weights)
            channels = origin.model.in_channels
            if channels != config.model.in_channels:
                raise ValueError(
                    f"init.weights = {config.init.weights!r} are of a model of {channels} channels, so "
                    f"model.in_channels must be {channels}, got {config.model.in_channels}"
                )
            return origin.mean, origin.std
    mean, std = (dataset.mean, dataset.std) if dataset.mean else IMAGENET_STATISTICS
    if len(mean) > config.model.in_channels:
        mean, std = (round(sum(mean) / 3, 4),), (round(sum(std) / 3, 4),)
    return mean, std
