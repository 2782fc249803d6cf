"""The weights that a run starts from, put into its model."""

from __future__ import annotations

from diffvit.config import RunConfig
from diffvit.models.vit import VisionTransformer
from diffvit.models.weights import LoadReport, load_weights


def load_initial(model: VisionTransformer, config: RunConfig) -> LoadReport:
    """Load `config.init.weights`; what had to be changed of them.

    Raises:
        ValueError: they are not there, do not fit the model, or `config.init` asks for what they cannot give.
    """
    init = config.init
    report = load_weights(model, init.weights, replace_head=True, from_plain=True, classes=config.data.classes)
    if init.gate_opening_steps and not report.converted:
        raise ValueError(
            "init.gate_opening_steps is for a plain ViT's weights, whose second maps are new, and init.weights = "
            f"{init.weights!r} are a V2's: closing its gates would take away what it learned; leave it out"
        )
    if init.train == "all" and not report.converted:
        model.open_gates(1.0)  # of a V2 that was saved while they opened, or they would stay as they are for good
    if init.train == "head" and report.converted:
        raise ValueError(
            f"init.train = 'head' keeps the features of init.weights = {init.weights!r}, a plain ViT's, and as a "
            f"model.variant = {config.model.variant!r} they are others until it is trained: take "
            "--model.variant softmax, or train all of it"
        )
    if init.train == "head" and report.changed:
        raise ValueError(
            f"init.train = 'head' keeps the features of init.weights = {init.weights!r}, trained with another "
            f"{' and another '.join(report.changed)}: leave that as it was, or train all of it"
        )
    return report
