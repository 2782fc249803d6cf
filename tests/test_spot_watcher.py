"""The spot watcher against a metadata service on loopback and a `ray` that notes how it is called."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from diffvit.cluster import spot_watcher
from diffvit.cluster.spot_watcher import Node, Notice, ask_aws, ask_file, ask_gcp, find_node, watch

NODE_ID = "5a" * 28
TOKEN = "the-session-token"


class Metadata:
    """Answers of a metadata service by path; None for 404. Like IMDSv2 it wants a token, like GCP's its header."""

    def __init__(self) -> None:
        self.answers: dict[str, str | None] = {}
        self.status = 200
        self.asked: list[str] = []
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_PUT(self) -> None:
                ok = self.path == "/latest/api/token" and self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
                self.reply(200 if ok else 400, TOKEN)

            def do_GET(self) -> None:
                service.asked.append(self.path)
                allowed = (
                    self.headers["X-aws-ec2-metadata-token"] == TOKEN or self.headers["Metadata-Flavor"] == "Google"
                )
                answer = service.answers.get(self.path)
                self.reply(401 if not allowed else 404 if answer is None else service.status, answer or "")

            def reply(self, code: int, text: str) -> None:
                self.send_response(code)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def metadata() -> Iterator[Metadata]:
    service = Metadata()
    thread = threading.Thread(target=service.server.serve_forever, args=(0.01,))
    thread.start()
    yield service
    service.server.shutdown()
    thread.join()
    service.server.server_close()


@pytest.fixture
def ray(tmp_path: Path) -> Path:
    """A `ray` that writes down its arguments and fails as often as `failures` says."""
    (tmp_path / "failures").write_text("0")
    script = tmp_path / "ray"
    script.write_text(
        f'#!/bin/sh\ncd {tmp_path}\necho "$@" >> calls\nn=$(cat failures)\n'
        'if [ "$n" -gt 0 ]; then echo $((n - 1)) > failures; echo "GCS is away" >&2; exit 1; fi\n'
    )
    script.chmod(0o755)
    return script


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The watcher's waits are noted and not waited; those of other threads, and of subprocess, stay."""
    waited: list[float] = []
    monkeypatch.setattr(spot_watcher, "time", SimpleNamespace(sleep=waited.append, monotonic=time.monotonic))
    return waited


@pytest.fixture
def node(ray: Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    monkeypatch.setattr(Node, "is_up", lambda self: True)
    return Node(ray, "10.77.0.11:6379", NODE_ID)


AWS_PATH = "/latest/meta-data/spot/instance-action"


def test_aws_notice_through_imdsv2(metadata: Metadata) -> None:
    assert ask_aws(metadata.address) is None  # 404: no notice
    metadata.answers[AWS_PATH] = '{"action": "terminate", "time": "2026-11-23T04:02:30Z"}'
    noon = 1795406430.0  # 2026-11-23T04:00:30Z
    assert ask_aws(metadata.address, now=lambda: noon) == Notice(120, "EC2 spot terminate")
    assert ask_aws(metadata.address, now=lambda: noon + 500) == Notice(0, "EC2 spot terminate")
    assert set(metadata.asked) == {AWS_PATH}
    metadata.status = 503  # not the same as no notice
    with pytest.raises(OSError, match="503"):
        ask_aws(metadata.address)


def test_gcp_preemption_and_maintenance(metadata: Metadata) -> None:
    preempted = "/computeMetadata/v1/instance/preempted"
    maintenance = "/computeMetadata/v1/instance/maintenance-event"
    metadata.answers = {preempted: "FALSE", maintenance: "NONE"}
    assert ask_gcp(metadata.address) is None
    metadata.answers[maintenance] = "MIGRATE_ON_HOST_MAINTENANCE"  # the VM goes on elsewhere
    assert ask_gcp(metadata.address) is None
    metadata.answers[maintenance] = "TERMINATE_ON_HOST_MAINTENANCE"
    assert ask_gcp(metadata.address) == Notice(30, "Compute Engine maintenance")
    metadata.answers[preempted] = "TRUE"
    assert ask_gcp(metadata.address) == Notice(30, "Compute Engine preemption")


def test_file_notice(tmp_path: Path) -> None:
    file = tmp_path / "notice"
    assert ask_file(file) is None
    file.write_text("")  # somebody is about to write it
    assert ask_file(file) is None
    file.write_text("17\n")
    assert ask_file(file) == Notice(17, f"notice in {file}")


def test_a_proxy_is_not_asked(metadata: Metadata, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert ask_aws(metadata.address) is None


def test_a_notice_drains_the_node(node: Node, capsys: pytest.CaptureFixture[str], no_waiting: list[float]) -> None:
    answers = iter([None, None, Notice(113, "EC2 spot terminate")])
    assert watch(lambda: next(answers), node, poll_seconds=5.0) == 0
    assert no_waiting == [5.0, 5.0]
    assert node.ray.with_name("calls").read_text() == (
        f"drain-node --address 10.77.0.11:6379 --node-id {NODE_ID} --reason DRAIN_NODE_REASON_PREEMPTION "
        "--reason-message EC2 spot terminate --deadline-remaining-seconds 113\n"
    )
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1
    assert said[0].endswith(f"EC2 spot terminate: node {NODE_ID} is drained, 113 s left")


def test_draining_is_tried_again_but_not_for_ever(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    node.ray.with_name("failures").write_text("2")
    assert watch(lambda: Notice(30, "n"), node, 1.0) == 0
    assert len(node.ray.with_name("calls").read_text().splitlines()) == 3
    node.ray.with_name("failures").write_text("99")
    assert watch(lambda: Notice(30, "n"), node, 1.0) == 1
    assert len(node.ray.with_name("calls").read_text().splitlines()) == 3 + 5
    assert "Ray did not take the notice in 5 attempts: GCS is away" in capsys.readouterr().out


def test_a_drain_that_dies_without_a_word_is_tried_again(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    node.ray.write_text("#!/bin/sh\nexit 9\n")
    assert watch(lambda: Notice(30, "n"), node, 1.0) == 1
    assert "Ray did not take the notice in 5 attempts: exit status 9" in capsys.readouterr().out


def test_a_silent_metadata_service_is_said_once(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    def ask(calls: list[int] = []) -> Notice | None:  # noqa: B006
        calls.append(1)
        if len(calls) < 9:
            raise TimeoutError("timed out")
        return Notice(30, "n")

    assert watch(ask, node, 1.0) == 0
    said = capsys.readouterr().out
    assert said.count("does not answer: timed out") == 1


@pytest.mark.parametrize("answer", ["[]", "7", '{"action": "stop"}', '{"action": "stop", "time": 7}', "", "<html>"])
def test_an_answer_of_another_kind_does_not_end_it(node: Node, metadata: Metadata, answer: str) -> None:
    metadata.answers[AWS_PATH] = answer
    asked = iter([lambda: ask_aws(metadata.address)] * 2 + [lambda: Notice(30, "n")])
    assert watch(lambda: next(asked)(), node, 1.0) == 0
    assert node.ray.with_name("calls").exists()


def test_nor_does_one_that_is_cut_off(node: Node) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            for said in (b"nonsense\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\nshort", b""):
                caller, _ = server.accept()
                with caller:
                    caller.recv(4096)
                    caller.sendall(said)

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        base = f"http://127.0.0.1:{server.getsockname()[1]}"
        asked = iter([lambda: ask_aws(base)] * 3 + [lambda: Notice(30, "n")])
        assert watch(lambda: next(asked)(), node, 1.0) == 0
        thread.join()


def test_it_ends_with_the_raylet(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    states = iter([True, True, False])
    monkeypatch.setattr(Node, "is_up", lambda self: next(states))
    assert watch(lambda: None, node, 1.0) == 0
    assert not node.ray.with_name("calls").exists()


def make_process(proc: Path, pid: int, *arguments: str) -> None:
    (proc / str(pid)).mkdir()
    (proc / str(pid) / "cmdline").write_bytes("\0".join(arguments).encode() + b"\0")


def test_the_node_is_known_from_its_raylet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_process(tmp_path, 7, "/usr/bin/less", "--gcs-address=1.2.3.4:1", "--node_id=aa")  # not a raylet
    make_process(tmp_path, 8, "/x/ray/core/src/ray/gcs/gcs_server", "--gcs-address=1.2.3.4:1", "--node_id=bb")
    times = iter([0.0, 1.0, 121.0])
    monkeypatch.setattr(spot_watcher, "time", SimpleNamespace(monotonic=lambda: next(times), sleep=time.sleep))
    with pytest.raises(RuntimeError, match="no raylet runs on this node 120 s after"):
        find_node(Path("ray"), tmp_path)
    command = "--python_worker_command=python --node-ip-address=10.0.0.9 --gcs-address=5.5.5.5:5"
    make_process(
        tmp_path, 9, "/x/ray/core/src/ray/raylet/raylet", command, f"--node_id={NODE_ID}", "--gcs-address=10.0.0.1:6379"
    )
    times = iter([0.0, 1.0])
    assert find_node(Path("ray"), tmp_path) == Node(Path("ray"), "10.0.0.1:6379", NODE_ID)


def test_the_script_alone_says_what_it_needs() -> None:
    script = Path(spot_watcher.__file__)
    done = subprocess.run(
        [sys.executable, "-I", script, "--cloud", "file"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "--cloud file needs --from FILE" in done.stderr
    imported = set(re.findall(r"^(?:from|import) (\w+)", script.read_text(), re.MULTILINE))
    assert imported <= sys.stdlib_module_names
