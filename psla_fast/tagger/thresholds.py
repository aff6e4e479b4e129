"""Thresholds: validation scores and targets -> from which score on a class counts as there."""

# N clips, C classes

from pathlib import Path

import numpy as np
import numpy.typing as npt

from psla_fast.classes import Classes

Scores = npt.NDArray[np.float32]


def compute_thresholds(scores: npt.NDArray[np.floating], targets: npt.NDArray[np.generic]) -> Scores:
    """Each class's threshold (C,) with the best F1 on scores (N, C) and targets (N, C) of 0 and 1.

    A class is there where its score is above its threshold: half-way between the two scores that it parts;
    of several thresholds with the same F1, the highest. A class without positives gets the median of the
    others' thresholds. Raises ValueError where no class has positives, or the shapes differ.
    """
    if scores.shape != targets.shape or scores.ndim != 2:
        raise ValueError(
            f"scores are {scores.shape}, targets {targets.shape}; give both as (clips, classes)."
        )
    is_positive = np.asarray(targets) > 0
    known = is_positive.any(axis=0)
    if not known.any():
        raise ValueError("no class has a positive clip, so that no threshold can be told. Give more clips.")
    values = np.asarray(scores, np.float32)
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


def resolve_thresholds(
    given: str | Path | npt.NDArray[np.floating] | None, classes: Classes
) -> Scores | None:
    """Give thresholds (C,) as they are, or computed from a score file with targets of the same classes."""
    if given is None:
        return None
    if isinstance(given, str | Path):
        return read_thresholds(Path(given), classes)
    thresholds = np.asarray(given, np.float32)
    if thresholds.shape != (len(classes),) or not np.isfinite(thresholds).all():
        raise ValueError(f"thresholds are {thresholds.shape}; give {len(classes)} numbers, one a class.")
    return thresholds


def read_thresholds(path: Path, classes: Classes) -> Scores:
    """Compute thresholds from a score file of `psla-fast evaluate`; ValueError where it misfits."""
    from psla_fast.scores import read_pieces, read_scores

    next(read_pieces(path, classes.mids), None)  # checks whose scores they are
    file = read_scores(path)
    if len(file.targets) != len(file.scores):
        raise ValueError(f"{path} has no targets. Let psla-fast evaluate write it, on a validation split.")
    try:
        return compute_thresholds(file.scores, file.targets)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
