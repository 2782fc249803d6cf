"""Compare plain ViT, V1 and V2: train them under one recipe and several seeds, or take finished runs (--runs A B …)."""

from __future__ import annotations

import shlex

from diffvit.cli import job_ends, parse_compare_config


def main() -> None:
    config = parse_compare_config(__doc__ or "")

    from diffvit.compare import run_comparison  # after the options are found good: these imports take seconds
    from diffvit.progress import Progress
    from diffvit.training.cluster import connect
    from diffvit.training.loop import RunStopped

    with job_ends("with the runs that are not finished", RunStopped), Progress() as progress:
        if not config.runs:
            connect()
        report = run_comparison(config, progress.show)
    print(f"report: {report}\ncurves: tensorboard --logdir {shlex.quote(str(report.parent))}")


if __name__ == "__main__":
    main()
