"""What a worker process that reads examples does about signals, and about the death of the process that started it."""

import multiprocessing
import os
import signal
import threading


def follow_parent(index: int, count: int) -> None:
    """Makes this worker, number `index` of `count`, end when the process that started it is gone, in whatever way.

    Without this a killed run leaves its workers behind. Signals that ask a run to stop reach its workers too, from a
    terminal or from Slurm: they leave the answer to the process that trains, which may want another batch.
    """
    del index, count
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_after, args=(parent,), name="parent", daemon=True).start()
    for signum in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(signum, signal.SIG_IGN)


def _end_after(parent) -> None:
    parent.join()
    os._exit(1)
