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
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from diffvit.config import RunConfig
from diffvit.manifest import WEIGHTS_NAME, read_manifest, write_manifest
from diffvit.models.vit import VisionTransformer
from diffvit.training.health import CALM_STEPS, Health
from diffvit.training.sharding import is_sharded, own_part, whole

_TRAINING_STATE_NAME = "training.pt"
_COUNTS = (
    "skipped_samples",
    "train_seconds",
    "world_sizes",
    "precisions",
    "poisoned_steps",
    "rollbacks",
    "good_step",
    "untried_step",
    "epoch_sums",
)
"""Fields of `TrainState` that are saved as they are."""


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
    health: Health = field(default_factory=lambda: Health(0))
    """Which of the last steps were poisoned."""
    evaluated: bool = False
    """Whether these weights were, at the end of an epoch."""
    good_step: int | None = None
    """That of the checkpoint which a sick run goes back to."""
    untried_step: int | None = None
    """That of a checkpoint whose weights have yet to prove good."""
    skipped_samples: list[int] = field(default_factory=list)
    """Numbers of the training samples whose image could not be used so far, each once."""
    epoch_sums: dict[str, float] = field(default_factory=dict)
    """What `Tracker` has added up since the epoch began."""
    train_seconds: float = 0.0
    """Time spent training and evaluating, over all sittings."""
    world_sizes: list[int] = field(default_factory=list)
    """Number of workers of each sitting."""
    precisions: list[str] = field(default_factory=list)
    """What each sitting computed in: bf16, tf32 or fp32."""
    poisoned_steps: int = 0
    """Steps so far whose update was skipped because the loss or its gradient was not finite."""
    rollbacks: int = 0
    """Times the run went back to the last good checkpoint because there were too many of those."""

    @property
    def evaluated_model(self) -> VisionTransformer:
        """The average where the run keeps one."""
        return self.model if self.ema is None else cast(VisionTransformer, self.ema.module)

    def note_healthy(self, *, tried: bool) -> None:
        """The checkpoint of this step is healthy as far as is known, and good once its weights were `tried`.

        That is when they were evaluated, or after CALM_STEPS further steps; the last update before a checkpoint may
        have gone too far.
        """
        if tried:
            self.good_step, self.untried_step = self.step, None
        elif self.untried_step is None:
            self.untried_step = self.step
        elif self.step - self.untried_step >= CALM_STEPS:
            self.good_step, self.untried_step = self.untried_step, self.step

    def note_evaluated(self) -> None:
        """The weights of this step were evaluated; where the run keeps an average, that was."""
        self.evaluated = True
        if not self.health.counted:
            self.note_healthy(tried=self.ema is None)


def checkpoint_name(step: int) -> str:
    """The folder of the checkpoint after global step `step`, below the run's own."""
    return f"checkpoint_step_{step:08d}"


@dataclass(frozen=True)
class Snapshot:
    """The state of one moment in CPU memory: what is written while training goes on with the next steps."""

    step: int
    weights: dict[str, torch.Tensor]
    training: dict[str, Any]
    fields: dict[str, Any]
    """What `checkpoint.json` says beside the files."""
    copied: torch.cuda.Event | None
    """Copies from a GPU are whole once it has happened."""

    def write(self, folder: Path) -> None:
        """Write the checkpoint into the empty folder `folder`."""
        if self.copied is not None:
            self.copied.synchronize()
        save_file(self.weights, folder / WEIGHTS_NAME)
        torch.save(self.training, folder / _TRAINING_STATE_NAME)
        write_manifest(folder, self.fields)


def take_snapshot(state: TrainState, config: RunConfig, metrics: dict[str, Any], *, keeps: bool = True) -> Snapshot:
    """Copy the state of this moment. A GPU's copies are queued behind its work and not waited for.

    A collective where the model is sharded; a rank that does not keep it only gives its part.
    """
    training = {
        "optimizer": state.optimizer.state_dict(),
        "schedule": state.schedule.state_dict(),
        "health": state.health.state_dict(),
        **{name: getattr(state, name) for name in _COUNTS},
    }
    if state.ema is not None:
        training["model"] = state.model.state_dict()
        training["ema_updates"] = state.ema.n_averaged
    device = next(state.model.parameters()).device
    weights = _to_host(state.evaluated_model.state_dict(), keeps)
    training = _to_host(training, keeps)
    copied = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
    fields = {
        "model": dataclasses.asdict(config.model),
        "data": {
            "classes": config.data.classes,
            "mean": config.data.mean,
            "std": config.data.std,
            "eval_crop_ratio": config.augment.eval_crop_ratio,
            "interpolation": config.augment.interpolation,
        },
        "gate_opening": state.evaluated_model.gate_opening,
        "step": state.step,
        "epoch": metrics.get("epoch"),
        "seed": config.seed,
        "metrics": metrics,
    }
    return Snapshot(state.step, weights, training, fields, copied)


def _to_host(value: Any, keeps: bool) -> Any:
    """A copy of a nest of dicts and lists, with its tensors, whole, in (pinned) CPU memory; None for them otherwise."""
    if isinstance(value, torch.Tensor):
        source = whole(value.detach())
        if not keeps:
            return None
        copy = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
        return copy.copy_(source, non_blocking=True)
    if isinstance(value, dict):
        return {key: _to_host(item, keeps) for key, item in value.items()}
    if isinstance(value, list):
        return [_to_host(item, keeps) for item in value]
    return value


def load_checkpoint(folder: Path, state: TrainState) -> None:
    """Bring `state` to the moment at which the checkpoint was written.

    Raises:
        FileNotFoundError, ValueError: not a checkpoint, or a damaged one (see `read_manifest`).
    """
    manifest = read_manifest(folder)
    # each rank of a sharded model takes its rows from the file and leaves the rest on the disk
    in_place = is_sharded(state.model)
    training = torch.load(folder / _TRAINING_STATE_NAME, map_location="cpu", weights_only=True, mmap=in_place)
    weights = load_file(folder / WEIGHTS_NAME)
    if state.ema is not None:
        _load_weights(state.ema.module, weights)
        state.ema.n_averaged.copy_(training["ema_updates"])
        weights = training["model"]
    _load_weights(state.model, weights)
    for model in {state.model, state.evaluated_model}:
        model.open_gates(manifest.get("gate_opening", 1.0))
    _load_moments(state.optimizer, training["optimizer"])
    state.schedule.load_state_dict(training["schedule"])
    state.step = manifest["step"]
    for name in _COUNTS:
        if name in training:  # an earlier version did not count everything
            setattr(state, name, training[name])
    if "health" in training:
        state.health.load_state_dict(training["health"])
    state.evaluated = False
    if "top1" in manifest["metrics"]:
        state.note_evaluated()  # which was found after the rest was written


def _load_weights(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    parameters = dict(model.named_parameters())
    own = {name: own_part(value, parameters.get(name, value)) for name, value in weights.items()}
    model.load_state_dict(own)


def _load_moments(optimizer: AdamW, saved: dict[str, Any]) -> None:
    """A moment is spread over the ranks as its parameter is; the count of steps is not."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, moments in saved["state"].items():
        for name, value in moments.items():
            moments[name] = own_part(value, parameters[number]) if name != "step" else value
    optimizer.load_state_dict(saved)


def roll_back(folder: Path, state: TrainState) -> None:
    """Take weights and optimiser of a checkpoint, but stay where the run is: the steps in between are given up.

    Order, schedule and every count go on from `state.step`.
    """
    here = {name: getattr(state, name) for name in ("step", "evaluated", *_COUNTS)}
    health = state.health.state_dict()
    load_checkpoint(folder, state)
    for name, value in here.items():
        setattr(state, name, value)
    state.health.load_state_dict(health)
    state.health.cure()
    state.untried_step = None
    state.schedule.last_epoch = state.step - 1
    state.schedule.step()
    state.rollbacks += 1
