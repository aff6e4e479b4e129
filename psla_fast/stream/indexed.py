"""Indexed stream: threads `preadv` members straight into reused (pinned) batch slabs, in draw order."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch

from psla_fast.shards import Shards
from psla_fast.stream.batch import Batch, BatchShape, StreamConfig
from psla_fast.stream.plan import BatchPlan


class _Slab:
    """Memory for one batch, and the copy to the device that may still be reading it."""

    def __init__(self, shards: Shards, num_rows: int, num_frames: int, pinned: bool) -> None:
        dtype = torch.float16 if shards.storage.dtype == "float16" else torch.uint8
        shape = (num_rows, num_frames, shards.fbank_config.num_mels)
        self.fbank = torch.zeros(shape, dtype=dtype, pin_memory=pinned)
        self.bytes = memoryview(self.fbank.numpy()).cast("B")  # type: ignore[arg-type]
        self.copied: torch.cuda.Event | None = None


class IndexedStream:
    """Reads batches ahead with a bounded number of slabs; keeps the order of the plans."""

    def __init__(self, shards: Shards, config: StreamConfig, shape: BatchShape, device: torch.device) -> None:
        """Allocate `read_ahead + 2` slabs of (rows, frames, F) and start no more than num_threads threads."""
        self._shards, self._config, self._shape, self._device = shards, config, shape, device
        num_frames = self._num_frames = shape.num_frames
        self._row_bytes = num_frames * shards.fbank_config.num_mels * shards.storage.numpy.itemsize
        self._frame_bytes = self._row_bytes // num_frames
        pinned = device.type == "cuda"
        self._slabs = [
            _Slab(shards, shape.num_rows, num_frames, pinned) for _ in range(config.read_ahead + 2)
        ]
        self._pool = ThreadPoolExecutor(config.num_threads, thread_name_prefix="psla-stream")

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def batches(self, plans: Iterator[BatchPlan]) -> Iterator[Batch]:
        """Yield the plans' batches in order. Raises ShardError where a clip can't be read."""
        free = deque(self._slabs)
        pending: deque[tuple[BatchPlan, _Slab, npt.NDArray[np.int64], list[Future[None]]]] = deque()
        lent: deque[_Slab] = deque()
        more = True
        try:
            while more or pending:
                while more and len(pending) < self._config.read_ahead and free:
                    plan = next(plans, None)
                    if plan is None:
                        more = False
                        break
                    slab = free.popleft()
                    if slab.copied is not None:
                        slab.copied.synchronize()
                    row_ids = np.concatenate([plan.clip_ids, plan.partner_ids[plan.partner_ids >= 0]])
                    pending.append((plan, slab, row_ids, self._submit(slab, row_ids)))
                if not pending:
                    break
                plan, slab, row_ids, futures = pending.popleft()
                for future in futures:
                    future.result()
                yield self._make_batch(plan, slab, row_ids)
                lent.append(slab)
                if len(lent) > 1:  # the batch before this one is done with
                    free.append(lent.popleft())
        finally:
            for _, _, _, futures in pending:
                for future in futures:
                    future.cancel()
                    if not future.cancelled():
                        future.exception()

    def _submit(self, slab: _Slab, row_ids: npt.NDArray[np.int64]) -> list[Future[None]]:
        """Share a batch's rows among the threads."""
        parts = np.array_split(np.arange(len(row_ids)), min(len(row_ids), self._config.num_threads))
        return [self._pool.submit(self._read_rows, slab, row_ids, int(part[0]), len(part)) for part in parts]

    def _read_rows(self, slab: _Slab, row_ids: npt.NDArray[np.int64], first: int, count: int) -> None:
        index, check_crc = self._shards.index, self._config.check_crc
        for row in range(first, first + count):
            clip_id = int(row_ids[row])
            num_frames = int(index.num_frames[clip_id])
            wanted = min(num_frames, self._num_frames) * self._frame_bytes
            start = row * self._row_bytes
            whole = num_frames <= self._num_frames
            self._shards.read_into(clip_id, slab.bytes[start : start + wanted], check_crc and whole)

    def _make_batch(self, plan: BatchPlan, slab: _Slab, row_ids: npt.NDArray[np.int64]) -> Batch:
        batch_size, num_rows, num_read = self._shape.batch_size, self._shape.num_rows, len(row_ids)
        num_frames = np.zeros(num_rows, dtype=np.int64)
        num_frames[:num_read] = np.minimum(self._shards.index.num_frames[row_ids], self._num_frames)
        targets = np.zeros((num_rows, len(self._shards.classes)), dtype=np.float32)
        targets[:num_read] = self._shards.targets(row_ids)
        num_clips = len(plan.clip_ids)
        partner_row = np.arange(batch_size)
        partner_row[:num_clips][plan.partner_ids >= 0] = np.arange(num_clips, num_read)
        lam = np.ones(batch_size, dtype=np.float32)
        lam[:num_clips] = plan.lam
        host = tuple(torch.from_numpy(a) for a in (num_frames, targets, partner_row, lam))
        if self._device.type != "cuda":
            return Batch(plan.clip_ids, slab.fbank, *host)
        device = self._device
        fbank = torch.empty_like(slab.fbank, device=device)
        fbank[:num_read].copy_(slab.fbank[:num_read], non_blocking=True)
        copied = tuple(tensor.pin_memory().to(device, non_blocking=True) for tensor in host)
        slab.copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        slab.copied.record()
        return Batch(plan.clip_ids, fbank, *copied)
