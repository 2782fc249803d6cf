"""What `scale.py` reckons with: what is assumed, with where it comes from, and what was measured.

Names carry units. Prices are US dollars in us-east-1, on Linux; look them up before relying on them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

VARIANTS = ("plain", "V1", "V2")


@dataclass(frozen=True)
class Fleet:
    """GPU nodes, all alike."""

    name: str
    """As the cloud calls the type."""
    gpus_per_node: int
    """GPUs of a node."""
    vcpus_per_node: int
    """Of which one a GPU is left to training, and the others decode."""
    gpu_images_per_second: float
    """Training rate of the plain ViT-S/16 on one GPU with nothing else in the way."""
    node_gigabits_per_second: float
    """Network of a node, each way."""
    node_dollars_per_hour: float
    """Price of a node."""
    interruptions_per_node_hour: float
    """How often a node is taken away; 0 on demand."""


G6 = Fleet(
    name="g6.2xlarge",
    gpus_per_node=1,
    vcpus_per_node=8,
    gpu_images_per_second=1058.0 * 300 / 936,
    node_gigabits_per_second=5.0,  # EC2's baseline; bursts to 10
    node_dollars_per_hour=0.39,  # spot, 2025-03-05
    interruptions_per_node_hour=0.005,  # AWS only says "> 20 % a month", which is 0.0003 or more
)
"""The workers of cluster/aws.yaml: one L4 each, on spot.

No published rate was found. An RTX 3090 trains 1,058 images/s (timm, ViT-S/16 with AMP,
results/benchmark-train-amp-nhwc-pt112-cu113-rtx3090.csv); here that times the ratio of memory bandwidths, in GB/s.
"""

P4D = Fleet(
    name="p4d.24xlarge",
    gpus_per_node=8,
    vcpus_per_node=96,
    gpu_images_per_second=1058.0 * 1555 / 936,
    node_gigabits_per_second=100.0,  # one of its four cards, by TCP
    node_dollars_per_hour=21.96,  # on demand, after the cut of June 2025; not looked up since
    interruptions_per_node_hour=0.0,
)
"""What one would rent for many GPUs: eight A100 (40 GB) each, on demand.

By the same ratio. A published run of the recipe, 5 h 41 min on eight A100, did 697 images/s a GPU from end to end.
"""


@dataclass(frozen=True)
class Assumptions:
    """What was not measured here. Every one is an option."""

    gpu: Fleet = G6
    """The GPU nodes of cluster/aws.yaml."""
    big: Fleet = P4D
    """Other GPU nodes, to compare."""
    v1_step_to_plain: float = 1.22
    """V1's training step to that of the plain ViT-S/16: measured on one H200 in bf16 (benchmarks/train_step.py, commit
    8f0cfa9) and taken for any GPU's."""
    v2_step_to_plain: float = 1.40
    """V2's, likewise."""
    stream_to_ceiling: float = 0.69
    """Images/s of the stream to those of plain decoding, in one run (benchmarks/ingest.py, commit 153d9b3)."""
    stream_start_seconds: float = 0.73
    """From asking for an epoch to its first batch, in the same run."""
    evaluation_to_training: float = 1 / 3
    """What an evaluated image costs to one trained on: the forward pass alone."""
    least_step_seconds: float = 0.02
    """A GPU's step cannot be shorter: launching a thousand or so kernels from Python."""
    hop_seconds: float = 50e-6
    """Latency of one hop of the ring all-reduce over TCP."""
    overlap: float = 0.5
    """Share of the compute time behind which DDP hides the all-reduce."""
    vcpu_to_core: float = 0.6
    """Decoding rate of a cloud vCPU (a hyperthread) to that of the core measured here."""
    data_vcpus_per_node: int = 16
    """vCPUs of a data node: c7i.4xlarge."""
    data_dollars_per_hour: float = 0.29
    """Price of a data node: spot, about 40 % of the 0.714 on demand (2025)."""
    head_dollars_per_hour: float = 0.2016
    """Price of the head, m7i.xlarge on demand (2025)."""
    node_extras_dollars_per_hour: float = 0.0214
    """150 GiB of gp3 and a public IPv4 address (2025)."""
    s3_requests_per_second: float = 5500.0
    """GETs that one prefix of a bucket answers; every image is one. S3 may allow more to a bucket that is busy long."""
    dollars_per_s3_request: float = 0.4e-6
    """Price of a GET (2025)."""
    node_start_seconds: float = 600.0
    """From asking for a node until it is useful: boot, and pip of 6.6 GB of wheels."""
    lost_seconds: float = 15.2
    """Of training lost when the workers start again after a notice: one, of a tiny model on one machine (`results.json`
    of the run in tests/test_preemption.py, 2026-11-23); its import, connection and repeated steps."""
    train_images: int = 1_268_355
    """In an epoch: 99 % of ImageNet-1k's training set, as the recipe has it."""
    val_images: int = 50_000
    """Evaluated after each epoch."""
    epochs: int = 90
    """Of the recipe."""
    batch_size: int = 1024
    """G, of the recipe."""
    gpus: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    """Numbers of GPUs to look at."""


@dataclass(frozen=True)
class Measured:
    """What this machine showed."""

    decode_images_per_core_second: float
    """Encoded 500 x 375 JPEG to augmented 224 px crop, by CPU time."""
    gradient_bytes: Mapping[str, int]
    """By variant."""
    checkpoint_bytes: int
    """Of the plain model, with the optimiser's state."""
    checkpoint_write_seconds: float
    """Beside training."""
    snapshot_seconds: float
    """Copying the state, for which training waits."""
    stream_chunks_per_second: float
    """That the stream's coordinator could deal out with a core to itself, by its CPU time for one."""
    images_per_chunk: int
    """The most in a chunk of the stream."""
    control_cores: Mapping[int, Mapping[str, float]]
    """That a run's control takes of its head: by number of workers and process, as shares of a core."""
