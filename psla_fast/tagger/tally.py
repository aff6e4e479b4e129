"""Tally: the scored windows of one sound, as they come -> its scores, and its activity over time."""

# C classes, T' time steps of a window, T those of the sound, F mels

from typing import Literal

import numpy as np

from psla_fast.tagger.results import Scores
from psla_fast.tagger.scorer import Scored

MOST_COLUMNS = 4096  # of an overview


class Tally:
    """The scores (C,) of a sound: the maximum or the mean of those of its windows."""

    def __init__(self, over: Literal["max", "mean"]) -> None:
        """Begin without a window."""
        self._over, self._scores, self._num_windows = over, np.empty(0, np.float32), 0

    def add(self, scored: Scored) -> None:
        """Count a window in."""
        scores = scored.scores.numpy()
        self._num_windows += 1
        if self._num_windows == 1:
            self._scores = scores.copy()
        elif self._over == "max":
            np.maximum(self._scores, scores, out=self._scores)
        else:
            self._scores += (scores - self._scores) / self._num_windows

    @property
    def scores(self) -> Scores:
        """The scores (C,) so far."""
        return self._scores


class Stitch:
    """The activity (C, T) of a sound, put together from that of its windows; where they overlap, the mean."""

    def __init__(self) -> None:
        """Begin without a window."""
        self._sums, self._counts, self._num_steps = np.empty((0, 0), np.float32), np.empty(0, np.float32), 0

    def add(self, first_step: int, activity: Scores) -> None:
        """Add a window's activity (C, T'), which begins at a time step of the sound."""
        end = first_step + activity.shape[1]
        if end > len(self._sums):
            grown = max(end, 2 * len(self._sums))
            sums, counts = np.zeros((grown, len(activity)), np.float32), np.zeros(grown, np.float32)
            if self._num_steps:
                sums[: self._num_steps] = self._sums[: self._num_steps]
                counts[: self._num_steps] = self._counts[: self._num_steps]
            self._sums, self._counts = sums, counts
        self._sums[first_step:end] += activity.T
        self._counts[first_step:end] += 1
        self._num_steps = max(self._num_steps, end)

    @property
    def activity(self) -> Scores:
        """The activity (C, T) so far."""
        steps = slice(0, self._num_steps)
        return np.ascontiguousarray((self._sums[steps] / self._counts[steps, None]).T)


class Overview:
    """Log-mels (≤ 4096, F) of a sound of any length: means over 1, 2, 4, … frames."""

    def __init__(self, num_mels: int) -> None:
        """Begin with a column a frame."""
        self.factor, self._num_frames = 1, 0
        self._sums = np.zeros((MOST_COLUMNS, num_mels), np.float32)

    def add(self, start_frame: int, fbank: Scores) -> None:
        """Add what a window's fbank (T, F) has beyond the frames that are there."""
        new = fbank[max(0, self._num_frames - start_frame) :]
        while len(new):
            if self._num_frames == MOST_COLUMNS * self.factor:
                halved = self._sums[::2] + self._sums[1::2]
                self._sums = np.concatenate([halved, np.zeros_like(halved)])
                self.factor *= 2
            part = new[: MOST_COLUMNS * self.factor - self._num_frames]
            columns = (self._num_frames + np.arange(len(part))) // self.factor
            np.add.at(self._sums, columns, part)
            self._num_frames, new = self._num_frames + len(part), new[len(part) :]

    @property
    def fbank(self) -> Scores:
        """The log-mels so far."""
        edges = np.arange(0, self._num_frames, self.factor)
        counts = np.minimum(edges + self.factor, self._num_frames) - edges
        means: Scores = (self._sums[: len(edges)] / counts[:, None]).astype(np.float32)
        return means
