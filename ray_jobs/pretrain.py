"""Train a Differential Vision Transformer, or a plain one, from scratch."""

from __future__ import annotations

from diffvit.cli import fail, parse_run_config


def main() -> None:
    config = parse_run_config(__doc__ or "")

    from diffvit.console import print_results  # after the options are found good: these imports take seconds
    from diffvit.training.launch import RunStopped, TrainingFailedError, train

    try:
        results = train(config)
    except ValueError as error:
        fail(str(error), status=2)
    except (RunStopped, TrainingFailedError) as error:
        fail(str(error), status=1)
    except KeyboardInterrupt:
        fail("interrupted; the same command goes on from the last checkpoint", status=130)
    print_results(config.folder, results)


if __name__ == "__main__":
    main()
