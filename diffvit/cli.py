"""The command line of the jobs: `JOB.py [RECIPE | --config FILE] [--section.field VALUE ...]`."""

from __future__ import annotations

import dataclasses
import difflib
import errno
import inspect
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import tyro

from diffvit.config import RehearsalOptions, RunConfig, differing_fields, from_json
from diffvit.published_recipes import VARIANTS
from diffvit.recipes import DEFAULT_RECIPE, RECIPES
from diffvit.search.config import SearchConfig, SweepConfig
from diffvit.search.space import Space

if TYPE_CHECKING:
    from diffvit.compare import CompareConfig

T = TypeVar("T")

_NO_WEIGHTS = "init.weights is missing: the run, checkpoint or .safetensors file to start from"


def parse_pretrain_config(description: str, arguments: list[str] | None = None) -> tuple[RunConfig, RehearsalOptions]:
    """The run that the command line asks for, and whether it is only to be rehearsed.

    Starts from a recipe, or from the JSON file of an earlier run (`--config`), and applies the options. Help ends
    with status 0; anything that is wrong with one line on stderr and status 2.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        described = _described(description, arguments)
        return _run_or_rehearsal(_take_default(arguments), arguments, described)
    except ValueError as error:
        fail(str(error))


def _run_or_rehearsal(default: RunConfig, arguments: list[str], description: str) -> tuple[RunConfig, RehearsalOptions]:
    def job(
        run: Annotated[RunConfig, tyro.conf.arg(name="")] = default,
        rehearsal: Annotated[RehearsalOptions, tyro.conf.arg(name="")] = RehearsalOptions(),  # noqa: B008 - frozen
    ) -> tuple[RunConfig, RehearsalOptions]:
        return run, rehearsal

    run, rehearsal = _parsed(job, arguments, description)
    _require_heeded(run, default)
    return run, rehearsal


def _require_heeded(run: RunConfig, default: RunConfig) -> None:
    """Refuse what was asked of an optimizer that is not there. A file's own values may say anything of it."""
    for name in ("muon_lr", "muon_momentum"):
        if run.optim.optimizer != "muon" and getattr(run.optim, name) != getattr(default.optim, name):
            raise ValueError(f"optim.{name} is for optim.optimizer = 'muon', got {run.optim.optimizer!r}")


def parse_sweep_config(description: str, arguments: list[str] | None = None) -> SweepConfig:
    """The sweep that the command line asks for: a run, with the sections `search` and `space` too.

    That of a recipe is called `<recipe>-sweep`, so that it is not in the way of the recipe's run.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        suffix = "" if _names_config(arguments) else "-sweep"
        described, default = _described(description, arguments), _take_default(arguments)
        default = dataclasses.replace(default, name=default.name + suffix)

        def sweep(
            run: Annotated[RunConfig, tyro.conf.arg(name="")] = default,
            search: SearchConfig = SearchConfig(),  # noqa: B008 - frozen
            space: Space = Space(),  # noqa: B008 - frozen
        ) -> SweepConfig:
            return SweepConfig(run, search, space)

        return _parsed(sweep, arguments, described)
    except ValueError as error:
        fail(str(error))


def parse_finetune_config(description: str, arguments: list[str] | None = None) -> tuple[RunConfig, RehearsalOptions]:
    """As `parse_pretrain_config`, from the recipe `finetune` where none is named, and the model of `--init.weights`."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        from_recipe = not _names_config(arguments)
        if from_recipe and (not arguments or arguments[0].startswith("-")):
            arguments.insert(0, "finetune")
        described, default = _described(description, arguments), _take_default(arguments)
        weights = _value_of("--init.weights", arguments) or (default.init.weights if from_recipe else "")
        if weights:
            default = _starting_from(weights, default, _value_of("--model.variant", arguments))
        elif not default.init.weights and not _asks_for_help(arguments):
            raise ValueError(_NO_WEIGHTS)
        return _run_or_rehearsal(default, arguments, described)
    except ValueError as error:
        fail(str(error))


def _starting_from(weights: str, default: RunConfig, variant: str) -> RunConfig:
    """`default` with the model that `weights` are of, as the `variant` that is asked for, if one is."""
    from diffvit.models.pretrained import model_from, origin_of  # imports torch, which takes seconds

    model = dataclasses.replace(model_from(origin_of(weights), variant), num_classes=default.model.num_classes)
    return dataclasses.replace(default, model=model, init=dataclasses.replace(default.init, weights=weights))


def parse_compare_config(description: str, arguments: list[str] | None = None) -> CompareConfig:
    """The comparison that the command line asks for: a recipe's options, and those of `CompareConfig`."""
    from diffvit.compare import CompareConfig

    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        described = _described(description, arguments)
        recipe = dataclasses.replace(_take_default(arguments), storage="")
        config = _parsed(CompareConfig, arguments, described, default=CompareConfig(recipe))
        _require_used(config, recipe)
        return config
    except ValueError as error:
        fail(str(error))


def _require_used(config: CompareConfig, recipe: RunConfig) -> None:
    """Refuse options of a run that a comparison would not heed."""
    run = config.run
    differing = ", ".join(differing_fields(recipe, run))
    if config.runs and differing:
        raise ValueError(f"--runs compares runs as they were trained, got {differing} too; leave it out, or --runs")
    for name, before, now, remedy in (
        ("name", recipe.name, run.name, "--out names the comparison, and its runs are <arm>-seed<k>"),
        ("seed", recipe.seed, run.seed, "--seeds N trains every arm under the seeds 0 to N - 1"),
        ("scale.workers", recipe.scale.workers, run.scale.workers, "an arm has one; --concurrent trains arms together"),
    ):
        if now != before:
            raise ValueError(f"compare takes no --{name}, got {now!r}: {remedy}")


def run_training(config: RunConfig, rehearsal: RehearsalOptions) -> None:
    """Train, or continue, the run, or rehearse it; say how that ended, and end the job."""
    if rehearsal.rehearse:
        _run_rehearsal(config, rehearsal)
        return
    from diffvit.console import print_results  # after the options are found good: these imports take seconds
    from diffvit.training.launch import RunStopped, TrainingFailedError, train

    with job_ends("from the last checkpoint", RunStopped, TrainingFailedError):
        results = train(config)
    print_results(config.location, results)


def _run_rehearsal(config: RunConfig, options: RehearsalOptions) -> None:
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
        if getattr(error, "errno", None) in (errno.ENOTDIR, errno.EACCES, errno.EROFS):  # trying again is of no use
            fail(str(error), status=2)
        fail(f"{error}; the same command goes on {goes_on}", status=1)
    except stops as error:
        fail(str(error), status=1)
    except KeyboardInterrupt:
        fail(f"interrupted; the same command goes on {goes_on}", status=130)


def _parsed(what: Callable[..., T], arguments: list[str] | None, description: str, **default: Any) -> T:
    with _ends_with_its_reader() if _asks_for_help(sys.argv if arguments is None else arguments) else nullcontext():
        parsed: T = tyro.cli(what, args=arguments, description=description, **default)
    return parsed


@contextmanager
def _ends_with_its_reader() -> Iterator[None]:
    """What is printed in here ends the process quietly when nobody reads on, as in `--help | head`."""
    if not hasattr(signal, "SIGPIPE"):
        yield
        return
    before = signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        yield
    finally:
        sys.stdout.flush()
        signal.signal(signal.SIGPIPE, before)


def parse_options(kind: type[T], description: str, arguments: list[str] | None = None) -> T:
    """The options of a job that trains nothing, from `kind`'s fields; ends like `parse_pretrain_config`."""
    try:
        return _parsed(kind, arguments, description)
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
    if recipe == "finetune" and not _value_of("--init.weights", arguments) and not _asks_for_help(arguments):
        raise ValueError(_NO_WEIGHTS)
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


def _asks_for_help(arguments: list[str]) -> bool:
    return not {"-h", "--help"}.isdisjoint(arguments)


def _names_config(arguments: list[str]) -> bool:
    return any(argument.partition("=")[0] == "--config" for argument in arguments)


def _value_of(option: str, arguments: list[str]) -> str:
    for place, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == option:
            return value if equals else (arguments[place + 1] if place + 1 < len(arguments) else "")
    return ""


def _described(description: str, arguments: list[str]) -> str:
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
