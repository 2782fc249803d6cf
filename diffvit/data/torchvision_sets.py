"""Image classification sets by their torchvision name: CIFAR10, FashionMNIST, Flowers102, ImageNet, …

Images that lie in files are taken as they are; those that torchvision holds as arrays are encoded as PNG, which loses
nothing.
"""

from __future__ import annotations

import difflib
import inspect
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torchvision import datasets

from diffvit.config import SourceOptions
from diffvit.data.sources import Entry, Staging, Unit
from diffvit.storage import Storage

_SPLIT_ARGUMENTS: dict[str, tuple[dict[str, Any], ...]] = {
    "train": ({"train": True}, {"split": "train"}, {"split": "trainval"}),
    "val": ({"split": "val"}, {"split": "valid"}),
    "test": ({"train": False}, {"split": "test"}),
}


def find_splits(name: str, options: SourceOptions) -> list[tuple[str, int]]:
    """(split, images) of every split that the set has.

    Raises:
        ValueError: no such set, not one of labelled images, or neither a local copy nor `download`.
    """
    found = [
        (split, len(dataset)) for split in _SPLIT_ARGUMENTS if (dataset := _open(name, split, options)) is not None
    ]
    if not found:
        raise ValueError(f"torchvision:{name} has no train, val or test split; give its files as a folder")
    return found


def index_torchvision(unit: Unit, options: SourceOptions, staging: Staging) -> Iterator[Entry]:
    """Entries of one split."""
    name, split = unit.files[0].split("/")
    dataset = _open(name, split, options)
    files = _files(dataset)
    # ImageNet's names are not unique (two cranes, two maillots), its WordNet ids are
    classes = list(getattr(dataset, "wnids", getattr(dataset, "classes", [])))
    for number in range(len(dataset)):
        if files is not None:
            path, label = files[number]
            size = path.stat().st_size
            place: dict[str, Any] = {"file": path.name, "length": size, "location": str(path.parent)}
        else:
            image, label = dataset[number]
            encoded = io.BytesIO()
            image.save(encoded, "PNG")
            place = staging.add(encoded.getvalue())
        if not isinstance(label, int | None):
            raise ValueError(f"torchvision's {name} must give each image the number of one class, it gives {label!r}")
        class_name = None if label is None else classes[label] if classes else str(label)
        yield Entry(f"{split}/{number:07d}", split=split, class_name=class_name, label=label, **place)


def _open(name: str, split: str, options: SourceOptions) -> Any:
    """The set, or None where it has no such split."""
    kind = getattr(datasets, name, None)
    known = [n for n in datasets.__all__ if inspect.isclass(getattr(datasets, n)) and n not in ("FakeData",)]
    if kind is None or name not in known:
        nearest = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"torchvision has no data set {name!r}{hint}")
    parameters = inspect.signature(kind).parameters
    if not options.root:
        raise ValueError(
            f"root is missing: the folder that holds torchvision's {name}, or receives it with --download "
            "(--root FOLDER)"
        )
    root = Path(Storage(options.root).path())
    download = {"download": True} if options.download and "download" in parameters else {}
    refusals = []
    for arguments in _SPLIT_ARGUMENTS[split]:
        if not arguments.keys() <= parameters.keys():
            continue
        try:
            return kind(root, **arguments, **download)
        except ValueError as error:  # no such split
            refusals.append(str(error))
        except TypeError as error:
            raise ValueError(
                f"torchvision's {name} needs more than a split: {error}; give its files as a folder"
            ) from None
        except ImportError as error:
            raise ValueError(f"torchvision's {name} needs the package {error.name}: pip install {error.name}") from None
        except (RuntimeError, OSError) as error:
            raise ValueError(
                f"torchvision's {name} is not in {root}: {error}. Copy it there"
                + ("" if options.download or "download" not in parameters else ", or add --download to fetch it")
            ) from None
    return None


def _files(dataset: Any) -> list[tuple[Path, int | None]] | None:
    """(path, label) of every image, for the sets that keep files; None for those that hold arrays."""
    samples = getattr(dataset, "samples", None) or getattr(dataset, "_samples", None)
    images = getattr(dataset, "_image_files", None) or getattr(dataset, "_images", None)
    if images:
        samples = list(zip(images, dataset._labels, strict=True))
    if not samples or not isinstance(samples[0][0], str | Path):
        return None
    return [(Path(path), label) for path, label in samples]
