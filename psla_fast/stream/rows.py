"""Rows: a plan -> what its batch says of each row beside the fbanks: lengths, targets, partners, λ."""

# B clips of a batch, R rows, C classes

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from psla_fast.shards import Shards
from psla_fast.stream.plan import BatchPlan


class Rows(NamedTuple):
    """Batch's num_frames (R,), targets (R, C), partner_row (B,) and lam (B,), on the host."""

    num_frames: Tensor
    targets: Tensor
    partner_row: Tensor
    lam: Tensor

    def to(self, device: torch.device) -> "Rows":
        """Copy to a GPU without waiting for it; on a CPU they stay what they are."""
        if device.type != "cuda":
            return self
        return Rows(*(tensor.pin_memory().to(device, non_blocking=True) for tensor in self))


def count_frames(shards: Shards, plan: BatchPlan) -> npt.NDArray[np.int64]:
    """Give the frames (R,) that are read of each row: at most the batch's, 0 for rows that stay empty."""
    num_frames = np.zeros(plan.shape.num_rows, dtype=np.int64)
    num_frames[: len(plan.row_ids)] = shards.index.num_frames[plan.row_ids]
    return np.minimum(num_frames, plan.shape.num_frames)


def describe_rows(
    shards: Shards, plan: BatchPlan, row_ids: npt.NDArray[np.int64], num_frames: npt.NDArray[np.int64]
) -> Rows:
    """Describe a batch whose rows hold these clips (≤ R,), of these lengths (R,)."""
    shape, num_clips, num_read = plan.shape, len(plan.clip_ids), len(row_ids)
    targets = np.zeros((shape.num_rows, len(shards.classes)), dtype=np.float32)
    targets[:num_read] = shards.targets(row_ids)
    partner_row = np.arange(shape.batch_size)
    partner_row[:num_clips][plan.partner_ids >= 0] = np.arange(num_clips, num_read)
    lam = np.ones(shape.batch_size, dtype=np.float32)
    lam[:num_clips] = plan.lam
    return Rows(*(torch.from_numpy(array) for array in (num_frames, targets, partner_row, lam)))
