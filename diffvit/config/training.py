"""The recipe, what a run takes of the cluster, and when it is saved."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from diffvit.config.checks import STRICT, require, require_fraction


@dataclass(frozen=True)
class OptimConfig:
    """The recipe: AdamW (or Muon), linear warm-up and cosine decay per step."""

    __pydantic_config__ = STRICT

    epochs: int = 90
    """Passes over the training set."""
    batch_size: int = 1024
    """Global batch: samples a step over all workers."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: the matrices of the blocks are trained by Muon (Jordan et al. 2024), all else by AdamW."""
    lr: float = 1e-3
    """Peak learning rate, at this batch size (nothing is rescaled behind your back)."""
    muon_lr: float = 0.02
    """Peak learning rate of the matrices that Muon trains."""
    muon_momentum: float = 0.95
    """Muon's decay of the gradient average."""
    min_lr_ratio: float = 0.0
    """Learning rate at the end, as a share of the peak."""
    warmup_epochs: float = 5.0
    """Epochs of linear warm-up; fractions allowed."""
    warmup_steps: int | None = None
    """Steps of linear warm-up instead, as some papers give it; then warmup_epochs must be 0."""
    weight_decay: float = 0.05
    """Decoupled weight decay; not applied to biases, norms, V1's lambda, LayerScale, tokens and positions."""
    no_decay: tuple[str, ...] = ()
    """What else is not decayed: names of parameters as in a checkpoint, * for any characters ('head.*')."""
    beta1: float = 0.9
    """AdamW's decay of the gradient average."""
    beta2: float = 0.999
    """AdamW's decay of the squared-gradient average."""
    layer_decay: float = 1.0
    """Factor of the learning rate from each block to the one before it (arXiv 2106.08254); 1 for the same rate
    everywhere, 0.65 to 0.85 for fine-tuning."""
    clip_norm: float = 1.0
    """Largest global gradient norm; 0 for no clipping."""
    label_smoothing: float = 0.0
    """Share of the target spread over all classes."""
    ema_decay: float = 0.0
    """Decay per step of the weight average that is evaluated and saved; 0 for none."""
    max_skipped_steps: int = 3
    """A step whose loss or gradient is not finite changes no weight (the average goes on) and is counted. More of them
    than this, without ten good steps in between, take the weights back to the last good checkpoint of an epoch's end or
    of checkpoint.every_steps; the order of samples goes on."""
    max_rollbacks: int = 2
    """Times that is tried before the run ends."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            require(getattr(self, name) >= 1, f"optim.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "muon_lr"):
            rate = getattr(self, name)
            require(0 < rate < math.inf, f"optim.{name} must be positive and finite, got {rate}")
        require(
            0.0 <= self.warmup_epochs <= self.epochs,
            f"optim.warmup_epochs must be between 0 and optim.epochs = {self.epochs}, got {self.warmup_epochs}",
        )
        require(
            self.warmup_steps is None or (self.warmup_steps >= 0 and self.warmup_epochs == 0),
            "optim.warmup_steps must not be negative, and stands instead of optim.warmup_epochs, which must then be 0; "
            f"got {self.warmup_steps} and {self.warmup_epochs}",
        )
        require(0.0 < self.layer_decay <= 1.0, f"optim.layer_decay must be in (0, 1], got {self.layer_decay}")
        require(0.0 <= self.min_lr_ratio <= 1.0, f"optim.min_lr_ratio must be in [0, 1], got {self.min_lr_ratio}")
        for name in ("weight_decay", "clip_norm", "max_skipped_steps", "max_rollbacks"):
            require(getattr(self, name) >= 0, f"optim.{name} must not be negative, got {getattr(self, name)}")
        for name in ("beta1", "beta2", "muon_momentum", "label_smoothing", "ema_decay"):
            require_fraction(f"optim.{name}", getattr(self, name))


@dataclass(frozen=True)
class ScaleConfig:
    """What the run takes of the cluster. May change between the sittings of a run."""

    __pydantic_config__ = STRICT

    workers: int | tuple[int, int] = 1
    """Ray Train workers; must divide optim.batch_size. Two numbers, least and most: as many as there is room for, more
    when nodes come and fewer when they go; numbers that do not divide the batch are passed over."""
    gpu: bool = False
    """One GPU a worker."""
    cpus_per_worker: float = 0.5
    """CPUs a worker reserves. Decoding runs in Ray tasks beside the workers, one CPU each, and needs some left."""
    micro_batch_size: int | None = None
    """Samples that a worker takes through the model at once, or less, half at least, where that does not divide its
    share; the rest is accumulated. None: the whole share, that of the most workers where their number is left open."""
    precision: Literal["auto", "bf16", "tf32", "fp32"] = "auto"
    """auto: bf16 autocast on a GPU that has it, else float32; bf16: on a CPU that has it too; tf32: float32, but a GPU
    from Ampere on multiplies with 10 bits of mantissa; fp32: float32 throughout. On a CPU tf32 is fp32."""
    sharding: Literal["none", "fsdp"] = "none"
    """fsdp: parameters, their average and AdamW's moments are spread over the workers (PyTorch's FSDP2), for models
    that do not fit one GPU; slower where they do. Checkpoints are the same with and without."""
    compile: bool = False
    """Train through torch.compile, which fuses kernels and takes a minute to start; evaluation stays as it is.
    Needs a C++ compiler, on a GPU a C compiler."""
    wait_minutes: float = 20.0
    """Minutes to wait for nodes that the cluster's autoscaler has still to start."""
    max_failures: int = 3
    """Times a lost worker group is restarted from the last checkpoint."""
    max_preemptions: int = -1
    """The same where a node was taken away with notice, as spot instances are; -1: as often as it takes."""

    def __post_init__(self) -> None:
        require(
            1 <= self.min_workers <= self.max_workers,
            f"scale.workers must be at least 1, or two numbers in order, got {self.workers}",
        )
        require(
            1e-4 <= self.cpus_per_worker < math.inf,  # Ray counts ten-thousandths
            f"scale.cpus_per_worker must be at least 0.0001, and finite, got {self.cpus_per_worker}",
        )
        require(
            self.sharding == "none" or not self.compile,
            "scale.compile is not offered with scale.sharding = 'fsdp', because nobody has tried the two together; "
            "leave one of them out",
        )
        require(self.max_failures >= 0, f"scale.max_failures must not be negative, got {self.max_failures}")
        require(self.max_preemptions >= -1, f"scale.max_preemptions must be -1 or more, got {self.max_preemptions}")
        require(
            self.micro_batch_size is None or self.micro_batch_size >= 1,
            f"scale.micro_batch_size must be at least 1, got {self.micro_batch_size}",
        )

    @property
    def device_type(self) -> Literal["cuda", "cpu"]:
        return "cuda" if self.gpu else "cpu"

    @property
    def worker_resources(self) -> dict[str, float]:
        """What Ray sets aside for each worker."""
        return {"CPU": self.cpus_per_worker} | ({"GPU": 1.0} if self.gpu else {})

    @property
    def min_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def max_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[1]


@dataclass(frozen=True)
class CheckpointConfig:
    """When the run is saved. May change between the sittings of a run."""

    __pydantic_config__ = STRICT

    every_steps: int | None = None
    """Also save every this many steps, beside the end of each epoch and `every_minutes`."""
    every_minutes: float | None = 5.0
    """Also save when so many minutes have gone since the last checkpoint (looked at every few steps); None: not."""
    keep_last: int = 2
    """Checkpoints kept beside the best one: should the last be damaged, the run goes on from the one before."""
    keep_every_epochs: int | None = None
    """Also keep that of every so many epochs; None: no others."""
    retry_minutes: float = 10.0
    """How long the run goes on while its storage is away or full, before it ends."""

    def __post_init__(self) -> None:
        require(
            self.every_steps is None or self.every_steps >= 1,
            f"checkpoint.every_steps must be at least 1, got {self.every_steps}",
        )
        require(
            self.every_minutes is None or self.every_minutes > 0,
            f"checkpoint.every_minutes must be positive, got {self.every_minutes}",
        )
        require(self.keep_last >= 1, f"checkpoint.keep_last must be at least 1, got {self.keep_last}")
        require(
            self.keep_every_epochs is None or self.keep_every_epochs >= 1,
            f"checkpoint.keep_every_epochs must be at least 1, got {self.keep_every_epochs}",
        )
        require(self.retry_minutes >= 0, f"checkpoint.retry_minutes must not be negative, got {self.retry_minutes}")
