"""Label enhancement: a model's scores of the training clips + the ontology -> labels that annotators missed.

A clip gets a label that is a child (type I) or an ancestor (type II) of one it has, where the model scores it
above the class's threshold: a statistic of the scores of the clips that carry the class. Source: Gong, Chung,
Glass 2021, PSLA, section III.C.
"""

# N clips, C classes

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from psla_fast.labels import LabelTable
from psla_fast.ontology import Relations

Threshold = Literal["mean", "median", "25", "10", "5"]
Kind = Literal["1", "2", "both"]
THRESHOLDS: tuple[Threshold, ...] = get_args(Threshold)
Floats = npt.NDArray[np.float32]
Pieces = Callable[[], Iterable[tuple[npt.NDArray[np.int64], Floats]]]  # rows (n,) and their scores (n, C)


@dataclass(frozen=True)
class Added:
    """How many labels were added: of each type (a label may be of both), in how many clips, by which pairs.

    pairs counts (label that the clip had, label that it got).
    """

    num_labels: int
    num_type1: int
    num_type2: int
    num_clips: int
    pairs: Counter[tuple[int, int]]


def compute_thresholds(pieces: Pieces, labels: LabelTable, num_classes: int) -> dict[Threshold, Floats]:
    """Each class's thresholds (C,): mean, median and percentiles of the scores of the clips that carry it.

    pieces() gives clips' rows and scores, each clip once. NaN for a class that no clip carries: nothing is
    above it.
    """
    classes, scores = [], []
    for rows, piece in pieces():
        for row, line in zip(rows.tolist(), piece, strict=True):
            classes.append(labels.labels(row))
            scores.append(line[classes[-1]])
    of_class = np.concatenate(classes) if classes else np.empty(0, np.int32)
    order = np.argsort(of_class, kind="stable")
    carried = (np.concatenate(scores) if scores else np.empty(0, np.float32))[order]
    bounds = np.searchsorted(of_class[order], np.arange(num_classes + 1))
    statistics: dict[Threshold, Callable[[Floats], np.floating]] = {
        "mean": lambda values: values.mean(),
        "median": lambda values: np.median(values),
        "25": lambda values: np.percentile(values, 25),
        "10": lambda values: np.percentile(values, 10),
        "5": lambda values: np.percentile(values, 5),
    }
    found = {name: np.full(num_classes, np.nan, np.float32) for name in THRESHOLDS}
    for c in np.flatnonzero(np.diff(bounds)):
        values = carried[bounds[c] : bounds[c + 1]]
        for name, statistic in statistics.items():
            found[name][c] = statistic(values)
    return found


def enhance(
    pieces: Pieces, labels: LabelTable, relations: Relations, thresholds: Floats, kind: Kind
) -> LabelTable:
    """Give all clips their labels and those that are related and scored strictly above their threshold (C,).

    Labels come in class order. kind: 1 adds children, 2 ancestors, both the union.
    """
    lists: list[npt.NDArray[np.int32]] = [labels.labels(row) for row in range(len(labels))]
    for rows, piece in pieces():
        for row, line in zip(rows.tolist(), piece, strict=True):
            own = labels.labels(row)
            related = _join(_related(own, relations, kind))
            added = related[line[related] > thresholds[related]]
            lists[row] = np.union1d(own, added).astype(np.int32)
    lengths = np.array([len(one) for one in lists], dtype=np.int64)
    indptr = np.concatenate([np.zeros(1, np.int64), lengths.cumsum()])
    return replace(labels, indptr=indptr, indices=_join(lists))


def count_added(labels: LabelTable, enhanced: LabelTable, relations: Relations) -> Added:
    """Count what the enhanced labels of the same clips have more."""
    children, ancestors = ([set(c.tolist()) for c in r] for r in (relations.children, relations.ancestors))
    num_labels = num_type1 = num_type2 = num_clips = 0
    pairs: Counter[tuple[int, int]] = Counter()
    for row in range(len(labels)):
        own = labels.labels(row).tolist()
        new = set(enhanced.labels(row).tolist()) - set(own)
        num_labels += len(new)
        num_clips += bool(new)
        num_type1 += len(new & set().union(*(children[label] for label in own)))
        num_type2 += len(new & set().union(*(ancestors[label] for label in own)))
        pairs.update((label, got) for label in own for got in new & (children[label] | ancestors[label]))
    return Added(num_labels, num_type1, num_type2, num_clips, pairs)


def _related(own: npt.NDArray[np.int32], relations: Relations, kind: Kind) -> Iterator[npt.NDArray[np.int32]]:
    for label in own.tolist():
        if kind != "2":
            yield relations.children[label]
        if kind != "1":
            yield relations.ancestors[label]


def _join(lists: Iterable[npt.NDArray[np.int32]]) -> npt.NDArray[np.int32]:
    return np.concatenate([np.empty(0, np.int32), *lists])
