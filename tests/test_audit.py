"""What is taken back of the record of trained samples."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, cast

from diffvit.data.batches import Stream
from diffvit.data.order import TrainPlan
from diffvit.training.audit import Audit


def test_steps_that_are_undone_go_from_the_files_of_all_ranks(tmp_path: Path) -> None:
    """Also of those that the group of workers had before it became smaller."""
    plan = TrainPlan(num_samples=36, seed=0, epochs=2, batch_size=12, workers=4)
    stream = cast(Stream, None)

    def left() -> list[str]:
        return sorted(path.name for path in (tmp_path / "audit").iterdir())

    def write(audit: Audit, step: int, ranks: int) -> None:
        for name, content in audit.parts(step, [b"rows"] * ranks).items():
            (tmp_path / name).write_bytes(content)

    (tmp_path / "audit").mkdir()
    four = Audit(str(tmp_path), plan, stream, rank=0, first_step=0)
    write(four, 2, ranks=4)
    write(four, 4, ranks=4)
    smaller: dict[str, Any] = {"run": str(tmp_path), "plan": dataclasses.replace(plan, workers=2), "stream": stream}
    two, other = (Audit(**smaller, rank=rank, first_step=4) for rank in range(2))
    write(two, 5, ranks=2)
    other.forget(2, 6)
    assert len(left()) == 4 + 4 + 2  # rank 0 alone deletes
    two.forget(2, 6)
    assert left() == [f"00000000-00000002-000{rank}.parquet" for rank in range(4)]
    write(two, 8, ranks=1)
    assert left()[-1] == "00000006-00000008-0000.parquet"
