"""How long and how dear a run would be on 1 to 256 GPUs: arithmetic on what was measured and what is assumed.

Nothing here is measured, and what comes out is a prediction. Not in it: that decoded images and gradients share a
node's network, and that GPUs differ. Names carry units; data and gradients are in bytes.

Letters: G global batch, W GPUs (one rank each).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from scale_facts import Assumptions, Fleet, Measured


@dataclass(frozen=True)
class Prediction:
    """One run."""

    gpus: int
    images_per_second: float
    bound_by: str
    """What keeps it from being faster."""
    data_nodes: int
    hours: float
    """Infinite where interruptions come faster than the run gets over them."""
    dollars: float


@dataclass(frozen=True)
class Step:
    """The seconds of one training step, as its parts."""

    compute_seconds: float
    """At the GPU's rate."""
    launch_seconds: float
    """What a small share of the batch leaves of `least_step_seconds`."""
    exposed_seconds: float
    """All-reduce that does not hide behind compute."""

    @property
    def seconds(self) -> float:
        return self.compute_seconds + self.launch_seconds + self.exposed_seconds


def gigabits_in_bytes(gigabits: float) -> float:
    return gigabits * 1e9 / 8


def ring_allreduce_seconds(content_bytes: float, nodes: int, bytes_per_second: float, hop_seconds: float) -> float:
    """2 (N - 1) / N of the content through every node's network, in 2 (N - 1) hops; free within one node."""
    return 2 * (nodes - 1) * (content_bytes / nodes / bytes_per_second + hop_seconds)


def nodes_of(gpus: int, fleet: Fleet) -> int:
    return math.ceil(gpus / fleet.gpus_per_node)


def step_of(gpus: int, variant: str, fleet: Fleet, a: Assumptions, m: Measured) -> Step:
    ratio = {"plain": 1.0, "V1": a.v1_step_to_plain, "V2": a.v2_step_to_plain}[variant]
    compute = a.batch_size / gpus / fleet.gpu_images_per_second * ratio
    launch = max(a.least_step_seconds * ratio - compute, 0.0)
    network = gigabits_in_bytes(fleet.node_gigabits_per_second)
    reduce = ring_allreduce_seconds(m.gradient_bytes[variant], nodes_of(gpus, fleet), network, a.hop_seconds)
    return Step(compute, launch, max(reduce - a.overlap * (compute + launch), 0.0))


def chunk_images(gpus: int, a: Assumptions, m: Measured) -> int:
    """Images in a chunk of the stream: whole micro-batches, at least one."""
    share = a.batch_size // gpus
    return max(m.images_per_chunk // share, 1) * min(share, m.images_per_chunk)


def vcpu_images_per_second(a: Assumptions, m: Measured) -> float:
    return m.decode_images_per_core_second * a.vcpu_to_core * a.stream_to_ceiling


def ceilings_images_per_second(gpus: int, variant: str, fleet: Fleet, a: Assumptions, m: Measured) -> dict[str, float]:
    """What each part of the system would allow alone."""
    return {
        "GPU": a.batch_size / step_of(gpus, variant, fleet, a, m).seconds,
        "coordinator": m.stream_chunks_per_second * chunk_images(gpus, a, m),
        "S3": a.s3_requests_per_second,
    }


def control_cores(workers: int, m: Measured) -> dict[str, float]:
    """Of the head, by process: on the line through the smallest and the largest group that was watched."""
    few, many = min(m.control_cores), max(m.control_cores)
    ahead = (workers - many) / (many - few)
    return {name: share + ahead * (share - m.control_cores[few][name]) for name, share in m.control_cores[many].items()}


def bound_by(gpus: int, variant: str, fleet: Fleet, a: Assumptions, m: Measured) -> str:
    """The lowest ceiling. Of the GPUs' own: "batch" (too small a share) or "all-reduce" from a quarter of a step on."""
    ceilings = ceilings_images_per_second(gpus, variant, fleet, a, m)
    lowest = min(ceilings, key=ceilings.__getitem__)
    if lowest != "GPU":
        return lowest
    step = step_of(gpus, variant, fleet, a, m)
    if step.compute_seconds > 0.75 * step.seconds:
        return "GPU"
    return "batch" if step.launch_seconds > step.exposed_seconds else "all-reduce"


def data_nodes(images_per_second: float, gpu_nodes: int, fleet: Fleet, a: Assumptions, m: Measured) -> int:
    """Nodes that decode what the GPU nodes' own CPUs do not."""
    own = gpu_nodes * (fleet.vcpus_per_node - fleet.gpus_per_node)
    needed = images_per_second / vcpu_images_per_second(a, m) - own
    return max(math.ceil(needed / a.data_vcpus_per_node), 0)


def epoch_seconds(images_per_second: float, a: Assumptions, m: Measured) -> float:
    """Training, evaluation, the start of both streams and the copy for the checkpoint, which is written meanwhile."""
    images = a.train_images // a.batch_size * a.batch_size + a.val_images * a.evaluation_to_training
    return max(images / images_per_second + 2 * a.stream_start_seconds + m.snapshot_seconds, m.checkpoint_write_seconds)


def interruption_seconds(gpu_nodes: int, a: Assumptions) -> float:
    """Of a run's time that the loss of one node costs.

    Alone, a node waits for the next. Of several, half go on (a number of workers must divide the batch) until it
    comes, and the workers start again twice.
    """
    if gpu_nodes == 1:
        return a.lost_seconds + a.node_start_seconds
    return 2 * a.lost_seconds + a.node_start_seconds / 2


def useful_share(gpu_nodes: int, fleet: Fleet, a: Assumptions) -> float:
    """Of a run's time, what interruptions leave; 0 where they leave nothing."""
    lost = fleet.interruptions_per_node_hour * gpu_nodes * interruption_seconds(gpu_nodes, a) / 3600
    return max(1 - lost, 0.0)


def predict(gpus: int, variant: str, fleet: Fleet, a: Assumptions, m: Measured) -> Prediction:
    """A whole run of the recipe, from the first node asked for to the last checkpoint."""
    rate = min(ceilings_images_per_second(gpus, variant, fleet, a, m).values())
    gpu_nodes = nodes_of(gpus, fleet)
    decoders = data_nodes(rate, gpu_nodes, fleet, a, m)
    useful = useful_share(gpu_nodes, fleet, a)
    epoch = epoch_seconds(rate, a, m)
    seconds = a.node_start_seconds + a.epochs * epoch / useful if useful else math.inf
    per_hour = (
        a.head_dollars_per_hour
        + gpu_nodes * fleet.node_dollars_per_hour
        + decoders * a.data_dollars_per_hour
        + (1 + gpu_nodes + decoders) * a.node_extras_dollars_per_hour
    )
    requests = a.epochs * (a.train_images + a.val_images) * a.dollars_per_s3_request
    reason = bound_by(gpus, variant, fleet, a, m)
    if epoch == m.checkpoint_write_seconds:
        reason = "checkpoint"
    elif useful < 0.5:
        reason = "interruptions"
    return Prediction(gpus, rate, reason, decoders, seconds / 3600, seconds / 3600 * per_hour + requests)


def stops_at(runs: Sequence[Prediction], gain: float = 1.5) -> str:
    """Says where twice the GPUs first give less than `gain` times the speed, and why (`runs` double each time)."""
    for before, after in pairwise(runs):
        if after.hours > before.hours / gain:
            faster = before.hours / after.hours if math.isfinite(after.hours) else 0.0
            return f"scales to {before.gpus} GPUs: {after.gpus} are {faster:.2f} x as fast, bound by {after.bound_by}"
    return f"still scales at {runs[-1].gpus} GPUs"
