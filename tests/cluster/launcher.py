"""`ray up`, `ray dashboard`, `ray job submit` and `ray down`, called as a user calls them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hosts import Host

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Job:
    """`ray job submit`, which goes on as long as the job does."""

    process: subprocess.Popen[bytes]
    log: Path

    def finish(self, timeout: float) -> str:
        """All that the job has said, once it ended well."""
        status = self.process.wait(timeout=timeout)
        assert status == 0, self.log.read_text()
        return self.log.read_text()


@dataclass(frozen=True)
class Launcher:
    """The Ray commands for one cluster file, from the project's folder and `host`'s network, by a user with `home`."""

    file: Path
    host: Host
    home: Path
    first_on_path: Path = BIN

    @property
    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_"))}
        return kept | {
            "HOME": str(self.home),
            "TMPDIR": str(self.home),  # where `ray up` caches the cluster's config
            "RAY_TMPDIR": str(self.home),  # and keeps the state of a local cluster
            "RAY_AUTH_MODE": "token",
            "RAY_USAGE_STATS_ENABLED": "0",
            "PATH": f"{self.first_on_path}:{BIN}:{os.environ['PATH']}",
        }

    def _ray(self, *arguments: str) -> list[str]:
        return self.host.from_here(str(BIN / "ray"), *arguments)

    def ray(self, *arguments: str, timeout: float) -> subprocess.CompletedProcess[str]:
        try:
            return subprocess.run(
                self._ray(*arguments), cwd=ROOT, env=self.environment, text=True, timeout=timeout, check=False,
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            print((error.output or b"").decode())
            raise

    def up(self) -> str:
        done = self.ray("up", "--yes", str(self.file), timeout=400)
        assert done.returncode == 0, done.stdout
        return done.stdout

    def down(self) -> str:
        done = self.ray("down", "--yes", str(self.file), timeout=120)
        assert done.returncode == 0, done.stdout
        return done.stdout

    @contextlib.contextmanager
    def tunnel(self) -> Iterator[str]:
        """`ray dashboard`: the address under which the head's dashboard is reached through SSH."""
        port = _free_port()
        command = self._ray("dashboard", "--port", str(port), "--remote-port", "8265", str(self.file))
        with (self.home / "tunnel.log").open("w") as log:
            process = subprocess.Popen(
                command, cwd=ROOT, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
            try:
                self._wait_for_answer(port, self.home / "tunnel.log")
                yield f"http://127.0.0.1:{port}"
            finally:
                os.killpg(process.pid, 15)
                process.wait(timeout=20)

    def _wait_for_answer(self, port: int, log: Path) -> None:
        """Until there is one, which is that the token is missing."""
        ask = (
            f"import http.client; c = http.client.HTTPConnection('127.0.0.1', {port}, timeout=2); "
            "c.request('GET', '/api/jobs/'); c.getresponse()"
        )
        for _ in range(60):
            asked = subprocess.run(self.host.from_here(sys.executable, "-c", ask), capture_output=True, check=False)
            if asked.returncode == 0:
                return
            time.sleep(0.5)
        raise AssertionError(f"nothing answers on port {port}:\n{log.read_text()[-2000:]}")

    def submit(self, address: str, *job: str, timeout: float) -> subprocess.CompletedProcess[str]:
        return self.ray("job", "submit", "--address", address, "--working-dir", ".", "--", *job, timeout=timeout)

    @contextlib.contextmanager
    def job(self, address: str, *job: str) -> Iterator[Job]:
        """A submitted job, while it runs; shows what it has said if the test fails meanwhile."""
        command = self._ray("job", "submit", "--address", address, "--working-dir", ".", "--", *job)
        said = self.home / "job.log"
        with said.open("w") as log:
            process = subprocess.Popen(
                self.host.from_here(*command),
                cwd=ROOT,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            yield Job(process, said)
        except BaseException:
            print(said.read_text())
            raise
        finally:
            process.kill()
            process.wait()

    def forget(self, cluster_name: str) -> None:
        """Remove the SSH sockets that Ray keeps outside of every folder that can be named."""
        name = hashlib.sha256(cluster_name.encode()).hexdigest()[:10]
        for folder in Path("/tmp").glob(f"ray_ssh_*/{name}"):
            shutil.rmtree(folder)


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])
