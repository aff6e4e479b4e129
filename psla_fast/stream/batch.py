"""Batch: what a stream yields; StreamConfig: which executor, and how it reads."""

# B clips of a batch, R rows (the clips, then room for as many partners), T frames, F mels, C classes

import os
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
from torch import Tensor

Kind = Literal["indexed", "resident", "dali", "webdataset"]


@dataclass(frozen=True)
class StreamConfig:
    """How shards are read while training."""

    kind: Kind = "indexed"
    """Executor of the draws. indexed: threads pread members straight into batch slabs, for local disks.
    resident: the split is loaded once into memory. dali: NVIDIA's reader. webdataset: sequential shards, for
    http(s)://, s3:// and slow disks."""
    num_threads: int = field(default_factory=lambda: min(4, len(os.sched_getaffinity(0))))
    """Reading threads of a rank (dali: readers; webdataset: requests at a time). More than there are cores
    hinder each other."""
    read_ahead: int = 4
    """Batches read ahead (indexed, webdataset, resident in host memory)."""
    check_crc: bool = False
    """Check the crc32 of each clip that is read whole, in evaluation too; remote clips always are checked."""
    on_error: Literal["raise", "skip"] = "raise"
    """What a clip that can't be read does while training: stop the run, or be counted and replaced by another
    draw of the epoch. indexed and webdataset only."""
    buckets: tuple[int, ...] = ()
    """Lengths in frames, ascending, the last one input.clip_frames: batches of near-equal lengths, padded to
    the smallest that holds their clips. Empty: every batch has input.clip_frames."""
    bucket_by: Literal["frames", "clips"] = "frames"
    """What batches of all buckets have in common. clips: optim.batch_size clips; frames: about as many frames
    as optim.batch_size of the longest bucket, so short clips come in multiples of that."""
    bucket_window: int = 64
    """Batches are put together from the draws of so many times optim.batch_size."""
    place: Literal["device", "host", "shared"] = "device"
    """Where resident keeps the split: on each rank's device, in each rank's host memory, or once a machine in
    host memory that its ranks share."""
    cache: str = ""
    """Folder in which webdataset keeps whole remote shards, checked, for the next epoch; empty: nowhere."""
    lanes: int = 8
    """webdataset: parts of an epoch read side by side; a global batch has clips of each. Best a multiple of
    the number of ranks."""
    shuffle_clips: int = 500
    """webdataset: a lane's draws move by at most so many places from the shards' own order. About lanes ×
    shuffle_clips clips are held in memory."""
    dali_buffer_mb: int = 2048
    """dali: memory, the device's, of batches that are read together and put into draw order; taken twice."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        for name in (
            "num_threads",
            "read_ahead",
            "bucket_window",
            "lanes",
            "shuffle_clips",
            "dali_buffer_mb",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"stream.{name} is {getattr(self, name)}; give 1 or more.")
        if list(self.buckets) != sorted({*self.buckets}) or any(frames < 1 for frames in self.buckets):
            raise ValueError(f"stream.buckets is {list(self.buckets)}; give ascending numbers of frames.")
        if self.kind in ("resident", "dali") and self.on_error == "skip":
            raise ValueError(f"stream.kind {self.kind} can't skip clips. Use --stream.kind indexed.")
        if self.cache and self.kind != "webdataset":
            raise ValueError(f"stream.cache is for --stream.kind webdataset, not {self.kind}. Leave it out.")
        if self.place != "device" and self.kind != "resident":
            raise ValueError(f"stream.place is for --stream.kind resident, not {self.kind}. Leave it out.")
        if self.kind == "dali" and self.check_crc:
            raise ValueError("stream.kind dali can't check crc32. Use --stream.kind indexed.")


@dataclass(frozen=True)
class BatchShape:
    """The shape of a rank's batch: B clips of at most T frames, and room for as many partners or none."""

    batch_size: int
    num_frames: int
    partners: bool

    @property
    def num_rows(self) -> int:
        """Rows R of the slab."""
        return self.batch_size * (2 if self.partners else 1)


@dataclass(frozen=True)
class Batch:
    """B clips and their mixup partners as stored: rows 0…B-1 are the clips, the rows after them partners.

    fbank (R, T, F) in the stored dtype, 0 from each row's num_frames (R,) on; targets (R, C) multi-hot;
    partner_row (B,) is the row a clip is mixed with, its own where it isn't; lam (B,) in [0, 1]; clip_ids
    (≤ B,): fewer than B only in the last batch of a sequential pass, whose spare rows have 0 frames; skipped:
    what was wrong with the clips that other draws replace.
    """

    clip_ids: npt.NDArray[np.int64]
    fbank: Tensor
    num_frames: Tensor
    targets: Tensor
    partner_row: Tensor
    lam: Tensor
    skipped: tuple[str, ...] = ()
