"""Bootstrap: scores and targets -> how far mAP, AUC, d-prime and lwlrap would differ on other clips.

Clips are drawn with replacement; a resample is how often each clip was drawn. A class's clips are sorted
once; then its AP and AUC in all resamples follow from sums of those counts between one positive and the next.
"""

# N clips, C classes, R resamples, P positives of a class

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch

from psla_fast.metrics.inputs import FloatArray, Values, as_array, as_checked_tensors
from psla_fast.metrics.label_ranking import rank_labels
from psla_fast.metrics.means import d_prime
from psla_fast.metrics.threads import map_in_threads

if TYPE_CHECKING:  # takes a fifth of a second, which only the bootstrap needs
    from scipy.sparse import csr_array

COUNTS_AT_ONCE = 2**21  # a float32 a clip and resample: 8 MB, which stay in the processor's cache
LARGEST_SUM = 2**24  # up to which float32 holds every integer
Counts = npt.NDArray[np.float32]
IntervalKind = Literal["basic", "percentile"]


@dataclass(frozen=True)
class Interval:
    """A figure on all clips, and the interval that the resamples give it."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """Format as `0.4403 (0.4318 to 0.4479)`."""
        return f"{self.value:.4f} ({self.low:.4f} to {self.high:.4f})"


@dataclass(frozen=True)
class Resampled:
    """AP (R, C) and AUC (R, C) of each class in each resample, NaN where it can't be told; lwlrap (R,)."""

    average_precision: FloatArray
    roc_auc: FloatArray
    lwlrap: FloatArray

    def means(self) -> dict[str, FloatArray]:
        """Give mean_ap, mean_auc and lwlrap (R,), over the classes that each resample tells."""
        return {
            "mean_ap": _mean_known(self.average_precision),
            "mean_auc": _mean_known(self.roc_auc),
            "lwlrap": self.lwlrap,
        }


@dataclass(frozen=True)
class Bootstrap:
    """Intervals of the means over classes; class_ap (C, 2) has those of each class's AP.

    A class without positives in a resample is left out of its mean: mean_left_out classes on average.
    num_untold resamples in which no class could be measured are left out. d' has the AUC's interval,
    transformed. samples: mean_ap, mean_auc, lwlrap (num_resamples,); the same generator gives the same
    resamples of N clips, so those of two models can be subtracted.
    """

    mean_ap: Interval
    mean_auc: Interval
    d_prime: Interval
    lwlrap: Interval
    class_ap: FloatArray
    samples: dict[str, FloatArray]
    confidence: float
    mean_left_out: float
    num_untold: int


def bootstrap_metrics(
    scores: Values,
    targets: Values,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    generator: torch.Generator | None = None,
    kind: IntervalKind = "basic",
) -> Bootstrap:
    """Measure num_resamples resamples of the clips of scores (N, C) and targets (N, C) of 0 and 1.

    kind percentile takes the resamples' own quantiles q; basic 2·value - q, within [0, 1]: the AP of few
    positives is too high, in a sample as in its resamples, and that mirrors it away (Davison and Hinkley
    1997, 5.2). generator is the CPU's (default: seed 0); tensors of a GPU are copied to the CPU. Raises
    ValueError for other shapes or values, or where no class has positives and negatives.
    """
    if num_resamples < 2:
        raise ValueError(f"the number of resamples is {num_resamples}; give 2 or more, for instance 1000.")
    if not 0 < confidence < 1:
        raise ValueError(f"the confidence is {confidence}; give a share between 0 and 1, for instance 0.95.")
    if kind not in get_args(IntervalKind):
        raise ValueError(f"the interval is {kind!r}; give one of {', '.join(get_args(IntervalKind))}.")
    score, is_positive = _as_arrays(scores, targets)
    if not (is_positive.any(0) & ~is_positive.all(0)).any():
        raise ValueError("no class has both positives and negatives. Give clips of which some have labels.")
    random = torch.Generator().manual_seed(0) if generator is None else generator
    found = _measure(score, is_positive, _draw(len(score), num_resamples, random))
    means = found.means()
    intervals = {name: _interval(values, confidence, kind) for name, values in means.items()}
    auc = intervals["mean_auc"]
    in_resamples, is_known = found.average_precision[1:], np.isfinite(found.average_precision[0])
    class_intervals = [_interval(values, confidence, kind) for values in found.average_precision.T]
    return Bootstrap(
        **intervals,
        d_prime=Interval(d_prime(auc.value), d_prime(auc.low), d_prime(auc.high)),
        class_ap=np.array([(i.low, i.high) for i in class_intervals]),
        samples={name: values[1:] for name, values in means.items()},
        confidence=confidence,
        mean_left_out=float(np.isnan(in_resamples[:, is_known]).sum(1).mean()),
        num_untold=int(np.isnan(means["mean_auc"]).sum()),
    )


def measure_resamples(scores: Values, targets: Values, counts: Values) -> Resampled:
    """Measure each class where clip n is there counts[n, r] times, of counts (N, R), whole and not negative.

    Equal to the metrics of scores and targets (N, C) with their rows repeated as often. Raises ValueError for
    other shapes or values.
    """
    score, is_positive = _as_arrays(scores, targets)
    given = as_array(counts)
    if given.ndim != 2 or len(given) != len(score) or (given < 0).any() or (given != np.floor(given)).any():
        raise ValueError(f"counts are {given.shape}; give ({len(score)}, R), each whole and 0 or more.")
    if not given.shape[1]:
        raise ValueError(
            f"counts are {given.shape}, of no resample; give ({len(score)}, R) with R of 1 or more."
        )
    if given.sum(0, dtype=np.float64).max(initial=0) >= LARGEST_SUM:
        raise ValueError(f"counts of a resample add up to more than {LARGEST_SUM:,}. Give smaller ones.")
    step = max(1, COUNTS_AT_ONCE // max(1, len(score)))
    pieces = (given[:, start : start + step] for start in range(0, given.shape[1], step))
    return _measure(score, is_positive, (np.ascontiguousarray(piece, np.float32) for piece in pieces))


def _as_arrays(scores: Values, targets: Values) -> tuple[npt.NDArray[np.floating], npt.NDArray[np.bool_]]:
    """Check scores and targets, and bring them to the CPU, where cores take a class each."""
    score, is_positive = as_checked_tensors(scores, targets)
    return score.cpu().numpy(), is_positive.cpu().numpy()


def _draw(num_clips: int, num_resamples: int, generator: torch.Generator) -> Iterator[Counts]:
    """Yield how often each clip is in the resamples, (N, ≤ R) some at a time; the first is of all clips."""
    step, total = max(1, COUNTS_AT_ONCE // num_clips), 1 + num_resamples
    for start in range(0, total, step):
        size = min(step, total - start)
        counts = np.empty((size, num_clips), np.float32)
        for row in range(size):
            drawn = torch.randint(num_clips, (num_clips,), generator=generator).numpy()
            counts[row] = np.bincount(drawn, minlength=num_clips)
        if not start:
            counts[0] = 1
        yield np.ascontiguousarray(counts.T)


@dataclass(frozen=True)
class _Ranking:
    """One class: its positives (P,) by rising score, and what lies between them.

    between (P, N): which negatives score less than a positive, and not less than the one before; tied (P, N):
    which score as much as it, where any does; first (P,): the first of each positive's ties, where there are
    any.
    """

    positives: npt.NDArray[np.int64]
    between: "csr_array"
    tied: "csr_array | None"
    first: npt.NDArray[np.int64] | None


def _rank(scores: npt.NDArray[np.floating], is_positive: npt.NDArray[np.bool_]) -> _Ranking:
    order = np.argsort(scores)
    hit = is_positive[order]
    positives, negatives = order[hit], order[~hit]
    values, others = scores[positives], scores[negatives]
    below, up_to = others.searchsorted(values), others.searchsorted(values, "right")
    first = values.searchsorted(values)
    tied = _rows(negatives, below, up_to, len(scores)) if (below < up_to).any() else None
    between = _rows(negatives, np.concatenate(([0], below[:-1])), below, len(scores))
    return _Ranking(positives, between, tied, first if (values[1:] == values[:-1]).any() else None)


def _rows(
    clips: npt.NDArray[np.int64],
    starts: npt.NDArray[np.int64],
    ends: npt.NDArray[np.int64],
    num_clips: int,
) -> "csr_array":
    """Build the matrix (P, N) whose row p has ones at clips[starts[p]:ends[p]]."""
    from scipy.sparse import csr_array

    sizes = ends - starts
    indptr = np.concatenate(([0], sizes.cumsum()))
    chosen = clips[np.arange(indptr[-1]) + (starts - indptr[:-1]).repeat(sizes)].astype(np.int32)
    return csr_array((np.ones(len(chosen), np.float32), chosen, indptr), shape=(len(sizes), num_clips))


def _measure(
    scores: npt.NDArray[np.floating], is_positive: npt.NDArray[np.bool_], pieces: Iterator[Counts]
) -> Resampled:
    """Measure all resamples, given as pieces (N, ≤ R) of counts."""
    if len(scores) >= LARGEST_SUM:
        raise ValueError(f"there are {len(scores):,} clips; give fewer than {LARGEST_SUM:,}.")
    known = np.flatnonzero(is_positive.any(0))
    clips, _, precision = rank_labels(torch.from_numpy(scores), torch.from_numpy(is_positive))
    label_sums = np.stack(
        (np.bincount(clips.numpy(), precision.numpy(), len(scores)), is_positive.sum(1, dtype=np.float64))
    )
    rankings = list(map_in_threads(lambda c: _rank(scores[:, c], is_positive[:, c]), known, scores.size))
    found, lwlrap = [], []
    for counts in pieces:
        sizes = counts.sum(0)
        figures = np.full((scores.shape[1], 2, len(sizes)), np.nan)
        measure = partial(_measure_class, counts=counts, sizes=sizes)
        for index, row in zip(known, map_in_threads(measure, rankings, scores.size), strict=True):
            figures[index] = row
        found.append(figures)
        summed = label_sums @ counts
        lwlrap.append(_ratio(summed[0], summed[1]))
    precisions, aucs = np.concatenate(found, axis=2).transpose(1, 2, 0)
    return Resampled(precisions, aucs, np.concatenate(lwlrap))


def _measure_class(ranking: _Ranking, counts: Counts, sizes: Counts) -> FloatArray:
    """AP and AUC (2, R) of a class in resamples (N, R), of `sizes` clips (R,); NaN where it has one value."""
    positive = counts[ranking.positives]
    num_positive = positive.sum(0)
    num_negative = sizes - num_positive
    below = (ranking.between @ counts).cumsum(0)
    found = num_positive - (positive.cumsum(0) - positive)  # positives that score at least as much
    if ranking.first is not None:
        found = found[ranking.first]
    at_least = np.maximum(found + (num_negative - below), 1)  # where 0, no positive counts
    precision = np.divide(found, at_least, dtype=np.float64)
    precision *= positive
    wins = np.multiply(below, positive, dtype=np.float64)
    if ranking.tied is not None:
        wins += np.multiply(ranking.tied @ counts, positive, dtype=np.float64) / 2
    pairs = num_positive.astype(np.float64) * num_negative
    return np.stack((_ratio(precision.sum(0), num_positive), _ratio(wins.sum(0), pairs)))


def _ratio(part: FloatArray, whole: npt.NDArray[np.floating]) -> FloatArray:
    """Divide; NaN where the whole is 0."""
    return np.where(whole > 0, part / np.maximum(whole, 1), np.nan)


def _mean_known(values: FloatArray) -> FloatArray:
    """Mean (R,) of values (R, C) over those that aren't NaN; NaN where all are."""
    is_known = ~np.isnan(values)
    return _ratio(np.where(is_known, values, 0.0).sum(1), is_known.sum(1).astype(np.float64))


def _interval(values: FloatArray, confidence: float, kind: IntervalKind) -> Interval:
    """Give the interval of a figure from its value on all clips, values[0], and in each resample."""
    value, known = float(values[0]), values[1:][~np.isnan(values[1:])]
    if np.isnan(value) or not len(known):
        return Interval(value, np.nan, np.nan)
    low, high = (float(v) for v in np.quantile(known, [(1 - confidence) / 2, (1 + confidence) / 2]))
    if kind == "percentile":
        return Interval(value, low, high)
    return Interval(value, max(0.0, 2 * value - high), min(1.0, 2 * value - low))
