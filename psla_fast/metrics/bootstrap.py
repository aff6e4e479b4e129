"""Bootstrap: scores and targets -> how far mAP, AUC, d-prime and lwlrap would differ on other clips.

Clips are drawn with replacement; a resample is how often each clip was drawn. A class's clips are sorted
once; then its AP and AUC in all resamples follow from sums of those counts between one positive and the next.
"""

# N clips, C classes, R resamples, P positives of a class

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from psla_fast.metrics.inputs import FloatArray, Values, as_checked_tensors, as_tensor
from psla_fast.metrics.label_ranking import rank_labels
from psla_fast.metrics.means import d_prime

COUNTS_AT_ONCE = 2**23  # a float32 a clip and resample: 32 MB
LARGEST_SUM = 2**24  # up to which float32 holds every integer


@dataclass(frozen=True)
class Interval:
    """A figure on all clips, and the interval that holds the confidence's share of the resamples."""

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
    """Percentile intervals of the means over classes; class_ap (C, 2) has those of each class's AP.

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
) -> Bootstrap:
    """Measure num_resamples resamples of the clips of scores (N, C) and targets (N, C) of 0 and 1.

    generator is the CPU's (default: seed 0), and draws the same for every device; tensors of a GPU are
    measured there. Raises ValueError for other shapes or values, or where no class has positives and
    negatives.
    """
    if num_resamples < 2:
        raise ValueError(f"the number of resamples is {num_resamples}; give 2 or more, for instance 1000.")
    if not 0 < confidence < 1:
        raise ValueError(f"the confidence is {confidence}; give a share between 0 and 1, for instance 0.95.")
    score, is_positive = as_checked_tensors(scores, targets)
    with_auc = is_positive.any(0) & ~is_positive.all(0)
    if not with_auc.any():
        raise ValueError("no class has both positives and negatives. Give clips of which some have labels.")
    random = torch.Generator().manual_seed(0) if generator is None else generator
    found = _measure(score, is_positive, _draw(len(score), num_resamples, random))
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    means = found.means()
    intervals = {name: Interval(float(v[0]), *_quantiles(v[1:], tails)) for name, v in means.items()}
    auc = intervals["mean_auc"]
    in_resamples, is_known = found.average_precision[1:], np.isfinite(found.average_precision[0])
    return Bootstrap(
        **intervals,
        d_prime=Interval(d_prime(auc.value), d_prime(auc.low), d_prime(auc.high)),
        class_ap=np.array([_quantiles(values, tails) for values in in_resamples.T]),
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
    score, is_positive = as_checked_tensors(scores, targets)
    given = as_tensor(counts, score.device).float()
    if given.ndim != 2 or len(given) != len(score) or (given < 0).any() or (given != given.floor()).any():
        raise ValueError(
            f"counts are {tuple(given.shape)}; give ({len(score)}, R), each whole and 0 or more."
        )
    if given.numel() and int(given.double().sum(0).max()) >= LARGEST_SUM:
        raise ValueError(f"counts of a resample add up to more than {LARGEST_SUM:,}. Give smaller ones.")
    step = max(1, COUNTS_AT_ONCE // max(1, len(score)))
    return _measure(score, is_positive, (piece.contiguous() for piece in torch.split(given, step, dim=1)))


def _draw(num_clips: int, num_resamples: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield how often each clip is in the resamples, (N, ≤ R) some at a time; the first is of all clips."""
    if num_clips >= LARGEST_SUM:
        raise ValueError(f"there are {num_clips:,} clips; give fewer than {LARGEST_SUM:,}.")
    step, total = max(1, COUNTS_AT_ONCE // num_clips), 1 + num_resamples
    for start in range(0, total, step):
        size = min(step, total - start)
        counts = torch.empty(size, num_clips)
        for row in range(size):
            drawn = torch.randint(num_clips, (num_clips,), generator=generator)
            counts[row] = torch.bincount(drawn, minlength=num_clips)
        if not start:
            counts[0] = 1
        yield counts.T.contiguous()


@dataclass(frozen=True)
class _Ranking:
    """One class: its positives (P,) and negatives (N - P,) by rising score, and where the former belong.

    below, up_to (P,): how many negatives score less, and at most as much; first (P,): the first of a
    positive's ties.
    """

    positives: Tensor
    negatives: Tensor
    below: Tensor
    up_to: Tensor
    first: Tensor
    negatives_tie: bool
    positives_tie: bool


def _rank(scores: Tensor, is_positive: Tensor) -> _Ranking:
    order = torch.argsort(scores)
    hit = is_positive[order]
    positives, negatives = order[hit], order[~hit]
    values, others = scores[positives], scores[negatives]
    below, up_to = torch.searchsorted(others, values), torch.searchsorted(others, values, right=True)
    first = torch.searchsorted(values, values)
    return _Ranking(
        positives,
        negatives,
        below,
        up_to,
        first,
        bool((below != up_to).any()),
        bool((values[1:] == values[:-1]).any()),
    )


def _measure(scores: Tensor, is_positive: Tensor, pieces: Iterator[Tensor]) -> Resampled:
    """Measure all resamples, given as pieces (N, ≤ R) of float32 counts."""
    with_positives = is_positive.any(0).tolist()
    rankings = [
        _rank(scores[:, index].contiguous(), is_positive[:, index]) if known else None
        for index, known in enumerate(with_positives)
    ]
    clips, _, precision = rank_labels(scores, is_positive)
    label_sums = torch.zeros(2, len(scores), dtype=torch.float64, device=scores.device)
    label_sums[0].index_add_(0, clips, precision)
    label_sums[1] = is_positive.sum(1)
    found: list[Tensor] = []
    lwlrap: list[Tensor] = []
    for piece in pieces:
        counts = piece.to(scores.device)
        nothing = torch.full((2, counts.shape[1]), torch.nan, dtype=torch.float64, device=scores.device)
        rows = [nothing if ranking is None else _measure_class(ranking, counts) for ranking in rankings]
        found.append(torch.stack(rows).cpu())
        summed = label_sums @ counts.double()
        lwlrap.append((summed[0] / summed[1]).cpu())
    precisions, aucs = torch.cat(found, dim=2).permute(1, 2, 0).numpy()
    return Resampled(precisions, aucs, torch.cat(lwlrap).numpy())


def _measure_class(ranking: _Ranking, counts: Tensor) -> Tensor:
    """AP and AUC (2, R) of a class in resamples (N, R); NaN where it has no positives, or no negatives."""
    positive = counts[ranking.positives]
    num_positive = positive.sum(0)
    num_negative = counts.sum(0) - num_positive
    below = _sum_before(counts, ranking.negatives, ranking.below)
    up_to = _sum_before(counts, ranking.negatives, ranking.up_to) if ranking.negatives_tie else below
    found_before = positive.cumsum(0) - positive
    if ranking.positives_tie:
        found_before = found_before[ranking.first]
    found = num_positive - found_before  # positives that score at least as much
    at_least = (found + (num_negative - below)).clamp_(min=1)  # where 0, no positive counts
    precision = (found.double() / at_least * positive).sum(0) / num_positive
    wins = ((below.double() + up_to) * positive).sum(0) / 2
    return torch.stack((precision, wins / (num_positive.double() * num_negative)))


def _sum_before(counts: Tensor, order: Tensor, ends: Tensor) -> Tensor:
    """Sum counts (N, R) of the first `ends` (P,), rising, of the clips `order`: (P, R), exact."""
    if not len(order):
        return counts.new_zeros(len(ends), counts.shape[1])
    starts = functional.pad(ends[:-1], (1, 0))
    between = functional.embedding_bag(order[: int(ends[-1])], counts, starts, mode="sum")
    return between.cumsum_(0)


def _mean_known(values: FloatArray) -> FloatArray:
    """Mean (R,) of values (R, C) over those that aren't NaN; NaN where all are."""
    is_known = ~np.isnan(values)
    num_known = is_known.sum(1)
    summed = np.where(is_known, values, 0.0).sum(1)
    return np.where(num_known > 0, summed / np.maximum(num_known, 1), np.nan)


def _quantiles(values: npt.NDArray[np.float64], shares: list[float]) -> list[float]:
    """Quantiles of the values that aren't NaN; NaN where all are."""
    known = values[~np.isnan(values)]
    return [float(v) for v in np.quantile(known, shares)] if len(known) else [np.nan] * len(shares)
