"""The command line of the jobs: `JOB.py [RECIPE | --config FILE] [--section.field VALUE ...]`."""

from __future__ import annotations

import dataclasses
import difflib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn, TypeVar

import tyro

from diffvit.config import RehearsalOptions, RunConfig, from_json
from diffvit.recipes import DEFAULT_RECIPE, RECIPES
from diffvit.search.config import SearchConfig, SweepConfig
from diffvit.search.space import Space

if TYPE_CHECKING:
    from diffvit.compare import CompareConfig

T = TypeVar("T")


def parse_pretrain_config(description: str, arguments: list[str] | None = None) -> tuple[RunConfig, RehearsalOptions]:
    """The run that the command line asks for, and whether it is only to be rehearsed.

    Starts from a recipe, or from the JSON file of an earlier run (`--config`), and applies the options. Help ends
    with status 0; anything that is wrong with one line on stderr and status 2.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        default = _take_default(arguments)

        def pretrain(
            run: Annotated[RunConfig, tyro.conf.arg(name="")] = default,
            rehearsal: Annotated[RehearsalOptions, tyro.conf.arg(name="")] = RehearsalOptions(),  # noqa: B008 - frozen
        ) -> tuple[RunConfig, RehearsalOptions]:
            return run, rehearsal

        return tyro.cli(pretrain, args=arguments, description=_described(description))
    except ValueError as error:
        fail(str(error))


def parse_sweep_config(description: str, arguments: list[str] | None = None) -> SweepConfig:
    """The sweep that the command line asks for: a run, with the sections `search` and `space` too."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        default = _take_default(arguments)

        def sweep(
            run: Annotated[RunConfig, tyro.conf.arg(name="")] = default,
            search: SearchConfig = SearchConfig(),  # noqa: B008 - frozen
            space: Space = Space(),  # noqa: B008 - frozen
        ) -> SweepConfig:
            return SweepConfig(run, search, space)

        return tyro.cli(sweep, args=arguments, description=_described(description))
    except ValueError as error:
        fail(str(error))


def parse_finetune_config(description: str, arguments: list[str] | None = None) -> RunConfig:
    """As `parse_pretrain_config`, from the recipe `finetune` and the model whose weights `--init.weights` names."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        default = _take_default(["finetune", *arguments]) if not _names_config(arguments) else _take_default(arguments)
        weights = _value_of("--init.weights", arguments) or default.init.weights
        if weights and weights != default.init.weights:  # else a config's, which has the model: a run goes on without
            from diffvit.models.pretrained import shape_of  # imports torch, which takes seconds

            model = shape_of(weights)
            default = dataclasses.replace(default, model=model, init=dataclasses.replace(default.init, weights=weights))
        elif not weights and not {"-h", "--help"} & set(arguments):
            raise ValueError("init.weights is missing: the run, checkpoint or .safetensors file to start from")
        return tyro.cli(RunConfig, default=default, args=arguments, description=description)
    except ValueError as error:
        fail(str(error))


def parse_compare_config(description: str, arguments: list[str] | None = None) -> CompareConfig:
    """The comparison that the command line asks for: a recipe's options, and those of `CompareConfig`."""
    from diffvit.compare import CompareConfig

    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        default = CompareConfig(_take_default(arguments))
        return tyro.cli(CompareConfig, default=default, args=arguments, description=_described(description))
    except ValueError as error:
        fail(str(error))


def run_training(config: RunConfig) -> None:
    """Train, or continue, the run, say how it ended, and end the job."""
    from diffvit.console import print_results  # after the options are found good: these imports take seconds
    from diffvit.training.launch import RunStopped, TrainingFailedError, train

    with job_ends("from the last checkpoint", RunStopped, TrainingFailedError):
        results = train(config)
    print_results(config.location, results)


def run_rehearsal(config: RunConfig, options: RehearsalOptions) -> None:
    """Rehearse the run, print what it will take, and end the job."""
    from diffvit.rehearse import rehearse  # as above
    from diffvit.training.launch import RunStopped, TrainingFailedError

    with job_ends("from the beginning", RunStopped, TrainingFailedError):
        rehearse(config, options)


@contextmanager
def job_ends(goes_on: str, *stops: type[Exception]) -> Iterator[None]:
    """End a job that an error ends with one message: status 2 for wrong input, 130 for Ctrl-C, else 1.

    Args:
        goes_on: where the same command goes on.
        stops: the errors, beside OSError and StorageError, that are no defect of the program.
    """
    from diffvit.storage import StorageError  # imports pyarrow

    try:
        yield
    except ValueError as error:
        fail(str(error), status=2)
    except (OSError, StorageError) as error:
        fail(f"{error}; the same command goes on {goes_on}", status=1)
    except stops as error:
        fail(str(error), status=1)
    except KeyboardInterrupt:
        fail(f"interrupted; the same command goes on {goes_on}", status=130)


def parse_options(kind: type[T], description: str, arguments: list[str] | None = None) -> T:
    """The options of a job that trains nothing, from `kind`'s fields; ends like `parse_pretrain_config`."""
    try:
        return tyro.cli(kind, args=arguments, description=description)
    except ValueError as error:
        fail(str(error))


def fail(message: str, status: int = 2) -> NoReturn:
    """End the job with one message; status 2 says that the input was wrong."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(status)


def _take_default(arguments: list[str]) -> RunConfig:
    """Remove what names the starting point from `arguments`, and load it."""
    for place, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if option == "--config":
            del arguments[place]
            if not equals:
                if place >= len(arguments):
                    raise ValueError("--config needs a file")
                value = arguments.pop(place)
            path = Path(value)
            if not path.is_file():
                raise ValueError(f"--config must name a JSON file, got {value!r}: there is none")
            return from_json(path.read_bytes(), value)
    recipe = arguments.pop(0) if arguments and not arguments[0].startswith("-") else DEFAULT_RECIPE
    if recipe not in RECIPES:
        nearest = difflib.get_close_matches(recipe, RECIPES, n=1, cutoff=0.4)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"unknown recipe {recipe!r}{hint} (there are {', '.join(RECIPES)})")
    return RECIPES[recipe]()


def _names_config(arguments: list[str]) -> bool:
    return any(argument.partition("=")[0] == "--config" for argument in arguments)


def _value_of(option: str, arguments: list[str]) -> str:
    for place, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == option:
            return value if equals else (arguments[place + 1] if place + 1 < len(arguments) else "")
    return ""


def _described(description: str) -> str:
    return (
        f"{description}\n\nRecipes, the first argument:\n{_recipe_list()}\n"
        "\nOr --config FILE, the config.json of an earlier run."
    )


def _recipe_list() -> str:
    return "\n".join(f"  {name}: {(recipe.__doc__ or '').strip().splitlines()[0]}" for name, recipe in RECIPES.items())
