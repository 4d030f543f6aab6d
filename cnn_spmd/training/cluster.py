"""Join a cluster of processes, agree with them, and end together when one fails.

The processes talk through the key-value store of jax's coordination service, which process 0
holds. The store needs neither devices nor compiled programs. So it works before there are any, and
while the main thread waits in a collective. Without a cluster each function does nothing, or what
one process does alone.
"""

import contextlib
import itertools
import json
import os
import pathlib
import socket
import sys
import time
import traceback
import uuid
from typing import Any

from cnn_spmd.config import differences, flat
from cnn_spmd.errors import UserError, one_line
from cnn_spmd.training import cluster_env, peers

SHARED_DISK_SECONDS = 5  # how late a network disk may show a new file to other hosts

_exchanges = itertools.count()


def join(seconds: int = 120) -> None:
    """Join the cluster that the environment names, if any, before jax has any device.

    seconds: how long to wait for the others, unless JAX_INITIALIZATION_TIMEOUT says it.
    Raises UserError for bad variables. If not all processes come, it ends this process, with one
    line; otherwise each would train a copy of its own.
    """
    name = cluster_env.variable(os.environ)
    if not name:
        return
    membership = cluster_env.membership(os.environ)
    address = membership["coordinator_address"]
    if membership["process_id"] == 0 and address and cluster_env.BIND_ADDRESS not in os.environ:
        refuse_taken_port(address)
    seconds = int(os.environ.get("JAX_INITIALIZATION_TIMEOUT", seconds))
    import jax

    peers.end_aborts_in_one_line()
    try:
        jax.distributed.initialize(
            **membership,
            initialization_timeout=seconds,
            heartbeat_timeout_seconds=peers.HEARTBEAT_SECONDS,
        )
    except Exception as error:
        hint = f"expected srun or mpirun to start it, or {cluster_env.COORDINATOR}=host:port"
        raise UserError(
            f"cannot join the cluster of {name}={os.environ[name]}: {one_line(error)} ({hint})"
        ) from None
    peers.watch()


def refuse_taken_port(address: str) -> None:
    """Raise UserError where another program listens at the port of host:port on this machine.

    jax would end process 0 without a word.
    """
    port = int(address.rpartition(":")[2])
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # an earlier run may have ended
        try:
            probe.bind(("", port))
        except OSError as error:
            raise UserError(
                f"{cluster_env.COORDINATOR}={address}: port {port} cannot be used "
                f"({error.strerror}): give another"
            ) from None


def leave() -> None:
    """Leave the cluster, once all processes do."""
    if _has_joined():
        import jax

        peers.stop_watching()
        jax.distributed.shutdown()


def exchange(value: Any) -> list:
    """Return the values of all processes, in their order; all must call this.

    value: anything that JSON holds. The wait has no limit, because one process may prepare data for
    hours; a process that fails or is lost meanwhile ends this one.
    """
    cluster = peers.record()
    if cluster.client is None:
        return [value]
    key = f"cnn_spmd/{next(_exchanges)}"
    cluster.client.key_value_set(f"{key}/{cluster.process_id}", json.dumps(value))
    return [json.loads(_wait_for(f"{key}/{i}")) for i in range(cluster.num_processes)]


def agree(values: dict) -> None:
    """Raise UserError for the first field in which a process differs from process 0."""
    first, *others = map(flat, exchange(dict(processes=peers.record().num_processes) | values))
    for i, other in enumerate(others, 1):
        for field, ours, theirs in differences(first, other):
            raise UserError(
                f"{field}: process 0 has {ours}, process {i} has {theirs}: give all processes the "
                "same command, code and data"
            )


def same_folder(folder: pathlib.Path, mark: pathlib.Path) -> None:
    """Raise UserError if the processes do not share `folder`.

    mark: a file in it that process 0 overwrites with a random text, and that the others read.
    """
    cluster = peers.record()
    if cluster.client is None:
        return
    text = uuid.uuid4().hex
    if cluster.process_id == 0:
        mark.write_text(text)
    text = exchange(text)[0]
    deadline = time.monotonic() + SHARED_DISK_SECONDS
    while not (seen := mark.exists() and mark.read_text() == text) and time.monotonic() < deadline:
        time.sleep(0.2)
    seen_by = exchange(seen)
    if not all(seen_by):
        raise UserError(
            f"--workdir={folder}: process {seen_by.index(False)} sees another folder there than "
            "process 0: give one that all processes share"
        )


def size() -> str:
    """Return the numbers of processes and of devices of each. Creates the devices."""
    import jax

    counts = exchange(jax.local_device_count())
    if jax.process_count() != len(counts):
        raise RuntimeError(f"jax sees {jax.process_count()} processes, expected {len(counts)}")
    each = counts[:1] if len(set(counts)) == 1 else counts
    return f"{len(counts)} processes x {', '.join(map(str, each))} devices"


def fail(line: str, code: int) -> None:
    """Print why this process ends; in a cluster, end all of them with this exit code.

    A process that has not joined the cluster yet joins it to inform the others. Returns if there is
    no cluster.
    """
    if not _is_named():
        print(line, file=sys.stderr)
        return
    peers.claim_the_end(code)
    print(line, file=sys.stderr, flush=True)
    with contextlib.suppress(Exception):  # others may be gone, or another one failed first
        if not _has_joined():
            join(seconds=30)
        peers.publish(code, line.removeprefix("error: "))
    peers.end()


def raise_if_peer_trouble(error: Exception) -> None:
    """Raise an error that may only say that another process of the cluster is gone; see crash."""
    import jax

    if jax.process_count() > 1 and peers.is_peer_trouble(str(error)):
        raise error


def crash(error: Exception) -> None:
    """End all processes of a cluster after an exception; return if this one is alone.

    A collective also raises if another process is gone. Then a thread or the handler of peers.py
    reports that process soon, which says more than this exception.
    """
    if not _has_joined():
        return
    if peers.is_peer_trouble(str(error)):
        time.sleep(peers.VERDICT_SECONDS)
    traceback.print_exception(error)
    fail(f"error: {one_line(error)}", 1)


def _is_named() -> bool:
    """Return whether the environment names a cluster, by variables that are good."""
    try:
        return bool(cluster_env.variable(os.environ) and cluster_env.membership(os.environ))
    except UserError:  # the error that ends this process names the bad variable
        return False


def _has_joined() -> bool:
    # Without the first test a bad flag would wait a second for the import of jax.
    return bool(cluster_env.variable(os.environ)) and peers.record().client is not None


def _wait_for(key: str) -> str:
    """Return the value of a key once it is there."""
    while True:
        try:
            # It waits one second at a time, because Python handles signals only in between.
            return peers.record().client.blocking_key_value_get(key, 1000)
        except Exception as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
