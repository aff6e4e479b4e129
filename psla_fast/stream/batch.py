"""Batch: what a stream yields; StreamConfig: how it reads."""

# B clips of a batch, R rows (the clips, then room for as many partners), T frames, F mels, C classes

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from torch import Tensor


@dataclass(frozen=True)
class StreamConfig:
    """How shards are read while training."""

    kind: Literal["indexed"] = "indexed"
    """Executor of the draws; indexed: threads pread members straight into batch slabs."""
    num_threads: int = 4
    """Reading threads of a rank."""
    read_ahead: int = 4
    """Batches read ahead."""
    check_crc: bool = False
    """Check each clip's crc32 where the whole clip is read."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if self.num_threads < 1 or self.read_ahead < 1:
            raise ValueError(
                f"stream.num_threads is {self.num_threads}, stream.read_ahead {self.read_ahead}; "
                "give 1 or more."
            )


@dataclass(frozen=True)
class BatchShape:
    """The fixed shape of a rank's batches: B clips of at most T frames, and room for partners or none."""

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

    fbank (R, T, F) in the stored dtype, meaningful up to each row's num_frames (R,), whatever lies behind;
    targets (R, C) multi-hot; partner_row (B,) is the row a clip is mixed with, its own where it isn't; lam
    (B,) in [0, 1]; clip_ids (≤ B,): fewer than B only in the last batch of a sequential pass, whose spare
    rows have 0 frames.
    """

    clip_ids: npt.NDArray[np.int64]
    fbank: Tensor
    num_frames: Tensor
    targets: Tensor
    partner_row: Tensor
    lam: Tensor
