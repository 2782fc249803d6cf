"""What a run is made of: frozen dataclasses, checked when they are built, that round-trip through JSON.

The command line (`diffvit/cli.py`) is generated from these fields and their docstrings; recipes (`diffvit/recipes.py`)
are values of `RunConfig`. Every check that needs neither files nor a cluster is made here, so that a wrong option
costs a second and not a cluster start.
"""

from diffvit.config.data import AugmentConfig, DataConfig
from diffvit.config.export import ExportConfig
from diffvit.config.init import InitConfig
from diffvit.config.model import (
    MODEL_SIZES,
    VARIANT_NAMES,
    ModelConfig,
    Variant,
    as_variant,
    model_preset,
    valid_num_heads,
)
from diffvit.config.rehearsal import RehearsalOptions
from diffvit.config.run import RunConfig, differing_fields, from_json, listed, to_json
from diffvit.config.source import PredictConfig, PrepareConfig, SourceOptions
from diffvit.config.training import CheckpointConfig, OptimConfig, ScaleConfig

__all__ = [
    "MODEL_SIZES",
    "VARIANT_NAMES",
    "AugmentConfig",
    "CheckpointConfig",
    "DataConfig",
    "ExportConfig",
    "InitConfig",
    "ModelConfig",
    "OptimConfig",
    "PredictConfig",
    "PrepareConfig",
    "RehearsalOptions",
    "RunConfig",
    "ScaleConfig",
    "SourceOptions",
    "Variant",
    "as_variant",
    "differing_fields",
    "from_json",
    "listed",
    "model_preset",
    "to_json",
    "valid_num_heads",
]
