"""Loader: batches are read while the model computes.

`num_workers` processes read whole micro-batches, a thread takes them over, and a step finds the next one lying ready. What a
batch holds is decided by its number alone (data.py), so readers have no state, and their number changes nothing.

Way: data -> **micro-batches, ahead of time** -> train.py. Lesson: 07.
"""

import contextlib
import queue
import signal
import threading

import torch


def make_loader(data, first, num_workers, pin):
    """Iterate `data[first]`, `data[first + 1]`, ..: read by `num_workers` processes (0: by a thread), ahead of their use."""
    return read_ahead(torch.utils.data.DataLoader(
        data, batch_size=None, sampler=range(first, len(data)), num_workers=num_workers, pin_memory=pin,
        prefetch_factor=4 if num_workers else None, worker_init_fn=start_worker if num_workers else None))


def start_worker(_):
    """A data worker computes on one thread. A request to stop reaches every process; a worker then leaves the training
    process ten seconds to save and go, since a worker that dies at once would be taken for an accident."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):  # not on Windows
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(10))


def read_ahead(batches, depth=2):
    """Iterate in a thread, so that a step need not wait while a batch comes over from its worker; errors come along.

    When the reader stops early, so does the thread, and the workers with it.
    """
    ready, closed = queue.Queue(depth), threading.Event()

    def put(item):
        while not closed.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=0.1)
                return

    def fill():
        try:
            for batch in batches:
                put(batch)
                if closed.is_set():
                    return
            put(None)
        except BaseException as error:  # whatever it is, the reader shall see it
            put(error)

    thread = threading.Thread(target=fill, daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        closed.set()
        thread.join()
