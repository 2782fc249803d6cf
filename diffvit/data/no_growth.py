"""Keep Ray Data from asking the autoscaler of a cluster for nodes.

As soon as half of the CPUs decode, Ray Data 2.60 asks for twice as many, and goes on asking until the data set ends:
for a training run, days. They come with GPUs once the cluster file's CPU nodes are all up, none of them is ever idle,
and the autoscaler, which adds up what all jobs ask for, launches nothing for a second job as long as the sum is more
than the cluster could ever have. So the stream decodes on what is there; how many CPU nodes that is says the cluster
file (`min_workers`), and a rehearsal whether decoding is what a run waits for.
"""

from __future__ import annotations

from typing import Any

from ray.data._internal.execution.execution_callback import ExecutionCallback


class NoGrowth(ExecutionCallback):  # type: ignore[misc]  # to mypy all of Ray Data is Any
    """Of a Ray Data execution, by `DataContext.custom_execution_callback_classes`."""

    def before_execution_starts(self, executor: Any) -> None:
        """Have its autoscaler find that no more is needed; it goes on telling the cluster that it is there."""
        executor._cluster_autoscaler._is_cluster_utilization_low = lambda _: True
