"""The command `tag`: audio files, folders or raw PCM on stdin -> their top classes as text, JSON or CSV."""

import contextlib
import csv
import io
import json
import os
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from psla_fast.distributed import DeviceName
from psla_fast.evaluate import Precision
from psla_fast.recipe import parse_flags
from psla_fast.tagger import Failure, Label, Tagger, Tagging, Timeline, Windowing
from psla_fast.tagger.live import Pcm, tag_live
from psla_fast.tagger.recordings import find_recordings

CHECKPOINT_VARIABLE = "PSLA_FAST_CHECKPOINT"
COLUMNS = ("source", "start_seconds", "seconds", "rank", "index", "mid", "name", "score", "above_threshold")
MOST_BYTES = 200  # of a picture's name; file systems take 255, some fewer, and writing adds a suffix
PICTURED, MOST_PICTURED = 10, 40  # classes of a timeline
Results = Generator[Tagging | Failure, None, None] | Generator[Timeline | Failure, None, None]


@dataclass(frozen=True)
class TagCommand:
    """Tag audio with a checkpoint: each file's top classes, a long file's over overlapping windows.

    Names that begin with a dash go after --. A microphone:
    arecord -q -f S16_LE -r 16000 -t raw | psla-fast tag - --checkpoint CKPT
    """

    files: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="FILE")]
    """Audio files, folders of them, or - alone: raw PCM on stdin, tagged live, a line each hop."""
    checkpoint: Path | None = None
    """A file of RUN/checkpoints; $PSLA_FAST_CHECKPOINT where none is given."""
    top: int = 5
    """Classes to show of each file."""
    json: bool = False
    """Print an object a line (JSON Lines)."""
    csv: bool = False
    """Print a CSV table with a header, a row a class."""
    timeline: Path | None = None
    """PNG to draw the activity of ten classes or more over time to; of several files OUT_NAME.png each."""
    thresholds: Path | None = None
    """Score file that psla-fast evaluate wrote of CKPT on a validation split: a star marks classes above the
    threshold with the best F1 there."""
    over: Literal["max", "mean"] = "max"
    """A long file's scores: the highest over its windows, or their mean."""
    window_seconds: float | None = None
    """Length of a window; as long as the clips of the model's training where none is given."""
    overlap: float = 0.5
    """Part of a window that the next one repeats, 0 to below 1."""
    batch_size: int = 16
    """Windows scored at once, of several files."""
    device: DeviceName = "auto"
    """auto takes the GPU where there is one."""
    precision: Precision = "auto"
    """Autocast, as in training."""
    pcm_rate: int = 16000
    """Sample rate in Hz of stdin."""
    pcm_format: Literal["s16", "f32"] = "s16"
    """Samples of stdin: 16-bit integers or 32-bit floats, little-endian."""
    pcm_channels: int = 1
    """Interleaved channels of stdin."""


def tag(arguments: list[str]) -> None:
    """Tag what is named; exits with 1 where some files can't be tagged, with 2 where none can."""
    command = parse_flags(TagCommand, arguments, "psla-fast tag")
    _check(command)
    live = "-" in command.files
    names = [] if live else [found.name for found in find_recordings(list(command.files), 0)]
    pcm = Pcm(command.pcm_rate, command.pcm_format, command.pcm_channels)
    windowing = Windowing(command.window_seconds, command.overlap, command.over)
    tagger = Tagger.from_checkpoint(
        command.checkpoint or os.environ[CHECKPOINT_VARIABLE],
        command.device,
        command.precision,
        1 if live else command.batch_size,
        command.thresholds,
        windowing,
    )
    write = _choose_writer(command, live)
    if live:
        with contextlib.closing(tag_live(tagger, _open_stdin(), pcm)) as taggings:
            for tagging in taggings:
                write(tagging)
        return
    failures = _tag_files(tagger, names, command, write)
    if failures:
        sys.exit(2 if failures == len(names) else 1)


def _check(command: TagCommand) -> None:
    if not command.files:
        raise ValueError("no file is given. Name audio files or folders, or - for raw PCM on stdin.")
    if command.checkpoint is None and not os.environ.get(CHECKPOINT_VARIABLE):
        raise ValueError(f"--checkpoint is missing. Give one, or set ${CHECKPOINT_VARIABLE}.")
    if command.top < 1:
        raise ValueError(f"--top is {command.top}; give 1 or more.")
    if command.json and command.csv:
        raise ValueError("--json and --csv can't both be had. Give one.")
    if "-" in command.files and (len(command.files) > 1 or command.timeline):
        raise ValueError(
            "- is live and stands alone, without other files and --timeline. Name files instead."
        )
    if command.timeline and command.timeline.suffix.lower() != ".png":
        raise ValueError(f"--timeline {command.timeline} is no PNG by its name; give one that ends in .png.")
    if command.timeline and (command.timeline.is_dir() or not command.timeline.absolute().parent.is_dir()):
        raise ValueError(f"--timeline {command.timeline}: give a file in a folder that is there.")


def _open_stdin() -> Callable[[int], bytes]:
    if sys.stdin.isatty():
        raise ValueError("- is the terminal. Pipe raw PCM into it, as of arecord -f S16_LE -r 16000 -t raw.")
    read: Callable[[int], bytes] = sys.stdin.buffer.read1  # type: ignore[union-attr]  # as soon as it comes
    return read


def _tag_files(
    tagger: Tagger, names: list[str], command: TagCommand, write: Callable[[Tagging], None]
) -> int:
    """Tag files and write each at once; returns how many failed."""
    paths = [Path(name) for name in names]
    pictures = iter(_name_pictures(command.timeline, paths) if command.timeline else [])
    results: Results = tagger.stream_timelines(paths) if command.timeline else tagger.stream(paths)
    failures = 0
    with contextlib.closing(results):
        for result in results:
            picture = next(pictures, None)
            if isinstance(result, Failure):
                failures += 1
                print(f"psla-fast tag: {_printable(result.reason)}", file=sys.stderr, flush=True)
            elif isinstance(result, Timeline):
                assert picture is not None
                _draw(picture, result, command.top)
                write(result.tagging)
            else:
                write(result)
    return failures


def _name_pictures(out: Path, paths: list[Path]) -> list[Path]:
    """Give OUT for one file; of several OUT_NAME.png, long names cut, numbered where two have one name."""
    if len(paths) == 1:
        return [out]
    taken: dict[Path, None] = {}
    for path in paths:
        stem, number = f"{out.stem}_{path.stem}", 1
        while len(os.fsencode(stem)) > MOST_BYTES:
            stem = stem[:-1]
        picture = out.with_name(f"{stem}{out.suffix}")
        while picture in taken:
            number += 1
            picture = out.with_name(f"{stem}_{number}{out.suffix}")
        taken[picture] = None
    return list(taken)


def _draw(picture: Path, timeline: Timeline, top: int) -> None:
    from psla_fast.plots import Strip, plot_timeline

    shown = timeline.tagging.top(min(max(top, PICTURED), MOST_PICTURED))
    names = [f"{label.name} {label.score:.2f}" for label in shown]
    activity = timeline.activity[[label.index for label in shown]]
    plot_timeline(
        picture,
        Strip(timeline.fbank, timeline.fbank_step_seconds),
        Strip(activity.T, timeline.step_seconds),
        names,
        f"{_printable(timeline.tagging.source)}, {timeline.tagging.seconds:.2f} s",
    )


def _choose_writer(command: TagCommand, live: bool) -> Callable[[Tagging], None]:
    """Choose how taggings are printed; CSV's header is printed at once."""
    if command.json:
        return lambda tagging: _print(json.dumps(_as_plain(tagging, command.top)))
    if command.csv:
        _print(_csv_text([COLUMNS]))
        return lambda tagging: _print(_csv_text(_csv_rows(tagging, command.top)))
    form = _live_line if live else _text
    return lambda tagging: _print(form(tagging, command.top))


def _print(text: str) -> None:
    print(text, flush=True)


def _text(tagging: Tagging, top: int) -> str:
    lines = [f"{_printable(tagging.source)}  {tagging.seconds:.2f} s"]
    lines += [f"  {label.score:.3f} {_mark(tagging, label)} {label.name}" for label in tagging.top(top)]
    return "\n".join(lines)


def _live_line(tagging: Tagging, top: int) -> str:
    minutes, seconds = divmod(tagging.start_seconds + tagging.seconds, 60)
    clock = f"{int(minutes) // 60}:{int(minutes) % 60:02d}:{seconds:05.2f}"
    labels = (f"{label.name}{_mark(tagging, label).strip()} {label.score:.2f}" for label in tagging.top(top))
    return f"{clock}  {'  '.join(labels)}"


def _mark(tagging: Tagging, label: Label) -> str:
    """Give a star for a class above its threshold, else a blank."""
    return "*" if tagging.thresholds is not None and label.score > tagging.thresholds[label.index] else " "


def _as_plain(tagging: Tagging, top: int) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "source": tagging.source,
        "start_seconds": round(tagging.start_seconds, 4),
        "seconds": round(tagging.seconds, 4),
        "top": [label._asdict() for label in tagging.top(top)],
    }
    if tagging.thresholds is not None:
        plain["labels"] = [label._asdict() for label in tagging.labels]
    return plain


def _csv_rows(tagging: Tagging, top: int) -> Iterator[tuple[object, ...]]:
    place = _printable(tagging.source), f"{tagging.start_seconds:.4f}", f"{tagging.seconds:.4f}"
    for rank, label in enumerate(tagging.top(top), start=1):
        above = "" if tagging.thresholds is None else int(_mark(tagging, label) == "*")
        yield *place, rank, label.index, label.mid, label.name, f"{label.score:.6f}", above


def _csv_text(rows: Iterable[Iterable[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().rstrip("\n")


def _printable(text: str) -> str:
    """Write a file's name on one line, also where it isn't UTF-8."""
    name = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
