"""What a run tells while it goes: TensorBoard, progress for the console, and the metrics of each checkpoint."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from diffvit.analysis.attention_grid import attention_figure, mean_gates
from diffvit.config import RunConfig
from diffvit.data.batches import Batch, Stream
from diffvit.data.order import TrainPlan
from diffvit.training.checkpoint import TrainState
from diffvit.training.event_log import TENSORBOARD_FOLDER, EventLog
from diffvit.training.sharding import is_sharded, whole_copy
from diffvit.training.utilisation import device_name, peak_bytes

Publish = Callable[[str, dict[str, Any]], None]
"""(kind, fields): 'step', 'epoch', 'skipped' or, with a message, 'started from' and 'warning'; for the console."""

__all__ = ["TENSORBOARD_FOLDER", "Publish", "Tracker"]

_ATTENTION_GRIDS = 5
"""How many times a run draws its attention maps."""
_GRID_IMAGES = 8


def draws_attention(epoch: int, epochs: int) -> bool:
    """Whether the attention maps are drawn after this epoch, from 1, of `epochs`."""
    return epoch % max(epochs // _ATTENTION_GRIDS, 1) == 0 or epoch == epochs


class Waiting:
    """Seconds that training stood still for its next images: a GPU may still compute while the host waits for them."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._gaps: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds = 0.0

    def next_of(self, batches: Iterator[Batch]) -> Batch | None:
        if self._on_gpu:
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()  # reached when all that was queued is done
            batch = next(batches, None)
            after.record()
            self._gaps.append((before, after))
            return batch
        started = time.perf_counter()
        batch = next(batches, None)
        self._seconds += time.perf_counter() - started
        return batch

    def read(self) -> float:
        """The sum since the last call. The device must have done what it was given."""
        seconds: float = self._seconds + sum(before.elapsed_time(after) for before, after in self._gaps) / 1000
        self._seconds, self._gaps = 0.0, []
        return seconds


class Tracker:
    """Rank 0's record of a run; on other ranks (`enabled=False`) it only keeps the counts that all ranks share."""

    def __init__(
        self, config: RunConfig, plan: TrainPlan, state: TrainState, publish: Publish, *, enabled: bool
    ) -> None:
        self._config, self._plan, self._state, self._publish = config, plan, state, publish
        self._events = EventLog(config.location, state.step + 1) if enabled else None
        self._seconds_before, self._first_step = state.train_seconds, state.step
        self._started = self._lap_started = time.perf_counter()
        self._lap_first_step = state.step
        self._saved_at = self._started
        self._device = next(state.model.parameters()).device
        self._waiting = Waiting(self._device)
        self._first_step_at: float | None = None
        self.step_seconds = 0.0
        """What a step took lately."""
        if not state.epoch_sums or state.evaluated:
            self._begin_epoch()

    def _begin_epoch(self) -> None:
        self._state.epoch_sums = dict.fromkeys(("loss", "top1", "images", "skipped", "seconds", "waited"), 0.0)

    @property
    def minutes_since_save(self) -> float:
        """Since the last checkpoint, or the start of this sitting."""
        return (time.perf_counter() - self._saved_at) / 60

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; the time that training waits for them counts as waited."""
        for number in itertools.count():
            if number == self._plan.accumulation_steps:
                self._first_step_at = time.time()
            batch = self._waiting.next_of(batches)
            if batch is None:
                return
            yield batch

    def log_steps(self, sums: dict[str, float]) -> None:
        """Record the steps since the last call; `sums` from `Sums.read`."""
        now = time.perf_counter()
        seconds, waited = now - self._lap_started, self._waiting.read()
        self._lap_started = now
        self.step_seconds = seconds / max(self._state.step - self._lap_first_step, 1)
        self._lap_first_step = self._state.step
        self._state.train_seconds = self._seconds_before + now - self._started
        epoch = self._state.epoch_sums
        for name in ("loss", "top1"):
            epoch[name] += sums[name] * sums["images"]
        added = {"images": sums["images"], "skipped": sums["skipped"], "seconds": seconds, "waited": waited}
        for name, value in added.items():
            epoch[name] += value
        lambdas = self._state.model.lambdas() if self._events is not None or is_sharded(self._state.model) else []
        if self._events is None:
            return
        step = self._state.step
        images = sums["images"] + sums["skipped"]
        # of poisoned steps alone there is no loss
        trained = {"train/loss": sums["loss"], "train/top1": sums["top1"]} if sums["images"] else {}
        scalars: dict[str, float] = {
            **trained,
            **self._learning_rates(),
            "speed/images_per_second": images / seconds,
            "speed/data_wait_fraction": min(waited / seconds, 1.0),
        }
        for name, value in scalars.items():
            self._events.add_scalar(name, value, step)
        for layer, value in enumerate(lambdas):
            self._events.add_scalar(f"lambda/layer_{layer:02d}", value, step)
        self._publish(
            "step",
            {
                "epoch": (step - 1) // self._plan.steps_per_epoch + 1,
                "step": step,
                "loss": sums["loss"] if sums["images"] else math.nan,
                "images_per_second": images / seconds,
                "eta_seconds": self._eta_seconds(now),
            },
        )

    def _learning_rates(self) -> dict[str, float]:
        """Of AdamW and, where that is used, of Muon; of the topmost group, which `optim.layer_decay` slows least."""
        state, rates = self._state, dict[str, float]()
        for group, rate in zip(state.optimizer.param_groups, state.schedule.get_last_lr(), strict=True):
            rates.setdefault("train/muon_lr" if group.get("muon") else "train/lr", float(rate))
        return rates

    def log_epoch(self, evaluated: dict[str, float], stream: Stream) -> None:
        """Record an evaluation; `evaluated` from `evaluate`. Draws attention maps a few times a run."""
        self._state.train_seconds = self._seconds_before + time.perf_counter() - self._started
        step, model = self._state.step, self._state.evaluated_model
        draws = draws_attention(step // self._plan.steps_per_epoch, self._plan.epochs)
        gates = self._config.model.variant == "diff_v2"
        if (draws or gates) and is_sharded(model):
            model = whole_copy(model)
        if self._events is None:
            return
        for name in ("loss", "top1", "top5"):
            self._events.add_scalar(f"val/{name}", evaluated[name], step)
        if not (draws or gates):
            return
        images = stream.preview(_GRID_IMAGES).images
        if draws:
            self._events.add_figure("attention/last_block", attention_figure(model, images, self._config), step)
        for layer, value in enumerate(mean_gates(model, images, self._config) if gates else []):
            self._events.add_scalar(f"gate/layer_{layer:02d}", value, step)

    def metrics(self) -> dict[str, Any]:
        """The metrics of a checkpoint written now, before it is evaluated."""
        step, epoch = self._state.step, self._state.epoch_sums
        used, seconds = max(epoch["images"], 1.0), max(epoch["seconds"], 1e-9)
        return {
            "epoch": -(-step // self._plan.steps_per_epoch),
            "step": step,
            "train_loss": epoch["loss"] / used,
            "train_top1": epoch["top1"] / used,
            "images_per_second": (epoch["images"] + epoch["skipped"]) / seconds,
            "data_wait_fraction": min(epoch["waited"] / seconds, 1.0),
            "train_seconds": self._state.train_seconds,
            "skipped_images": len(self._state.skipped_samples),
            "world_sizes": list(self._state.world_sizes),
            "device": device_name(self._device),
            "precisions": list(self._state.precisions),
            "peak_bytes": peak_bytes(self._device),  # rank 0's, which also holds checkpoints on their way
            "first_step_at": self._first_step_at,
            "poisoned_steps": self._state.poisoned_steps,
            "rollbacks": self._state.rollbacks,
        }

    def end_epoch(self, evaluated: dict[str, float]) -> dict[str, Any]:
        """The metrics of the epoch's checkpoint, `evaluated` included; also told to the console."""
        metrics = self.metrics() | {name: evaluated[name] for name in ("loss", "top1", "top5")}
        metrics["skipped_images"] += int(evaluated["skipped"])
        if self._events is not None:
            self._publish("epoch", metrics)
        self._begin_epoch()
        return metrics

    def to_copy(self) -> tuple[Callable[[], None], ...]:
        """What is to be called, on rank 0, to bring the events into the run's folder."""
        return () if self._events is None else (self._events.copy,)

    def saved(self) -> None:
        """A checkpoint was handed over; evaluation and that do not count as training time in images a second."""
        self._lap_started = self._saved_at = time.perf_counter()

    def close(self) -> None:
        if self._events is not None:
            self._events.close()

    def _eta_seconds(self, now: float) -> float:
        """Evaluations and checkpoints included, because the time so far includes them."""
        done = self._state.step - self._first_step
        return (now - self._started) / done * (self._plan.total_steps - self._state.step)
