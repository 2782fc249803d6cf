"""What a run tells while it goes: TensorBoard, progress for the console, and the metrics of each checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from diffvit.analysis.attention_grid import attention_figure
from diffvit.config import RunConfig
from diffvit.data.batches import Batch, Stream
from diffvit.data.order import TrainPlan
from diffvit.training.checkpoint import TrainState
from diffvit.training.event_folder import TENSORBOARD_FOLDER, EventFolder
from diffvit.training.sharding import is_sharded, whole_copy
from diffvit.training.utilisation import device_name

Publish = Callable[[str, dict[str, Any]], None]
"""(kind, fields): 'step', 'epoch', 'skipped' or 'warning', read by `diffvit.console`."""

__all__ = ["TENSORBOARD_FOLDER", "Publish", "Tracker"]

_ATTENTION_GRIDS = 5
"""How many times a run draws its attention maps."""
_GRID_IMAGES = 8


def draws_attention(epoch: int, epochs: int) -> bool:
    """Whether the attention maps are drawn after this epoch, from 1, of `epochs`."""
    return epoch % max(epochs // _ATTENTION_GRIDS, 1) == 0 or epoch == epochs


class Tracker:
    """Rank 0's record of a run; on other ranks (`enabled=False`) it only keeps the counts that all ranks share."""

    def __init__(
        self, config: RunConfig, plan: TrainPlan, state: TrainState, publish: Publish, *, enabled: bool
    ) -> None:
        self._config, self._plan, self._state, self._publish = config, plan, state, publish
        self._writer: SummaryWriter | None = None
        if enabled:
            self._events = EventFolder(config.location)
            # what a cut run wrote after the step it goes on from will be written again
            self._writer = SummaryWriter(str(self._events.path), purge_step=state.step + 1)
        self._seconds_before, self._first_step = state.train_seconds, state.step
        self._started = self._lap_started = time.perf_counter()
        self._saved_at = self._started
        self._waited = 0.0
        self._evaluated: dict[str, float] = {}
        self._reset_epoch()

    def _reset_epoch(self) -> None:
        self._epoch = dict.fromkeys(("loss", "top1", "images", "skipped", "seconds", "waited"), 0.0)

    @property
    def epoch_skipped(self) -> float:
        """Training samples skipped since the epoch began (or since the run was continued), over all ranks."""
        return self._epoch["skipped"]

    @property
    def minutes_since_save(self) -> float:
        """Since the last checkpoint, or the start of this sitting."""
        return (time.perf_counter() - self._saved_at) / 60

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; the time that training waits for them counts as waited."""
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            self._waited += time.perf_counter() - started
            if batch is None:
                return
            yield batch

    def log_steps(self, sums: dict[str, float]) -> None:
        """Record the steps since the last call; `sums` from `Sums.read`."""
        now = time.perf_counter()
        seconds, waited = now - self._lap_started, self._waited
        self._lap_started, self._waited = now, 0.0
        self._state.train_seconds = self._seconds_before + now - self._started
        self._state.skipped += int(sums["skipped"])
        for name in ("loss", "top1"):
            self._epoch[name] += sums[name] * sums["images"]
        for name, value in (("images", sums["images"]), ("skipped", sums["skipped"])):
            self._epoch[name] += value
        self._epoch["seconds"] += seconds
        self._epoch["waited"] += waited
        lambdas = self._state.model.lambdas() if self._writer is not None or is_sharded(self._state.model) else []
        if self._writer is None:
            return
        step, lr = self._state.step, float(self._state.schedule.get_last_lr()[0])
        images = sums["images"] + sums["skipped"]
        scalars: dict[str, float] = {
            "train/loss": sums["loss"],
            "train/top1": sums["top1"],
            "train/lr": lr,
            "speed/images_per_second": images / seconds,
            "speed/data_wait_fraction": min(waited / seconds, 1.0),
        }
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)
        for layer, value in enumerate(lambdas):
            self._writer.add_scalar(f"lambda/layer_{layer:02d}", value, step)
        self._publish(
            "step",
            {
                "epoch": (step - 1) // self._plan.steps_per_epoch + 1,
                "step": step,
                "loss": sums["loss"],
                "images_per_second": images / seconds,
                "eta_seconds": self._eta_seconds(now),
            },
        )

    def log_epoch(self, evaluated: dict[str, float], stream: Stream) -> None:
        """Record an evaluation; `evaluated` from `evaluate`. Draws attention maps a few times a run."""
        self._evaluated = evaluated
        step, model = self._state.step, self._state.evaluated_model
        draws = draws_attention(step // self._plan.steps_per_epoch, self._plan.epochs)
        if draws and is_sharded(model):
            model = whole_copy(model)
        if self._writer is None:
            return
        for name in ("loss", "top1", "top5"):
            self._writer.add_scalar(f"val/{name}", evaluated[name], step)
        if draws:
            images = stream.preview(_GRID_IMAGES).images
            figure = attention_figure(model, images, self._config)
            self._writer.add_figure("attention/last_block", figure, step)
        self._writer.flush()

    def report(self) -> dict[str, Any]:
        """The metrics of a checkpoint written now; at the end of an epoch also told to the console."""
        step, epoch, used = self._state.step, self._epoch, max(self._epoch["images"], 1.0)
        seconds = max(epoch["seconds"], 1e-9)
        metrics = {
            "epoch": -(-step // self._plan.steps_per_epoch),
            "step": step,
            "train_loss": epoch["loss"] / used,
            "train_top1": epoch["top1"] / used,
            "images_per_second": (epoch["images"] + epoch["skipped"]) / seconds,
            "data_wait_fraction": min(epoch["waited"] / seconds, 1.0),
            "train_seconds": self._state.train_seconds,
            "skipped_images": self._state.skipped + int(self._evaluated.get("skipped", 0)),
            "world_sizes": list(self._state.world_sizes),
            "device": device_name(next(self._state.model.parameters()).device),
            "poisoned_steps": self._state.poisoned_steps,
            "rollbacks": self._state.rollbacks,
        }
        if step % self._plan.steps_per_epoch == 0:
            metrics |= {name: self._evaluated[name] for name in ("loss", "top1", "top5")}
            if self._writer is not None:
                self._publish("epoch", metrics)
            self._reset_epoch()
        return metrics

    def flush(self) -> tuple[Callable[[], None], ...]:
        """Bring the events to the disk; what is to be called, on rank 0, to bring them into the run's folder."""
        if self._writer is None:
            return ()
        self._writer.flush()
        return (self._events.copy,)

    def saved(self) -> None:
        """A checkpoint was handed over; evaluation and that do not count as training time in images a second."""
        self._lap_started = self._saved_at = time.perf_counter()
        self._waited = 0.0

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._events.close()

    def _eta_seconds(self, now: float) -> float:
        """Evaluations and checkpoints included, because the time so far includes them."""
        done = self._state.step - self._first_step
        return (now - self._started) / done * (self._plan.total_steps - self._state.step)
