"""Search for a better recipe: Ray Tune with Optuna and ASHA over lambda_init, heads and learning rate."""

from __future__ import annotations

from diffvit.cli import job_ends, parse_sweep_config


def main() -> None:
    sweep = parse_sweep_config(__doc__ or "")

    from diffvit.search.console import print_sweep  # after the options are found good: these imports take seconds
    from diffvit.search.sweep import SweepFailed, run_sweep

    with job_ends("with the trials that are left", SweepFailed):
        results = run_sweep(sweep)
    print_sweep(sweep.run.folder, results)


if __name__ == "__main__":
    main()
