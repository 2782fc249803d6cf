"""Real hosts and a real cluster on them, for tests that need more than one machine."""

from __future__ import annotations

import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hosts import Host, HostNetwork, missing_requirement


@pytest.fixture(scope="module")
def shared_folder() -> Iterator[Path]:
    """Seen by this machine and by every host: neither under HOME nor /tmp, of which each host has its own."""
    folder = Path(tempfile.mkdtemp(prefix="diffvit-hosts-", dir="/var/tmp"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def network(shared_folder: Path) -> Iterator[HostNetwork]:
    reason = missing_requirement()
    if reason:
        pytest.skip(f"cannot make test hosts: {reason}")
    with HostNetwork(shared_folder / "hosts") as network:
        yield network


@pytest.fixture(scope="module")
def hosts(network: HostNetwork) -> list[Host]:
    """Three hosts for a cluster and a fourth that is not in it."""
    return [network.start(number) for number in (11, 12, 13, 14)]


@pytest.fixture(scope="module")
def caller(network: HostNetwork) -> Host:
    """The host on which the user sits who calls `ray up` and submits jobs."""
    return network.start(200)


@pytest.fixture(scope="module")
def caller_home(shared_folder: Path) -> Path:
    """HOME of the user who calls `ray up`, with a token of its own."""
    token = shared_folder / "caller" / ".ray" / "auth_token"
    token.parent.mkdir(parents=True)
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    return shared_folder / "caller"
