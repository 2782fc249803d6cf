"""Local folders and object stores (emulators, on loopback): the same operations, and an outage."""

from __future__ import annotations

import threading
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import GoogleStore, ObjectStore
from pyarrow import fs

from diffvit import object_stores
from diffvit import storage as module
from diffvit.storage import Storage, StorageError

STORES = ["object_store", "google_store"]


@pytest.fixture(params=["local", *STORES])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "local":
        return Storage(str(tmp_path / "data"))
    store: ObjectStore | GoogleStore = request.getfixturevalue(request.param)
    return Storage(store.uri(f"data-{tmp_path.name}"))


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ObjectStore | GoogleStore:
    monkeypatch.setattr(object_stores, "_GCS_RETRIES", timedelta(seconds=0.1))
    found: ObjectStore | GoogleStore = request.getfixturevalue(request.param)
    return found


def test_what_is_written_is_read(storage: Storage) -> None:
    storage.write("a/b.bin", b"hello world")
    storage.write("c.bin", b"")
    assert storage.read("a/b.bin") == b"hello world"
    assert storage.read_range("a/b.bin", 6, 3) == b"wor"
    assert storage.read_range("a/b.bin", 9, 100) == b"ld"
    assert storage.sizes() == {"a/b.bin": 11, "c.bin": 0}
    assert storage.child("a").sizes() == {"b.bin": 11}
    assert (storage.size("a/b.bin"), storage.size("a"), storage.size("x")) == (11, None, None)
    assert (storage.names(), storage.names("a"), storage.names("x")) == (["a", "c.bin"], ["b.bin"], [])
    storage.delete_folder("a")
    storage.delete_folder("a")
    assert storage.sizes() == {"c.bin": 0}
    storage.delete("a/b.bin")
    with pytest.raises(FileNotFoundError):
        storage.read("a/b.bin")


def test_a_name_that_ends_in_gz_changes_no_bytes(storage: Storage, tmp_path: Path) -> None:
    storage.write("x.gz", b"as it is")
    assert storage.read("x.gz") == b"as it is"
    storage.fetch("x.gz", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"as it is"


def test_writing_again_replaces(storage: Storage) -> None:
    storage.write("x", b"one")
    storage.write("x", b"three")
    assert storage.read("x") == b"three"


@pytest.mark.slow
def test_an_absent_store_is_waited_for(store: ObjectStore | GoogleStore) -> None:
    storage = Storage(store.uri("patience"))
    storage.write("x", b"still there")
    store.stop()
    back = threading.Timer(1.5, store.start)
    back.start()
    started = time.monotonic()
    assert storage.read("x") == b"still there"
    assert time.monotonic() - started > 1.0
    back.join()


def test_a_bucket_whose_region_cannot_be_asked_for_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrow asks when it makes the file system, so an outage may begin there."""
    monkeypatch.setattr(module, "_FIRST_DELAY_SECONDS", 0.01)
    answers: list[object] = [OSError("When resolving region for bucket 'b': curlCode 7, connection refused")] * 2
    answers += [(fs.LocalFileSystem(), "/nowhere/folder")]

    def from_uri(_: str) -> object:
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer

    monkeypatch.setattr(object_stores, "fs", SimpleNamespace(FileSystem=SimpleNamespace(from_uri=from_uri)))
    monkeypatch.setattr(object_stores, "_s3", lambda *_: None)
    assert Storage("s3://region-once/folder").path("x") == "/nowhere/folder/x"
    assert not answers
    answers.append(OSError("Bucket 'b' not found"))
    with pytest.raises(StorageError, match=r"refuses: Bucket 'b' not found"):
        Storage("s3://region-none/folder").path("x")


@pytest.mark.slow
def test_a_store_that_stays_away_is_named(store: ObjectStore | GoogleStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.1)
    storage = Storage(store.uri("gone"))
    store.stop()
    try:
        with pytest.raises(StorageError, match=r"://.*bucket/gone.* is away, tried for") as caught:
            storage.read("x")
    finally:
        store.start()
    assert len(str(caught.value)) < 400  # Google's says everything twice, with its source lines


def test_a_file_whose_content_did_not_come_is_asked_for_again(
    google_store: GoogleStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pyarrow gives it as a file that is closed."""
    storage = Storage(google_store.uri(f"late-{tmp_path.name}"))
    storage.write("x", b"content")
    monkeypatch.setattr(module, "_FIRST_DELAY_SECONDS", 0.01)
    closed, root = storage.filesystem.open_input_file(storage.path("x")), storage.path()
    closed.close()
    answers = [closed, storage.filesystem.open_input_file(storage.path("x"))]
    late = SimpleNamespace(open_input_file=lambda _: answers.pop(0))
    monkeypatch.setattr(module, "file_system", lambda _: (late, root))
    assert storage.read("x") == b"content"
    assert not answers


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts open descriptors by /proc")
def test_shards_that_were_read_keep_no_download_open(google_store: GoogleStore, tmp_path: Path) -> None:
    storage = Storage(google_store.uri(f"shards-{tmp_path.name}"))
    for number in range(8):
        storage.write(str(number), bytes(4 * 2**20))
    before = len(list(Path("/proc/self/fd").iterdir()))
    assert all(storage.read_range(str(number), 100, 10) == bytes(10) for number in range(8))
    assert all(storage.read_range(str(number), 7, 3) == bytes(3) for number in range(8))
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 2


@pytest.mark.parametrize("operation", ["write", "read"])
def test_what_waiting_does_not_mend_is_not_waited_for(
    operation: str, google_store: GoogleStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bucket that is not there, and credentials that cannot be read, which Arrow reports as no OSError."""
    monkeypatch.setattr(module.time, "sleep", lambda _: pytest.fail("tried again"))
    if operation == "write":
        storage = Storage(google_store.uri("x").replace("bucket", "no-bucket"))
        with pytest.raises(StorageError, match="names a bucket that does not exist"):
            storage.write("x", b"1")
    else:
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none.json"))
        storage = Storage(google_store.uri("x").replace("anonymous@", ""))
        with pytest.raises(StorageError, match=r"refuses: .*Cannot open credentials file"):
            storage.read("x")


def test_only_what_writing_leaves_is_swept(tmp_path: Path) -> None:
    (tmp_path / ".cache.1.unfinished").mkdir()
    (tmp_path / ".link.2.unfinished").symlink_to(tmp_path)
    (tmp_path / ".x.3.unfinished").write_text("half")
    (tmp_path / ".x.3").write_text("mine")
    (tmp_path / ".notes").write_text("mine")
    Storage(str(tmp_path)).sweep()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".cache.1.unfinished",
        ".link.2.unfinished",
        ".notes",
        ".x.3",
    ]


def test_a_full_disk_leaves_nothing_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(str(tmp_path))
    storage.write("x", b"whole")
    monkeypatch.setattr(module.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(StorageError, match=r"the disk of .* is full: x was not written"):
        storage.write("x", b"half")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert storage.read("x") == b"whole"


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("http://host/data", "must be a path or a URI of s3://, gs://, gcs://; got http://"),
        ("s3://KEY:SECRET@bucket/data", "leave them to the environment"),
        ("s3://anonymous@bucket/data", "leave them to the environment"),
        ("gs://anonymous:SECRET@bucket/data", "leave them to the environment"),
        ("gs://anonymous@/data", "names no bucket"),
        ("s3://bucket/data?access_key=KEY&secret_key=SECRET", "leave them to the environment"),
        ("s3:///data", "names no bucket"),
    ],
)
def test_uris_that_are_refused(uri: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Storage(uri)
    assert "SECRET" not in str(caught.value)
