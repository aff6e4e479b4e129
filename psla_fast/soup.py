"""Soup: checkpoints of one model -> the mean of those that score best together on a validation split."""

# N clips, B clips of a batch, T frames, F mels

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from psla_fast.augment import LOG_FLOOR, pad_and_normalise
from psla_fast.checkpoint import Card, Checkpoint, load_checkpoint
from psla_fast.distributed import start_world
from psla_fast.ensemble import Scoring, hard_targets, refuse_eval, refuse_shared_clips
from psla_fast.evaluate import check_compatible, score_shards
from psla_fast.metrics import compute_metrics
from psla_fast.models import use_channels_last
from psla_fast.recipe import read_recipe
from psla_fast.sampling import SamplingConfig, compute_draws, compute_sample_weights
from psla_fast.shards import Shards, exists_split, join, open_shards
from psla_fast.train.averaging import RunningMean, add_checkpoint
from psla_fast.train.batch_norm import find_batch_norms, recompute_statistics

SamplingKind = Literal["balanced", "shuffle"]


class BatchNormAnew:
    """Measures BatchNorm's statistics of weights on draws of a training split, without augmentation.

    The same draws each time, by a fixed seed, cut or padded as the model hears them. There is neither
    drop-connect nor dropout, so that the statistics are those of what inference sees; they are whole batches'
    means and variances, averaged.
    """

    def __init__(
        self, card: Card, shards: Shards, num_clips: int, scoring: Scoring, sampling: SamplingKind
    ) -> None:
        """Raise ValueError where the split is another model's, or there is nothing to measure."""
        check_compatible(card, shards, Path("the checkpoint"))
        if num_clips < 1:
            raise ValueError(f"--batch-norm-clips is {num_clips}; give 1 or more.")
        self._shards, self._scoring = shards, scoring
        self._world = start_world(scoring.device)
        self.card = replace(card, model=replace(card.model, drop_connect=0.0, dropout=0.0))
        index = shards.index
        weights = compute_sample_weights(index.indptr, index.indices, len(shards.classes))
        config = SamplingConfig(sampling, num_clips, mixup_rate=0.0)
        self._batches = self._plan(compute_draws(config, weights, seed=0, epoch=1).clip_ids)
        self.num_clips = sum(len(ids) for ids, _ in self._batches)

    def measure(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Give the state with statistics measured for its weights."""
        model = Checkpoint(self.card, state, 0, {}).build().to(self._world.device)
        if not find_batch_norms(model):
            raise ValueError(f"{self.card.model.name} has no BatchNorm. Leave --batch-norm-clips out.")
        use_channels_last(model)
        device = self._world.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(0)  # of networks with randomness of their own
            masks = bool(getattr(model, "mask_padding", False))
            recompute_statistics(model, self._read(masks), self._scoring.precision, self._world)
        return {name: value.cpu() for name, value in model.state_dict().items()}

    def _plan(self, chosen: npt.NDArray[np.int64]) -> list[tuple[npt.NDArray[np.int64], int]]:
        """Put clips into batches of one length each; a length's last, smaller one only where it is alone."""
        spec, size = self.card.input, self._scoring.batch_size
        lengths = spec.buckets or (spec.clip_frames,)
        bucket = np.searchsorted(lengths[:-1], self._shards.index.num_frames[chosen])
        plan = []
        for number, frames in enumerate(lengths):
            ids = chosen[bucket == number]
            whole = len(ids) // size * size or len(ids)
            plan += [(ids[start : start + size], frames) for start in range(0, whole, size)]
        return plan

    def _read(self, masks_padding: bool) -> Iterator[tuple[Tensor, ...]]:
        for ids, frames in self._batches:
            fbank = torch.zeros(len(ids), frames, self.card.input.num_mels)
            lengths = torch.zeros(len(ids), dtype=torch.int32)
            for row, clip in enumerate(ids.tolist()):
                clip_fbank = torch.from_numpy(self._shards.fbank(clip)[:frames])
                fbank[row, : len(clip_fbank)], lengths[row] = clip_fbank, len(clip_fbank)
            fbank = fbank.clamp(min=LOG_FLOOR).to(self._world.device)  # float16 rounds silence to below it
            lengths = lengths.to(self._world.device)
            x = pad_and_normalise(fbank, lengths, self.card.input)
            yield (x, lengths) if masks_padding else (x,)


@dataclass(frozen=True)
class Decision:
    """A member of a soup, the mAP of the mean with it, and whether it was kept; the first: its own mAP."""

    path: Path
    mean_ap: float
    kept: bool


class GreedySoup:
    """Greedy soup of checkpoints by the mAP of a validation split (Wortsman et al. 2022, recipe 1).

    Members are taken from the best to the worst, those given first among equals; one is kept where the mAP of
    the mean with it isn't less than without. So the soup is never below the best member. `mean` is the kept
    members' average, `state` that with BatchNorm as it was scored.
    """

    def __init__(
        self, paths: Sequence[Path], shards: Shards, scoring: Scoring, anew: BatchNormAnew | None = None
    ) -> None:
        """Take the members; raises ValueError where the split is another model's."""
        if len(paths) < 2:
            raise ValueError(f"{len(paths)} checkpoints given; a soup is of 2 or more.")
        self.paths, self.card = list(paths), load_checkpoint(paths[0]).card
        check_compatible(self.card, shards, paths[0])
        self._shards, self._scoring, self._anew = shards, scoring, anew
        self._targets = hard_targets(shards)
        self.state: dict[str, Tensor] = {}
        self.epoch = 0

    def score_members(self) -> list[tuple[float, Path]]:
        """Give the mAP of each member with its own weights, in the given order."""
        return [(self._measure(self._with(RunningMean(), path)[0].mean()), path) for path in self.paths]

    def choose(self, scored: Sequence[tuple[float, Path]]) -> Iterator[Decision]:
        """Yield each member's decision, from the best on; `state` and `epoch` are the soup's at the end."""
        (best, first), *others = sorted(scored, key=lambda pair: -pair[0])
        mean, self.epoch = self._with(RunningMean(), first)
        self.state = mean.mean()
        yield Decision(first, best, True)
        for _, path in others:
            candidate, epoch = self._with(mean.copy(), path)
            state = candidate.mean()
            if self._anew:
                state = self._anew.measure(state)
            mean_ap = self._measure(state)
            if mean_ap >= best:
                best, mean, self.state = mean_ap, candidate, state
                self.epoch = max(self.epoch, epoch)
            yield Decision(path, mean_ap, mean is candidate)

    def _with(self, mean: RunningMean, path: Path) -> tuple[RunningMean, int]:
        return mean, add_checkpoint(mean, path, self.card, self.paths[0])

    def _measure(self, state: dict[str, Tensor]) -> float:
        world, scoring = start_world(self._scoring.device), self._scoring
        model = Checkpoint(self.card, state, 0, {}).build().to(world.device)
        use_channels_last(model)
        size, precision = scoring.batch_size, scoring.precision
        scores = score_shards(model, self._shards, self.card.input, size, precision, world)
        return compute_metrics(scores, self._targets).mean_ap


def refuse_eval_of_runs(data: str, shards: Shards, paths: Sequence[Path], flag: str) -> None:
    """Raise ValueError where a split to choose by is an eval split: by name, or by the members' own runs.

    A checkpoint's run is the folder above that of its file, where that has a config.toml.
    """
    refuse_eval(data, flag)
    for config in sorted({path.absolute().parent.parent / "config.toml" for path in paths}):
        if not config.is_file():
            continue
        flat = read_recipe(str(config))
        folder, val, name = (str(flat.get(f"data.{part}", "")) for part in ("shards", "val", "eval"))
        evaluation = join(folder, name)
        if not folder or not name or name == val or not exists_split(evaluation):
            continue
        with open_shards(evaluation) as measured:
            refuse_shared_clips(shards.keys, measured.keys, f"{flag} {data} and {config.parent}'s {name}")
