"""Results: what a sound's tags, their course over time, and a file that can't be tagged look like."""

# C classes, T time steps of the model, F mels

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from psla_fast.classes import Classes

Scores = npt.NDArray[np.float32]


class Label(NamedTuple):
    """A class and its score in a sound."""

    index: int  # type: ignore[assignment]  # tuple has a method of this name
    mid: str
    name: str
    score: float


@dataclass(frozen=True)
class Tagging:
    """The scores (C,) of a sound, or of the stretch of it from start_seconds on that is `seconds` long.

    `source` is its path, or what stands for one; thresholds (C,) are those that were given.
    """

    source: str
    seconds: float
    scores: Scores
    classes: Classes = field(repr=False)
    thresholds: Scores | None = field(default=None, repr=False)
    start_seconds: float = 0.0

    def top(self, k: int = 5) -> list[Label]:
        """Give the k classes with the highest scores, or all where there are fewer, the highest first."""
        return [self._label(i) for i in np.argsort(-self.scores, kind="stable")[:k].tolist()]

    @property
    def labels(self) -> list[Label]:
        """Give the classes above their thresholds, the highest score first; ValueError without thresholds."""
        if self.thresholds is None:
            raise ValueError("labels need thresholds. Give thresholds= to Tagger.from_checkpoint.")
        return [label for label in self.top(len(self.scores)) if label.score > self.thresholds[label.index]]

    def _label(self, index: int) -> Label:
        return Label(index, self.classes.mids[index], self.classes.names[index], float(self.scores[index]))


@dataclass(frozen=True)
class Timeline:
    """A sound's tagging and its classes' activity (C, T) over time, a step each step_seconds.

    fbank (≤ 4096, F) are the log-mels, averaged over fbank_step_seconds each, for a picture.
    """

    tagging: Tagging
    activity: Scores
    step_seconds: float
    fbank: Scores = field(repr=False)
    fbank_step_seconds: float

    @property
    def scores(self) -> Scores:
        """The scores (C,) of the whole sound."""
        return self.tagging.scores


@dataclass(frozen=True)
class Failure:
    """A sound that can't be tagged, and why, in a line."""

    source: str
    reason: str
