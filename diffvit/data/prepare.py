"""From any source of images to shards, as a Ray Data job: index the source, plan the layout, pack the shards.

Each step leaves its result beside the data set (`.staging/`) when it is whole, and skips what is there, so the same
call goes on where an earlier one was cut. `dataset.json` comes last and `.staging/` then goes.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from diffvit.config import PrepareConfig, SourceOptions
from diffvit.data.claim import STAGING, claim, given_back, identity_of, release, reopen, require_outside, require_same
from diffvit.data.indexing import find_units, index_unit, with_absolute_paths
from diffvit.data.layout import Layout, plan_layout
from diffvit.data.packing import Limits, PackedShard, pack_shard, read_index_part, read_packed
from diffvit.data.shards import (
    FORMAT_VERSION,
    INDEX_SCHEMA,
    INFO_NAME,
    QUARANTINE_NAME,
    DatasetInfo,
    ShardInfo,
    SplitInfo,
    index_name,
    is_damaged,
    open_shards,
    read_index,
    read_info,
    write_info,
)
from diffvit.data.sources import (
    Staging,
    Unit,
    ignored_in,
    join_entries,
    label_entries,
    places_of,
    read_labels,
    with_ignored,
)
from diffvit.data.tables import read_table, write_table
from diffvit.data.tasks import Report, map_anywhere
from diffvit.storage import Storage, StorageError, absolute


def prepare(config: PrepareConfig, report: Report) -> DatasetInfo:
    """Write the data set that `config` asks for, on the connected cluster; its description.

    Raises:
        ValueError: the source is not usable, or `out` lies in it or holds something else.
        StorageError: a store stayed away; the same call goes on from there.
    """
    config = with_absolute_paths(config)
    require_outside(config.out, config.source)
    target = Storage(config.out)
    units = find_units(config.source, config)
    if units[0].kind == "shards":
        raise ValueError(f"source {config.source!r} is prepared already; train on it with --data.path")
    options = {name: value for name, value in asdict(config).items() if name not in ("out", "download", "verify")}
    labels = read_labels(config.labels)
    identity = identity_of(options, units, labels)
    finished = _finished(target, identity)
    if finished is not None:
        release(target)
        return finished
    claim(target, identity)
    with given_back(target):
        entries = collect_entries(units, config, labels, target.child(STAGING), report)
        layout = plan_layout(
            entries, val_fraction=config.val_fraction, seed=config.seed, shard_bytes=int(config.shard_mib * 2**20)
        )
    limits = Limits(config.max_pixels, config.max_image_bytes, config.max_side)
    packed = _pack_all(layout, target, limits, report)
    info = _finish(config, identity, layout, packed, ignored_in(entries), target)
    release(target)
    return info


def verify(config: PrepareConfig, report: Report) -> DatasetInfo:
    """Read the whole data set at `config.out` and compare it with its index and the check sums in `dataset.json`.

    Raises:
        ValueError: there is none, or shards are missing or damaged.
        StorageError: the store stayed away.
    """
    target = Storage(absolute(config.out))
    try:
        info, _ = open_shards(target)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"out must hold a data set that prepare made, {config.out!r} has no {INFO_NAME}") from None
    shards: list[tuple[ShardInfo, pa.Table]] = []
    for name, split in info.splits.items():
        index = read_index(target, name)
        shards += [(shard, index.filter(pc.equal(index["shard"], number))) for number, shard in enumerate(split.shards)]
    damaged = []

    def check(shards: list[tuple[ShardInfo, pa.Table]], number: int) -> str:
        return shards[number][0].name if is_damaged(target, *shards[number]) else ""

    for done, name in enumerate(map_anywhere(check, shards, list(range(len(shards))), [target]), start=1):
        damaged += [name] if name else []
        report("verifying", done, len(shards))
    if damaged:
        raise ValueError(
            f"{len(damaged)} of {len(shards)} shards of {target.uri} are not what prepare wrote, among them "
            f"{min(damaged)}; copy or prepare the data set again"
        )
    return info


def _finished(target: Storage, identity: dict[str, Any]) -> DatasetInfo | None:
    """The data set that an earlier call with the same options made; None too where it lost files since."""
    try:
        info = read_info(target)
    except (FileNotFoundError, NotADirectoryError):
        return None
    require_same({"source": info.source, **info.options}, identity, f"out = {target.uri!r} holds a data set made")
    try:
        open_shards(target)
    except (FileNotFoundError, ValueError):
        reopen(target, identity, INFO_NAME)
        return None
    return info


def collect_entries(
    units: list[Unit], options: SourceOptions, labels: dict[str, str], staging: Storage, report: Report
) -> pa.Table:
    """The entries of every unit, in order, and what is no image; each unit is indexed once, anywhere in the cluster.

    Raises:
        ValueError: a unit is not what it should be.
        StorageError: a store stayed away.
    """
    names = [f"index/{number:06d}.parquet" for number in range(len(units))]
    there = staging.sizes("index")
    todo = [number for number, name in enumerate(names) if name not in there]
    done = len(units) - len(todo)
    report("indexing", done, len(units))

    def index(units: list[Unit], number: int) -> str:
        try:
            table = index_unit(units[number], options, Staging(staging, f"images/{number:06d}"))
        except (ValueError, OSError) as error:  # pyarrow's are of either kind
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the disk's fault and not the file's
            return f"{', '.join(units[number].files[:1])}: {error}"
        write_table(staging, names[number], table)
        return ""

    # a torchvision set lies on this machine, which the tasks' need not share
    local = [number for number in todo if units[number].kind == "torchvision"]
    anywhere = [number for number in todo if units[number].kind != "torchvision"]
    places = [staging, *{Storage(units[number].location) for number in anywhere}]
    for error in chain((index(units, number) for number in local), map_anywhere(index, units, anywhere, places)):
        if error:
            raise ValueError(f"the source cannot be read: {error}")
        done += 1
        report("indexing", done, len(units))
    parts = [read_table(staging, name) for name in names]
    ignored = sum((ignored_in(part) for part in parts), Counter[str]())
    try:
        return with_ignored(label_entries(join_entries(units, parts), labels), ignored)
    except ValueError:
        staging.delete_folder("")  # else it could only be gone on with by the labels that do not do
        raise


def _pack_all(layout: Layout, target: Storage, limits: Limits, report: Report) -> list[PackedShard]:
    """Every shard packed; those of an earlier attempt are taken as they are."""
    packed = {number: read_packed(target, name) for number, (name, _, _) in enumerate(layout.shards)}
    sizes = [end - first for _, first, end in layout.shards]
    todo = [number for number, shard in packed.items() if shard is None]
    done = sum(sizes) - sum(sizes[number] for number in todo)
    report("packing", done, sum(sizes))

    def pack(plan: Layout, number: int) -> str:
        name, first, end = plan.shards[number]
        pack_shard(plan.entries[first:end], plan.labels[first:end].tolist(), target, name, limits)
        return str(number)

    for result in map_anywhere(pack, layout, todo, [target.child(STAGING), *places_of(layout.entries)]):
        done += sizes[int(result)]
        report("packing", done, sum(sizes))
    return [packed[n] or _require(read_packed(target, name)) for n, (name, _, _) in enumerate(layout.shards)]


def _require(packed: PackedShard | None) -> PackedShard:
    if packed is None:
        raise StorageError("a shard that was written is gone: has another prepare filled this folder meanwhile?")
    return packed


def _finish(
    config: PrepareConfig,
    identity: dict[str, Any],
    layout: Layout,
    packed: list[PackedShard],
    ignored: dict[str, int],
    target: Storage,
) -> DatasetInfo:
    quarantined = [*layout.quarantined, *(bad for shard in packed for bad in shard.quarantined)]
    keys, reasons = [key for key, _ in quarantined], [reason for _, reason in quarantined]
    reasoned = pa.table({"key": pa.array(keys, pa.string()), "reason": pa.array(reasons, pa.string())})
    write_table(target, QUARANTINE_NAME, reasoned)
    splits: dict[str, SplitInfo] = {}
    for split in dict.fromkeys(name.split("/")[0] for name, _, _ in layout.shards):
        shards = [shard.shard for shard in packed if shard.shard and shard.shard.name.startswith(f"{split}/")]
        parts = [read_index_part(target, shard.name) for shard in shards]
        numbered = [
            part.set_column(0, "shard", pa.array(np.full(part.num_rows, number, np.int32)))
            for number, part in enumerate(parts)
        ]
        index = pa.concat_tables(numbered) if numbered else INDEX_SCHEMA.empty_table()
        if not index.num_rows:
            raise ValueError(f"no image of the {split} split can be used; {QUARANTINE_NAME} in {target.uri} names them")
        write_table(target, index_name(split), index)
        counts = np.bincount(index["label"].to_numpy(), minlength=len(layout.classes))
        splits[split] = SplitInfo(index.num_rows, counts.tolist(), shards)
        if split == "train" and not counts.all():
            raise ValueError(
                f"no training image of class {layout.classes[int(counts.argmin())]!r} can be used; "
                f"{QUARANTINE_NAME} in {target.uri} says why: mend them, or take the class out"
            )
    mean, std = _channel_statistics(layout, packed, splits["train"].images)
    info = DatasetInfo(
        format_version=FORMAT_VERSION,
        source=config.source,
        options={name: value for name, value in identity.items() if name != "source"},
        classes=list(layout.classes),
        splits=splits,
        mean=mean,
        std=std,
        width=_range([shard.width for shard in packed], splits),
        height=_range([shard.height for shard in packed], splits),
        quarantined=len(quarantined),
        ignored=ignored,
    )
    for split in splits:
        target.child(split).sweep()
    write_info(target, info)
    return info


def _channel_statistics(layout: Layout, packed: list[PackedShard], images: int) -> tuple[list[float], list[float]]:
    train = [shard for (name, _, _), shard in zip(layout.shards, packed, strict=True) if name.startswith("train/")]
    channels = 1 if all(shard.all_grey for shard in packed) else 3
    mean = np.sum([shard.sums for shard in train], axis=0)[:channels] / images
    square = np.sum([shard.square_sums for shard in train], axis=0)[:channels] / images
    std = np.sqrt(np.maximum(square - mean**2, 1e-6))  # a data set of one flat colour still divides
    return mean.round(4).tolist(), std.round(4).tolist()


def _range(parts: list[tuple[int, int, int]], splits: dict[str, SplitInfo]) -> tuple[int, float, int]:
    images = sum(split.images for split in splits.values())
    smallest, total, largest = (list(column) for column in zip(*parts, strict=True))
    return min(smallest), round(sum(total) / images, 1), max(largest)
