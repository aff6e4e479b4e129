"""Plots: a clip's fbank, its classes over time, and a split's class counts and clip lengths, as PNG files."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from psla_fast.classes import Classes
from psla_fast.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

    from psla_fast.shards.index import SplitStatistics

NAMED_CLASSES = 60  # more names than that can't be read


def plot_fbank(path: Path, fbank: npt.NDArray[np.float32], frame_shift_ms: float, title: str) -> None:
    """Draw log-mels (T, F): time to the right in seconds, mel bins upwards."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.add_subplot()
    picture = _draw_strip(axes, Strip(fbank, frame_shift_ms / 1000))
    axes.set(xlabel="seconds", ylabel="mel bin", title=_plain(textwrap.fill(title, 110, max_lines=3)))
    figure.colorbar(picture, label="log-mel")
    _save(figure, path)


class Strip(NamedTuple):
    """Values (T, rows) over time, a column each step_seconds."""

    values: npt.NDArray[np.float32]
    step_seconds: float


def plot_timeline(path: Path, fbank: Strip, activity: Strip, names: Sequence[str], title: str) -> None:
    """Draw log-mels (T, F), and below them classes' activity (T', K) with a name each, the first on top."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.2 + 0.28 * len(names)), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(2.2, 0.28 * len(names)))
    picture = _draw_strip(upper, fbank)
    upper.set(ylabel="mel bin", title=_plain(textwrap.fill(title, 110, max_lines=3)))
    figure.colorbar(picture, label="log-mel", pad=0.01)
    heat = _draw_strip(lower, activity._replace(values=activity.values[:, ::-1]))
    heat.set_clim(0.0, 1.0)
    lower.set_yticks(np.arange(len(names)) + 0.5, [_plain(name)[:40] for name in reversed(names)], fontsize=8)
    lower.set_xlabel("seconds")
    lower.set_xlim(0.0, max(len(strip.values) * strip.step_seconds for strip in (fbank, activity)))
    figure.colorbar(heat, label="activity", pad=0.01)
    _save(figure, path)


def plot_split(folder: Path, statistics: "SplitStatistics", classes: Classes, frame_shift_ms: float) -> None:
    """Draw FOLDER/class_counts.png and FOLDER/clip_lengths.png."""
    from matplotlib.figure import Figure

    order = np.argsort(-statistics.class_counts, kind="stable")
    counts = statistics.class_counts[order]
    named = len(classes) <= NAMED_CLASSES
    figure = Figure(figsize=(10, 3 + 0.16 * len(classes)) if named else (10, 5), layout="constrained")
    axes = figure.add_subplot()
    if named:
        names = [_plain(classes.names[i])[:40] for i in order]
        axes.barh(np.arange(len(counts)), counts)
        axes.set_yticks(np.arange(len(counts)), names, fontsize=7)
        axes.invert_yaxis()
        axes.set(xlabel="clips", title=f"{_plain(folder.name)}: clips of each class")
    else:
        axes.plot(np.arange(1, len(counts) + 1), np.maximum(counts, 0.5))
        axes.set(xlabel="class, most frequent first", ylabel="clips", yscale="log")
        most, least = (_plain(classes.names[order[i]]) for i in (0, -1))
        axes.set_title(f"{_plain(folder.name)}: {counts[0]:,} clips of {most}, {counts[-1]:,} of {least}")
    _save(figure, folder / "class_counts.png")

    seconds = statistics.num_frames * frame_shift_ms / 1000
    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.hist(seconds, bins=60)
    median = float(np.median(seconds))
    axes.axvline(median, color="black", linestyle="--", label=f"median {median:.2f} s")
    axes.set(
        xlabel="seconds", ylabel="clips", title=f"{_plain(folder.name)}: lengths of {len(seconds):,} clips"
    )
    axes.legend()
    _save(figure, folder / "clip_lengths.png")


def _draw_strip(axes: "Axes", strip: Strip) -> "AxesImage":
    columns, rows = strip.values.shape
    extent = (0.0, columns * strip.step_seconds, 0.0, float(rows))
    return axes.imshow(strip.values.T, origin="lower", aspect="auto", extent=extent, interpolation="nearest")


def _plain(text: str) -> str:
    """Keep matplotlib from reading $…$ as mathematics."""
    return text.replace("$", r"\$")


def _save(figure: "Figure", path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120, metadata={"Software": None})
