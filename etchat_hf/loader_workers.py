"""Workers of data loaders and pools that do not outlive the process they work for."""

import os
from multiprocessing import parent_process
from threading import Thread


def leave_with_parent(worker_id: int = 0) -> None:
    """
    `worker_init_fn` of a `DataLoader`, or `initializer` of a pool: the worker ends when the process that it works for
    does, killed or not.

    The loader's own watch cannot promise that: a worker that has noticed still waits for somebody to take the samples
    that it has ready, and a worker of a fork server watches the server.
    """
    Thread(target=_leave, daemon=True).start()


def _leave() -> None:
    parent_process().join()
    os._exit(1)
