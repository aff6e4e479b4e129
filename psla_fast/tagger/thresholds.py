"""Thresholds: numbers, or a validation split's score file -> from which score on a class counts as there."""

# C classes

from pathlib import Path

import numpy as np
import numpy.typing as npt

from psla_fast.classes import Classes
from psla_fast.metrics import compute_thresholds

Scores = npt.NDArray[np.float32]


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
