"""Two runs, one name: who is refused, and how long the dead hold on."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from conftest import ObjectStore

from diffvit.storage import Storage
from diffvit.training import lock_file, run_lock
from diffvit.training.run_lock import LOCK_NAME, Owner, RunLock

HOLD = """
import sys, time
from pathlib import Path
from diffvit.training.run_lock import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "_BEAT_SECONDS", 0.1)
    monkeypatch.setattr(run_lock, "_SILENT_SECONDS", 1.0)


def test_the_second_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    with RunLock(tmp_path / "a"):
        with pytest.raises(ValueError, match=rf"run 'a' is being worked on by process {os.getpid()} on "):
            RunLock(tmp_path / "a").__enter__()
        with RunLock(tmp_path / "b"):
            pass
    with RunLock(tmp_path / "a"):
        pass
    assert list((tmp_path / "a").iterdir()) == []


def test_where_there_are_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(lock_file.os, "link", refuse)
    for _ in range(2):
        with RunLock(tmp_path), pytest.raises(ValueError, match=f"being worked on by process {os.getpid()} on "):
            RunLock(tmp_path).__enter__()
    assert list(tmp_path.iterdir()) == []


def test_a_killed_owner_of_this_host_holds_nothing(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match=f"process {other.pid} on"):
            RunLock(tmp_path).__enter__()
        other.send_signal(signal.SIGKILL)
        other.wait()
        started = time.monotonic()
        with RunLock(tmp_path):
            assert time.monotonic() - started < 0.9  # not waited for


def of_another_host(folder: Path, beat: int = 0) -> Path:
    owner = replace(Owner.of_this_process(), host="node-7 boot pid:[1]", pid=42, beat=beat)
    path = folder / LOCK_NAME
    path.write_text(json.dumps(asdict(owner)))
    return path


def test_an_owner_elsewhere_lives_if_it_is_heard_of(tmp_path: Path) -> None:
    of_another_host(tmp_path)
    threading.Timer(0.3, of_another_host, (tmp_path, 1)).start()
    with pytest.raises(ValueError, match="process 42 on node-7"):
        RunLock(tmp_path).__enter__()


@pytest.mark.slow
@pytest.mark.parametrize("content", ["silent", "unreadable"])
def test_an_owner_elsewhere_that_is_silent_is_gone(tmp_path: Path, content: str) -> None:
    path = of_another_host(tmp_path)
    if content == "unreadable":
        path.write_text("{")
    started = time.monotonic()
    with RunLock(tmp_path):
        assert 1.0 <= time.monotonic() - started < 3.0
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_of_many_who_want_what_was_left_behind_one_gets_it(tmp_path: Path) -> None:
    of_another_host(tmp_path)
    got, refused = wanted_by_many(tmp_path)
    assert (len(got), len(refused)) == (1, 7)
    got[0].__exit__(None, None, None)


def wanted_by_many(place: Path | str) -> tuple[list[RunLock], list[str]]:
    got: list[RunLock] = []
    refused: list[str] = []

    def want() -> None:
        try:
            got.append(RunLock(place).__enter__())
        except ValueError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=want) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return got, refused


@pytest.fixture(params=["conditional", "unconditional"])
def url(
    request: pytest.FixtureRequest, object_store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> str:
    """A run in a store that refuses a write whose condition does not hold, and in one that cannot."""
    if request.param == "unconditional":
        monkeypatch.setattr(lock_file, "_s3_client", lambda storage: None)
        monkeypatch.setattr(lock_file, "_SETTLE_SECONDS", 0.5)
    return object_store.uri(f"lock-{tmp_path.name}/a")


def stored(url: str, beat: int = 0, content: str | None = None) -> None:
    owner = replace(Owner.of_this_process(), host="node-7 boot pid:[1]", pid=42, beat=beat)
    Storage(url).write(LOCK_NAME, (content or json.dumps(asdict(owner))).encode())


@pytest.mark.slow
def test_in_a_store_the_second_is_refused_until_the_first_ends(url: str) -> None:
    with RunLock(url), pytest.raises(ValueError, match=rf"run 'a' is being worked on by process {os.getpid()} on "):
        RunLock(url).__enter__()
    assert Storage(url).names() == []
    with RunLock(url):
        time.sleep(0.5)
        assert json.loads(Storage(url).read(LOCK_NAME))["beat"] > 0


@pytest.mark.slow
def test_in_a_store_an_owner_elsewhere_lives_if_it_is_heard_of(url: str) -> None:
    stored(url)
    threading.Timer(0.3, stored, (url, 1)).start()
    with pytest.raises(ValueError, match="process 42 on node-7"):
        RunLock(url).__enter__()


@pytest.mark.slow
@pytest.mark.parametrize("left", [None, "{"])
def test_in_a_store_an_answer_that_was_lost_is_no_other_owner(
    object_store: ObjectStore, tmp_path: Path, left: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S3 has written the lock, boto3 has not heard of it and writes again: the condition fails."""
    url = object_store.uri(f"lock-{tmp_path.name}/a")
    if left is not None:
        stored(url, content=left)
    make_client = lock_file._s3_client

    def deaf(storage: Storage) -> Any:
        client = make_client(storage)
        put = client.put_object

        def put_twice(**request: Any) -> Any:
            put(**request)
            return put(**request)

        monkeypatch.setattr(client, "put_object", put_twice)
        return client

    monkeypatch.setattr(lock_file, "_s3_client", deaf)
    with RunLock(url) as lock:
        assert json.loads(Storage(url).read(LOCK_NAME))["id"] == lock._me.id


@pytest.mark.slow
def test_in_a_store_of_many_who_want_what_was_left_behind_one_gets_it(url: str) -> None:
    stored(url, content="{")
    got, refused = wanted_by_many(url)
    assert (len(got), len(refused)) == (1, 7)
    assert json.loads(Storage(url).read(LOCK_NAME))["id"] == got[0]._me.id
    got[0].__exit__(None, None, None)


@pytest.mark.slow
def test_a_lock_outlasts_its_store(object_store: ObjectStore, tmp_path: Path) -> None:
    url = object_store.uri(f"lock-{tmp_path.name}/a")
    with RunLock(url):
        object_store.stop()
        try:
            time.sleep(0.5)
            with pytest.raises(ValueError, match=r"storage s3://bucket/lock-.* cannot be written: "):
                RunLock(url).__enter__()
        finally:
            object_store.start()
        with pytest.raises(ValueError, match=f"being worked on by process {os.getpid()}"):
            RunLock(url).__enter__()
        seen = Storage(url).read(LOCK_NAME)
        deadline = time.monotonic() + 60  # a beat that met the outage waits before it tries again
        while Storage(url).read(LOCK_NAME) == seen:
            assert time.monotonic() < deadline, "it does not beat again"
            time.sleep(0.1)
    assert Storage(url).names() == []


class Ended(Exception):
    """What the signal raises here."""


@pytest.mark.parametrize(
    ("interrupt", "raised"), [(signal.default_int_handler, KeyboardInterrupt), (signal.SIG_IGN, Ended)]
)
def test_an_owner_that_was_replaced_ends(tmp_path: Path, interrupt: Any, raised: type[BaseException]) -> None:
    """Also one that ignores SIGINT, as a shell's background jobs do."""

    def end(*_: object) -> None:
        raise Ended

    def hold_until_replaced() -> None:
        with RunLock(tmp_path):
            of_another_host(tmp_path)
            time.sleep(5)

    before = signal.signal(signal.SIGINT, interrupt), signal.signal(signal.SIGTERM, end)
    try:
        with pytest.raises(raised):
            hold_until_replaced()
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])
    assert (tmp_path / LOCK_NAME).exists()  # the other's
