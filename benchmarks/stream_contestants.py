"""Other libraries in benchmarks/stream.py: each builds a function that reads clips and returns how many."""

# B clips of a batch, T frames, F mels, C classes

from collections.abc import Callable
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from psla_fast.classes import compute_targets
from psla_fast.shards import Shards

Read = Callable[[], int]
NUM_WORKERS = 2


def webdataset(
    shards: Shards,
    shuffle: Literal["none", "clips", "batches too"],
    batch_size: int,
    num_frames: int,
) -> Read:
    """WebDataset's WebLoader over the same tars, one pass.

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
    loader = wds.WebLoader(batches, batch_size=None, num_workers=NUM_WORKERS, persistent_workers=True)
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
