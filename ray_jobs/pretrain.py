"""Train a Differential Vision Transformer, or a plain one, from scratch."""

from __future__ import annotations

from diffvit.cli import parse_pretrain_config, run_training


def main() -> None:
    run_training(*parse_pretrain_config(__doc__ or ""))


if __name__ == "__main__":
    main()
