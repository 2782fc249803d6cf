"""Train a Differential Vision Transformer, or a plain one, from scratch."""

from __future__ import annotations

from diffvit.cli import parse_pretrain_config, run_rehearsal, run_training


def main() -> None:
    config, rehearsal = parse_pretrain_config(__doc__ or "")
    if rehearsal.rehearse:
        run_rehearsal(config, rehearsal)
    else:
        run_training(config)


if __name__ == "__main__":
    main()
