"""Ensemble: checkpoints or score files on one split -> each one's metrics and those of their mean."""

# M members, N clips, C classes

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import h5py
import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from psla_fast.checkpoint import HUB_CONFIG, HUB_WEIGHTS, load_checkpoint
from psla_fast.distributed import DeviceName, start_world
from psla_fast.evaluate import Precision, check_compatible, score_shards
from psla_fast.metrics import Metrics, compute_metrics
from psla_fast.models import use_channels_last
from psla_fast.scores import read_pieces, write_scores
from psla_fast.shards import Shards, open_shards

MeanKind = Literal["arithmetic", "geometric"]
Scores = npt.NDArray[np.float32]
FLOOR = 1e-7  # of scores in a geometric mean
CLIPS_A_PIECE = 2048
FIT_ROUNDS = 20


@dataclass(frozen=True)
class Scoring:
    """How checkpoints are scored."""

    batch_size: int = 32
    precision: Precision = "auto"
    device: DeviceName = "auto"

    def __post_init__(self) -> None:
        """Refuse batches of no clip."""
        if self.batch_size < 1:
            raise ValueError(f"--batch-size is {self.batch_size}; give 1 or more.")


@dataclass(frozen=True)
class Combination:
    """How members' scores become one: kind of mean, and weights (M,) ≥ 0; none: all alike.

    A geometric mean is of scores clamped to [1e-7, 1].
    """

    mean: MeanKind = "arithmetic"
    weights: tuple[float, ...] = ()

    def weights_of(self, num_members: int) -> npt.NDArray[np.float64]:
        """Give the weights (M,) as they are to be summed; raises ValueError where they don't fit."""
        if not self.weights:
            return np.ones(num_members)
        weights = np.array(self.weights, np.float64)
        if len(weights) != num_members:
            raise ValueError(
                f"{len(weights)} weights for {num_members} models. Give --weights a number a model, in order."
            )
        if not np.isfinite(weights).all() or weights.min() < 0 or not weights.sum():
            shown = " ".join(f"{weight:g}" for weight in self.weights)
            raise ValueError(f"--weights is {shown}; give numbers of 0 or more, one of them above 0.")
        return weights


class WeightedMean:
    """Running weighted mean of scores (N, C), in float64."""

    def __init__(self, shape: tuple[int, ...], kind: MeanKind) -> None:
        """Start empty."""
        self.total = np.zeros(shape, np.float64)
        self._kind, self._weight = kind, 0.0

    def add(self, scores: Scores, weight: float) -> None:
        """Take in one more member's scores (N, C)."""
        for start in range(0, len(scores), CLIPS_A_PIECE):
            piece = slice(start, start + CLIPS_A_PIECE)
            self.total[piece] += weight * _as_summed(scores[piece], self._kind).astype(np.float64)
        self._weight += weight

    def mean(self) -> npt.NDArray[np.float64]:
        """Give the mean; nothing can be added afterwards, as it takes the sum's memory."""
        self.total /= self._weight
        return np.exp(self.total, out=self.total) if self._kind == "geometric" else self.total


class Ensemble:
    """Members on one split; after `measure` has ended, `scores` (N, C) are the mean's."""

    def __init__(
        self,
        members: Sequence[Path],
        shards: Shards,
        scoring: Scoring | None = None,
        combination: Combination | None = None,
    ) -> None:
        """Check what can be checked before a model scores for long; raises ValueError."""
        self.members, self.shards = check_members(members), shards
        self.scoring, self._combination = scoring or Scoring(), combination or Combination()
        self._weights = self._combination.weights_of(len(members))
        self.scores: npt.NDArray[np.float64] | None = None

    def measure(self) -> Iterator[tuple[str, Metrics]]:
        """Yield (path, metrics) of each member in order, then ("", metrics) of the mean of their scores.

        One member's scores are in memory at a time. Raises ValueError where a member has other clips or
        classes than the split, or scores that aren't finite.
        """
        targets = hard_targets(self.shards)
        mean = WeightedMean(targets.shape, self._combination.mean)
        for path, weight in zip(self.members, self._weights.tolist(), strict=True):
            scores = score_member(path, self.shards, self.scoring)
            mean.add(scores, weight)
            yield str(path), compute_metrics(scores, targets)
        self.scores = mean.mean()
        yield "", compute_metrics(self.scores, targets)

    def save(self, path: Path) -> None:
        """Write the mean as a score file."""
        assert self.scores is not None
        shards = self.shards
        write_scores(path, shards.keys, self.scores, hard_targets(shards), shards.classes.mids)


def ensemble_members(
    members: Sequence[Path],
    data: str | Path,
    batch_size: int,
    precision: Precision = "auto",
    device: DeviceName = "auto",
) -> Iterator[tuple[str, Metrics]]:
    """Yield what Ensemble.measure does, of a packed split's folder or URL and the plain mean."""
    with open_shards(data) as shards:
        yield from Ensemble(members, shards, Scoring(batch_size, precision, device)).measure()


def check_members(members: Sequence[Path]) -> list[Path]:
    """Give the members; raises ValueError where there is none, or one is missing or no model's folder."""
    if not members:
        raise ValueError("no model given. Pass checkpoints or score files.")
    for path in members:
        if not path.exists():
            raise ValueError(f"{path} not found. Pass a checkpoint or a score file.")
        if path.is_dir() and not ((path / HUB_WEIGHTS).is_file() and (path / HUB_CONFIG).is_file()):
            raise ValueError(
                f"{path} is a folder without {HUB_WEIGHTS} and {HUB_CONFIG}. Pass its files, {path}/*.pt."
            )
    return list(members)


def is_score_file(path: Path) -> bool:
    """Tell a score file (HDF5) from a checkpoint, by content."""
    return path.is_file() and bool(h5py.is_hdf5(path))


def hard_targets(shards: Shards) -> npt.NDArray[np.bool_]:
    """Give the targets (N, C) of a split's labels."""
    targets = np.zeros((len(shards), len(shards.classes)), np.bool_)
    clips = np.repeat(np.arange(len(shards)), np.diff(shards.index.indptr))
    targets[clips, shards.index.indices] = True
    return targets


def score_member(path: Path, shards: Shards, scoring: Scoring) -> Scores:
    """Score a split by a checkpoint, or read its scores from a file: (N, C) in the order of the split.

    Raises ValueError for other clips, other classes, or scores that aren't finite, and names the member.
    """
    if is_score_file(path):
        scores = _read_ordered(path, shards)
    else:
        checkpoint = load_checkpoint(path)
        check_compatible(checkpoint.card, shards, path)
        world = start_world(scoring.device)
        model = checkpoint.build().to(world.device)
        use_channels_last(model)
        spec, size = checkpoint.card.input, scoring.batch_size
        scores = score_shards(model, shards, spec, size, scoring.precision, world).numpy()
    for start in range(0, len(scores), CLIPS_A_PIECE):
        bad = ~np.isfinite(scores[start : start + CLIPS_A_PIECE])
        if bad.any():
            clip, index = (int(found[0]) for found in np.nonzero(bad))
            value, key = scores[start + clip, index], shards.keys[start + clip]
            raise ValueError(f"{path}: the score of {key}, class {index} is {value}. Leave that model out.")
    return scores


def _read_ordered(path: Path, shards: Shards) -> Scores:
    row_of = {key: row for row, key in enumerate(shards.keys)}
    scores = np.empty((len(shards), len(shards.classes)), np.float32)
    is_there, unknown = np.zeros(len(shards), np.bool_), []
    for keys, piece in read_pieces(path, shards.classes.mids):
        rows = np.array([row_of.get(key, -1) for key in keys], np.int64)
        known = rows >= 0
        unknown += [key for key, is_known in zip(keys, known.tolist(), strict=True) if not is_known]
        scores[rows[known]] = piece[known]
        is_there[rows[known]] = True
    if unknown or not is_there.all():
        missing = np.flatnonzero(~is_there)
        if len(missing):
            example = f"{shards.keys[missing[0]]} has no scores"
        else:
            example = f"{unknown[0]} is not in the data"
        raise ValueError(
            f"{path}: {len(missing)} clips missing, {len(unknown)} unknown ({example}). Give scores of "
            f"{shards.location}."
        )
    return scores


@dataclass(frozen=True)
class Fit:
    """Weights (M,) that sum to 1, and what they, the best member and equal weights reach in mAP."""

    weights: tuple[float, ...]
    mean_ap: float
    best_member: float
    alike: float


def fit_weights(members: Sequence[Path], shards: Shards, scoring: Scoring, mean: MeanKind) -> Fit:
    """Choose members' weights for the mAP of a validation split; deterministic.

    Greedy selection with replacement (Caruana et al. 2004): 20 times the member is added to the mean with
    which it scores best, the first of equals; a weight is how often a member was chosen up to the best mean.
    Equal weights stand unless that beats them, so no less than these and the best member is reached. The
    members' scores lie in a temporary file; two members' are in memory.
    """
    targets = hard_targets(shards)
    paths = check_members(members)
    with tempfile.TemporaryFile() as spill:
        for path in paths:
            score_member(path, shards, scoring).tofile(spill)

        def read(number: int) -> Scores:
            spill.seek(0)
            values: Scores = np.fromfile(
                spill, np.float32, targets.size, offset=number * targets.size * np.float32().itemsize
            )
            return values.reshape(targets.shape)

        return select_members(read, len(paths), targets, mean)


def select_members(
    read: Callable[[int], Scores], num_members: int, targets: npt.NDArray[np.bool_], mean: MeanKind
) -> Fit:
    """Select as `fit_weights` says; `read` gives a member's scores (N, C) for targets (N, C)."""
    alike, chosen = np.zeros(targets.shape), np.zeros(targets.shape)  # sums: their order is the means'
    for number in range(num_members):
        alike += _as_summed(read(number), mean)
    alike_ap = compute_metrics(alike, targets).mean_ap
    best_ap, best_counts = alike_ap, np.ones(num_members)
    best_member, counts = 0.0, np.zeros(num_members)
    work = alike
    for turn in tqdm(range(FIT_ROUNDS), "fit", leave=False, disable=None):
        found = []
        for number in range(num_members):
            np.add(chosen, _as_summed(read(number), mean), out=work)
            found.append(compute_metrics(work, targets).mean_ap)
        number = int(np.argmax(found))
        chosen += _as_summed(read(number), mean)
        counts[number] += 1
        if turn == 0:
            best_member = found[number]
        if found[number] > best_ap:
            best_ap, best_counts = found[number], counts.copy()
    weights = best_counts / best_counts.sum()
    return Fit(tuple(weights.tolist()), best_ap, best_member, alike_ap)


def refuse_shared_clips(keys: Sequence[str], others: Sequence[str], what: str) -> None:
    """Raise ValueError where what is fitted and what is measured have a clip in common; `what` names both."""
    if shared := sorted({*keys} & {*others}):
        raise ValueError(
            f"{what} share {len(shared)} clips, {shared[0]} among them. Fit on clips that aren't measured."
        )


def refuse_eval(data: str, flag: str) -> None:
    """Raise ValueError where a split to choose by is named eval."""
    names = {data.rstrip("/").rpartition("/")[2], Path(data).resolve().name}
    if "eval" in {name.lower() for name in names}:
        raise ValueError(
            f"{flag} {data} is an eval split; what is chosen by it can't be measured on it. Give the "
            "validation split."
        )


def _as_summed(scores: Scores, kind: MeanKind) -> npt.NDArray[np.floating]:
    """Turn scores into what a mean of this kind sums up."""
    return np.log(np.clip(scores.astype(np.float64), FLOOR, 1)) if kind == "geometric" else scores
