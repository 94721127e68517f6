"""Batches read ahead of their use, by threads of this process or by worker processes."""

import atexit
import weakref
from collections.abc import Iterator
from typing import ClassVar

import grain
import numpy as np
from absl import flags

from tosa_jax.data.settings import DataConfig
from tosa_jax.data.sources import BadImages
from tosa_jax.data.workers import follow_parent
from tosa_jax.errors import ProcessError

# From this size of an example on, threads read single examples. Below it they read whole batches:
# handing a small example from thread to thread costs as much as reading it.
_LARGE_EXAMPLE_BYTES = 2**15


class BatchStream(Iterator[dict[str, np.ndarray]]):
    """An iterator of batches. `close()` ends its threads and workers, and so does dropping it.

    `bad_images` holds the bad images that this process has skipped. Worker processes count and log
    theirs themselves.
    """

    open_streams: ClassVar[weakref.WeakSet] = weakref.WeakSet()

    def __init__(self, iterator: grain.DatasetIterator, bad_images: BadImages | tuple = ()) -> None:
        self.bad_images = bad_images
        self._iterator: grain.DatasetIterator | None = iterator
        # Closed at exit: Grain prints errors if its threads still run while Python shuts down.
        self.open_streams.add(self)

    def __next__(self) -> dict[str, np.ndarray]:
        if self._iterator is None:
            raise ValueError("this stream of batches is closed")
        try:
            return next(self._iterator)
        except RuntimeError as error:
            if "Worker process was terminated" not in str(error):  # Grain's words
                raise
            raise ProcessError(
                "a worker process that reads data was killed, perhaps for its memory; start the same command again, "
                "with fewer workers (--config.data.workers), fewer prefetch_mib, or without in_memory"
            ) from error

    def close(self) -> None:
        """Ends the stream; a second call does nothing."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None


@atexit.register
def _close_streams() -> None:
    for stream in list(BatchStream.open_streams):
        stream.close()


def read_ahead(
    examples: grain.MapDataset, local_size: int, example_bytes: int, config: DataConfig
) -> grain.DatasetIterator:
    """Batches of `local_size` examples, of which `prefetch_batches` and `prefetch_mib` limit how many wait.

    `example_bytes` is the memory of one example. An incomplete last batch is dropped.
    """
    affordable = config.prefetch_mib * 2**20 // example_bytes  # examples
    waiting = min(config.prefetch_batches, max(1, affordable // local_size))
    batches = examples.batch(local_size, drop_remainder=True)
    kind, count = config.readers
    workers = min(count, len(batches))
    if kind == "processes" and workers:
        # Grain passes absl's flags on to its workers, which fails if nothing has parsed them.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        stream = batches.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
        options = grain.MultiprocessingOptions(workers, max(1, waiting // workers))
        return iter(stream.mp_prefetch(options, follow_parent))
    if example_bytes < _LARGE_EXAMPLE_BYTES:
        return iter(batches.to_iter_dataset(_read_options(count, waiting)))
    waiting = min(config.prefetch_batches * local_size, max(1, affordable))
    stream = examples.to_iter_dataset(_read_options(count, waiting))
    return iter(stream.batch(local_size, drop_remainder=True))


def _read_options(num_threads: int, buffer_size: int) -> grain.ReadOptions:
    """Explicit options: Grain's default buffer is 500 elements, which may be batches here."""
    threads = min(num_threads, buffer_size)  # more would have nothing to do
    return grain.ReadOptions(
        num_threads=threads, prefetch_buffer_size=buffer_size if threads else 0
    )
