"""Fine-tune a trained Vision Transformer on other images: --init.weights WEIGHTS --data.path IMAGES.

The model is that of the weights; options change it: another --model.image-size (positions are resampled), or another
--model.variant (a plain ViT becomes a Diff-ViT). The classifier is new where the number of classes is.
`finetune.py flowers` has a recipe of its own, and --config FILE goes on from the config.json of an earlier run.
"""

from __future__ import annotations

from diffvit.cli import parse_finetune_config, run_training


def main() -> None:
    run_training(*parse_finetune_config(__doc__ or ""))


if __name__ == "__main__":
    main()
