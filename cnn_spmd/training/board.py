"""Write scalars for TensorBoard."""

import os
import pathlib
import socket
import time

from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer.record_writer import RecordWriter


class Board:
    """Write scalars to an event file of TensorBoard in a folder.

    start: the step at which the run starts. TensorBoard forgets what earlier files in the folder
    hold after it.

    tensorboard's own classes for this import TensorFlow, and tensorboardX imports PyTorch, where
    they are installed: that takes seconds.
    """

    def __init__(self, folder: pathlib.Path, start: int):
        # TensorBoard reads the files of a folder in the order of their names.
        name = f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
        self._records = RecordWriter((folder / name).open("wb", buffering=0))
        self._write(file_version="brain.Event:2")
        restart = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(step=start + 1, session_log=restart)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Write the scalars of a step, by tag."""
        entries = [
            summary_pb2.Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()
        ]
        self._write(step=step, summary=summary_pb2.Summary(value=entries))

    def close(self) -> None:
        """Close the file."""
        self._records.close()

    def _write(self, **fields) -> None:
        event = event_pb2.Event(wall_time=time.time(), **fields)
        self._records.write(event.SerializeToString())
