"""A command that trains and that benchmarks interrupt (`faults.py`, `soak.py`), and every process that comes of it."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from diffvit.config import RunConfig, to_json
from diffvit.training.checkpoint_store import CheckpointStore
from diffvit.training.logbook import Logbook

JOB = Path(__file__).parents[1] / "ray_jobs/pretrain.py"
_MARK = "DIFFVIT_SOAK"
"""Variable by which every process that a run started is found."""
_WAIT_SECONDS = 300.0


def temporary_folder(storage: str) -> Path:
    """Where the runs in `storage` put their temporary files, and Ray its logs."""
    return Path(storage, "tmp")


class Sitting:
    """The command, from when it is typed until it ends; what is left of it is killed at the end of the `with` block."""

    def __init__(self, config: RunConfig) -> None:
        self._config, self._mark = config, f"{os.getpid()}-{uuid.uuid4().hex}"
        self._log = Path(config.storage, f"{config.name}.log")
        described = Path(config.storage, f"{config.name}.json")
        described.write_text(to_json(config))
        temporary_folder(config.storage).mkdir(exist_ok=True)
        environment = {
            _MARK: self._mark,
            "TMPDIR": str(temporary_folder(config.storage)),
            "SPT_NOENV": "1",  # or setproctitle, which Ray's workers use, writes over a process's environment
            "RAY_worker_niceness": "0",  # or anything else on the machine goes first
        }
        with self._log.open("a") as log:
            self._command = subprocess.Popen(
                [sys.executable, str(JOB), "--config", str(described)],
                stdout=log,
                stderr=log,
                env=os.environ | environment,
                # a background job of a shell ignores Ctrl-C, and so would this
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            )

    def __enter__(self) -> Sitting:
        return self

    def __exit__(self, *_: object) -> None:
        for process in processes(self._mark):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self._command.wait()

    def wait_for_checkpoint(self, interruptions: int) -> None:
        """Until so many interruptions are listed, and a checkpoint was written since the last one was."""
        self._wait_until(lambda: len(listed_interruptions(self._config)) == interruptions)
        begun = newest_step(self._config)
        self._wait_until(lambda: newest_step(self._config) > begun)

    def kill_a_worker(self) -> None:
        os.kill(random.choice(self.workers()), signal.SIGKILL)

    def end(self, number: int) -> None:
        """Send the command a signal that ends it."""
        self._command.send_signal(number)
        self._command.wait(_WAIT_SECONDS)

    def workers(self) -> list[int]:
        return processes(self._mark, "ray::RayTrainWorker")

    def wait(self) -> None:
        """Until it has ended by itself."""
        if self._command.wait(_WAIT_SECONDS):
            raise SystemExit(f"the run failed:\n{self._log.read_text()[-3000:]}")

    def _wait_until(self, happens: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _WAIT_SECONDS
        while not happens():
            if self._command.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the run has ended or stands still:\n{self._log.read_text()[-3000:]}")
            time.sleep(0.1)


def listed_interruptions(config: RunConfig) -> list[dict[str, Any]]:
    return Logbook(config.folder).interruptions


def newest_step(config: RunConfig) -> int:
    """Step of the newest checkpoint, 0 before there is one."""
    entries = CheckpointStore(config.folder, config.checkpoint).entries() if config.folder.exists() else []
    return entries[-1].step if entries else 0


def processes(mark: str = f"{os.getpid()}-", title: str = "") -> list[int]:
    """Those that a sitting (all sittings, by default) has started and that live, the command itself included."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            ours = f"{_MARK}={mark}".encode() in (folder / "environ").read_bytes()
            if ours and (folder / "cmdline").read_text().startswith(title):
                found.append(int(folder.name))
        except OSError:  # it has ended meanwhile
            continue
    return found
