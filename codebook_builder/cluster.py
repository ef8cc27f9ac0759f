"""Connecting to Ray: an embedded one on this machine, or a running cluster. `dispatch` hands the work out."""

from __future__ import annotations

import logging
import math
import os
import secrets
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from tempfile import TemporaryDirectory
from typing import Any

from codebook_builder.dispatch import Dispatch, package_folders
from codebook_builder.tasks import Runner
from codebook_schemas import ClusterConfig, UserError
from codebook_schemas.errors import one_line

CONNECT_SECONDS = 10


@contextmanager
def connected(config: ClusterConfig, address: str | None) -> Iterator[Runner]:
    """A runner on an embedded Ray (`address` None: own token, no dashboard) or on a running cluster.

    Raises:
        UserError: no cluster at `address`, or no node of it can hold one worker.
    """
    if address is None:
        _protect()
    else:
        check_reachable(address)
    import ray

    threads = str(config.threads_per_worker)
    variables = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "RAY_USAGE_STATS_ENABLED": "0"}
    environment: dict[str, Any] = {"env_vars": variables}
    with ExitStack() as stack:
        try:
            if address is None:
                stack.enter_context(_embedded(config, environment))
            else:
                code = {"py_modules": package_folders()}
                ray.init(address, runtime_env=environment | code, log_to_driver=False, logging_level=logging.ERROR)
                stack.callback(ray.shutdown)
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"cannot start Ray or reach it at {address or 'this machine'}: {reason}") from None
        check_placement(config)
        yield lambda tasks: Dispatch(config, tasks).outcomes()


def check_reachable(address: str) -> None:
    """Refuse a host:port (also ray://host:port) that takes no connection; Ray itself would try, and say so, for minutes.

    Raises:
        UserError: nothing listens there. Other addresses, such as 'auto', are for Ray to resolve.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"no Ray cluster at {address}: {reason}; is it running, and its port open to this machine?") from None


def _protect() -> None:
    """Let the embedded Ray listen on loopback only, and give it a random token that only our processes know.

    Ray (2.60) takes 127.0.0.1 for a node's address only where clusters are switched off, by the switch it has for systems other
    than Linux. It reads both once, when it is imported; a program that imported it before decides for itself.

    Raises:
        UserError: the environment asks for another protection than a token, which is none.
    """
    if "ray" in sys.modules:
        return
    mode = os.environ.get("RAY_AUTH_MODE", "token")
    if mode != "token":
        raise UserError(
            f"RAY_AUTH_MODE is {one_line(mode, 40)!r}: the embedded Ray would take commands from everyone on this machine; "
            "unset it, or set it to token"
        )
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


@contextmanager
def _embedded(config: ClusterConfig, environment: dict[str, Any]) -> Iterator[None]:
    """A private Ray on this machine, with logical CPUs for all workers and its files in a temporary folder."""
    import ray

    cpus = max(os.cpu_count() or 1, math.ceil(config.workers * config.cpus_per_worker))
    with TemporaryDirectory(prefix="codebook-ray-", ignore_cleanup_errors=True) as folder:
        ray.init(
            address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False, runtime_env=environment,
            _node_ip_address="127.0.0.1", _temp_dir=folder, object_store_memory=128 << 20,
        )  # fmt: skip
        try:
            yield
        finally:
            ray.shutdown()


def check_placement(config: ClusterConfig) -> None:
    """Refuse what would wait for ever: at least one live node must be able to hold one worker.

    With `wait_for_nodes` the autoscaler is asked for room for all workers first, and has that many seconds to add a node.

    Raises:
        UserError: says what is asked for and what the nodes have.
    """
    import ray

    wanted = {"CPU": config.cpus_per_worker, "GPU": config.gpus_per_worker}
    if config.wait_for_nodes:
        from ray.autoscaler.sdk import request_resources

        request_resources(bundles=[wanted] * config.workers)
    deadline = time.monotonic() + config.wait_for_nodes
    while True:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if any(all(node.get(kind, 0) >= amount for kind, amount in wanted.items()) for node in nodes):
            return
        if time.monotonic() >= deadline:
            break
        time.sleep(1)
    has = "; ".join(f"{node.get('CPU', 0):g} CPUs, {node.get('GPU', 0):g} GPUs" for node in nodes) or "none"
    raise UserError(
        f"a worker needs {config.cpus_per_worker:g} CPUs and {config.gpus_per_worker:g} GPUs on one node, the cluster's "
        f"nodes have: {has}; change cluster.cpus_per_worker or cluster.gpus_per_worker, or add nodes "
        "(an autoscaling cluster: set cluster.wait_for_nodes to the seconds it may take)"
    )
