"""A cluster of processes: join it, agree on what runs, and leave together when one fails.

The processes talk through the key-value store of jax's coordination service, which process 0
holds. That needs neither devices nor compiled programs, so it works before there are any, and
while the main thread hangs in a collective.
"""

import contextlib
import ctypes
import glob
import itertools
import json
import os
import pathlib
import re
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Mapping
from typing import Any, BinaryIO

from cnn_spmd.config import flat
from cnn_spmd.errors import UserError

HEARTBEAT_SECONDS = 20  # without a sign of life a process is lost; XLA gives a stuck GPU 40 s
VERDICT_SECONDS = HEARTBEAT_SECONDS + 20  # after which it is known whether a process is lost
COORDINATOR = "JAX_COORDINATOR_ADDRESS"
JAX, MPI, SLURM = (  # the variables for the number of processes, and for each one's own number
    ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("SLURM_NTASKS", "SLURM_PROCID"),
)
FAILED = "cnn_spmd/failed"
PEER_TROUBLE = re.compile("gloo|nccl|coordination|barrier|UNAVAILABLE|DEADLINE_EXCEEDED", re.I)

_exchanges = itertools.count()
_ending = threading.Lock()  # for the one thread that ends this process
_leaving = threading.Event()
_exit_code = 1


# ---- The variables of the environment


def number(env: Mapping[str, str], name: str, low: int, high: int = 2**31 - 1) -> int:
    """Read a whole number from a variable. Raises UserError that names the variable."""
    value = env.get(name)
    if value is None or not re.fullmatch("[0-9]{1,10}", value) or not low <= int(value) <= high:
        shown = f"{name} is not set" if value is None else f"{name}={value}"
        hint = "; srun sets it" if name.startswith("SLURM") else ""
        raise UserError(f"{shown}: expected a whole number from {low} to {high}{hint}")
    return int(value)


def named(env: Mapping[str, str]) -> str:
    """Name the variable that makes this process one of several; "" where it is alone."""
    for name in (*JAX, COORDINATOR):
        if name in env:
            return name
    counts = (MPI[0], SLURM[0])
    return next((name for name in counts if env.get(name) and number(env, name, 1) > 1), "")


def member(env: Mapping[str, str]) -> dict:
    """Return what jax.distributed.initialize needs; an address of None is for jax to find.

    Raises UserError that names the bad variable.
    """
    name = named(env)
    if name == COORDINATOR:  # the launcher may give the numbers
        name = next((names[0] for names in (MPI, SLURM) if names[0] in env), JAX[0])
    count_name, id_name = next(names for names in (MPI, SLURM, JAX) if name in names)
    for address in (COORDINATOR, "JAX_COORDINATOR_BIND_ADDRESS"):
        host, _, port = env.get(address, "").rpartition(":")
        good = host and re.fullmatch("[0-9]{1,5}", port) and 0 < int(port) < 2**16
        needed = address == COORDINATOR and count_name == JAX[0]
        if (needed or address in env) and not good:
            expected = "expected host:port of process 0, with a port from 1 to 65535"
            raise UserError(f"{address}={env.get(address, '')}: {expected}")
    for other in ("JAX_COORDINATOR_PORT", "JAX_INITIALIZATION_TIMEOUT", "SLURM_JOB_ID"):
        if other in env:
            number(env, other, 1, 2**16 - 1 if other.endswith("PORT") else 2**31 - 1)
    count = number(env, count_name, 1)
    return dict(
        coordinator_address=env.get(COORDINATOR),
        num_processes=count,
        process_id=number(env, id_name, 0, count - 1),
        local_device_ids=local_devices(env),
    )


def local_devices(env: Mapping[str, str]) -> list[int]:
    """Choose the GPUs for this process among those that it sees; [] means all.

    The tasks of a node share its GPUs evenly, or as SLURM_GPUS_PER_TASK says. (By itself jax
    would give one GPU to each task, also where a task is alone on its node.)
    """
    ids, share = "JAX_LOCAL_DEVICE_IDS", 0
    if ids in env:
        return [number({ids: each}, ids, 0) for each in env[ids].split(",")]
    if "OMPI_COMM_WORLD_LOCAL_SIZE" in env:
        tasks = number(env, "OMPI_COMM_WORLD_LOCAL_SIZE", 1)
        task = number(env, "OMPI_COMM_WORLD_LOCAL_RANK", 0, tasks - 1)
    elif "SLURM_STEP_TASKS_PER_NODE" in env:  # such as 4(x2),3
        name = "SLURM_STEP_TASKS_PER_NODE"
        parts = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", each) for each in env[name].split(",")]
        if not all(parts):
            raise UserError(f"{name}={env[name]}: expected tasks of each node, such as 4(x2),3")
        nodes = [int(part[1]) for part in parts for _ in range(int(part[2] or 1))]
        tasks = nodes[number(env, "SLURM_NODEID", 0, len(nodes) - 1)]
        task = number(env, "SLURM_LOCALID", 0, tasks - 1)
        if name := env.get("SLURM_GPUS_PER_TASK"):  # 2, or h100:2
            share = number({"SLURM_GPUS_PER_TASK": name.split(":")[-1]}, "SLURM_GPUS_PER_TASK", 1)
    else:
        return []
    visible = env.get("CUDA_VISIBLE_DEVICES")
    gpus = len(visible.split(",") if visible else glob.glob("/dev/nvidia[0-9]*"))
    share = share or gpus // tasks
    alone = tasks == 1 or gpus <= share  # the launcher may show each task its own GPUs only
    return [] if alone else list(range(task * share, (task + 1) * share))


# ---- Join, agree, leave


def join(seconds: int = 120) -> None:
    """Join the cluster that the environment names, if any, before jax has any device.

    seconds: how long to wait for the others, unless JAX_INITIALIZATION_TIMEOUT says it.
    Raises UserError for bad variables. Ends the process, with one line, where not all come:
    otherwise it would train a copy of its own.
    """
    name = named(os.environ)
    if not name:
        return
    arguments = member(os.environ)
    seconds = int(os.environ.get("JAX_INITIALIZATION_TIMEOUT", seconds))
    import jax

    _end_aborts_in_a_line(_hide_chatter(), time.monotonic())
    try:
        jax.distributed.initialize(
            **arguments, initialization_timeout=seconds, heartbeat_timeout_seconds=HEARTBEAT_SECONDS
        )
    except Exception as error:
        hint = f"expected srun or mpirun to start it, or {COORDINATOR}=host:port"
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"cannot join the cluster of {name}={os.environ[name]}: {reason} ({hint})"
        ) from None
    threading.Thread(target=_watch, daemon=True).start()


def exchange(value: Any) -> list:
    """Return what each process gives, in their order; all must come here.

    value: anything that JSON holds. The wait has no limit, as preparing data may take hours;
    a process that fails or is lost meanwhile ends this one.
    """
    state = _state()
    if state.client is None:
        return [value]
    key = f"cnn_spmd/{next(_exchanges)}"
    state.client.key_value_set(f"{key}/{state.process_id}", json.dumps(value))
    return [json.loads(_wait_for(f"{key}/{i}")) for i in range(state.num_processes)]


def _wait_for(key: str) -> str:
    while True:
        try:  # short waits, so that a signal is heeded between two
            return _state().client.blocking_key_value_get(key, 1000)
        except Exception as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


def agree(values: dict) -> None:
    """Raise UserError for the first field in which a process differs from process 0."""
    if _state().client is None:
        return
    count = dict(processes=_state().num_processes)
    first, *others = map(flat, exchange(count | values))
    for i, other in enumerate(others, 1):
        for field in first | other:
            ours, theirs = first.get(field, "absent"), other.get(field, "absent")
            if ours != theirs:
                raise UserError(
                    f"{field}: process 0 has {ours}, process {i} has {theirs}: give all processes "
                    "the same command, code and data"
                )


def same_folder(folder: pathlib.Path, mark: pathlib.Path) -> None:
    """Raise UserError where the processes do not share `folder`.

    mark: a file in it that process 0 may write, and that the others look for.
    """
    state = _state()
    if state.client is None:
        return
    token = uuid.uuid4().hex
    if state.process_id == 0:
        mark.write_text(token)
    token = exchange(token)[0]
    deadline = time.monotonic() + 5  # a network disk may be late
    while not (seen := mark.exists() and mark.read_text() == token) and time.monotonic() < deadline:
        time.sleep(0.2)
    if not all(seen_by := exchange(seen)):
        raise UserError(
            f"--workdir={folder}: process {seen_by.index(False)} sees another folder there than "
            "process 0: give one that all processes share"
        )


def size() -> str:
    """Say how many processes there are and how many devices each has. Creates the devices."""
    import jax

    counts = exchange(jax.local_device_count())
    if jax.process_count() != len(counts):
        raise RuntimeError(f"jax sees {jax.process_count()} processes, expected {len(counts)}")
    each = counts[:1] if len(set(counts)) == 1 else counts
    return f"{len(counts)} processes x {', '.join(map(str, each))} devices"


def leave() -> None:
    """Leave the cluster when all are done; do nothing where there is none."""
    if named(os.environ) and _state().client is not None:
        import jax

        _leaving.set()
        jax.distributed.shutdown()


def fail(line: str, code: int) -> None:
    """Print why this process ends; in a cluster, end it and all others with the same exit code.

    A process that has not joined yet joins to tell the others. Returns where there is no cluster.
    """
    try:
        alone = not named(os.environ) or not member(os.environ)
    except UserError:  # a bad variable, which the line names
        alone = True
    if alone:
        print(line, file=sys.stderr)
        return
    _claim_the_end(code)
    print(line, file=sys.stderr, flush=True)
    with contextlib.suppress(Exception):  # others may be gone, or another one failed first
        if _state().client is None:
            join(seconds=30)
        value = json.dumps([_state().process_id, code, line.removeprefix("error: ")])
        _state().client.key_value_set(f"{FAILED}/first", value)
    _end()


def crash(error: Exception) -> None:
    """End all processes of a cluster after an exception; return where there is no cluster.

    A collective also raises where another process is gone: another thread then says which one.
    """
    if not named(os.environ) or _state().client is None:
        return
    if PEER_TROUBLE.search(str(error)):
        time.sleep(VERDICT_SECONDS)
    traceback.print_exception(error)
    fail(f"error: {type(error).__name__}: {' '.join(str(error).split())[:300]}", 1)


def _state() -> Any:
    """Return jax's own record of the cluster; its client is None where there is no cluster."""
    from jax._src import distributed  # jax has no public way to its key-value store

    return distributed.global_state


def _watch() -> None:
    """End this process once another one has failed, whatever the main thread does."""
    state = _state()
    while not _leaving.wait(0.5):
        try:
            failures = state.client.key_value_dir_get(FAILED)
        except Exception:  # process 0 is gone, and _end_aborts_in_a_line says it
            return
        for _, value in failures:
            i, code, line = json.loads(value)
            _claim_the_end(code)
            _tell(f"error: process {i} of the cluster ended: {line}")
            _end()


def _hide_chatter() -> BinaryIO:
    """Send what C++ code prints, such as Gloo's and XLA's logs, to a file; return the file.

    Python's own streams move to a copy of their file descriptor, and write where they did.
    """
    chatter = tempfile.TemporaryFile()  # noqa: SIM115  (open as long as the process)
    hidden = [sys.stderr] if "NCCL_DEBUG" in os.environ else [sys.stdout, sys.stderr]
    for stream in filter(None, hidden):
        stream.flush()
        old, new = stream.fileno(), os.dup(stream.fileno())
        raw = getattr(stream.buffer, "raw", stream.buffer)  # PYTHONUNBUFFERED leaves no buffer
        raw.__init__(new, "w", closefd=False)
        os.dup2(chatter.fileno(), old)
    return chatter


def _end_aborts_in_a_line(chatter: BinaryIO, since: float) -> None:
    """Catch the abort by which jax's C++ code ends a process whose cluster has broken."""

    def printed() -> str:  # without moving the place at which C++ code writes on
        return os.pread(chatter.fileno(), 10**6, 0).decode(errors="replace")

    def aborted(_: int) -> None:
        if "absl::Status" not in printed() and PEER_TROUBLE.search(printed()):
            time.sleep(VERDICT_SECONDS)  # Gloo may abort first; another thread says who was lost
        if _ending.acquire(blocking=False):
            _tell(_reason(printed(), time.monotonic() - since))
        os._exit(_exit_code)

    global _handler  # C code holds it, which Python cannot see
    _handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(aborted)
    ctypes.CDLL(None).signal(signal.SIGABRT, _handler)


def _reason(chatter: str, seconds: float) -> str:
    """Turn what C++ code printed before it aborted into one line."""
    state = _state()
    status = re.search("absl::Status: (.*)", chatter)
    lost = re.search(r"stopped sending heartbeats\):\s*([0-9, \n]+)", chatter)
    if "RegisterTask" in chatter:
        return f"error: cannot join the cluster: {_absent(state)} (waited {seconds:.0f} s)"
    if lost or "Failed to send RPC to coordination service" in chatter:
        who = ", ".join(re.findall("[0-9]+", lost[1])) if lost else "0"
        again = "the same command goes on from the last checkpoint"
        return f"error: process {who} of the cluster was lost; {again}"
    return f"error: the cluster broke: {status[1]}" if status else chatter


def _absent(state: Any) -> str:
    """Say who is missing of those that should have joined, as far as this process can know."""
    host, _, port = state.coordinator_address.rpartition(":")
    if state.process_id:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
        except OSError as error:
            return f"process 0 does not answer at {state.coordinator_address} ({error})"
    return (
        f"not all of {state.num_processes} processes came to {state.coordinator_address}; "
        f"process {state.process_id} did"
    )


def _claim_the_end(code: int) -> None:
    """Let only the first thread that wants to end this process do so, with its exit code."""
    global _exit_code
    if not _ending.acquire(blocking=False):
        time.sleep(60)
    _exit_code = code


def _tell(line: str) -> None:
    os.write(sys.stderr.fileno(), f"{line}\n".encode())


def _end() -> None:
    """End this process once all processes know why; process 0 holds what the others read."""
    with contextlib.suppress(Exception):
        _state().client.wait_at_barrier("cnn_spmd/end", 5000)
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os._exit(_exit_code)
