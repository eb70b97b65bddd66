"""The floor: reads every source byte once and writes arrays that are in their final form, and does nothing else.

    python floor.py JOB.json

JOB.json: `files`, the source's; `arrays`, each with TensorStore's `spec` and the path of its `samples`, a .npy file of
some real chunks of that array, (n, *chunk shape) in unsigned integers of the dtype's width; `threads`.

It is a script of its own so that it imports nothing of Ferry. It prints the seconds that loading the samples took: a
writer whose arrays are in their final form has them in memory, so they are no part of the floor.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

READ_BYTES = 8 << 20
IN_FLIGHT = 512 << 20
"""Bytes of writes under way at once: enough to keep codec and disk busy."""


class Source:
    """The source's files, one after the other as one run of bytes."""

    def __init__(self, files: list[str]) -> None:
        self._files = [(os.open(file, os.O_RDONLY), os.stat(file).st_size) for file in files]
        self.nbytes = sum(size for _, size in self._files)

    def read(self, start: int, stop: int, buffer: memoryview) -> None:
        for descriptor, size in self._files:
            position, end = max(start, 0), min(stop, size)
            while position < end:
                position += os.preadv(descriptor, [buffer[: end - position]], position)
            start, stop = start - size, stop - size


class Room:
    """So many bytes may be under way; the next writer waits until some are durable."""

    def __init__(self, total: int) -> None:
        self._free, self._changed = total, threading.Condition()

    def take(self, nbytes: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._free >= nbytes)
            self._free -= nbytes

    def give(self, nbytes: int) -> None:
        with self._changed:
            self._free += nbytes
            self._changed.notify()


def open_arrays(arrays: list[dict[str, Any]], threads: int) -> list[Any]:
    context = ts.Context({"cache_pool": {"total_bytes_limit": 0}, "data_copy_concurrency": {"limit": threads}})
    opened = [ts.open(array["spec"], create=True, open=True, context=context) for array in arrays]
    return [future.result() for future in opened]


def chunks_of(array: Any) -> list[tuple[slice, ...]]:
    steps = array.chunk_layout.write_chunk.shape
    spans = [range(0, extent, step) for extent, step in zip(array.shape, steps, strict=True)]
    corners = itertools.product(*spans)
    return [
        tuple(
            slice(start, min(start + step, extent))
            for start, step, extent in zip(corner, steps, array.shape, strict=True)
        )
        for corner in corners
    ]


def run(job: dict[str, Any], samples: list[np.ndarray[Any, Any]]) -> None:
    """Writes all chunks, each from one of its array's samples, with the source's bytes read in between."""
    source, arrays, room = Source(job["files"]), open_arrays(job["arrays"], job["threads"]), Room(IN_FLIGHT)
    todo = [(number, box) for number, array in enumerate(arrays) for box in chunks_of(array)]
    sizes = [samples[number][0].nbytes for number, _ in todo]
    ends = [end * source.nbytes // sum(sizes) for end in itertools.accumulate(sizes)]
    pending, lock, futures = iter(range(len(todo))), threading.Lock(), []

    def work() -> None:
        buffer = memoryview(bytearray(READ_BYTES))
        while True:
            with lock:
                place = next(pending, None)
            if place is None:
                return
            start, stop = ends[place - 1] if place else 0, ends[place]
            for position in range(start, stop, READ_BYTES):
                source.read(position, min(position + READ_BYTES, stop), buffer)
            number, box = todo[place]
            data = samples[number][place % len(samples[number])]
            data = data[tuple(slice(span.stop - span.start) for span in box)].view(arrays[number].dtype.numpy_dtype)
            room.take(sizes[place])
            write = arrays[number][box].write(data, can_reference_source_data_indefinitely=True)
            write.commit.add_done_callback(lambda _, nbytes=sizes[place]: room.give(nbytes))
            write.commit.force()
            futures.append(write.commit)

    workers = [threading.Thread(target=work) for _ in range(job["threads"])]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for future in futures:
        future.result()
    assert len(futures) == len(todo) and math.prod(len(samples) for samples in samples), "a chunk was not written"


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    started, cpu = time.perf_counter(), time.process_time()
    samples = [np.load(array["samples"]) for array in job["arrays"]]
    loading = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu}
    run(job, samples)
    print(json.dumps(loading))


if __name__ == "__main__":
    main()
