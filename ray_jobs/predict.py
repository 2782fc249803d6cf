"""Predict images with a trained model: classes and probabilities for each, and accuracy where the truth is known."""

from __future__ import annotations

from diffvit.cli import job_ends, parse_options
from diffvit.config import PredictConfig, ScaleConfig


def main() -> None:
    config = parse_options(PredictConfig, __doc__ or "")

    from diffvit.predict import predict  # after the options are found good: these imports take seconds
    from diffvit.progress import Progress, print_predictions
    from diffvit.training.cluster import connect

    with job_ends("from here"), Progress() as progress:
        connect(ScaleConfig(workers=config.workers, cpus_per_worker=1.0))
        results = predict(config, progress.show)
    print_predictions(config.out, results)


if __name__ == "__main__":
    main()
