"""End this process, with one line, when another of its cluster fails or is lost.

At that moment the main thread usually waits in a collective for the other process, and can do
nothing. So the end comes from elsewhere:

- A process that fails writes its error to jax's key-value store (`publish`). A thread of each other
  process (`_watch`) reads it there.
- A process that is killed, or loses its network, sends no more heartbeats. jax's C++ code notices,
  prints a page of text and calls abort(). It does the same if a process never joins the cluster.
  A handler of the signal SIGABRT (`end_aborts_in_one_line`) turns that into one line.
"""

import contextlib
import ctypes
import json
import os
import re
import signal
import socket
import sys
import tempfile
import threading
import time
from typing import Any, BinaryIO

HEARTBEAT_SECONDS = 20  # a process without a sign of life for this long is lost
# By then it is known whether a process is lost, or why it failed.
VERDICT_SECONDS = HEARTBEAT_SECONDS + 20
FAILED = "cnn_spmd/failed"  # the folder of the key-value store that holds a failure
PEER_TROUBLE = re.compile(
    "gloo|nccl|coordination|barrier|heartbeat|UNAVAILABLE|DEADLINE_EXCEEDED", re.I
)

_ending = threading.Lock()  # the thread that ends this process takes it, and keeps it
_leaving = threading.Event()
_exit_code = 1
_abort_handler: Any = None  # C code holds it, which Python cannot know: Python must not free it


def record() -> Any:
    """Return jax's record of the cluster.

    Its fields are client, process_id, num_processes and coordinator_address. The client is None if
    this process has joined no cluster. jax has no public way to it, nor to its key-value store.
    """
    from jax._src import distributed

    return distributed.global_state


def watch() -> None:
    """Start the thread that ends this process once another one has failed."""
    threading.Thread(target=_watch, daemon=True).start()


def stop_watching() -> None:
    """End that thread: from now on the other processes may leave, too."""
    _leaving.set()


def is_peer_trouble(text: str) -> bool:
    """Return whether an error may only say that another process is gone."""
    return PEER_TROUBLE.search(text) is not None


def claim_the_end(code: int) -> None:
    """Become the one thread that ends this process, with this code; others sleep."""
    global _exit_code
    if not _ending.acquire(blocking=False):
        time.sleep(60)  # the process ends meanwhile
    _exit_code = code


def publish(code: int, line: str) -> None:
    """Write to the key-value store why this process ends, for the others to read."""
    value = json.dumps([record().process_id, code, line])
    record().client.key_value_set(f"{FAILED}/first", value)


def end() -> None:
    """End this process, once each process knows why or after 5 s.

    It waits because process 0 holds the key-value store that the others read. It does not raise
    SystemExit, because the main thread may hang in C++ code.
    """
    with contextlib.suppress(Exception):
        record().client.wait_at_barrier("cnn_spmd/end", 5000)
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os._exit(_exit_code)


def _watch() -> None:
    """End this process once another one has published its failure."""
    client = record().client
    while not _leaving.wait(0.5):
        try:
            failures = client.key_value_dir_get(FAILED)
        except Exception:  # process 0 is gone; an abort follows, and its handler reports it
            return
        for _, value in failures:
            process, code, line = json.loads(value)
            claim_the_end(code)
            _print(f"error: process {process} of the cluster ended: {line}")
            end()


def _hide_native_output() -> BinaryIO:
    """Send what C++ code prints from now on to a file; return the file.

    Gloo, which does the collectives of CPUs, prints a line per connection to stdout, and its errors
    to stderr; XLA prints to stderr. They write to the file descriptors 1 and 2, so these now lead
    to the file. Python's streams get copies of the old descriptors. Each stream object stays,
    since loggers and progress bars hold it, and only its raw file is opened anew.
    """
    output = tempfile.TemporaryFile()  # noqa: SIM115 (it stays open as long as the process lives)
    streams = [sys.stdout, sys.stderr]
    if "NCCL_DEBUG" in os.environ:  # the user wants to see what NCCL prints to stdout
        streams = [sys.stderr]
    for stream in filter(None, streams):
        stream.flush()
        descriptor = stream.fileno()
        raw = getattr(stream.buffer, "raw", stream.buffer)  # an unbuffered stream has no .raw
        raw.__init__(os.dup(descriptor), "w", closefd=False)
        os.dup2(output.fileno(), descriptor)
    return output


def end_aborts_in_one_line() -> None:
    """Make abort() in C++ code end this process with one line and a plain exit code.

    Call it just before jax.distributed.initialize: the line says how long the join has taken.
    A handler set by Python's signal module would never run: Python calls it in the main thread once
    the C++ code returns, and abort() does not return. So C's signal() gets a C function, by ctypes.
    jax's client could also call Python back instead of aborting, but jaxlib fails to convert
    the callback's argument (std::bad_cast).
    """
    output, since = _hide_native_output(), time.monotonic()

    def printed() -> str:
        size = os.fstat(output.fileno()).st_size
        # pread does not move the position at which C++ code writes on.
        return os.pread(output.fileno(), size, 0).decode(errors="replace")

    def aborted(_: int) -> None:
        # Gloo may abort before the heartbeats have shown which process is lost. jax's own abort
        # prints an absl::Status.
        if "absl::Status" not in printed() and is_peer_trouble(printed()):
            time.sleep(VERDICT_SECONDS)  # another thread ends the process meanwhile
        if _ending.acquire(blocking=False):
            _print(_reason(printed(), time.monotonic() - since))
        os._exit(_exit_code)

    global _abort_handler
    _abort_handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(aborted)
    ctypes.CDLL(None).signal(signal.SIGABRT, _abort_handler)


def _reason(printed: str, seconds: float) -> str:
    """Return one line for what C++ code printed before it aborted.

    seconds: the time since the join began.
    """
    if "RegisterTask" in printed:
        return f"error: cannot join the cluster: {_who_is_absent()} (waited {seconds:.0f} s)"
    lost = re.search(r"stopped sending heartbeats\):\s*([0-9, \n]+)", printed)
    if lost or "Failed to send RPC to coordination service" in printed:
        # Only process 0 receives the heartbeats. The others only notice that it is gone.
        who = ", ".join(re.findall("[0-9]+", lost[1])) if lost else "0"
        again = "the same command goes on from the last checkpoint"
        return f"error: process {who} of the cluster was lost; {again}"
    status = re.search("absl::Status: (.*)", printed)
    return f"error: the cluster broke: {status[1]}" if status else printed


def _who_is_absent() -> str:
    """Say who did not join, as far as this process can know."""
    cluster = record()
    host, _, port = cluster.coordinator_address.rpartition(":")
    if cluster.process_id:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
        except OSError as error:
            return f"process 0 does not answer at {cluster.coordinator_address} ({error})"
    return (
        f"not all of {cluster.num_processes} processes came to {cluster.coordinator_address}; "
        f"process {cluster.process_id} did"
    )


def _print(line: str) -> None:
    """Write a line to stderr, without locks that the hanging main thread may hold."""
    os.write(sys.stderr.fileno(), f"{line}\n".encode())
