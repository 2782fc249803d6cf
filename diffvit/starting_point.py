"""What a command line starts from: `RECIPE`, its first argument, or `--config FILE`; and its help on these."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from itertools import pairwise
from pathlib import Path

from diffvit.config import RunConfig, from_json
from diffvit.published_recipes import VARIANTS
from diffvit.recipes import DEFAULT_RECIPE, RECIPES

NO_WEIGHTS = "init.weights is missing: the run, checkpoint or .safetensors file to start from"


def take_default(arguments: list[str]) -> RunConfig:
    """Remove what names the starting point from `arguments`, and load it."""
    for place, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if option == "--config":
            del arguments[place]
            if not equals:
                if place >= len(arguments):
                    raise ValueError("--config needs a file")
                value = arguments.pop(place)
            path = Path(value).expanduser()
            if not path.is_file():
                raise ValueError(f"--config must name a JSON file, got {value!r}: there is no such file")
            return _where_it_lies(from_json(path.read_bytes(), value), path.absolute().parent)
    named = bool(arguments) and not arguments[0].startswith("-")
    if not named:
        _require_recipe_first(arguments)
    recipe = arguments.pop(0) if named else DEFAULT_RECIPE
    if recipe not in RECIPES:
        nearest = difflib.get_close_matches(recipe, RECIPES, n=1, cutoff=0.4)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"unknown recipe {recipe!r}{hint} (there are {', '.join(RECIPES)})")
    if recipe == "finetune" and not value_of("--init.weights", arguments) and not asks_for_help(arguments):
        raise ValueError(NO_WEIGHTS)
    return RECIPES[recipe]()


def _where_it_lies(config: RunConfig, folder: Path) -> RunConfig:
    """The config of the run in `folder`, which may have been moved since; another folder's as it is."""
    if config.is_remote or folder.name != config.name or folder == config.folder:
        return config
    return dataclasses.replace(config, storage=str(folder.parent))


def _require_recipe_first(options: list[str]) -> None:
    """Refuse a recipe behind the value of an option: it would be taken for nothing."""
    for before, argument in pairwise(options):
        if argument in RECIPES and not before.startswith("-"):
            raise ValueError(f"the recipe comes before the options, got {argument!r} after {before!r}: put it first")


def asks_for_help(arguments: list[str]) -> bool:
    return not {"-h", "--help"}.isdisjoint(arguments)


def names_config(arguments: list[str]) -> bool:
    return any(argument.partition("=")[0] == "--config" for argument in arguments)


def value_of(option: str, arguments: list[str]) -> str:
    for place, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == option:
            return value if equals else (arguments[place + 1] if place + 1 < len(arguments) else "")
    return ""


def described(description: str, arguments: list[str]) -> str:
    """With what is said of the recipe that is named; else of all of them, in a line each."""
    if arguments and arguments[0] in RECIPES:
        return f"{description}\n\nThe recipe {arguments[0]}:\n\n{inspect.getdoc(RECIPES[arguments[0]])}"
    return (
        f"{description}\n\nRecipes, the first argument (RECIPE --help says more of one):\n{_recipe_list()}\n"
        "\nOr --config FILE, the config.json of an earlier run."
    )


def _recipe_list() -> str:
    with_variants = [name for name in RECIPES if f"{name}-v1-heads" in RECIPES]
    variants = {f"{name}{suffix}" for name in with_variants for suffix in VARIANTS}
    lines = [
        f"  {name}: {(recipe.__doc__ or '').strip().splitlines()[0]}"
        for name, recipe in RECIPES.items()
        if name not in variants
    ]
    suffixes = ", ".join(f"{suffix} ({text})" for suffix, text in VARIANTS.items())
    return "\n".join([*lines, f"\nAlso with {suffixes} after the name: {', '.join(with_variants)}."])
