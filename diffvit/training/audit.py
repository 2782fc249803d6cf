"""Which sample was trained on when: `audit/*.parquet` of (epoch, step, rank, position, key), one row a sample.

Rows are written just before the checkpoint that covers them, and a run that goes on from a checkpoint deletes what was
written after it; so the files together tell what the weights have seen, however often the run was cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from diffvit.data.batches import Batch, Stream
from diffvit.data.order import TrainPlan

AUDIT_FOLDER = "audit"


class Audit:
    """Records the batches of one rank. `position` is the sample's place in the order of its epoch, from 0."""

    def __init__(self, folder: Path, plan: TrainPlan, stream: Stream, rank: int, first_step: int) -> None:
        self._folder, self._plan, self._stream, self._rank = folder / AUDIT_FOLDER, plan, stream, rank
        self._first_step = first_step
        self._batches: list[tuple[int, pa.Array]] = []
        if rank == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._delete("*.parquet", first_step)

    def watch(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches, taken down."""
        for batch in batches:
            self._batches.append((batch.row, pa.array(batch.samples)))
            yield batch

    def forget(self, since: int, step: int) -> None:
        """Steps `since` + 1 to `step` were undone: the weights have not seen their samples."""
        self._batches.clear()
        self._delete(f"*-{self._rank:04d}.parquet", since)
        self._first_step = step

    def _delete(self, pattern: str, since: int) -> None:
        for file in self._folder.glob(pattern):
            if int(file.name.split("-")[0]) >= since:
                file.unlink()

    def write(self, step: int) -> None:
        """Write what was taken down since the last call; `step` steps are done."""
        plan, tables = self._plan, []
        for row, samples in self._batches:
            done, micro, rank = plan.locate(row)
            epoch, within = divmod(done, plan.steps_per_epoch)
            first = within * plan.batch_size + (rank * plan.accumulation_steps + micro) * plan.row_size
            columns = {
                "epoch": np.full(len(samples), epoch + 1),
                "step": np.full(len(samples), done + 1),
                "rank": np.full(len(samples), rank),
                "position": np.arange(first, first + len(samples)),
                "key": self._stream.keys(samples.to_numpy()),
            }
            tables.append(pa.table(columns))
        self._batches.clear()
        if not tables:  # nothing since what was undone
            return
        name = self._folder / f"{self._first_step:08d}-{step:08d}-{self._rank:04d}.parquet"
        temporary = name.with_suffix(".tmp")
        pq.write_table(pa.concat_tables(tables), temporary)
        temporary.replace(name)
        self._first_step = step
