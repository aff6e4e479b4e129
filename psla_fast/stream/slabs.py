"""Slabs: reader threads fill reused (pinned) batch slabs in plan order, ahead of the consumer."""

# R rows of a batch, T frames, F mels, C classes

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from psla_fast.shards import ShardError, Shards
from psla_fast.stream.batch import Batch, BatchShape, StreamConfig
from psla_fast.stream.plan import BatchPlan
from psla_fast.stream.rows import count_frames, describe_rows

MAX_REPLACEMENTS = 16  # draws tried in the place of an unreadable clip


class ClipSource(Protocol):
    """Where the clips of a slab come from."""

    def follow(self, plans: Iterator[BatchPlan]) -> Iterator[BatchPlan]:
        """Pass plans on before their batches are read; a source may look ahead in them."""

    def read_into(self, clip_id: int, target: memoryview) -> None:
        """Fill `target` with a clip's first stored bytes; called by several threads. Raises ShardError."""

    def close(self) -> None:
        """Release what is held, and make calls that wait return."""


class Slab:
    """Memory for one batch of any of the shapes, and the copy to the device that may still be reading it."""

    def __init__(self, shards: Shards, shapes: Sequence[BatchShape], pinned: bool) -> None:
        """Take zeroed memory for the largest shape."""
        self.num_mels = shards.fbank_config.num_mels
        self._dtype = torch.float16 if shards.storage.dtype == "float16" else torch.uint8
        most = max(shape.num_rows * shape.num_frames for shape in shapes)
        self._flat = torch.zeros(most * self.num_mels, dtype=self._dtype, pin_memory=pinned)
        self._raw = self._flat.numpy().view(np.uint8)
        self._bytes = self._raw.data
        self._shape: BatchShape | None = None
        self._ends = np.zeros(0, dtype=np.int64)
        self.copied: torch.cuda.Event | None = None

    def lay_out(self, shape: BatchShape, num_frames: npt.NDArray[np.int64]) -> list[memoryview]:
        """Give each row's bytes, as many as its frames (R,); what lies behind them is zero.

        A row's padding is written only where a longer clip of an earlier batch lay.
        """
        row_bytes = shape.num_frames * self.num_mels * self._dtype.itemsize
        if shape != self._shape:  # rows of another shape lay elsewhere
            self._ends = np.full(shape.num_rows, row_bytes if self._shape else 0, dtype=np.int64)
            self._shape = shape
        ends = num_frames * (self.num_mels * self._dtype.itemsize)
        starts = np.arange(shape.num_rows) * row_bytes
        for row in np.flatnonzero(self._ends > ends).tolist():
            self._raw[starts[row] + ends[row] : starts[row] + self._ends[row]] = 0
        self._ends = ends
        pairs = zip(starts.tolist(), (starts + ends).tolist(), strict=True)
        return [self._bytes[start:end] for start, end in pairs]

    def lay_out_row(self, row: int, num_frames: int) -> memoryview:
        """Give one row's bytes anew, for another number of frames."""
        assert self._shape is not None
        frame_bytes = self.num_mels * self._dtype.itemsize
        start, self._ends[row] = row * self._shape.num_frames * frame_bytes, num_frames * frame_bytes
        end = start + num_frames * frame_bytes
        self._raw[end : start + self._shape.num_frames * frame_bytes] = 0
        return self._bytes[start:end]

    def fbank(self) -> Tensor:
        """The batch (R, T, F) that was laid out last."""
        assert self._shape is not None
        rows, frames = self._shape.num_rows, self._shape.num_frames
        return self._flat[: rows * frames * self.num_mels].view(rows, frames, self.num_mels)


class Reading:
    """A batch while it is read; `done` is set when all its parts are, well or with an error."""

    def __init__(
        self, plan: BatchPlan, slab: Slab, num_frames: npt.NDArray[np.int64], num_parts: int
    ) -> None:
        """Lay the batch out in its slab; num_frames (R,) are 0 for rows that stay empty."""
        self.plan, self.slab, self.num_frames = plan, slab, num_frames
        self.row_ids = plan.row_ids.copy()
        self.rows = slab.lay_out(plan.shape, num_frames)
        self.skipped: list[tuple[int, str]] = []
        self.error: Exception | None = None
        self.done = threading.Event()
        self._lock, self._parts_left = threading.Lock(), num_parts

    def finish_part(self, error: Exception | None) -> None:
        """Count a part as done, well or not."""
        with self._lock:
            self._parts_left -= 1
            self.error = self.error or error
            if not self._parts_left:
                self.done.set()


class ReaderThreads:
    """Daemon threads that run tasks in order: a read that hangs keeps no program from ending."""

    def __init__(self, num_threads: int) -> None:
        """Start the threads."""
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, name=f"psla-stream-{number}", daemon=True)
            for number in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, task: Callable[[], None]) -> None:
        """Have a thread run a task, which must not raise."""
        self._tasks.put(task)

    def close(self) -> None:
        """Let the threads end; those that hang in a read are left behind after a second."""
        for _ in self._threads:
            self._tasks.put(None)
        until = time.monotonic() + 1
        for thread in self._threads:
            thread.join(timeout=max(0.0, until - time.monotonic()))

    def _work(self) -> None:
        while task := self._tasks.get():
            task()


class SlabStream:
    """Reads batches ahead from a source with a bounded number of slabs; keeps the order of the plans."""

    def __init__(
        self,
        shards: Shards,
        config: StreamConfig,
        shapes: Sequence[BatchShape],
        device: torch.device,
        source: ClipSource,
    ) -> None:
        """Start num_threads threads; `read_ahead + 2` slabs hold batches of any of the shapes."""
        self._shards, self._config, self._source = shards, config, source
        self._shapes, self._device = shapes, device
        self._slabs: list[Slab] = []
        self._threads = ReaderThreads(config.num_threads)
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._stopped = False

    def close(self) -> None:
        """End the threads and the source."""
        self._stopped = True
        self._source.close()
        self._threads.close()

    def batches(self, plans: Iterator[BatchPlan]) -> Iterator[Batch]:
        """Yield the plans' batches in order. Raises ShardError where a clip can't be read."""
        while len(self._slabs) < self._config.read_ahead + 2:
            self._slabs.append(Slab(self._shards, self._shapes, pinned=self._side is not None))
        free, lent = deque(self._slabs), deque[Slab]()
        pending: deque[Reading] = deque()
        moved: Batch | None = None
        plans = self._source.follow(plans)
        try:
            while True:
                while len(pending) < self._config.read_ahead and free and (plan := next(plans, None)):
                    pending.append(self._start(plan, free.popleft()))
                if not pending:
                    return
                while not pending[0].done.wait(timeout=0.5) and not self._stopped:
                    continue
                if self._stopped:
                    raise InterruptedError("the stream was closed while it read")
                reading = pending.popleft()
                if reading.error:
                    raise reading.error
                batch, moved = moved or self._make_batch(reading), None
                if self._side and pending and pending[0].done.is_set() and not pending[0].error:
                    moved = self._make_batch(pending[0])  # its copy runs beside the consumer's work
                yield self._hand_over(batch, reading.slab)
                lent.append(reading.slab)
                if len(lent) > 1:  # the batch before this one is done with
                    free.append(lent.popleft())
        finally:
            self._abandon(pending)

    def _start(self, plan: BatchPlan, slab: Slab) -> Reading:
        """Share a batch's rows among the threads."""
        if slab.copied is not None:
            slab.copied.synchronize()
        num_read = len(plan.row_ids)
        num_parts = min(num_read, 2 * self._config.num_threads)
        reading = Reading(plan, slab, count_frames(self._shards, plan), num_parts)
        bounds = np.arange(num_parts + 1) * num_read // num_parts
        for first, end in pairwise(bounds.tolist()):
            self._threads.submit(partial(self._read_part, reading, first, end))
        return reading

    def _read_part(self, reading: Reading, first: int, end: int) -> None:
        """Fill rows first … end-1, on a thread; what goes wrong is kept for the consumer."""
        problem: Exception | None = None
        try:
            for row, clip_id in enumerate(reading.row_ids[first:end].tolist(), start=first):
                if self._stopped or reading.error:
                    break
                try:
                    self._source.read_into(clip_id, reading.rows[row])
                except ShardError as error:
                    if self._config.on_error == "raise":
                        raise
                    self._replace(reading, row, error)
        except Exception as error:
            problem = error
        reading.finish_part(problem)

    def _replace(self, reading: Reading, row: int, error: ShardError) -> None:
        """Read another draw's clip in the place of one that can't be read."""
        reading.skipped.append((row, str(error)))
        for attempt in range(1, MAX_REPLACEMENTS + 1):
            clip_id = reading.plan.replacement(row, attempt)
            if clip_id is None:
                raise error
            num_frames = min(int(self._shards.index.num_frames[clip_id]), reading.plan.shape.num_frames)
            target = reading.slab.lay_out_row(row, num_frames)
            try:
                self._source.read_into(clip_id, target)
            except ShardError as next_error:
                error = next_error
            else:
                reading.row_ids[row], reading.num_frames[row] = clip_id, num_frames
                return
        raise ShardError(f"{error} {MAX_REPLACEMENTS} other clips in its place can't be read either.")

    def _make_batch(self, reading: Reading) -> Batch:
        """Describe a batch that was read; on a GPU start its copy on the side stream."""
        plan, slab, num_read = reading.plan, reading.slab, len(reading.row_ids)
        host = describe_rows(self._shards, plan, reading.row_ids, reading.num_frames)
        skipped = tuple(text for _, text in sorted(reading.skipped))
        clip_ids = reading.row_ids[: len(plan.clip_ids)]
        if self._side is None:
            return Batch(clip_ids, slab.fbank(), *host, skipped)
        stored = slab.fbank()
        with torch.cuda.stream(self._side):
            fbank = torch.empty_like(stored, device=self._device)
            fbank[:num_read].copy_(stored[:num_read], non_blocking=True)
            fbank[num_read:].zero_()
            copied = host.to(self._device)
            slab.copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            slab.copied.record(self._side)
        return Batch(clip_ids, fbank, *copied, skipped)

    def _hand_over(self, batch: Batch, slab: Slab) -> Batch:
        """Let the consumer's stream wait for this batch's copy, not for the next one's."""
        if slab.copied is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(slab.copied)
            for tensor in (batch.fbank, batch.num_frames, batch.targets, batch.partner_row, batch.lam):
                tensor.record_stream(current)
        return batch

    def _abandon(self, pending: Iterable[Reading]) -> None:
        """Stop reads that nobody waits for; a slab still written to after a second is given up."""
        until = time.monotonic() + 1
        for reading in pending:
            reading.error = reading.error or InterruptedError()
        for reading in pending:
            if not reading.done.wait(timeout=max(0.0, until - time.monotonic())):
                self._slabs.remove(reading.slab)
