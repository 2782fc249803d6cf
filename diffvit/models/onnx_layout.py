"""A trained model as one ONNX file: pixels in, class scores out, the normalisation inside.

images   uint8 (batch, C, S, S), 0 to 255, resized and cropped as the metadata says
logits   float32 (batch, classes); their softmax are the probabilities

Metadata: `classes` (JSON list, by place in the logits); `channels` ("grey" or "RGB"), `resize_short_side` and
`image_size` (of the centre crop) say how an image becomes the input.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from diffvit.models.saved import SavedModel

TOLERANCE = 1e-4
"""Of the logits, absolute where they are below 1 and relative above."""
_CHECKED_BATCHES = (1, 3)
"""Other than the batch that is traced, which is of 2."""


class OnnxMismatch(RuntimeError):
    """The file does not compute what the model does."""


class _Scorer(nn.Module):
    """uint8 (B, C, S, S) -> (B, classes)."""

    def __init__(self, saved: SavedModel) -> None:
        super().__init__()
        self.model = saved.model
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(saved.mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(saved.std).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model((images.float() / 255 - self.mean) / self.std)
        return logits


def require_onnx() -> None:
    """Raises ValueError where the packages that write ONNX are missing."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(f"format onnx needs the package {error.name}: pip install -e '.[export]'") from None


def write_onnx(saved: SavedModel, path: Path) -> None:
    """Write the model, whose batch may be of any size."""
    scorer = _Scorer(saved).eval()
    program = torch.onnx.export(
        scorer,
        (_random_images(saved, 2),),
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
        dynamo=True,
        verbose=False,
    )
    assert program is not None  # dynamo=True
    size = saved.config.image_size
    program.model.metadata_props.update(
        {
            "classes": json.dumps(saved.classes),
            "image_size": str(size),
            "interpolation": saved.interpolation,
            "resize_short_side": str(round(size / saved.eval_crop_ratio)),
            "channels": "grey" if saved.config.in_channels == 1 else "RGB",
        }
    )
    program.save(path, external_data=False)


@torch.no_grad()
def largest_difference(saved: SavedModel, path: Path) -> float | None:
    """Of the file's logits on random images to the model's, over the larger of 1 and the largest logit.

    None where onnxruntime is not installed.

    Raises:
        OnnxMismatch: the difference is more than `TOLERANCE`.
    """
    try:
        import onnxruntime
    except ImportError:
        return None
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    scorer = _Scorer(saved).eval()
    largest = 0.0
    for count in _CHECKED_BATCHES:
        images = _random_images(saved, count)
        found = torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
        expected = cast(Tensor, scorer(images))
        largest = max(largest, float((found - expected).abs().max() / expected.abs().max().clamp(min=1)))
    if not largest <= TOLERANCE:  # nor where it is NaN
        raise OnnxMismatch(f"the ONNX file does not compute what the model does: logits differ by {largest:.2g}")
    return largest


def _random_images(saved: SavedModel, count: int) -> Tensor:
    config, generator = saved.config, torch.Generator().manual_seed(count)
    shape = (count, config.in_channels, config.image_size, config.image_size)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
