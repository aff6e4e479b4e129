"""Examples: scores and targets -> a few clips that the model gets right, and a few that it gets wrong."""

# N clips, C classes

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
SHOWN_SCORES = 5


def choose_examples(scores: FloatArray, targets: npt.NDArray[np.generic], most: int) -> list[int]:
    """Choose at most so many clips, half of them right where there are: right ones, then wrong ones.

    A clip is right where each of its labels scores above each other class. The right ones are spread evenly
    from the surest to the closest; the wrong ones are the worst. As far as possible each has another label.
    """
    margins = compute_margins(scores, targets)
    measured = np.flatnonzero(np.isfinite(margins))
    falling = measured[np.argsort(-margins[measured], kind="stable")]
    right, wrong = falling[margins[falling] > 0].tolist(), falling[margins[falling] <= 0][::-1].tolist()
    labels = [np.flatnonzero(row).tolist() for row in targets]
    num_right = min(len(right), max(most - most // 2, most - len(wrong)))
    chosen_right = _choose(_spread(right), num_right, labels)
    chosen_wrong = _choose(wrong, min(len(wrong), most - num_right), labels)
    order = {clip: place for place, clip in enumerate(right)}
    return [*sorted(chosen_right, key=lambda clip: order[clip]), *chosen_wrong]


def compute_margins(scores: FloatArray, targets: npt.NDArray[np.generic]) -> FloatArray:
    """Give each clip's lowest labelled score minus its highest other one (N,); NaN without either."""
    has = targets != 0
    lowest = np.where(has, scores, np.inf).min(axis=1)
    highest = np.where(has, -np.inf, scores).max(axis=1)
    measured = has.any(axis=1) & ~has.all(axis=1)
    return np.where(measured, np.where(measured, lowest, 0) - np.where(measured, highest, 0), np.nan)


def _spread(clips: list[int]) -> list[int]:
    """Order clips so that any first few of them are spread evenly: ends, middle, quarters."""
    if not clips:
        return []
    places, step = [0, len(clips) - 1], len(clips) - 1
    while step > 1:
        step = (step + 1) // 2
        places += range(0, len(clips), step)
    return [clips[place] for place in dict.fromkeys([*places, *range(len(clips))])]


def _choose(clips: Iterable[int], most: int, labels: list[list[int]]) -> list[int]:
    """Take the first clips of which each brings other labels than those before it, then the first others."""
    clips = list(clips)
    seen: set[int] = set()
    chosen: list[int] = []
    for clip in clips:
        if len(chosen) < most and not seen & set(labels[clip]):
            chosen.append(clip)
            seen |= set(labels[clip])
    rest = [clip for clip in clips if clip not in set(chosen)]
    return [*chosen, *rest][:most]


def describe_scores(scores: FloatArray, targets: npt.NDArray[np.generic]) -> list[dict[str, Any]]:
    """Give a clip's highest scores (C,) and those of its labels, highest first: class, score, labelled."""
    order = np.argsort(-scores, kind="stable").tolist()
    shown = [*order[:SHOWN_SCORES], *(index for index in order[SHOWN_SCORES:] if targets[index])]
    return [
        {"class": index, "score": round(float(scores[index]), 4), "labelled": bool(targets[index])}
        for index in shown
    ]
