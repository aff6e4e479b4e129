"""Plans: the draws of an epoch -> what each batch of a rank holds, any step in O(1) after the draws."""

# D draws of an epoch, G clips of the smallest global batch, B clips of a rank's batch, R rows of its slab

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import count

import numpy as np
import numpy.typing as npt

from psla_fast.sampling import Draws, SamplingConfig, compute_draws, compute_sample_weights
from psla_fast.shards import Shards
from psla_fast.stream.batch import BatchShape, StreamConfig
from psla_fast.stream.order import Steps, arrange_by_shard, bucket_sizes, make_steps


@dataclass(frozen=True)
class BatchPlan:
    """What one batch of a rank holds, in a shape (B, T).

    Clip ids (≤ B,), partner ids alike with -1 for none, and λ; `draws` and the clips' positions (≤ B,) in
    them say by which draws unreadable clips may be replaced (none: not at all).
    """

    clip_ids: npt.NDArray[np.int64]
    partner_ids: npt.NDArray[np.int64]
    lam: npt.NDArray[np.float32]
    shape: BatchShape
    positions: npt.NDArray[np.int64] | None = None
    draws: Draws | None = None

    @cached_property
    def row_ids(self) -> npt.NDArray[np.int64]:
        """The clips of all rows that are read (≤ R,): the batch's clips, then the partners."""
        return np.concatenate([self.clip_ids, self.partner_ids[self.partner_ids >= 0]])

    def replacement(self, row: int, attempt: int) -> int | None:
        """Give the clip that stands in for an unreadable one: that of another draw of the epoch.

        A function of the draws and the clip's place in them alone, so a resume finds the same; attempts count
        from 1. None where nothing may stand in.
        """
        if self.draws is None or self.positions is None:
            return None
        if row < len(self.clip_ids):
            ids, position = self.draws.clip_ids, int(self.positions[row])
        else:
            ids = self.draws.partner_ids[self.draws.partner_ids >= 0]
            of_partner = self.positions[self.partner_ids >= 0][row - len(self.clip_ids)]
            position = int((self.draws.partner_ids[:of_partner] >= 0).sum())
        stride = next(n for n in count(len(ids) // 7 + 1) if math.gcd(n, len(ids)) == 1)  # visits all draws
        return int(ids[(position + attempt * stride) % len(ids)])


@dataclass(frozen=True)
class PlanConfig:
    """All that decides which clips a step of an epoch holds, beside the shards."""

    sampling: SamplingConfig
    stream: StreamConfig
    seed: int
    global_batch: int
    clip_frames: int

    def __post_init__(self) -> None:
        """Refuse buckets that don't end at the clips' length."""
        buckets = self.stream.buckets
        if buckets and buckets[-1] != self.clip_frames:
            raise ValueError(
                f"stream.buckets ends at {buckets[-1]} frames, input.clip_frames is {self.clip_frames}. "
                "Make them equal."
            )

    @property
    def by_shard(self) -> bool:
        """Tell whether an epoch goes through the shards in turn, as webdataset reads them."""
        return self.stream.kind == "webdataset"


class DrawPlan:
    """The training batches of a rank: its slice of each global batch of an epoch's draws.

    Every rank has the same number of batches, of the same shapes. Draws that don't fill a last global batch
    are left out of the epoch; all others are used once.
    """

    def __init__(self, shards: Shards, config: PlanConfig, rank: int = 0, world_size: int = 1) -> None:
        """Raise ValueError where ranks can't share a batch evenly, or an epoch has no whole batch."""
        global_batch = config.global_batch
        if global_batch % world_size:
            raise ValueError(
                f"a global batch of {global_batch} can't be shared by {world_size} ranks evenly."
            )
        num_draws = config.sampling.num_draws or len(shards)
        if num_draws < global_batch:
            raise ValueError(
                f"an epoch has {num_draws} draws, fewer than one batch of {global_batch}. "
                "Lower --optim.batch-size."
            )
        self._shards, self._config, self._rank, self._world_size = shards, config, rank, world_size
        self._weights = compute_sample_weights(shards.index.indptr, shards.index.indices, len(shards.classes))
        self._num_used = num_draws // global_batch * global_batch
        self._epoch: tuple[int, Draws, Steps] | None = None
        self.identity = self._identify()

    def _identify(self) -> dict[str, object]:
        """What a saved position in an epoch depends on, part by part."""
        config, stream = self._config, self._config.stream
        order: dict[str, object] = {"buckets": list(stream.buckets)}
        if stream.buckets:
            order |= {"bucket_by": stream.bucket_by, "bucket_window": stream.bucket_window}
        if config.by_shard:
            order |= {"lanes": stream.lanes, "shuffle_clips": stream.shuffle_clips}
        return {
            "shards": self._shards.fingerprint,
            "sample weights": hashlib.sha256(self._weights.tobytes()).hexdigest(),
            "seed": config.seed,
            "optim.batch_size": config.global_batch,
            **{f"sampling.{name}": value for name, value in asdict(config.sampling).items()},
            **{f"stream.{name}": value for name, value in order.items()},
            "stream.kind": "webdataset" if config.by_shard else "any in draw order",
        }

    @property
    def shapes(self) -> list[BatchShape]:
        """The shapes this rank's batches may have."""
        config = self._config
        sizes = bucket_sizes(config.stream, config.global_batch, config.clip_frames)
        partners = config.sampling.mixup_rate > 0
        wanted = {(size, frames) for frames, most in sizes.items() for size in (most, config.global_batch)}
        return [BatchShape(size // self._world_size, frames, partners) for size, frames in sorted(wanted)]

    def draws(self, epoch: int) -> Draws:
        """Give the draws of an epoch that are used, all ranks' (the last asked for is kept)."""
        return self._plan_epoch(epoch)[0]

    def num_steps(self, epoch: int) -> int:
        """Give the number of batches of an epoch; the same in all, but with buckets of equal frames."""
        if self._config.stream.buckets and self._config.stream.bucket_by == "frames":
            return len(self._plan_epoch(epoch)[1].num_frames)
        return self._num_used // self._config.global_batch

    def batches(self, epoch: int, start_step: int = 0) -> Iterator[BatchPlan]:
        """Yield this rank's batches of an epoch from a step on."""
        draws, steps = self._plan_epoch(epoch)
        partners = self._config.sampling.mixup_rate > 0
        for step in range(start_step, len(steps.num_frames)):
            first, end = steps.starts[step], steps.starts[step + 1]
            share = int(end - first) // self._world_size
            rows = steps.positions[first + self._rank * share :][:share]
            shape = BatchShape(share, int(steps.num_frames[step]), partners)
            ids = draws.clip_ids[rows], draws.partner_ids[rows]
            yield BatchPlan(*ids, draws.lam[rows], shape, rows, draws)

    def batch_sizes(self, epoch: int) -> npt.NDArray[np.int64]:
        """Give the clips of each global batch (steps,) of an epoch."""
        return np.diff(self._plan_epoch(epoch)[1].starts)

    def _plan_epoch(self, epoch: int) -> tuple[Draws, Steps]:
        if self._epoch is None or self._epoch[0] != epoch:
            config, index = self._config, self._shards.index
            draws = compute_draws(config.sampling, self._weights, config.seed, epoch)
            used = slice(self._num_used)
            draws = Draws(draws.clip_ids[used], draws.partner_ids[used], draws.lam[used])
            if config.by_shard:
                draws = arrange_by_shard(draws, index, config.stream, config.global_batch, config.seed, epoch)
            lengths = index.num_frames[draws.clip_ids]
            sizes = bucket_sizes(config.stream, config.global_batch, config.clip_frames)
            window = config.stream.bucket_window * config.global_batch
            steps = make_steps(lengths, sizes, config.global_batch, window, config.seed, epoch)
            self._epoch = (epoch, draws, steps)
        return self._epoch[1:]


def explain_difference(saved: Mapping[str, object], now: Mapping[str, object]) -> str:
    """Say in which parts two identities differ, for instance "seed: 0, now 1"; empty where they are equal."""
    parts = []
    for name in sorted({*saved, *now}):
        before, after = saved.get(name), now.get(name)
        if before != after:
            hashed = name in ("shards", "sample weights")
            parts.append(f"{name}: others than before" if hashed else f"{name}: {before}, now {after}")
    return "; ".join(parts)


class SequentialPlan:
    """Every clip once, in order, for evaluation; rank r takes clips r, r + world size and so on.

    With buckets a clip's batch has the smallest bucket's frames that hold it, whatever else is in the batch;
    clips then come bucket by bucket.
    """

    def __init__(
        self,
        num_frames: npt.NDArray[np.integer],
        batch_size: int,
        buckets: tuple[int, ...],
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Plan for one rank and clips of these lengths (N,); those above the last of `buckets` are cut."""
        mine = np.arange(rank, len(num_frames), world_size, dtype=np.int64)
        bucket = np.searchsorted(buckets[:-1], num_frames[mine])
        self.clip_ids = mine[np.argsort(bucket, kind="stable")]
        self._ends = np.cumsum(np.bincount(bucket, minlength=len(buckets)))
        self._batch_size, self._buckets = batch_size, buckets

    @property
    def shapes(self) -> list[BatchShape]:
        """The shapes the batches may have."""
        return [BatchShape(self._batch_size, frames, partners=False) for frames in self._buckets]

    def batches(self) -> Iterator[BatchPlan]:
        """Yield the batches; the last of a bucket may hold fewer clips."""
        first = 0
        for end, shape in zip(self._ends.tolist(), self.shapes, strict=True):
            for start in range(first, end, self._batch_size):
                clip_ids = self.clip_ids[start : min(end, start + self._batch_size)]
                unmixed = np.full(len(clip_ids), -1), np.ones(len(clip_ids), dtype=np.float32)
                yield BatchPlan(clip_ids, *unmixed, shape)
            first = end
