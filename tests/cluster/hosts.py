"""Several hosts on this machine: each has its own network, processes, HOME, /tmp, /dev/shm and sshd.

They are Linux namespaces on one bridge, 10.77.0.0/24; the machine itself is 10.77.0.1. Whatever they send to any other
address ends, and is counted, in a device that leads nowhere. Everything outside of HOME and /tmp is the machine's own
file system, so a folder elsewhere is shared by all hosts.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

_BRIDGE = "dvtest"
_NETWORK = "10.77.0"
_PROGRAMS = ("ip", "unshare", "ssh", "ssh-keygen", "sshd", "rsync")


def missing_requirement() -> str | None:
    """Why hosts cannot be made here, or None."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "namespaces need root on Linux"
    missing = [name for name in _PROGRAMS if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")]
    return f"needs {', '.join(missing)} (Debian: openssh-server, rsync, iproute2, util-linux)" if missing else None


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
        return subprocess.run(
            [*ssh, f"root@{self.address}", command], capture_output=True, text=True, timeout=timeout, check=check
        )

    def processes(self) -> list[str]:
        """The command lines of everything that runs on the host but SSH sessions."""
        listed = self.run("ps -eo args= --no-headers").stdout.splitlines()
        ours = ("sshd", "ps -eo", "bash -c ps", "sh -c ps")
        return [line for line in listed if not line.startswith(ours)]

    def packets_sent_outside(self) -> int:
        """How often anything on the host has tried to reach an address outside of the hosts' network."""
        counter = "/sys/class/net/outside/statistics/tx_packets"
        return int(subprocess.run(
            ["ip", "netns", "exec", self.name, "cat", counter], capture_output=True, text=True, check=True
        ).stdout)  # fmt: skip


class Hosts:
    """`with Hosts(3, folder) as hosts:` gives three hosts 10.77.0.11 to .13; leaving ends whatever runs on them."""

    def __init__(self, count: int, folder: Path) -> None:
        self._count, self._folder = count, folder
        self._running: list[Host] = []
        self.key = folder / "key"

    def __enter__(self) -> list[Host]:
        self._folder.mkdir(parents=True)
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd's own requirement
        for name in ("key", "hostkey"):
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self._folder / name))
        names = [f"{_NETWORK}.{10 + number} {_BRIDGE}{number}" for number in range(1, self._count + 1)]
        (self._folder / "names").write_text("\n".join(["127.0.0.1 localhost", *names, ""]))
        (self._folder / "resolver").write_text(f"nameserver {_NETWORK}.1\noptions timeout:1 attempts:1\n")
        try:
            _run("ip", "link", "add", _BRIDGE, "type", "bridge")
            _run("ip", "addr", "add", f"{_NETWORK}.1/24", "dev", _BRIDGE)
            _run("ip", "link", "set", _BRIDGE, "up")
            for number in range(1, self._count + 1):
                self._running.append(self._start(number))
            for host in self._running:
                _wait_for_ssh(host)
        except BaseException:
            self.__exit__()
            raise
        return self._running

    def __exit__(self, *error: object) -> None:
        for host in self._running:
            self.power_off(host)
        for number in range(1, self._count + 1):
            _run("ip", "link", "del", f"{_BRIDGE}v{number}", check=False)
            _run("ip", "netns", "del", f"{_BRIDGE}{number}", check=False)
        _run("ip", "link", "del", _BRIDGE, check=False)

    def power_off(self, host: Host) -> None:
        """Every process of the host dies at once."""
        for child in _children(host.process.pid):  # of `unshare`: the host's own first process
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, 9)
        host.process.kill()
        host.process.wait(timeout=10)

    def _start(self, number: int) -> Host:
        name, address = f"{_BRIDGE}{number}", f"{_NETWORK}.{10 + number}"
        home, temporary = self._folder / name / "home", self._folder / name / "tmp"
        for folder in (home, temporary):
            folder.mkdir(parents=True)
        (home / ".bashrc").touch()
        _run("ip", "netns", "add", name)
        cable = f"{_BRIDGE}v{number}"
        _run("ip", "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", name)
        _run("ip", "link", "set", cable, "master", _BRIDGE, "up")
        _run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
        _run("ip", "-n", name, "link", "add", "outside", "type", "veth", "peer", "name", "nowhere")
        for device in ("outside", "nowhere"):  # or the kernel's own announcements would be counted
            _run("ip", "netns", "exec", name, "sysctl", "-q", "-w", f"net.ipv6.conf.{device}.disable_ipv6=1")
        for device in ("eth0", "lo", "nowhere", "outside"):
            _run("ip", "-n", name, "link", "set", device, "up")
        # a default route, because Ray asks the kernel which address it would reach the world from
        _run("ip", "-n", name, "route", "add", "default", "dev", "outside", "src", address)
        script = "\n".join([
            "set -e",
            f"hostname {name}",
            f"mount --bind {shlex.quote(str(self._folder / 'names'))} /etc/hosts",
            f"mount --bind {shlex.quote(str(self._folder / 'resolver'))} /etc/resolv.conf",
            *_keep_python(home),
            f"mount --rbind {shlex.quote(str(home))} {shlex.quote(str(Path.home()))}",
            "mount -t tmpfs -o size=4g tmpfs /dev/shm",
            # last, because the folder may lie under /tmp itself
            f"exec 3< {shlex.quote(str(self._folder / 'hostkey'))} 4< {shlex.quote(str(self._folder / 'key.pub'))}",
            f"mkdir -p {shlex.quote(str(temporary))}/.host",
            f"cat <&3 > {shlex.quote(str(temporary))}/.host/hostkey",
            f"cat <&4 > {shlex.quote(str(temporary))}/.host/authorized_keys",
            f"chmod 600 {shlex.quote(str(temporary))}/.host/*",
            f"mount --rbind {shlex.quote(str(temporary))} /tmp",
            f"exec $(command -v sshd || echo /usr/sbin/sshd) -D -h /tmp/.host/hostkey -o ListenAddress={address}"
            " -o AuthorizedKeysFile=/tmp/.host/authorized_keys -o StrictModes=no -o PermitRootLogin=prohibit-password"
            " -o PasswordAuthentication=no -o UsePAM=no -o MaxStartups=100 -o MaxSessions=100 -o PidFile=none",
        ])  # fmt: skip
        inside = ["unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"]
        with (self._folder / name / "log").open("wb") as log:
            process = subprocess.Popen(
                ["ip", "netns", "exec", name, *inside, "bash", "-c", script],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        return Host(name, address, home, process, self.key)


def _keep_python(home: Path) -> list[str]:
    """Mounts that keep this Python visible where HOME is covered, and keep the hosts from writing to it anywhere."""
    commands = []
    for folder in dict.fromkeys([Path(sys.base_prefix), Path(sys.prefix)]):
        place = folder
        if folder.is_relative_to(Path.home()):
            place = home / folder.relative_to(Path.home())
            place.mkdir(parents=True, exist_ok=True)
        source, target = shlex.quote(str(folder)), shlex.quote(str(place))
        commands += [f"mount --bind {source} {target}", f"mount -o remount,bind,ro {target}"]
    return commands


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
