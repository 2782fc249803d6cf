"""Several hosts on this machine: each has its own network, processes, HOME, /tmp, /dev/shm and sshd.

They are Linux namespaces on one bridge, 10.77.0.0/24; the machine itself is 10.77.0.1. Whatever they send to any
other address ends, and is counted, in a device that leads nowhere; names that they ask for are noted. Everything
outside of HOME and /tmp is the machine's own file system, so a folder elsewhere is shared by all hosts.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_BRIDGE = "dvtest"
_NETWORK = "10.77.0"
MACHINE = f"{_NETWORK}.1"
"""This machine, as the hosts reach it."""
_NAMES_RAY_ASKS_FOR = ("metadata.google.internal", "usage-stats.ray.io")
"""At each start: whether there are TPUs, and to say that usage statistics are off. Here this machine, which refuses."""
_PROGRAMS = ("ip", "unshare", "ssh", "ssh-keygen", "sshd", "rsync")
_LOCK = Path("/run/diffvit-test-hosts.lock")


def missing_requirement() -> str | None:
    """Why hosts cannot be made here, or None."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "namespaces need root on Linux"
    missing = [name for name in _PROGRAMS if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")]
    if missing:
        return f"needs {', '.join(missing)} (Debian: openssh-server, rsync, iproute2, util-linux)"
    # root in a container may lack the rights: make in namespaces of its own what a host is made of
    devices = "ip link add dvprobe type bridge && ip link add dvprobe0 type veth peer name dvprobe1"
    tried = subprocess.run(
        ["unshare", "--mount", "--uts", "--ipc", "--net", "--pid", "--fork", "--mount-proc", "sh", "-c",
         f"{devices} && mount -t tmpfs tmpfs /dev/shm"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return f"namespaces do not work here: {tried.stderr.strip()}" if tried.returncode else None


@dataclass(frozen=True)
class Host:
    """One running host; `process` is its first process, and when that is killed the kernel kills all others."""

    name: str
    address: str
    home: Path
    process: subprocess.Popen[bytes]
    key: Path

    def run(self, command: str, *, timeout: float = 30, check: bool = True) -> subprocess.CompletedProcess[str]:
        """`command` in a shell on the host, as root over SSH."""
        ssh = ["ssh", "-q", "-i", str(self.key), "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]
        ssh += ["-o", "ConnectTimeout=3"]
        return subprocess.run(
            [*ssh, f"root@{self.address}", command], capture_output=True, text=True, timeout=timeout, check=check
        )

    def processes(self) -> list[str]:
        """The command lines of everything that runs on the host but SSH sessions."""
        listed = self.run("ps -eo args= --no-headers").stdout.splitlines()
        ours = ("sshd", "ps -eo", "bash -c ps", "sh -c ps")
        return [line for line in listed if not line.startswith(ours)]

    def from_here(self, *command: str) -> list[str]:
        """`command` as this machine's process, with its files, but with the host's network and names."""
        bound = " && ".join(_bind(self._names / name, f"/etc/{name}") for name in ("hosts", "resolv.conf"))
        named = f'hostname {self.name} && {bound} && exec "$@"'
        return ["ip", "netns", "exec", self.name, "unshare", "--uts", "sh", "-c", named, "sh", *command]

    def packets_sent_outside(self) -> int:
        """How often anything on the host has tried to reach an address outside of the hosts' network."""
        counter = "/sys/class/net/outside/statistics/tx_packets"
        read = subprocess.run(self.from_here("cat", counter), capture_output=True, text=True, check=True)
        return int(read.stdout)

    @property
    def _names(self) -> Path:
        return self.key.parent


class NameServer(threading.Thread):
    """Knows no name, and notes each that it is asked for."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.asked: set[str] = set()
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind((MACHINE, 53))

    def run(self) -> None:
        while True:
            question, sender = self._socket.recvfrom(512)
            if not question:  # closed
                return
            labels, place = [], 12
            while length := question[place]:
                labels.append(question[place + 1 : place + 1 + length].decode())
                place += 1 + length
            self.asked.add(f"{'.'.join(labels)} by {sender[0]}")
            no_such_name = bytes([0x81, 0x83])
            self._socket.sendto(question[:2] + no_such_name + question[4:6] + bytes(6) + question[12:], sender)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # that it is not connected; it wakes the thread nevertheless
            self._socket.shutdown(socket.SHUT_RDWR)
        self.join()
        self._socket.close()


class HostNetwork:
    """`with HostNetwork(folder) as network: network.start(11)`; leaving ends whatever runs on the hosts.

    `folder` must lie outside of HOME and /tmp, which each host covers with its own.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._started: set[str] = set()
        self.hosts: dict[str, Host] = {}
        self.key = folder / "key"

    def __enter__(self) -> HostNetwork:
        self._lock = _LOCK.open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(
                f"another run of these tests has test hosts on this machine ({_LOCK}): wait for it"
            ) from None
        _remove_leftovers()
        self._folder.mkdir(parents=True)
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd's own requirement
        for name in ("key", "hostkey"):
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self._folder / name))
        names = [f"{_NETWORK}.{number} {_BRIDGE}{number}" for number in range(2, 255)]
        # torch asks for the name of its rendezvous' address in this form
        names += [f"::ffff:{_NETWORK}.{number} {_BRIDGE}{number}-ipv6" for number in range(2, 255)]
        known = [f"{MACHINE} {name}" for name in _NAMES_RAY_ASKS_FOR]
        (self._folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *names, *known, ""]))
        (self._folder / "resolv.conf").write_text(f"nameserver {MACHINE}\noptions timeout:1 attempts:1\n")
        _run("ip", "link", "add", _BRIDGE, "type", "bridge")
        _run("ip", "addr", "add", f"{MACHINE}/24", "dev", _BRIDGE)
        _run("ip", "link", "set", _BRIDGE, "up")
        self._names = NameServer()
        self._names.start()
        return self

    def __exit__(self, *error: object) -> None:
        for host in list(self.hosts.values()):
            self.power_off(host)
        for name in self._started:
            _run("ip", "link", "del", _cable(name), check=False)
            _run("ip", "netns", "del", name, check=False)
        self._names.close()
        _run("ip", "link", "del", _BRIDGE, check=False)
        self._lock.close()

    @property
    def names_asked(self) -> set[str]:
        """'NAME by ADDRESS' of every question for a name that is none of the hosts'."""
        return self._names.asked

    def start(self, number: int, furnish: Callable[[Path], None] | None = None) -> Host:
        """A new host at 10.77.0.`number`, once it takes SSH; `furnish` puts into its HOME what it likes."""
        self._started.add(f"{_BRIDGE}{number}")
        host = self.hosts[f"{_NETWORK}.{number}"] = self._boot(number, furnish)
        _wait_for_ssh(host)
        return host

    def power_off(self, host: Host) -> None:
        """Every process of the host dies at once."""
        for child in _children(host.process.pid):  # of `unshare`: the host's own first process
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, 9)
        host.process.kill()
        host.process.wait(timeout=10)
        self.hosts.pop(host.address, None)
        _run("ip", "link", "del", _cable(host.name), check=False)
        _run("ip", "netns", "del", host.name, check=False)

    def cut(self, host: Host) -> None:
        """Pull the host's network cable; its processes go on."""
        _run("ip", "link", "set", _cable(host.name), "down")

    def join(self, host: Host) -> None:
        """Plug it in again."""
        _run("ip", "link", "set", _cable(host.name), "up")
        _wait_for_ssh(host)

    def _boot(self, number: int, furnish: Callable[[Path], None] | None) -> Host:
        name, address = f"{_BRIDGE}{number}", f"{_NETWORK}.{number}"
        place = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self._folder))  # a host that comes back is a new one
        home, temporary = place / "home", place / "tmp"
        for folder in (home, temporary):
            folder.mkdir()
        (home / ".bashrc").touch()
        if furnish:
            furnish(home)
        _lay_cable(name, number)
        script = "\n".join([
            "set -e",
            f"hostname {name}",
            _bind(self._folder / "hosts", "/etc/hosts"),
            _bind(self._folder / "resolv.conf", "/etc/resolv.conf"),
            *_keep_python(home),
            _bind(home, Path.home()),
            _bind(temporary, "/tmp"),
            "mount -t tmpfs -o size=4g tmpfs /dev/shm",
            f"exec $(command -v sshd || echo /usr/sbin/sshd) -D -h {self._folder}/hostkey -o ListenAddress={address}"
            f" -o AuthorizedKeysFile={self._folder}/key.pub -o StrictModes=no -o PermitRootLogin=prohibit-password"
            " -o PasswordAuthentication=no -o UsePAM=no -o MaxStartups=100 -o MaxSessions=100 -o PidFile=none",
        ])  # fmt: skip
        inside = ["unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"]
        with (place / "log").open("wb") as log:
            process = subprocess.Popen(
                ["ip", "netns", "exec", name, *inside, "bash", "-c", script],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        return Host(name, address, home, process, self.key)


def _lay_cable(name: str, number: int) -> None:
    """A network namespace on the bridge, whose default route leads nowhere."""
    _run("ip", "netns", "add", name)
    # always the same hardware address, because neighbours remember it
    inside = ["name", "eth0", "address", f"02:00:0a:4d:00:{number:02x}", "netns", name]
    _run("ip", "link", "add", _cable(name), "type", "veth", "peer", *inside)
    _run("ip", "link", "set", _cable(name), "master", _BRIDGE, "up")
    _run("ip", "-n", name, "link", "add", "outside", "type", "veth", "peer", "name", "nowhere")
    for device in ("outside", "nowhere"):  # or the kernel's own announcements would be counted
        _run("ip", "netns", "exec", name, "sysctl", "-q", "-w", f"net.ipv6.conf.{device}.disable_ipv6=1")
    _run("ip", "-n", name, "addr", "add", f"{_NETWORK}.{number}/24", "dev", "eth0")
    for device in ("eth0", "lo", "nowhere", "outside"):
        _run("ip", "-n", name, "link", "set", device, "up")
    # Ray asks the kernel from which address it would reach the world
    _run("ip", "-n", name, "route", "add", "default", "dev", "outside", "src", f"{_NETWORK}.{number}")
    # and a local Ray a cloud's metadata service, whose address never leaves the link
    _run("ip", "-n", name, "route", "add", "unreachable", "169.254.0.0/16")


def _remove_leftovers() -> None:
    """What a run that was killed has left: its hosts' processes, networks and cables, and the bridge."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    for name in (line.split()[0] for line in listed.splitlines() if line.startswith(_BRIDGE)):
        pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False).stdout
        for pid in pids.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), 9)
        _run("ip", "link", "del", _cable(name), check=False)
        _run("ip", "netns", "del", name)
    _run("ip", "link", "del", _BRIDGE, check=False)


def _bind(source: Path, place: Path | str) -> str:
    return f"mount --rbind {shlex.quote(str(source))} {shlex.quote(str(place))}"


def _keep_python(home: Path) -> list[str]:
    """Mounts that keep this Python visible where HOME is covered, and keep the hosts from writing to it anywhere."""
    commands = []
    for folder in dict.fromkeys([Path(sys.base_prefix), Path(sys.prefix)]):
        place = folder
        if folder.is_relative_to(Path.home()):
            place = home / folder.relative_to(Path.home())
            place.mkdir(parents=True, exist_ok=True)
        commands += [_bind(folder, place), f"mount -o remount,bind,ro {shlex.quote(str(place))}"]
    return commands


def _cable(name: str) -> str:
    return f"{name}v"


def _children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def _wait_for_ssh(host: Host) -> None:
    for _ in range(100):
        if host.run("true", check=False).returncode == 0:
            return
        time.sleep(0.1)
    raise RuntimeError(f"{host.name} did not start: {(host.home.parent / 'log').read_text()}")


def _run(*command: str, check: bool = True) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed: {done.stderr.strip()}")
