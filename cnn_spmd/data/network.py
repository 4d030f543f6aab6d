"""Ask a host whether it answers, before TFDS downloads from it: that alone retries for minutes."""

import queue
import threading

from cnn_spmd.errors import UserError, one_line

PROBE_SECONDS = 10.0  # an unreachable host is noticed within this time


class Unreachable(UserError):
    """Raised where a data set is not on disk and cannot be downloaded."""


def probe(url: str) -> None:
    """Raise Unreachable unless the host of a URL answers within PROBE_SECONDS.

    It asks through a proxy where the environment names one.
    """
    answer: queue.Queue[str] = queue.Queue()

    def ask() -> None:
        import requests  # which a run that has the data does not need

        try:
            with requests.get(url, stream=True, timeout=PROBE_SECONDS) as response:
                answer.put("" if response.ok else f"HTTP status {response.status_code}")
        except Exception as error:  # whatever it is, the answer is no
            # The first cause says most: requests and urllib3 wrap it several times.
            while error.__context__ is not None:
                error = error.__context__
            answer.put(one_line(error))

    # The timeout of requests covers neither a stalled name server nor retries. So we ask in a
    # thread, and do not wait for it longer than that.
    threading.Thread(target=ask, daemon=True).start()
    try:
        problem = answer.get(timeout=PROBE_SECONDS)
    except queue.Empty:
        problem = f"no answer in {PROBE_SECONDS:g} s"
    if problem:
        raise Unreachable(f"cannot reach {url} ({problem})")
