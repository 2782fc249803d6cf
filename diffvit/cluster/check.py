"""`python -m diffvit.cluster.check FILE`: what is wrong with a cluster file, before it costs anything.

One line per problem on stderr and exit status 2, or one line on stdout and 0. Looks for fields left at their
placeholder, for what Ray's schema refuses and for what it lets pass but the cloud's API would not take, for open doors
(`security_rules`), for versions that differ, for policy files that do not fit it, and on this machine for the token,
the SSH key and the cloud's credentials. What need not be wrong, such as a name that is taken, is a note.
"""

from __future__ import annotations

import contextlib
import copy
import io
import re
import socket
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from diffvit.cluster.account import PLACEHOLDER, credential_problems, policy_problems, running_nodes
from diffvit.cluster.kuberay_fields import kuberay_problems
from diffvit.cluster.provider_fields import node_problems, provider_problems
from diffvit.cluster.security_rules import (
    TOKEN_PATH,
    kuberay_security_problems,
    launcher_problems,
    ray_version_problems,
)

_LOCK = Path("requirements.lock")
_PROVIDERS = ("aws", "gcp", "azure", "local")


def file_problems(text: str, lock: str) -> list[str]:
    """What is wrong in the text of a cluster file, given that of `requirements.lock`."""
    version = _locked_ray(lock)
    problems = [*ray_version_problems(version, "requirements.lock"), *_placeholder_problems(text)]
    try:
        documents = [document for document in yaml.safe_load_all(text) if document is not None]
    except yaml.YAMLError as error:
        return [*problems, f"not YAML: {' '.join(str(error).split())}"]
    if not documents or not all(isinstance(document, dict) for document in documents):
        return [*problems, "must hold a mapping of fields"]
    if "apiVersion" in documents[0]:
        lists = [document.get("items", [document]) for document in documents]
        if not all(isinstance(items, list) for items in lists):
            return [*problems, "items: must be a list of RayClusters and RayJobs"]
        items = [item for items in lists for item in items]
        return problems + [line for item in items for line in _kuberay_problems(item, version)]
    return [*problems, *_pinned_ray_problems(text, version), *_launcher_problems(documents[0])]


def caller_problems(config: dict[str, Any]) -> Iterator[str]:
    """What is missing on this machine for `ray up`; asks the network whether a head of your own answers."""
    token = Path(TOKEN_PATH).expanduser()
    if not token.exists():
        yield f"there is no token in {token}: (umask 077 && ray get-auth-token --generate > /dev/null)"
    elif token.stat().st_mode & 0o077:
        yield f"{token} can be read by others: chmod 600 {token}"
    installed, locked = metadata.version("ray"), _locked_ray(_LOCK.read_text())
    if installed != locked:
        yield f"this environment has Ray {installed}, the nodes will have {locked}: pip install -c {_LOCK} -e ."
    key = config.get("auth", {}).get("ssh_private_key")
    if key and key != PLACEHOLDER and not Path(key).expanduser().exists():
        yield f"auth.ssh_private_key: there is no {key}"
    head = config["provider"].get("external_head_ip", config["provider"].get("head_ip", PLACEHOLDER))
    if head != PLACEHOLDER:
        why = _unreachable(head)
        if why:
            yield f"provider.head_ip: {head} does not answer on port 22 (SSH): {why}"
    yield from credential_problems(config)


def caller_notes(config: dict[str, Any]) -> Iterator[str]:
    """What may be meant: workers that answer the head alone, a name that is taken.

    Raises:
        ValueError: the cloud does not answer.
    """
    for worker in config["provider"].get("worker_ips", []):
        why = _unreachable(worker)
        if why:
            yield f"worker {worker} does not answer this machine on port 22 (SSH): {why}; it must answer the head"
    if config["provider"]["type"] == "aws" and (running := running_nodes(config)):
        name = config["cluster_name"]
        yield f"cluster_name: {name} is up, with {running} instances: `ray up` changes it and makes no other one"


def _unreachable(host: str) -> str | None:
    try:
        socket.create_connection((host, 22), timeout=5).close()
    except OSError as error:
        return str(error)
    return None


def _placeholder_problems(text: str) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), start=1):
        code, _, comment = line.partition("#")
        if PLACEHOLDER in code:
            hint = f": {comment.strip()}" if comment else ""
            yield f"line {number}: {code.split(':')[0].strip()} is still {PLACEHOLDER}{hint}"


def _launcher_problems(config: dict[str, Any]) -> list[str]:
    provider = config.get("provider")
    kind = provider.get("type") if isinstance(provider, dict) else provider
    if not isinstance(provider, dict) or kind not in _PROVIDERS:
        return [f"provider.type: must be one of {', '.join(_PROVIDERS)}, got {kind!r}"]
    try:
        prepared = _prepare(config)
    except ValueError as error:
        return [str(error)]
    problems = provider_problems(provider)
    for name, node_type in prepared["available_node_types"].items():
        path = f"available_node_types.{name}.node_config"
        try:
            problems += node_problems(kind, node_type["node_config"], path)
        except ModuleNotFoundError as error:
            return [*problems, f"{error.name} is not installed: pip install -c {_LOCK} -e '.[{kind}]'"]
    return problems or launcher_problems(prepared)  # which relies on what the fields are


def _prepare(config: dict[str, Any]) -> dict[str, Any]:
    """The config with Ray's defaults merged in, as `ray up` would go on with it.

    Raises:
        ValueError: Ray refuses it; says which field and why.
    """
    import jsonschema
    from ray.autoscaler._private.util import prepare_config, validate_config

    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            prepared: dict[str, Any] = prepare_config(copy.deepcopy(config))
            validate_config(prepared)
    except jsonschema.ValidationError as error:
        place = ".".join(str(part) for part in error.absolute_path) or "file"
        raise ValueError(f"{place}: {error.message}") from None
    except Exception as error:  # Ray aborts with click's, and trips over missing fields with any other
        raise ValueError(f"Ray refuses it: {_reason(error, said.getvalue())}") from None
    return prepared


def _reason(error: Exception, said: str) -> str:
    """In one line; where Ray's exception is silent, it has logged the reason last."""
    logged = re.sub(r"\x1b\[[\d;]*m", "", said).strip().splitlines()
    told = str(error) or (logged[-1].rpartition(" -- ")[2] if logged else "")
    return f"{type(error).__name__}: {' '.join(told.split())}"


def _kuberay_problems(document: dict[str, Any], version: str) -> list[str]:
    problems = kuberay_problems(document)
    if problems:
        return problems
    problems = kuberay_security_problems(document)
    spec = document["spec"].get("rayClusterSpec", document["spec"])
    if "rayVersion" in spec and spec["rayVersion"] != version:
        problems.append(
            f"{document['kind']}: rayVersion must be {version}, as in requirements.lock, got {spec['rayVersion']}"
        )
    return problems


def _pinned_ray_problems(text: str, version: str) -> list[str]:
    pinned = set(re.findall(r"\bray(?:\[[\w,]+\])?==([\d.]+)", text))
    return [
        f"installs Ray {other}, requirements.lock has {version}: nodes and this machine must not differ"
        for other in sorted(pinned - {version})
    ]


def _locked_ray(lock: str) -> str:
    found = re.search(r"^ray==(\S+)$", lock, re.MULTILINE)
    assert found, "requirements.lock names Ray"
    return found[1]


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print(__doc__)
        return 0 if arguments in (["-h"], ["--help"]) else 2
    file = Path(arguments[0])
    if not _LOCK.exists():
        problems = [f"run this in the project's folder: there is no {_LOCK} in {Path.cwd()}"]
    elif not file.is_file():
        problems = ["there is no such file"]
    else:
        problems = file_problems(file.read_text(), _LOCK.read_text())
        config = next(yaml.safe_load_all(file.read_text()), None) if not problems else None
        if isinstance(config, dict) and "provider" in config:
            problems += policy_problems(config, file.parent) if config["provider"]["type"] == "aws" else []
            problems += caller_problems(config)
            problems += _say_notes(config) if not problems else []
    for problem in problems:
        print(f"error: {file}: {problem}", file=sys.stderr)
    if problems:
        return 2
    print(f"{file}: nothing found that would stop it")
    return 0


def _say_notes(config: dict[str, Any]) -> list[str]:
    """Why they could not be found, if so."""
    try:
        for note in caller_notes(config):
            print(f"note: {note}")
    except ValueError as error:
        return [str(error)]
    return []


if __name__ == "__main__":
    sys.exit(main())
