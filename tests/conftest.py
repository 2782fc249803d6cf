"""What the tests share: tiny real images and tiny configs."""

from __future__ import annotations

import dataclasses
import io
import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pyarrow import fs

from diffvit.config import AugmentConfig, DataConfig, ModelConfig, OptimConfig, RunConfig, ScaleConfig
from diffvit.models.vit import VisionTransformer
from diffvit.training import tracking
from diffvit.training.checkpoint import TrainState, take_snapshot
from diffvit.training.optim import build_optimizer, build_schedule

# before any Ray starts, whose workers inherit them: the store on loopback needs some, and no test may use real ones
os.environ |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_EC2_METADATA_DISABLED": "true"}

torch.set_num_threads(1)  # the models are tiny: more threads would only wait for each other


def make_image(path: Path, *, hue: int, seed: int, size: tuple[int, int] = (20, 17)) -> None:
    """A noisy picture whose colour tells its class."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_png(hue % 3, seed, size))


@cache
def _png(channel: int, seed: int, size: tuple[int, int]) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 60, (*reversed(size), 3))
    pixels[..., channel] += 150
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def make_folder(root: Path, images_per_class: int = 12, val_per_class: int = 0) -> Path:
    """`<class>/*.png`, or train/ and val/ where `val_per_class` is given; three classes told apart by colour."""
    for hue, name in enumerate(("blue", "green", "red")):
        for number in range(images_per_class):
            train = root / "train" if val_per_class else root
            make_image(train / name / f"{number:03d}.png", hue=2 - hue, seed=100 * hue + number)
        for number in range(val_per_class):
            make_image(root / "val" / name / f"{number:03d}.png", hue=2 - hue, seed=10_000 + 100 * hue + number)
    return root


@pytest.fixture(autouse=True)
def _no_drawing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in this process draw no attention maps, which takes longer than an epoch, but in tests marked `draws`."""
    if request.node.get_closest_marker("draws") is None:
        monkeypatch.setattr(tracking, "draws_attention", lambda *_: False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "images", images_per_class=12, val_per_class=5)


@pytest.fixture
def tiny_config(tmp_path: Path, folder: Path) -> RunConfig:
    """36 training and 15 validation images of three classes, batches of 12, two epochs."""
    return RunConfig(
        name="tiny",
        storage=str(tmp_path / "runs"),
        model=ModelConfig(
            variant="diff",
            image_size=16,
            patch_size=4,
            embed_dim=16,
            depth=2,
            num_heads=1,
            class_token=False,
            pool="avg",
        ),
        data=DataConfig(path=str(folder), mean=(0.5,), std=(0.25,)),
        augment=AugmentConfig(crop="inception", crop_scale=(0.5, 1.0)),
        optim=OptimConfig(epochs=2, batch_size=12, lr=3e-3, warmup_epochs=1),
        scale=ScaleConfig(workers=1),
    )


def with_fields(config: RunConfig, **sections: dict[str, object]) -> RunConfig:
    """`with_fields(config, optim={"lr": 1.0})`: the config with some fields of some sections replaced."""
    changed = {name: dataclasses.replace(getattr(config, name), **fields) for name, fields in sections.items()}
    return dataclasses.replace(config, **changed)


def write_untrained(config: RunConfig, folder: Path) -> VisionTransformer:
    """A checkpoint of a model before its first step; the model."""
    model = VisionTransformer(config.model)
    optimizer = build_optimizer(model, config.optim)
    folder.mkdir()
    state = TrainState(model, optimizer, build_schedule(optimizer, config.optim, 3), None)
    take_snapshot(state, config, {}).write(folder)
    return model


class ObjectStore:
    """An S3 server on loopback that can be away for a while; what it holds outlives that."""

    def __init__(self) -> None:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._port = 0
        self.start()
        bucket = fs.S3FileSystem(endpoint_override=f"127.0.0.1:{self._port}", scheme="http", allow_bucket_creation=True)
        bucket.create_dir("bucket")

    def start(self) -> None:
        from moto.server import ThreadedMotoServer  # seconds, which processes that import this file need not wait for

        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=self._port, verbose=False)
        self._server.start()
        self._port = self._server.get_host_and_port()[1]
        self.answers = True

    def stop(self) -> None:
        self.answers = False
        listening = self._server._server
        self._server.stop()
        listening.server_close()  # else what comes in is neither answered nor refused

    @contextmanager
    def away(self) -> Iterator[threading.Event]:
        """Hang up on whoever asks meanwhile; the event tells that somebody did."""
        self.stop()
        asked = threading.Event()

        def hang_up() -> None:
            with suppress(OSError):  # the store comes back
                while True:
                    door.accept()[0].close()
                    asked.set()

        with socket.create_server(("127.0.0.1", self._port)) as door:
            thread = threading.Thread(target=hang_up)
            thread.start()
            try:
                yield asked
            finally:
                door.shutdown(socket.SHUT_RDWR)
                thread.join()
                door.close()
                self.start()

    def uri(self, folder: str) -> str:
        return f"s3://bucket/{folder}?endpoint_override=127.0.0.1:{self._port}&scheme=http"


class GoogleStore:
    """A server of Google's storage on loopback that can be away for a while; what it holds outlives that.

    A process of its own: pyarrow keeps Python's lock while it waits for this store.
    """

    _PROGRAM = """
import sys
from http.server import ThreadingHTTPServer
from gcp_storage_emulator import server
server.server.HTTPServer = ThreadingHTTPServer  # or a download that is not read on holds up all other requests
server.create_server("127.0.0.1", int(sys.argv[1]), data_dir=sys.argv[2], default_bucket="bucket").run()
"""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with socket.create_server(("127.0.0.1", 0)) as door:
            self._port = door.getsockname()[1]
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-c", self._PROGRAM, str(self._port), str(self._folder)]
        self._server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self._server.poll() is None:
            with suppress(OSError), socket.create_connection(("127.0.0.1", self._port)):
                return
            time.sleep(0.05)
        self.stop()
        raise RuntimeError(f"the store did not start: {self._server.returncode}")

    def stop(self) -> None:
        self._server.kill()
        self._server.wait()

    def uri(self, folder: str) -> str:
        return f"gs://anonymous@bucket/{folder}?endpoint_override=127.0.0.1:{self._port}&scheme=http"


class Outage:
    """A job's `report` that takes the store away for a second and a half, once, when a part of `what` is done."""

    def __init__(self, store: ObjectStore, what: str) -> None:
        self._store, self._what = store, what
        self._back = threading.Timer(1.5, store.start)

    def __call__(self, what: str, done: int, total: int) -> None:
        if what == self._what and done and self._back.ident is None:
            self._store.stop()
            self._back.start()

    def join(self) -> None:
        """Raises RuntimeError where there was no outage."""
        self._back.join()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="session")
def _object_store() -> Iterator[ObjectStore]:
    store = ObjectStore()
    yield store
    store.stop()


@pytest.fixture
def object_store(_object_store: ObjectStore) -> Iterator[ObjectStore]:
    """The one of all tests; where one failed while it was away, it is back for the next."""
    yield _object_store
    if not _object_store.answers:
        _object_store.start()


@pytest.fixture(scope="session")
def google_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GoogleStore]:
    store = GoogleStore(tmp_path_factory.mktemp("google"))
    yield store
    store.stop()


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """One local Ray for all tests: starting it takes longer than any of them."""
    import ray

    ray.init(
        address="local",
        num_cpus=6,
        num_gpus=0,
        include_dashboard=True,  # as a sweep of worker groups has it: Ray asks it which groups have ended
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=512 * 2**20,
    )
    folder = Path(ray._private.worker._global_node.get_session_dir_path())
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)
