"""The command line of the jobs: `JOB.py [RECIPE | --config FILE] [--section.field VALUE ...]`."""

from __future__ import annotations

import dataclasses
import errno
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import tyro

from diffvit.config import RehearsalOptions, RunConfig, differing_fields
from diffvit.search.config import SearchConfig, SweepConfig, as_asked
from diffvit.search.space import Space
from diffvit.starting_point import NO_WEIGHTS, asks_for_help, described, names_config, take_default, value_of

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
        help_text = described(description, arguments)
        return _run_or_rehearsal(take_default(arguments), arguments, help_text)
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
        from_recipe, finetunes = not names_config(arguments), arguments[:1] == ["finetune"]
        help_text, default = described(description, arguments), take_default(arguments)
        default = _starting_from_weights(default, arguments) if finetunes else default
        default = dataclasses.replace(default, name=default.name + ("-sweep" if from_recipe else ""))

        def sweep(
            run: Annotated[RunConfig, tyro.conf.arg(name="")] = default,
            search: SearchConfig = SearchConfig(),  # noqa: B008 - frozen
            space: Space = Space(),  # noqa: B008 - frozen
        ) -> SweepConfig:
            return SweepConfig(run, search, space)

        asked = as_asked(_parsed(sweep, arguments, help_text))
        workers, remedy = asked.run.scale.workers, "--search.workers-per-trial says how many each trial has"
        _refuse("tune", "scale.workers", default.scale.workers, workers, remedy)
        _require_heeded(asked.run, default)
        return asked
    except ValueError as error:
        fail(str(error))


def parse_finetune_config(description: str, arguments: list[str] | None = None) -> tuple[RunConfig, RehearsalOptions]:
    """As `parse_pretrain_config`, from the recipe `finetune` where none is named, and the model of `--init.weights`."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        from_recipe = not names_config(arguments)
        if from_recipe and (not arguments or arguments[0].startswith("-")):
            arguments.insert(0, "finetune")
        help_text, default = described(description, arguments), take_default(arguments)
        if from_recipe:
            default = _starting_from_weights(default, arguments)
        elif value_of("--init.weights", arguments):  # others than the file's; its model stays
            default = _without_statistics(default)
        if not default.init.weights and not asks_for_help(arguments):
            raise ValueError(NO_WEIGHTS)
        return _run_or_rehearsal(default, arguments, help_text)
    except ValueError as error:
        fail(str(error))


def _starting_from_weights(default: RunConfig, arguments: list[str]) -> RunConfig:
    """`default` with the model of its weights, or of those that are asked for, as the variant that is asked for."""
    named = value_of("--init.weights", arguments)
    weights = named or default.init.weights
    if not weights:
        return default
    if named:
        default = _without_statistics(default)
    from diffvit.models.pretrained import model_from, origin_of  # imports torch, which takes seconds

    made = model_from(origin_of(weights), value_of("--model.variant", arguments))
    model = dataclasses.replace(made, num_classes=default.model.num_classes)
    return dataclasses.replace(default, model=model, init=dataclasses.replace(default.init, weights=weights))


def _without_statistics(default: RunConfig) -> RunConfig:
    """What pixels are normalised by is then what the weights were trained with."""
    return dataclasses.replace(default, data=dataclasses.replace(default.data, mean=(), std=()))


def parse_compare_config(description: str, arguments: list[str] | None = None) -> CompareConfig:
    """The comparison that the command line asks for: a recipe's options, and those of `CompareConfig`."""
    from diffvit.compare import CompareConfig

    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        help_text = described(description, arguments)
        recipe = dataclasses.replace(take_default(arguments), storage="")
        config = _parsed(CompareConfig, arguments, help_text, default=CompareConfig(recipe))
        _require_used(config, recipe)
        return config
    except ValueError as error:
        fail(str(error))


def _require_used(config: CompareConfig, recipe: RunConfig) -> None:
    """Refuse options of a run that a comparison would not heed."""
    run = config.run
    differing = ", ".join(differing_fields(recipe, run, limits=True))
    if config.runs and differing:
        raise ValueError(f"--runs compares runs as they were trained, got {differing} too; leave it out, or --runs")
    for name, before, now, remedy in (
        ("name", recipe.name, run.name, "--out names the comparison, and its runs are <arm>-seed<k>"),
        ("seed", recipe.seed, run.seed, "--seeds N trains every arm under the seeds 0 to N - 1"),
        ("scale.workers", recipe.scale.workers, run.scale.workers, "an arm has one; --concurrent trains arms together"),
    ):
        _refuse("compare", name, before, now, remedy)
    _require_heeded(run, recipe)


def _refuse(job: str, name: str, before: Any, now: Any, remedy: str) -> None:
    if now != before:
        raise ValueError(f"{job} takes no --{name}, got {now!r}: {remedy}")


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
    with _ends_with_its_reader() if asks_for_help(sys.argv if arguments is None else arguments) else nullcontext():
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
