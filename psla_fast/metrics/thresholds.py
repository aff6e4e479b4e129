"""Thresholds: scores and targets -> from which score on a class counts as there, by its best F1."""

# N clips, C classes

import numpy as np
import numpy.typing as npt

from psla_fast.metrics.inputs import Values, as_array, as_checked_tensors

Scores = npt.NDArray[np.float32]


def compute_thresholds(scores: Values, targets: Values) -> Scores:
    """Each class's threshold (C,) with the best F1 on scores (N, C) and targets (N, C) of 0 and 1.

    A class is there where its score is above its threshold: half-way between the two scores that it parts;
    of several thresholds with the same F1, the highest. A class without positives gets the median of the
    others' thresholds. Raises ValueError for other shapes, scores that aren't finite in float32, targets
    other than 0 and 1, or where no class has positives.
    """
    with np.errstate(over="ignore"):
        single = as_array(scores).astype(np.float32, copy=False)
    values, is_positive = (t.numpy() for t in as_checked_tensors(single, as_array(targets)))
    known = is_positive.any(axis=0)
    if not known.any():
        raise ValueError("no class has a positive clip, so that no threshold can be told. Give more clips.")
    found = np.zeros(values.shape[1], np.float32)
    for index in np.flatnonzero(known):
        found[index] = _best_threshold(values[:, index], is_positive[:, index])
    found[~known] = np.median(found[known])
    return found


def _best_threshold(scores: Scores, is_positive: npt.NDArray[np.bool_]) -> float:
    """Threshold of one class, from its scores (N,)."""
    order = np.argsort(-scores, kind="stable")
    ranked, hits = scores[order], np.cumsum(is_positive[order])
    f1 = 2 * hits / (np.arange(1, len(ranked) + 1) + hits[-1])
    f1[:-1][ranked[:-1] == ranked[1:]] = 0.0  # equal scores can't be parted
    last = int(f1.argmax())
    above, below = ranked[last], ranked[last + 1] if last + 1 < len(ranked) else np.float32(0)
    middle = np.float32((float(above) + float(below)) / 2)
    return float(middle if below <= middle < above else np.nextafter(above, np.float32(-np.inf)))
