"""Finite: losses -> the first step of an interval whose loss is NaN or infinite, and the clips to blame."""

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from psla_fast.shards import ShardError, Shards
from psla_fast.stream import BatchPlan

NEVER = 2**62
NUM_NAMED = 4


class FiniteGuard:
    """Watches the loss on the device, so that no step waits for it; by choice undoes what a bad step did.

    The optimiser's update is left to a GradScaler, which leaves it out where gradients aren't finite; this
    puts back the statistics of BatchNorm, which the forward pass has changed by then.
    """

    def __init__(self, model: nn.Module, skips: bool, device: torch.device) -> None:
        """Watch a model's steps; `skips`: bad ones are left out."""
        self._skips = skips
        self._buffers = [b for b in model.buffers() if b.is_floating_point()] if skips else []
        self._saved: list[Tensor] = []
        self._first = torch.full((), NEVER, device=device, dtype=torch.int64)
        self._count = torch.zeros((), device=device, dtype=torch.int64)

    def before_step(self) -> None:
        """Remember the buffers."""
        self._saved = [buffer.clone() for buffer in self._buffers]

    def after_step(self, step: int, loss: Tensor) -> Tensor:
        """Note a step's loss (detached); returns it, or 0 for a step that is left out."""
        bad = ~loss.isfinite()
        self._first = torch.where(bad, self._first.clamp(max=step), self._first)
        self._count += bad
        if not self._skips:
            return loss
        for buffer, saved in zip(self._buffers, self._saved, strict=True):
            buffer.copy_(torch.where(bad, saved, buffer))
        return torch.where(bad, torch.zeros_like(loss), loss)

    def take(self) -> tuple[int, int]:
        """Give the first bad step since the last call, NEVER for none, and how many; of all ranks.

        Waits for the device. Every rank must call it.
        """
        if dist.is_initialized():
            dist.all_reduce(self._first, dist.ReduceOp.MIN)
            dist.all_reduce(self._count)
        first, count = int(self._first), int(self._count)
        self._first.fill_(NEVER)
        self._count.zero_()
        return first, count


def describe_batch(shards: Shards, plan: BatchPlan) -> str:
    """Name the clips of a batch that are damaged or not finite in the shards; if none is, some of it."""
    clip_ids = dict.fromkeys(plan.row_ids.tolist())
    bad = [clip_id for clip_id in clip_ids if not _is_sound(shards, clip_id)]
    keys = [shards.index.key[clip_id].decode() for clip_id in (bad or clip_ids)]
    named = ", ".join(keys[:NUM_NAMED])
    if len(keys) > NUM_NAMED:
        named += f" and {len(keys) - NUM_NAMED} more"
    if bad:
        return f"damaged or not finite in the shards: {named}"
    return f"finite in the shards, so the step itself went wrong: {named}"


def _is_sound(shards: Shards, clip_id: int) -> bool:
    try:
        return bool(np.isfinite(shards.fbank(clip_id)).all())
    except ShardError:
        return False
