"""DALI: chunks of plans, each read shard by shard by `fn.readers.webdataset` and put back into draw order.

DALI's reader keeps an order only within one tar, and every tar it is given is an open file, while consecutive
draws lie in different tars. So the batches of a chunk are read together, sorted by shard and offset; each
sample goes to its row, and the batches are handed over in order while the next chunk is read. The order is
exact, open files are bounded by the shards (+ readers), memory by two chunks.
"""

# N samples (clips and partners) of a chunk, R rows of a batch, T frames, F mels

import os
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from itertools import cycle, islice, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from psla_fast.shards import Index, ShardError, Shards
from psla_fast.shards.spec import TAR_BLOCK
from psla_fast.stream.batch import Batch, BatchShape, StreamConfig
from psla_fast.stream.plan import BatchPlan
from psla_fast.stream.rows import count_frames, describe_rows
from psla_fast.stream.slabs import ReaderThreads, Slab

SAMPLES_A_RUN = 8  # of each reader; more fall out of the processor's cache before they are copied
MB = 10**6
INDEX_FOLDER = "/dev/shm"  # a disk may take a hundred times as long for an epoch's many small files
Ints = npt.NDArray[np.int64]


@dataclass
class Chunk:
    """Batches read together: sample i, a clip, goes to row[i] of batch[i] and has size[i] bytes."""

    plans: list[BatchPlan]
    num_frames: list[Ints]
    clip_ids: Ints
    batch: Ints
    row: Ints
    size: Ints
    stopped: threading.Event = field(default_factory=threading.Event)
    done: Future[None] = field(default_factory=Future)


@dataclass(frozen=True)
class ReaderPart:
    """What one of DALI's readers reads: samples (n,) in its order, of shards with an index file each."""

    samples: Ints
    shards: list[int]
    index_paths: list[str]


class HostMemory:
    """A slab for each batch of a chunk; samples are copied from DALI's memory one by one."""

    def __init__(self, shards: Shards, shapes: Sequence[BatchShape]) -> None:
        """Take no memory yet: slabs come as chunks need them."""
        self._shards, self._shapes = shards, shapes
        self._slabs: list[Slab] = []
        self._rows: list[list[memoryview]] = []

    def outputs(self, stored: Any, row_bytes: int) -> list[Any]:
        """Give what the pipeline returns of a reader's samples: them as they are."""
        return [stored]

    def lay_out(self, chunk: Chunk) -> None:
        """Lay out each batch in its slab."""
        while len(self._slabs) < len(chunk.plans):
            self._slabs.append(Slab(self._shards, self._shapes, pinned=False))
        laid_out = zip(self._slabs, chunk.plans, chunk.num_frames, strict=False)
        self._rows = [slab.lay_out(plan.shape, num_frames) for slab, plan, num_frames in laid_out]

    def store(self, chunk: Chunk, samples: Ints, outputs: Sequence[Any]) -> None:
        """Check each sample's tar header and copy what follows to its row. Raises ShardError."""
        for number, sample in enumerate(samples.tolist()):
            stored, clip_id = np.asarray(outputs[0][number]), int(chunk.clip_ids[sample])
            header, content = stored[:TAR_BLOCK].tobytes(), stored[TAR_BLOCK:]
            self._shards.check_clip(clip_id, header, content.data, check_crc=False)
            target = self._rows[chunk.batch[sample]][chunk.row[sample]]
            if len(content) != len(target):
                key, got = self._shards.index.key[clip_id].decode(), f"{len(content)} of {len(target)} bytes"
                raise ShardError(f"{self._shards.folder}, key {key}: DALI read {got}. Pack it again.")
            np.copyto(np.frombuffer(target, dtype=np.uint8), content)

    def fbank(self, number: int) -> Tensor:
        """Give a batch's fbank (R, T, F)."""
        return self._slabs[number].fbank()

    def release(self) -> None:
        """The consumer is done with all batches; nothing of it runs on."""


class DeviceMemory:
    """All batches of a chunk in a device tensor; samples come padded, a scatter moves them to their rows."""

    def __init__(
        self, shards: Shards, shapes: Sequence[BatchShape], num_batches: int, device: torch.device
    ) -> None:
        """Take memory for that many batches of the largest shape."""
        self._shards, self._device = shards, device
        self._dtype = torch.float16 if shards.storage.dtype == "float16" else torch.uint8
        size = -(-batch_bytes(shards, shapes) // 512) * 512  # so that every batch is aligned
        self._bytes = torch.empty((num_batches, size), dtype=torch.uint8, device=device)
        self._plans: list[BatchPlan] = []
        self._side, self._used = None, None
        if device.type == "cuda":
            self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._used = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self.release()  # others may have had this memory

    def outputs(self, stored: Any, row_bytes: int) -> list[Any]:
        """Give what the pipeline returns of a reader's samples: headers on the host, rows on the device."""
        moved = stored.gpu() if self._side else stored
        return [stored[:TAR_BLOCK], load_dali("fn").pad(moved[TAR_BLOCK:], axes=[0], shape=[row_bytes])]

    def lay_out(self, chunk: Chunk) -> None:
        """Wait until the consumer is done with what lies here; zero the rows that nothing is read into."""
        self._plans = chunk.plans
        if self._used:
            self._used.synchronize()
        with torch.cuda.stream(self._side):
            for number, plan in enumerate(chunk.plans):
                self._rows(plan.shape)[number, len(plan.row_ids) :] = 0

    def store(self, chunk: Chunk, samples: Ints, outputs: Sequence[Any]) -> None:
        """Check the tar headers, move samples to their rows, wait for it. Raises ShardError."""
        for clip_id, header in zip(chunk.clip_ids[samples].tolist(), outputs[0].as_array(), strict=False):
            self._shards.check_clip(clip_id, header.tobytes(), memoryview(b""), check_crc=False)
        shapes = [chunk.plans[number].shape for number in chunk.batch[samples]]
        with torch.cuda.stream(self._side):
            padded = from_dlpack(outputs[1].as_tensor())  # on the side stream, which waits for DALI's
            for shape in set(shapes):
                at = np.flatnonzero([other == shape for other in shapes])
                places = at, chunk.batch[samples[at]], chunk.row[samples[at]]
                sample, batch, row = (torch.from_numpy(place).to(self._device) for place in places)
                rows = self._rows(shape)
                width = min(rows.shape[2], padded.shape[1])
                rows[batch, row, :width] = padded[sample, :width]
                rows[batch, row, width:] = 0
        if self._side:
            self._side.synchronize()  # DALI writes over its memory next

    def fbank(self, number: int) -> Tensor:
        """Give a batch's fbank (R, T, F)."""
        shape, num_mels = self._plans[number].shape, self._shards.fbank_config.num_mels
        stored = self._rows(shape)[number].reshape(-1).view(self._dtype)
        return stored.view(shape.num_rows, shape.num_frames, num_mels)

    def release(self) -> None:
        """The consumer is done with all batches, as soon as its stream gets here."""
        if self._used:
            self._used.record(torch.cuda.current_stream(self._device))

    def _rows(self, shape: BatchShape) -> Tensor:
        """The memory as if all batches had this shape (batches, R, bytes of a row)."""
        row_bytes = shape.num_frames * self._shards.frame_bytes
        used = self._bytes[:, : shape.num_rows * row_bytes]
        return used.view(len(used), shape.num_rows, row_bytes)


Memory = HostMemory | DeviceMemory


class DaliStream:
    """Reads chunks of batches by DALI, one ahead of the consumer; keeps the order of the plans."""

    def __init__(
        self, shards: Shards, config: StreamConfig, shapes: Sequence[BatchShape], device: torch.device
    ) -> None:
        """Start the thread that runs DALI; raises ValueError where DALI isn't installed."""
        load_dali("fn")
        self._shards, self._config, self._shapes, self._device = shards, config, shapes, device
        self._most = max(1, config.dali_buffer_mb * MB // batch_bytes(shards, shapes))
        self._memories: list[Memory] = []
        self._thread = ReaderThreads(1)
        self._stopped = False

    def close(self) -> None:
        """End the thread and let the memory go."""
        self._stopped = True
        self._thread.close()
        self._memories = []

    def batches(self, plans: Iterator[BatchPlan]) -> Iterator[Batch]:
        """Yield the plans' batches in order. Raises ShardError where a clip can't be read.

        The first chunk is one batch, each next one twice as many up to the buffer: the start is quick.
        """
        while len(self._memories) < 2:
            self._memories.append(self._take_memory())
        memories, num_batches = cycle(self._memories), 1
        memory = next(memories)
        chunk = self._start(list(islice(plans, num_batches)), memory)
        try:
            while chunk:
                while not wait([chunk.done], timeout=0.5).done and not self._stopped:
                    continue
                if self._stopped:
                    raise InterruptedError("the stream was closed while it read")
                chunk.done.result()
                ready, its_memory, memory = chunk, memory, next(memories)
                num_batches = min(2 * num_batches, self._most)
                chunk = self._start(list(islice(plans, num_batches)), memory)
                for number, plan in enumerate(ready.plans):
                    rows = describe_rows(self._shards, plan, plan.row_ids, ready.num_frames[number])
                    yield Batch(plan.clip_ids, its_memory.fbank(number), *rows.to(self._device))
                its_memory.release()
        finally:
            for used in self._memories:
                used.release()
            if chunk:
                chunk.stopped.set()
                if not wait([chunk.done], timeout=1).done and memory in self._memories:
                    self._memories.remove(memory)  # a read that hangs may still write there

    def _take_memory(self) -> Memory:
        if self._device.type == "cuda":
            return DeviceMemory(self._shards, self._shapes, self._most, self._device)
        return HostMemory(self._shards, self._shapes)

    def _start(self, plans: list[BatchPlan], memory: Memory) -> Chunk | None:
        """Have the thread read the batches of some plans; None where there are none."""
        if not plans:
            return None
        chunk = make_chunk(self._shards, plans)
        self._thread.submit(partial(self._read, chunk, memory))
        return chunk

    def _read(self, chunk: Chunk, memory: Memory) -> None:
        """Read a chunk, on the thread; what goes wrong is kept for the consumer."""
        try:
            memory.lay_out(chunk)
            for samples, outputs in self._run(chunk, memory):
                memory.store(chunk, samples, outputs)
        except Exception as error:
            chunk.done.set_exception(error)
        else:
            chunk.done.set_result(None)

    def _run(self, chunk: Chunk, memory: Memory) -> Iterator[tuple[Ints, Sequence[Any]]]:
        """Yield some samples of each reader, with the outputs that hold them until more are asked for."""
        check_files(self._shards, chunk.clip_ids)
        pipeline = None
        num_readers = min(self._config.num_threads, len(chunk.clip_ids))
        folder = INDEX_FOLDER if os.access(INDEX_FOLDER, os.W_OK) else None
        try:
            with tempfile.TemporaryDirectory(prefix="psla_fast_dali_", dir=folder) as folder:
                sizes = chunk.size + TAR_BLOCK
                parts = write_indices(folder, self._shards.index, chunk.clip_ids, sizes, num_readers)
                pipeline = self._build(chunk, memory, parts)  # reads the index files to their end
            for first in range(0, max(len(part.samples) for part in parts), SAMPLES_A_RUN):
                if chunk.stopped.is_set() or self._stopped:
                    raise InterruptedError("the stream was closed while it read")
                pipeline.schedule_run()
                outputs = pipeline.share_outputs()
                share = len(outputs) // len(parts)
                for number, part in enumerate(parts):
                    samples = part.samples[first : first + SAMPLES_A_RUN]
                    yield samples, outputs[number * share :][:share]
                pipeline.release_outputs()
            return
        except RuntimeError as error:
            said = " ".join(str(error).rpartition("encountered:")[2].partition("C++ context")[0].split())
        finally:
            del pipeline
        # Not raised above: DALI's traceback would keep the pipeline, its threads and open files.
        check_files(self._shards, chunk.clip_ids)
        raise ShardError(f"{self._shards.folder} can't be read by DALI: {said}")

    def _build(self, chunk: Chunk, memory: Memory, parts: Sequence[ReaderPart]) -> Any:
        """Build the pipeline of a chunk, a reader for each part."""
        device_id = None
        if self._device.type == "cuda":
            device_id = torch.cuda.current_device() if self._device.index is None else self._device.index
        pipeline = load_dali("pipeline").Pipeline(
            SAMPLES_A_RUN, num_threads=1, device_id=device_id, prefetch_queue_depth=1, exec_dynamic=False
        )
        row_bytes = int(chunk.size.max())
        with pipeline:
            outputs = []
            for part in parts:
                stored = load_dali("fn").readers.webdataset(
                    paths=[str(self._shards.shard_path(shard)) for shard in part.shards],
                    index_paths=part.index_paths,
                    ext="fbank",
                    missing_component_behavior="error",
                    dont_use_mmap=True,  # a tar cut short would kill the process
                    tensor_init_bytes=TAR_BLOCK + row_bytes,
                )
                outputs += memory.outputs(stored, row_bytes)
            pipeline.set_outputs(*outputs)
        pipeline.build()
        return pipeline


def load_dali(module: str) -> Any:
    """Import a module of DALI; raises ValueError where it isn't installed."""
    try:
        return import_module(f"nvidia.dali.{module}")
    except ImportError as error:
        raise ValueError("stream.kind dali needs the extra dali: pip install 'psla-fast[dali]'.") from error


def make_chunk(shards: Shards, plans: list[BatchPlan]) -> Chunk:
    """List the samples of batches."""
    counts = [len(plan.row_ids) for plan in plans]
    num_frames = [count_frames(shards, plan) for plan in plans]
    read = np.concatenate([frames[:count] for frames, count in zip(num_frames, counts, strict=True)])
    return Chunk(
        plans,
        num_frames,
        clip_ids=np.concatenate([plan.row_ids for plan in plans]),
        batch=np.repeat(np.arange(len(plans)), counts),
        row=np.concatenate([np.arange(count) for count in counts]),
        size=read * shards.frame_bytes,
    )


def write_indices(
    folder: str, index: Index, clip_ids: Ints, sizes: Ints, num_readers: int
) -> list[ReaderPart]:
    """Write index files by which DALI reads clips (N,) from their tar headers on, sizes (N,) bytes of each.

    Samples are sorted by shard and offset and shared out evenly; a shard of two readers has two files.
    """
    order = np.lexsort((index.offset[clip_ids], index.shard[clip_ids]))
    shards = index.shard[clip_ids[order]].astype(np.int64)
    lines = np.stack([index.offset[clip_ids[order]] - TAR_BLOCK, sizes[order]], axis=1)
    bounds = np.arange(num_readers + 1) * len(order) // num_readers
    parts = []
    for number, (first, end) in enumerate(pairwise(bounds.tolist())):
        edges = [first, *(first + 1 + np.flatnonzero(np.diff(shards[first:end]))).tolist(), end]
        part = ReaderPart(order[first:end], shards[edges[:-1]].tolist(), [])
        for shard, (start, stop) in zip(part.shards, pairwise(edges), strict=True):
            layout = "v1.2 %d\n" + "fbank %d %d clip\n" * (stop - start)
            text = layout % (stop - start, *lines[start:stop].ravel().tolist())
            part.index_paths.append(f"{folder}/{number}_{shard}.idx")
            with open(part.index_paths[-1], "wb", buffering=0) as file:
                file.write(text.encode())
        parts.append(part)
    return parts


def check_files(shards: Shards, clip_ids: Ints) -> None:
    """Raise ShardError where a tar of these clips is missing, or hasn't the size that was indexed."""
    for shard in np.unique(shards.index.shard[clip_ids]).tolist():
        shards.check_size(shard)


def batch_bytes(shards: Shards, shapes: Sequence[BatchShape]) -> int:
    """Give the bytes of the largest batch."""
    return max(shape.num_rows * shape.num_frames for shape in shapes) * shards.frame_bytes
