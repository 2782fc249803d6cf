"""Which sample was trained on when: `audit/*.parquet` of (epoch, step, rank, position, key), one row a sample.

One whose image could not be used was not trained on, and has none.

The rows of all ranks are written just before the checkpoint that covers them, and a run that goes on from a checkpoint
deletes what was written after it; so the files together tell what the weights have seen, however often it was cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from diffvit.data.batches import SKIPPED_LABEL, Batch, Stream
from diffvit.data.order import Indices, TrainPlan
from diffvit.storage import Storage

AUDIT_FOLDER = "audit"


class Audit:
    """Records the batches of one rank. `position` is the sample's place in the order of its epoch, from 0."""

    def __init__(self, run: str, plan: TrainPlan, stream: Stream, rank: int, first_step: int) -> None:
        self._storage, self._plan, self._stream, self._rank = Storage(run), plan, stream, rank
        self._first_step = first_step
        self._batches: list[tuple[int, Indices, npt.NDArray[np.bool_]]] = []
        if rank == 0:
            self._delete(first_step)

    def watch(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches, taken down."""
        for batch in batches:
            self._batches.append((batch.row, batch.samples.copy(), batch.labels != SKIPPED_LABEL))
            yield batch

    def forget(self, since: int, step: int) -> None:
        """Steps `since` + 1 to `step` were undone: the weights have not seen their samples."""
        self._batches.clear()
        if self._rank == 0:
            self._delete(since)
        self._first_step = step

    def _delete(self, since: int) -> None:
        """The files of all ranks, also of those that a larger group of workers had."""
        for name in self._storage.names(AUDIT_FOLDER):
            if name.endswith(".parquet") and int(name.split("-")[0]) >= since:
                self._storage.delete(f"{AUDIT_FOLDER}/{name}")

    def take(self) -> bytes:
        """What was taken down since the last call, as Parquet; empty where nothing was."""
        plan, tables = self._plan, []
        for row, samples, used in self._batches:
            done, micro, rank = plan.locate(row)
            epoch, within = divmod(done, plan.steps_per_epoch)
            first = within * plan.batch_size + (rank * plan.accumulation_steps + micro) * plan.row_size
            count = int(used.sum())
            columns = {
                "epoch": np.full(count, epoch + 1),
                "step": np.full(count, done + 1),
                "rank": np.full(count, rank),
                "position": np.arange(first, first + len(samples))[used],
                "key": pa.array(self._stream.keys(samples[used]), pa.string()),
            }
            tables.append(pa.table(columns))
        self._batches.clear()
        if not tables:  # nothing since what was undone
            return b""
        sink = pa.BufferOutputStream()
        pq.write_table(pa.concat_tables(tables), sink)
        content: bytes = sink.getvalue().to_pybytes()
        return content

    def parts(self, step: int, taken: Iterable[bytes]) -> dict[str, bytes]:
        """The files, by name in the run's folder, that hold what the ranks have `taken` at `step`."""
        first, self._first_step = self._first_step, step
        return {
            f"{AUDIT_FOLDER}/{first:08d}-{step:08d}-{rank:04d}.parquet": content
            for rank, content in enumerate(taken)
            if content
        }
