"""Resident: the split loaded once, as it is stored, into device or host memory; batches gathered there."""

# N clips, R rows of a batch, T frames, F mels

import mmap
import os
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from psla_fast.shards import ShardError, Shards
from psla_fast.stream.batch import Batch, StreamConfig
from psla_fast.stream.memory import available_memory
from psla_fast.stream.plan import BatchPlan
from psla_fast.stream.rows import count_frames, describe_rows

DEVICE_SHARE = 0.8  # of the free device memory; the rest is for the model
HOST_SHARE = 0.9
CLIPS_A_TASK = 64
STAGING_BYTES = 2**28
LOAD_TIMEOUT = timedelta(hours=2)
Item = TypeVar("Item")


class _Layout:
    """Where each clip's frames lie in one ragged array (frames of all clips, F)."""

    def __init__(self, shards: Shards) -> None:
        self.frame_bytes = shards.frame_bytes
        self.starts = np.concatenate([[0], np.cumsum(shards.index.num_frames, dtype=np.int64)])

    @property
    def num_bytes(self) -> int:
        return int(self.starts[-1]) * self.frame_bytes


class HostSource:
    """A source of slabs: the split in this process's memory, or once for all ranks of a machine."""

    def __init__(self, shards: Shards, config: StreamConfig) -> None:
        """Load the split; raises ValueError where it doesn't fit, ShardError where it can't be read."""
        self._layout = _Layout(shards)
        if config.place == "shared" and dist.is_initialized():
            memory = _share_memory(shards, self._layout, config)
        else:
            ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if dist.is_initialized() else 1
            hint = "--stream.place shared, " if ranks > 1 else ""
            _check_fits(shards, self._layout.num_bytes * ranks, *_host_memory(), hint)
            memory = mmap.mmap(-1, max(1, self._layout.num_bytes))
            _read(shards, self._layout, 0, len(shards), memoryview(memory), config)
        self._bytes = np.frombuffer(memory, dtype=np.uint8)

    def follow(self, plans: Iterator[BatchPlan]) -> Iterator[BatchPlan]:
        """Nothing to look ahead for."""
        return plans

    def read_into(self, clip_id: int, target: memoryview) -> None:
        """Copy a clip's first bytes."""
        start = int(self._layout.starts[clip_id]) * self._layout.frame_bytes
        np.copyto(np.frombuffer(target, dtype=np.uint8), self._bytes[start : start + len(target)])

    def close(self) -> None:
        """Let the memory go, once no thread copies from it."""
        self._bytes = np.empty(0, dtype=np.uint8)


class DeviceStream:
    """The split in a GPU's memory: no loader at all, a batch is one gather."""

    def __init__(self, shards: Shards, config: StreamConfig, device: torch.device) -> None:
        """Load the split; raises ValueError where it doesn't fit, ShardError where it can't be read."""
        self._shards, self._device = shards, device
        layout = _Layout(shards)
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
        _check_fits(shards, layout.num_bytes, str(device), free, DEVICE_SHARE)
        dtype = torch.float16 if shards.storage.dtype == "float16" else torch.uint8
        shape = (int(layout.starts[-1]), shards.fbank_config.num_mels)
        self._fbank = torch.empty(shape, dtype=dtype, device=device)
        self._starts = layout.starts[:-1]
        _read_to_device(shards, layout, self._fbank.view(torch.uint8).view(-1), config)

    def batches(self, plans: Iterator[BatchPlan]) -> Iterator[Batch]:
        """Yield the plans' batches in order."""
        for plan in plans:
            yield self._gather(plan)

    def close(self) -> None:
        """Let the memory go."""
        self._fbank = self._fbank.new_empty(0)

    def _gather(self, plan: BatchPlan) -> Batch:
        starts = np.zeros(plan.shape.num_rows, dtype=np.int64)
        starts[: len(plan.row_ids)] = self._starts[plan.row_ids]
        rows = describe_rows(self._shards, plan, plan.row_ids, count_frames(self._shards, plan))
        rows = rows.to(self._device)
        at = torch.arange(plan.shape.num_frames, device=self._device)
        inside = at < rows.num_frames[:, None]  # (R, T)
        first = torch.from_numpy(starts)
        if self._device.type == "cuda":
            first = first.pin_memory().to(self._device, non_blocking=True)
        fbank = self._fbank[(first[:, None] + at) * inside].masked_fill_(~inside[:, :, None], 0)
        return Batch(plan.clip_ids, fbank, *rows)


def _read(
    shards: Shards, layout: _Layout, first: int, end: int, target: memoryview, config: StreamConfig
) -> None:
    """Read the clips first … end-1 into memory that holds just them."""
    start, stopped = int(layout.starts[first]), threading.Event()

    def read_some(clip_ids: range) -> None:
        for clip_id in clip_ids:
            if stopped.is_set():
                return
            at, to = (layout.starts[clip_id : clip_id + 2] - start) * layout.frame_bytes
            shards.read_into(clip_id, target[at:to], config.check_crc)

    with ThreadPoolExecutor(config.num_threads) as pool:
        parts = [range(at, min(end, at + CLIPS_A_TASK)) for at in range(first, end, CLIPS_A_TASK)]
        try:
            for _ in pool.map(read_some, parts):
                pass
        finally:  # the pool waits for its threads, after an error or Ctrl-C too
            stopped.set()


def _read_to_device(shards: Shards, layout: _Layout, target: Tensor, config: StreamConfig) -> None:
    """Read all clips into device bytes, through host memory of a few hundred MB."""
    group = layout.starts[:-1] * layout.frame_bytes // STAGING_BYTES
    edges = [0, *(np.flatnonzero(np.diff(group)) + 1).tolist(), len(shards)]
    for first, end in pairwise(edges):
        start, stop = layout.starts[[first, end]] * layout.frame_bytes
        staging = np.empty(stop - start, dtype=np.uint8)
        _read(shards, layout, first, end, memoryview(staging.data), config)
        target[start:stop].copy_(torch.from_numpy(staging))


def _check_fits(shards: Shards, num_bytes: int, where: str, free: int, share: float, hint: str = "") -> None:
    """Raise ValueError where a split needs more than a share of the free memory."""
    if num_bytes > share * free:
        raise ValueError(
            f"{shards.folder} takes {num_bytes / 1e9:.2f} GB as it is stored, {where} has "
            f"{free / 1e9:.2f} GB free. Use {hint}--stream.kind indexed, or pack as uint8."
        )


def _share_memory(shards: Shards, layout: _Layout, config: StreamConfig) -> mmap.mmap:
    """Have one rank of each machine load the split, and map its memory in the others.

    The memory has no name in any file system, so nothing stays behind however the ranks end.
    """
    group = dist.new_group(backend="gloo", timeout=LOAD_TIMEOUT)  # the others wait while one loads
    host = (socket.gethostname(), Path("/proc/sys/kernel/random/boot_id").read_text())
    hosts = _gather(host, group)
    is_leader = hosts.index(host) == dist.get_rank()
    file, problem, memory = -1, "", None
    if is_leader:
        try:
            _check_fits(shards, layout.num_bytes, *_host_memory())
            file = os.memfd_create("psla-fast-resident")
            os.ftruncate(file, max(1, layout.num_bytes))
            memory = mmap.mmap(file, 0)
            _read(shards, layout, 0, len(shards), memoryview(memory), config)
        except (ValueError, OSError) as error:  # ShardError is a ValueError
            problem = str(error)
    offers = _gather((os.getpid(), file, problem), group)
    pid, shared, problem = offers[hosts.index(host)]
    problems = [text for _, _, text in offers if text]
    if not problems and memory is None:
        try:
            with open(f"/proc/{pid}/fd/{shared}", "rb") as opened:
                memory = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            problem = f"the memory of process {pid} can't be shared ({error}). Use --stream.place host."
    problems += [text for text in _gather(problem, group) if text]
    dist.destroy_process_group(group)
    if file >= 0:
        os.close(file)
    if problems or memory is None:
        raise ShardError(problems[0])
    return memory


def _gather(value: Item, group: dist.ProcessGroup | None) -> list[Item]:
    """Give every rank's value."""
    values: list[Item | None] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group)
    return cast(list[Item], values)


def _host_memory() -> tuple[str, int, float]:
    return "the machine", available_memory(), HOST_SHARE
