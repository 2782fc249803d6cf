"""What a run starts from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from diffvit.config.checks import STRICT, require


@dataclass(frozen=True)
class InitConfig:
    """Weights to begin with, and which of them are trained."""

    __pydantic_config__ = STRICT

    weights: str = ""
    """Empty: from scratch. A run (its best checkpoint), a checkpoint, a .safetensors file in timm's or unilm's layout,
    each on a disk or at an s3:// or gs:// URL, or hf-hub:OWNER/NAME. A plain ViT's weights are converted where the
    model is differential."""
    train: Literal["all", "head"] = "all"
    """head: a linear probe, everything but the classifier is frozen."""
    gate_opening_steps: int = 0
    """V2 from a plain ViT: steps over which the second map fades in, linearly; at the first step the model computes
    what the plain one did. 0: it is there at once."""

    def __post_init__(self) -> None:
        require(
            self.gate_opening_steps >= 0,
            f"init.gate_opening_steps must not be negative, got {self.gate_opening_steps}",
        )
        require(
            bool(self.weights) or (self.train == "all" and not self.gate_opening_steps),
            "init.train = 'head' and init.gate_opening_steps need init.weights: there is nothing to start from",
        )
        require(
            self.train == "all" or not self.gate_opening_steps,
            "init.gate_opening_steps changes what the model computes, which init.train = 'head' keeps as it is: "
            "leave one of them out",
        )
