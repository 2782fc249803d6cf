"""Give a trained model to other programs: timm's layout (safetensors and config.json), ONNX. Needs no Ray."""

from __future__ import annotations

from diffvit.cli import job_ends, parse_options
from diffvit.config import ExportConfig


def main() -> None:
    config = parse_options(ExportConfig, __doc__ or "")

    from diffvit.export import export  # after the options are found good: these imports take seconds
    from diffvit.models.onnx_layout import OnnxMismatch

    with job_ends("from the start", OnnxMismatch):
        exported = export(config)
    print(f"{exported.folder}: {', '.join(exported.files)}")
    if "timm" in config.format:
        print(f'timm.create_model("local-dir:{exported.folder}", pretrained=True)')
    if "onnx" in config.format:
        found = exported.onnx_difference
        checked = "not checked: onnxruntime is not installed" if found is None else f"at most {found:.1g} off"
        print(f"ONNX logits: {checked}")


if __name__ == "__main__":
    main()
