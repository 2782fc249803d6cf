"""Predict images with a trained model: classes and probabilities for each, and accuracy where the truth is known."""

from __future__ import annotations

from diffvit.cli import fail, parse_options
from diffvit.config import PredictConfig


def main() -> None:
    config = parse_options(PredictConfig, __doc__ or "")

    from diffvit.predict import predict  # after the options are found good: these imports take seconds
    from diffvit.progress import Progress, print_predictions
    from diffvit.storage import StorageError
    from diffvit.training.cluster import connect

    try:
        connect()
        with Progress() as progress:
            results = predict(config, progress.show)
    except ValueError as error:
        fail(str(error), status=2)
    except (StorageError, OSError) as error:
        fail(f"{error}; the same command goes on from here", status=1)
    except KeyboardInterrupt:
        fail("interrupted; the same command goes on from here", status=130)
    print_predictions(config.out, results)


if __name__ == "__main__":
    main()
