"""Plans: the draws of an epoch -> what each batch of a rank holds, any step in O(1) after the draws."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from psla_fast.sampling import Draws, SamplingConfig, compute_draws, compute_sample_weights
from psla_fast.shards import Shards


@dataclass(frozen=True)
class BatchPlan:
    """Clip ids (B,), partner ids (B,) with -1 for none, and λ (B,) of one rank's part of a global batch."""

    clip_ids: npt.NDArray[np.int64]
    partner_ids: npt.NDArray[np.int64]
    lam: npt.NDArray[np.float32]


class DrawPlan:
    """The training batches of a rank: its slice of each global batch of an epoch's draws.

    Every rank has the same number of batches; draws that don't fill a last global batch are left out of the
    epoch.
    """

    def __init__(
        self,
        shards: Shards,
        config: SamplingConfig,
        seed: int,
        global_batch: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Raise ValueError where ranks can't share a batch evenly, or an epoch has no whole batch."""
        if global_batch % world_size:
            raise ValueError(
                f"a global batch of {global_batch} can't be shared by {world_size} ranks evenly."
            )
        num_draws = config.num_draws or len(shards)
        if num_draws < global_batch:
            raise ValueError(
                f"an epoch has {num_draws} draws, fewer than one batch of {global_batch}. "
                "Lower --optim.batch-size."
            )
        self._config, self._seed = config, seed
        self._global_batch, self._rank, self._rank_batch = global_batch, rank, global_batch // world_size
        self._weights = compute_sample_weights(shards.index.indptr, shards.index.indices, len(shards.classes))
        self.num_steps = num_draws // global_batch
        content = [shards.fingerprint, asdict(config), seed, global_batch]
        digest = hashlib.sha256(json.dumps(content).encode() + self._weights.tobytes())
        self.fingerprint = digest.hexdigest()
        self._drawn: tuple[int, Draws] | None = None

    def draws(self, epoch: int) -> Draws:
        """Give the draws of an epoch, all ranks' (the last asked for is kept)."""
        if self._drawn is None or self._drawn[0] != epoch:
            self._drawn = (epoch, compute_draws(self._config, self._weights, self._seed, epoch))
        return self._drawn[1]

    def batches(self, epoch: int, start_step: int = 0) -> Iterator[BatchPlan]:
        """Yield this rank's batches of an epoch from a step on."""
        draws = self.draws(epoch)
        for step in range(start_step, self.num_steps):
            first = step * self._global_batch + self._rank * self._rank_batch
            rows = slice(first, first + self._rank_batch)
            yield BatchPlan(draws.clip_ids[rows], draws.partner_ids[rows], draws.lam[rows])


class SequentialPlan:
    """Every clip once, in order, for evaluation; rank r takes clips r, r + world size and so on."""

    def __init__(self, num_clips: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        """Plan for one rank."""
        self.clip_ids = np.arange(rank, num_clips, world_size, dtype=np.int64)
        self._batch_size = batch_size

    def batches(self) -> Iterator[BatchPlan]:
        """Yield the batches; the last may be shorter."""
        for first in range(0, len(self.clip_ids), self._batch_size):
            clip_ids = self.clip_ids[first : first + self._batch_size]
            yield BatchPlan(clip_ids, np.full(len(clip_ids), -1), np.ones(len(clip_ids), dtype=np.float32))
