"""What a sweep varies: the fields of a recipe, their ranges, and the points that can exist.

The space is walked define-by-run, so that the head counts on offer are those that fit the variant drawn before and
lambda_init is drawn for V1 alone: a model that cannot be built is never proposed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

from diffvit.config import RunConfig, Variant, as_variant, valid_num_heads
from diffvit.config.checks import STRICT, require
from diffvit.search.points import HasRange, Recogniser, Suggest, Walker

MAX_LAMBDA = 0.95
"""Above it (1 - lambda_init), the scale of V1's heads, all but vanishes."""

_SECTIONS = {
    "variant": "model",
    "num_heads": "model",
    "lambda_init": "model",
    "patch_size": "model",
    "drop_path": "model",
    "lr": "optim",
    "muon_lr": "optim",
    "weight_decay": "optim",
}
"""Where the fields of `Space` lie in a `RunConfig`, in the order of the tables."""

LOG_SCALE = ("lr", "muon_lr", "weight_decay")

Values = dict[str, Any]
"""The varied fields of a configuration, by name: `{"num_heads": 2, "lambda_init": "depth", "lr": 1e-3}`."""


@dataclass(frozen=True)
class Space:
    """The fields that a sweep varies. What is left empty or None keeps the recipe's value.

    lambda_init keeps it only where `depth_schedule` is off too.
    """

    __pydantic_config__ = STRICT

    lambda_init: tuple[float, float] | None = (0.0, MAX_LAMBDA)
    """V1 only: lowest and highest constant; None for no constants."""
    depth_schedule: bool = True
    """V1 only: also try the depth schedule of lambda_init."""
    num_heads: tuple[int, ...] | None = ()
    """Head counts to try; without a value, every one that fits the width and the variant; None for the recipe's."""
    lr: tuple[float, float] | None = (1e-4, 1e-2)
    """Lowest and highest peak learning rate, on a log scale."""
    muon_lr: tuple[float, float] | None = (5e-3, 5e-2)
    """Recipes that train by Muon only, whose blocks it is the rate of: lowest and highest, on a log scale."""
    variant: tuple[Variant, ...] = ()
    """Attention variants to try: softmax, diff, diff_v2."""
    weight_decay: tuple[float, float] | None = None
    """Lowest and highest weight decay, on a log scale."""
    drop_path: tuple[float, float] | None = None
    """Lowest and highest drop path rate."""
    patch_size: tuple[int, ...] = ()
    """Patch sides to try, in pixels; each must divide the image's."""

    def __post_init__(self) -> None:
        for name in ("lambda_init", "lr", "muon_lr", "weight_decay", "drop_path"):
            bounds = getattr(self, name)
            require(
                bounds is None or -math.inf < bounds[0] <= bounds[1] < math.inf,
                f"space.{name} must be LOW HIGH, two finite numbers, got {bounds}",
            )
        for name in LOG_SCALE:
            bounds = getattr(self, name)
            require(bounds is None or bounds[0] > 0, f"space.{name} is on a log scale: LOW must be positive: {bounds}")
        for name in ("lambda_init", "drop_path"):
            bounds = getattr(self, name)
            require(bounds is None or 0 <= bounds[0] <= bounds[1] < 1, f"space.{name} must lie in [0, 1), got {bounds}")
        for name in ("num_heads", "variant", "patch_size"):
            choices = getattr(self, name) or ()
            require(len(set(choices)) == len(choices), f"space.{name} must not name a value twice, got {choices}")

    def check(self, recipe: RunConfig) -> None:
        """Make sure that every point of the space, laid over `recipe`, is a model that can be built.

        Raises:
            ValueError: a head count or patch side that does not fit, or nothing to vary.
        """
        model = recipe.model
        for variant in self._variants(recipe):
            offered = self._heads(recipe, variant)
            maps = 2 if variant == "diff" else 1
            require(
                bool(offered) and all(heads >= 1 and model.embed_dim % (maps * heads) == 0 for heads in offered),
                f"space.num_heads must fit model.embed_dim = {model.embed_dim} for variant {variant!r}, "
                f"got {list(offered)}; what fits: {valid_num_heads(model.embed_dim, variant)}",
            )
        odd_patches = [size for size in self.patch_size if size < 1 or model.image_size % size]
        require(
            not odd_patches,
            f"space.patch_size must divide model.image_size = {model.image_size}, got {odd_patches}",
        )
        varied = [name for name in self.varied(recipe) if name != "lambda_init" or self.lambda_init is not None]
        require(
            bool(varied),
            "the space has nothing to vary: give a range to space.lr, space.lambda_init or another of its fields",
        )

    def require_heeded(self, recipe: RunConfig) -> None:
        """Raises ValueError where a range was asked for of what no trial has."""
        for name, applies, where in (
            ("lambda_init", "diff" in self._variants(recipe), "variant 'diff' (V1)"),
            ("muon_lr", recipe.optim.optimizer == "muon", "optim.optimizer = 'muon'"),
        ):
            asked = getattr(self, name)
            require(
                applies or not asked or asked == getattr(Space, name),
                f"space.{name} is for {where}, which no trial has, got {asked}; leave it out",
            )

    def shapes(self, recipe: RunConfig) -> Iterator[RunConfig]:
        """The recipe with each shape of model on offer: the fields that decide its weights' sizes and its speed.

        Raises:
            ValueError: one that cannot be trained; names it and says why.
        """
        for variant in self._variants(recipe):
            for heads, patch_size in product(
                self._heads(recipe, variant), self.patch_size or (recipe.model.patch_size,)
            ):
                shape: dict[str, Any] = {"variant": variant, "num_heads": heads, "patch_size": patch_size}
                try:
                    yield dataclasses.replace(recipe, model=as_variant(recipe.model, **shape))
                except ValueError as error:
                    raise ValueError(f"the space holds a trial that cannot be trained, {shape}: {error}") from None

    def varied(self, recipe: RunConfig) -> list[str]:
        """Names of the fields that may differ between trials, in the order of the tables."""
        several_heads = any(len(self._heads(recipe, variant)) > 1 for variant in self._variants(recipe))
        differs = {
            "variant": len(self.variant) > 0,
            "num_heads": several_heads or len(self.variant) > 0 or bool(self.num_heads),
            "lambda_init": "diff" in self._variants(recipe) and self._varies_lambda,
            "patch_size": len(self.patch_size) > 0,
            "drop_path": self.drop_path is not None,
            "lr": self.lr is not None,
            "muon_lr": self._muon_lr(recipe) is not None,
            "weight_decay": self.weight_decay is not None,
        }
        return [name for name in _SECTIONS if differs[name]]

    def propose(self, trial: Suggest, recipe: RunConfig) -> RunConfig:
        """The recipe with a point of the space laid over it, drawn from an Optuna trial."""
        model: dict[str, Any] = {}
        optim: dict[str, Any] = {}
        variant = trial.suggest_categorical("variant", self.variant) if self.variant else recipe.model.variant
        model["variant"] = variant
        model["num_heads"] = trial.suggest_categorical(self._heads_name(variant), self._heads(recipe, variant))
        if variant == "diff" and self._varies_lambda:
            model["lambda_init"] = self._propose_lambda(trial)
        if self.patch_size:
            model["patch_size"] = trial.suggest_categorical("patch_size", self.patch_size)
        if self.drop_path:
            model["drop_path"] = trial.suggest_float("drop_path", *self.drop_path)
        if self.lr:
            optim["lr"] = trial.suggest_float("lr", *self.lr, log=True)
        muon_lr = self._muon_lr(recipe)
        if muon_lr:
            optim["muon_lr"] = trial.suggest_float("muon_lr", *muon_lr, log=True)
        if self.weight_decay:
            optim["weight_decay"] = trial.suggest_float("weight_decay", *self.weight_decay, log=True)
        return dataclasses.replace(
            recipe,
            model=as_variant(recipe.model, **model),
            optim=dataclasses.replace(recipe.optim, **optim),
        )

    def points(self, recipe: RunConfig) -> list[dict[str, Any]] | None:
        """Every point of the space, as an Optuna trial holds it; None where there is a range."""
        walker, found = Walker(), []
        try:
            while walker.goes_on:
                self.propose(walker, recipe)
                found.append(walker.take_point())
        except HasRange:
            return None
        return found

    def choices(self, name: str, recipe: RunConfig) -> list[Any] | None:
        """All that the field can be; None where it has a range."""
        if name == "num_heads":
            return sorted({heads for variant in self._variants(recipe) for heads in self._heads(recipe, variant)})
        found = getattr(self, name)
        return list(found) if name in ("variant", "patch_size") else None

    def values(self, config: RunConfig) -> Values:
        """The varied fields of a configuration; lambda_init only where the variant has one."""
        return {
            name: _value(config, name)
            for name in self.varied(config)
            if name != "lambda_init" or config.model.variant == "diff"
        }

    def parameters(self, config: RunConfig) -> tuple[dict[str, Any], list[str]]:
        """What an Optuna trial of exactly this configuration holds, and the fields that lie outside of the space."""
        asker = Recogniser(partial(_value, config))
        proposed, own = self.values(self.propose(asker, config)), self.values(config)
        return asker.parameters, [name for name in own if name in asker.outside or proposed[name] != own[name]]

    def describe(self, recipe: RunConfig) -> dict[str, str]:
        """The space in words, field by field."""
        words = {name: self._describe(name, recipe) for name in self.varied(recipe)}
        _, outside = self.parameters(recipe)
        words["first trial"] = (
            f"drawn, because the recipe's own {', '.join(outside)} lies outside" if outside else "the recipe itself"
        )
        return words

    @property
    def _varies_lambda(self) -> bool:
        return self.lambda_init is not None or self.depth_schedule

    def _muon_lr(self, recipe: RunConfig) -> tuple[float, float] | None:
        return self.muon_lr if recipe.optim.optimizer == "muon" else None

    def _variants(self, recipe: RunConfig) -> tuple[Variant, ...]:
        return self.variant or (recipe.model.variant,)

    def _heads(self, recipe: RunConfig, variant: Variant) -> tuple[int, ...]:
        if self.num_heads is None:
            return (recipe.model.num_heads,)
        return self.num_heads or tuple(valid_num_heads(recipe.model.embed_dim, variant))

    def _heads_name(self, variant: Variant) -> str:
        """Optuna wants the same choices whenever it meets a name."""
        return f"num_heads_{variant}" if self.variant else "num_heads"

    def _propose_lambda(self, trial: Suggest) -> Any:
        if self.lambda_init is None:
            return "depth"
        if self.depth_schedule and trial.suggest_categorical("lambda_schedule", ("depth", "constant")) == "depth":
            return "depth"
        return trial.suggest_float("lambda_init", *self.lambda_init)

    def _describe(self, name: str, recipe: RunConfig) -> str:
        if name == "num_heads":
            counts = {variant: self._heads(recipe, variant) for variant in self._variants(recipe)}
            listed = {variant: ", ".join(map(str, heads)) for variant, heads in counts.items()}
            if len(set(listed.values())) == 1:
                return next(iter(listed.values()))
            return "; ".join(f"{heads} ({variant})" for variant, heads in listed.items())
        bounds = getattr(self, name)
        if name == "lambda_init":
            constant = f"a constant in [{bounds[0]:g}, {bounds[1]:g}]" if bounds else ""
            return " or ".join(filter(None, ["the depth schedule" if self.depth_schedule else "", constant]))
        if name in ("variant", "patch_size"):
            return ", ".join(map(str, bounds))
        return f"{bounds[0]:g} to {bounds[1]:g}" + (", log scale" if name in LOG_SCALE else "")


def _value(config: RunConfig, name: str) -> Any:
    return getattr(getattr(config, _SECTIONS[name]), name)
