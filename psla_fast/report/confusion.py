"""Confusion: scores of classes that clips aren't labelled with -> which classes are taken for which."""

# N clips, C classes, K classes of the heat map

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

ENOUGH_CLIPS = 3  # a mean over fewer says little
FEW_PAIRS = 10
FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Confusion:
    """Means (C, C) over the clips with class a (row) and without class b (column), and how many those are.

    `scored`: the mean score of b there; `elsewhere`: its mean over the clips that have neither. NaN where no
    clip is left. The diagonal of `scored` is a's mean score over its own clips.
    """

    scored: FloatArray
    elsewhere: FloatArray
    num_clips: npt.NDArray[np.int64]


def compute_confusion(scores: FloatArray, targets: npt.NDArray[np.generic]) -> Confusion:
    """Compute how high classes score on clips that carry others; scores and targets (N, C)."""
    has = (targets != 0).astype(np.float32)
    lacks = 1 - has
    unlabelled = scores * lacks
    num_clips = has.T @ lacks
    with np.errstate(invalid="ignore", divide="ignore"):
        scored = has.T @ unlabelled / num_clips
        elsewhere = lacks.T @ unlabelled / (lacks.T @ lacks)
        own = (has * scores).sum(axis=0) / has.sum(axis=0)
    np.fill_diagonal(scored, own)
    return Confusion(scored, elsewhere, num_clips.astype(np.int64))


def find_pairs(confusion: Confusion, most: int) -> list[tuple[int, int]]:
    """Give the pairs (a, b) whose unlabelled b scores highest, over ENOUGH_CLIPS clips where there are."""
    scored = np.where(np.isnan(confusion.scored), -1, confusion.scored)
    np.fill_diagonal(scored, -1)
    often = np.where(confusion.num_clips >= ENOUGH_CLIPS, scored, -1)
    if (often > 0).sum() >= FEW_PAIRS:
        scored = often
    order = np.argsort(-scored, axis=None, kind="stable")[:most]
    rows, columns = np.unravel_index(order, scored.shape)
    pairs = zip(rows.tolist(), columns.tolist(), strict=True)
    return [(a, b) for a, b in pairs if scored[a, b] > 0]


def choose_classes(confusion: Confusion, pairs: list[tuple[int, int]], most: int) -> list[int]:
    """Choose the K classes of the first pairs, ordered so that those that are confused stand together."""
    chosen: list[int] = []
    for pair in pairs:
        new = [index for index in pair if index not in chosen]
        if len(chosen) + len(new) > most:
            break
        chosen += new
    if not chosen:
        return []
    scored = np.nan_to_num(confusion.scored)
    ordered, left = [chosen[0]], chosen[1:]
    while left:
        last = ordered[-1]
        nearest = max(left, key=lambda index: float(scored[last, index] + scored[index, last]))
        ordered.append(nearest)
        left.remove(nearest)
    return ordered
