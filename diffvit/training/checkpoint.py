"""What a run saves and how it goes on: a checkpoint folder is complete or not one at all.

model.safetensors   the weights that were evaluated (the average, where the run keeps one)
training.pt         the rest of the state, read with `weights_only=True`
checkpoint.json     model config, position, metrics, sha256 of the two files; written last
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from diffvit.config import RunConfig
from diffvit.manifest import WEIGHTS_NAME, read_manifest, write_manifest
from diffvit.models.vit import VisionTransformer

_TRAINING_STATE_NAME = "training.pt"


@dataclass
class TrainState:
    """Everything that a step changes. `step` counts the global steps that are done.

    Random numbers are not here: order, augmentation and drop path are functions of (seed, step).
    """

    model: VisionTransformer
    optimizer: AdamW
    schedule: LambdaLR
    ema: AveragedModel | None
    step: int = 0
    skipped: int = 0
    """Training samples left out so far because their image could not be used."""
    train_seconds: float = 0.0
    """Time spent training and evaluating, over all sittings."""
    world_sizes: list[int] = field(default_factory=list)
    """Number of workers of each sitting."""

    @property
    def evaluated_model(self) -> VisionTransformer:
        """The average where the run keeps one."""
        return self.model if self.ema is None else cast(VisionTransformer, self.ema.module)


def checkpoint_name(step: int) -> str:
    """The folder of the checkpoint after global step `step`, below the run's own."""
    return f"checkpoint_step_{step:08d}"


def save_checkpoint(folder: Path, state: TrainState, config: RunConfig, metrics: dict[str, Any]) -> None:
    """Write the checkpoint of this moment into the empty folder `folder`."""
    weights = {name: tensor.contiguous() for name, tensor in state.evaluated_model.state_dict().items()}
    save_file(weights, folder / WEIGHTS_NAME)
    training = {
        "optimizer": state.optimizer.state_dict(),
        "schedule": state.schedule.state_dict(),
        "skipped": state.skipped,
        "train_seconds": state.train_seconds,
        "world_sizes": state.world_sizes,
    }
    if state.ema is not None:
        training["model"] = state.model.state_dict()
        training["ema_updates"] = state.ema.n_averaged
    torch.save(training, folder / _TRAINING_STATE_NAME)
    write_manifest(
        folder,
        {
            "model": dataclasses.asdict(config.model),
            "data": {
                "classes": config.data.classes,
                "mean": config.data.mean,
                "std": config.data.std,
                "eval_crop_ratio": config.augment.eval_crop_ratio,
            },
            "step": state.step,
            "seed": config.seed,
            "metrics": metrics,
        },
    )


def load_checkpoint(folder: Path, state: TrainState) -> None:
    """Bring `state` to the moment at which the checkpoint was written.

    Raises:
        FileNotFoundError, ValueError: not a checkpoint, or a damaged one (see `read_manifest`).
    """
    manifest = read_manifest(folder)
    training = torch.load(folder / _TRAINING_STATE_NAME, map_location="cpu", weights_only=True)
    weights = load_file(folder / WEIGHTS_NAME)
    if state.ema is not None:
        state.ema.module.load_state_dict(weights)
        state.ema.n_averaged.copy_(training["ema_updates"])
        weights = training["model"]
    state.model.load_state_dict(weights)
    state.optimizer.load_state_dict(training["optimizer"])
    state.schedule.load_state_dict(training["schedule"])
    state.step = manifest["step"]
    state.skipped = training["skipped"]
    state.train_seconds = training["train_seconds"]
    state.world_sizes = training["world_sizes"]
