"""Turn images (a folder, tars, Parquet, a torchvision data set) into shards that any number of workers can stream."""

from __future__ import annotations

import time

from diffvit.cli import job_ends, parse_options
from diffvit.config import PrepareConfig


def main() -> None:
    config = parse_options(PrepareConfig, __doc__ or "")

    from diffvit.data.prepare import prepare, verify  # after the options are found good: these imports take seconds
    from diffvit.progress import Progress, print_dataset
    from diffvit.training.cluster import connect

    started = time.perf_counter()
    with job_ends("from here"), Progress() as progress:
        connect()
        info = (verify if config.verify else prepare)(config, progress.show)
    print_dataset(config.out, info, time.perf_counter() - started, progress.done("packing"))


if __name__ == "__main__":
    main()
