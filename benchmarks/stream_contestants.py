"""What benchmarks/stream.py measures: each builds a function that reads clips and returns how many."""

# B clips of a batch, T frames, F mels, C classes

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from psla_fast.classes import compute_targets
from psla_fast.shards import Shards
from psla_fast.stream import BatchPlan, BatchShape, StreamConfig, open_stream

Read = Callable[[], int]
NUM_WORKERS = 2


def indexed(
    shards: Shards, plans: Sequence[BatchPlan], config: StreamConfig, batch_size: int, num_frames: int
) -> Read:
    """Ours."""
    partners = any((plan.partner_ids >= 0).any() for plan in plans)
    shape = BatchShape(batch_size, num_frames, partners)
    stream = open_stream(shards, config, [shape], torch.device("cpu"))
    return lambda: sum(len(batch.clip_ids) for batch in stream.batches(iter(plans)))


def bare_pread(
    shards: Shards, plans: Sequence[BatchPlan], num_threads: int, num_buffers: int, num_frames: int
) -> Read:
    """The ceiling: the same members in the same order, all arguments known beforehand, no batch handed over.

    One buffer, written over again and again, may stay in the cache. A loader whose consumer keeps a batch
    while the next is read needs two.
    """
    rows = [np.concatenate([plan.clip_ids, plan.partner_ids[plan.partner_ids >= 0]]) for plan in plans]
    num_mels, itemsize = shards.fbank_config.num_mels, shards.storage.numpy.itemsize
    shape = (num_buffers, max(map(len, rows)), num_frames, num_mels)
    buffers = np.zeros(shape, dtype=shards.storage.numpy)
    index, targets = shards.index, [[memoryview(row).cast("B") for row in buffer] for buffer in buffers]
    batches = [
        [
            (
                shards.descriptor(int(index.shard[clip_id])),
                [target[: min(num_frames, int(index.num_frames[clip_id])) * num_mels * itemsize]],
                int(index.offset[clip_id]),
            )
            for clip_id, target in zip(ids.tolist(), targets[number % num_buffers], strict=False)
        ]
        for number, ids in enumerate(rows)
    ]

    def read_part(first: int) -> None:
        for batch in batches:
            for descriptor, target, offset in batch[first::num_threads]:
                os.preadv(descriptor, target, offset)

    pool = ThreadPoolExecutor(num_threads)

    def read() -> int:
        list(pool.map(read_part, range(num_threads)))
        return sum(len(plan.clip_ids) for plan in plans)

    return read


def webdataset(
    shards: Shards,
    num_workers: int,
    shuffle: Literal["none", "clips", "batches too"],
    batch_size: int,
    num_frames: int,
) -> Read:
    """WebDataset over the same tars, one pass; in this process, or as its WebLoader.

    shuffle: none; clips: shards, then clips in a buffer of 1000; batches too: once more behind the loader,
    so that clips of several workers meet in a batch.
    """
    import webdataset as wds

    num_mels, num_classes = shards.fbank_config.num_mels, len(shards.classes)

    def collate(samples: list[tuple[bytes, bytes]]) -> tuple[Tensor, Tensor]:
        batch = np.zeros((len(samples), num_frames, num_mels), dtype=np.float16)
        for row, (stored, _) in zip(batch, samples, strict=True):
            fbank = np.frombuffer(stored, dtype="<f2").reshape(-1, num_mels)[:num_frames]
            row[: len(fbank)] = fbank
        labels = [np.frombuffer(stored, dtype="<i4") for _, stored in samples]
        return torch.from_numpy(batch), torch.from_numpy(compute_targets(labels, num_classes))

    shuffled = shuffle != "none"
    dataset = wds.WebDataset(_tars(shards), shardshuffle=len(_tars(shards)) if shuffled else False)
    clips = (dataset.shuffle(1000) if shuffled else dataset).to_tuple("fbank", "labels")
    batches = clips.batched(batch_size, collation_fn=collate)
    loader = (
        wds.WebLoader(batches, batch_size=None, num_workers=num_workers, persistent_workers=True)
        if num_workers
        else batches
    )
    if shuffle == "batches too":
        loader = loader.unbatched().shuffle(1000).batched(batch_size)
    return lambda: sum(len(fbank) for fbank, _ in loader)


def dali(shards: Shards, padded: bool, num_batches: int, batch_size: int, num_frames: int) -> Read:
    """DALI's CPU reader over the same tars in order; unpadded it does less than the others: 998 frames.

    The two batches that it reads ahead between trials are counted to its favour.
    """
    from nvidia.dali import fn, pipeline_def, types

    num_mels, num_classes = shards.fbank_config.num_mels, len(shards.classes)

    @pipeline_def(batch_size=batch_size, num_threads=NUM_WORKERS, device_id=None, exec_dynamic=False)
    def pipeline() -> tuple[object, object]:
        stored, labels = fn.readers.webdataset(
            paths=_tars(shards),
            index_paths=[tar.removesuffix("tar") + "idx" for tar in _tars(shards)],
            ext=["fbank", "labels"],
            dtypes=[types.FLOAT16, types.INT32],
            missing_component_behavior="error",
            dont_use_mmap=True,  # a tar cut short would kill the process
        )
        fbank = fn.reshape(stored, shape=[-1, num_mels])
        return fn.pad(fbank, axes=[0], shape=[num_frames]) if padded else fbank, fn.pad(labels, fill_value=-1)

    running = pipeline()
    running.build()

    def read() -> int:
        for _ in range(num_batches):
            fbank, labels = running.run()
            fbank.as_tensor()
            classes: npt.NDArray[np.int32] = labels.as_array()
            compute_targets([row[row >= 0] for row in classes], num_classes)
        return num_batches * batch_size

    return read


def _tars(shards: Shards) -> list[str]:
    return [str(shards.shard_path(number)) for number in range(len(shards.index.shard_bytes))]
