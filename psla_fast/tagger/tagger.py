"""Tagger: a checkpoint, ready to tag files, folders and arrays, one or many, of any length."""

# C classes, T time steps of the model

from collections import deque
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Self, TypeVar, overload

import numpy as np
import numpy.typing as npt

from psla_fast.checkpoint import load_checkpoint
from psla_fast.distributed import DeviceName
from psla_fast.evaluate import Precision
from psla_fast.models import check_input
from psla_fast.models.probing import first_line
from psla_fast.tagger.feed import End, feed_windows
from psla_fast.tagger.recordings import Recording, Sound, find_recordings
from psla_fast.tagger.results import Failure, Tagging, Timeline
from psla_fast.tagger.scorer import Scored, Scorer
from psla_fast.tagger.tally import Overview, Stitch, Tally
from psla_fast.tagger.thresholds import resolve_thresholds
from psla_fast.tagger.windows import Cut, Window, Windowing

Result = TypeVar("Result", Tagging, Timeline)
Thresholds = str | Path | npt.NDArray[np.floating] | None


class Tagger:
    """Tags sounds with a model; what fits one window gets the scores that evaluation gives its packed clip.

    A longer sound is cut into windows that overlap, each with its own mean subtracted as if it were a clip,
    and holds no more memory than its windows do.
    """

    def __init__(
        self,
        scorer: Scorer,
        batch_size: int = 16,
        thresholds: Thresholds = None,
        windowing: Windowing = Windowing(),  # noqa: B008 - frozen
    ) -> None:
        """Take a model that is ready; ValueError where thresholds or windows don't fit it."""
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; give 1 or more.")
        self.scorer, self.card, self.classes = scorer, scorer.card, scorer.card.classes
        self.batch_size, self.windowing = batch_size, windowing
        self.thresholds = resolve_thresholds(thresholds, self.classes)
        self.cut = Cut.of(windowing, self.card.input, self.card.fbank, scorer.grid)
        if windowing.seconds is not None:
            self._check_window(windowing.seconds)

    def _check_window(self, seconds: float) -> None:
        try:
            check_input(self.scorer.model, self.card.input.num_mels, self.cut.shapes, len(self.classes))
        except ValueError as error:
            reason = first_line(error.__cause__ or error)
            raise ValueError(
                f"a window of {seconds:g} seconds is not for this network ({reason}). Give a longer one, or "
                f"none for the {self.card.input.clip_frames} frames of its training."
            ) from error

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        device: DeviceName = "auto",
        precision: Precision = "auto",
        batch_size: int = 16,
        thresholds: Thresholds = None,
        windowing: Windowing = Windowing(),  # noqa: B008 - frozen
    ) -> Self:
        """Load a checkpoint; windows of several files are scored `batch_size` at once.

        thresholds (C,), or a score file with targets to compute them from, give taggings `labels`. Raises
        ValueError for what can't be loaded or doesn't fit.
        """
        return cls(Scorer(load_checkpoint(Path(path)), device, precision), batch_size, thresholds, windowing)

    @property
    def sample_rate(self) -> int:
        """The rate in Hz that the model hears; sounds of another one are resampled."""
        return self.card.fbank.sample_rate

    @overload
    def __call__(self, sounds: Sequence[Sound], sample_rate: int = 0) -> list[Tagging]: ...

    @overload
    def __call__(self, sounds: Sound, sample_rate: int = 0) -> Tagging | list[Tagging]: ...

    def __call__(self, sounds: Sound | Sequence[Sound], sample_rate: int = 0) -> Tagging | list[Tagging]:
        """Tag a file, a file's bytes or an array; or a list of them, or a folder: a list in their order.

        sample_rate is that of arrays: (samples,) or (samples, channels), floats in [-1, 1] or int16. Raises
        ValueError with the reason for a sound that can't be tagged; `stream` goes on instead.
        """
        taggings = [_or_raise(result) for result in self.stream(sounds, sample_rate)]
        return taggings[0] if _is_single(sounds) else taggings

    def stream(
        self, sounds: Sound | Sequence[Sound], sample_rate: int = 0
    ) -> Generator[Tagging | Failure, None, None]:
        """Tag sounds in order, each as soon as it is scored; threads decode the next ones meanwhile.

        A sound that can't be tagged gives its Failure. Close the iterator to stop early.
        """
        for result in self._run(find_recordings(sounds, sample_rate), with_activity=False):
            yield result.tagging() if isinstance(result, _Progress) else result

    def timeline(self, sound: Sound, sample_rate: int = 0) -> Timeline:
        """Give a sound's classes' activity over time; ValueError where the model has none."""
        if not _is_single(sound):
            raise ValueError(
                "timeline takes one sound. Give a file, or an array; stream_timelines takes many."
            )
        return _or_raise(next(self.stream_timelines(sound, sample_rate)))

    def stream_timelines(
        self, sounds: Sound | Sequence[Sound], sample_rate: int = 0
    ) -> Generator[Timeline | Failure, None, None]:
        """Give sounds' timelines as `stream` gives taggings; a timeline's memory grows with its sound."""
        self.scorer.check_activity()
        for result in self._run(find_recordings(sounds, sample_rate), with_activity=True):
            yield result.timeline() if isinstance(result, _Progress) else result

    def _run(
        self, recordings: Sequence[Recording], with_activity: bool
    ) -> Generator["_Progress | Failure", None, None]:
        """Score the windows of all recordings in batches; give each recording when its last one is scored."""
        waiting: deque[_Progress] = deque()
        pending: list[tuple[_Progress, Window]] = []
        for number, event in feed_windows(recordings, self.cut, self.batch_size):
            if not waiting or waiting[-1].number != number:
                waiting.append(_Progress(self, number, recordings[number], with_activity))
            progress = waiting[-1]
            if isinstance(event, Window):
                pending.append((progress, event))
                progress.num_unscored += 1
            else:
                progress.ended = event
            if len(pending) == self.batch_size:
                self._score(pending, with_activity)
            while waiting and (result := waiting[0].result()) is not None:
                waiting.popleft()
                yield result
        self._score(pending, with_activity)
        for progress in waiting:
            result = progress.result()
            assert result is not None
            yield result

    def _score(self, pending: "list[tuple[_Progress, Window]]", with_activity: bool) -> None:
        windows = [window for _, window in pending]
        for (progress, window), scored in zip(
            pending, self.scorer.score(windows, self.cut, with_activity), strict=True
        ):
            progress.add(window, scored)
        pending.clear()


class _Progress:
    """A recording whose windows are being scored."""

    def __init__(self, tagger: Tagger, number: int, recording: Recording, with_activity: bool) -> None:
        self.tagger, self.number, self.recording = tagger, number, recording
        self.ended: End | Failure | None = None
        self.num_unscored = 0
        self.tally = Tally(tagger.windowing.over)
        self.stitch = Stitch()
        self.overview = Overview(tagger.card.fbank.num_mels) if with_activity else None

    def add(self, window: Window, scored: Scored) -> None:
        """Count a scored window in."""
        self.num_unscored -= 1
        self.tally.add(scored)
        if scored.activity is not None and self.overview is not None:
            self.stitch.add(window.start_frame // self.tagger.scorer.step_frames, scored.activity.numpy())
            self.overview.add(window.start_frame, window.fbank.numpy())

    def result(self) -> "_Progress | Failure | None":
        """Give itself when all is scored, or its failure; None before."""
        if self.ended is None or self.num_unscored:
            return None
        return self.ended if isinstance(self.ended, Failure) else self

    def tagging(self) -> Tagging:
        assert isinstance(self.ended, End)
        tagger = self.tagger
        seconds = self.ended.num_samples / tagger.sample_rate
        return Tagging(self.recording.name, seconds, self.tally.scores, tagger.classes, tagger.thresholds)

    def timeline(self) -> Timeline:
        assert self.overview is not None
        frame_seconds = self.tagger.card.fbank.frame_shift_ms / 1000
        return Timeline(
            self.tagging(),
            self.stitch.activity,
            self.tagger.scorer.step_frames * frame_seconds,
            self.overview.fbank,
            self.overview.factor * frame_seconds,
        )


def _is_single(sounds: Sound | Sequence[Sound]) -> bool:
    if isinstance(sounds, str | Path):
        return not Path(sounds).is_dir()
    return isinstance(sounds, bytes) or not isinstance(sounds, Sequence)


def _or_raise(result: Result | Failure) -> Result:
    if isinstance(result, Failure):
        raise ValueError(result.reason)
    return result
