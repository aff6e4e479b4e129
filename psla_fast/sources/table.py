"""Table: a CSV file of paths and labels (path,labels[,key,start,end]) -> the clips of one split."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from psla_fast.classes import Classes, shorten
from psla_fast.clip import Clip, Rejected
from psla_fast.sources.base import Split
from psla_fast.sources.rows import NoClip, format_seconds, get_stem, make_row, parse_times, read_columns

AMBIGUOUS = -1


def read_table(path: Path, classes: Classes, name: str) -> Split:
    """Read a CSV file with the columns path and labels, perhaps key, start and end, and any others.

    labels: mids or display names, separated by commas or semicolons; a name that holds commas is found all
    the same, longest first. key is the clip's name; where it's blank, the path's stem is, with _start_end
    where the row has times (seconds; blank: from the beginning, to the end). A path that isn't absolute is
    relative to the table's folder. Raises ValueError that names the file and the line where it isn't such a
    table.
    """
    next(_read_rows(path), None)  # another kind of file is an error now
    index_by_label = _index_by_label(classes)
    longest = 1 + max(label.count(",") for label in index_by_label)

    def build(audio: str, labels: str, key: str, start: str, end: str) -> Clip:
        start_seconds, end_seconds = parse_times(start, end)
        times = [format_seconds(start_seconds)] if start.strip() or end_seconds is not None else []
        if end_seconds is not None:
            times.append(format_seconds(end_seconds))
        clip_name = key.strip() or "_".join([get_stem(audio), *times])
        found = _find_labels(labels, index_by_label, longest)
        return Clip(clip_name, audio, found, None, start_seconds, end_seconds)

    def read() -> Iterator[Clip | Rejected]:
        for _, row in _read_rows(path):
            yield make_row(row[2].strip() or get_stem(row[0]), row[0], build, *row)

    return Split(name, path.parent, read)


def _read_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    return read_columns(path, ("path", "labels"), ("key", "start", "end"))


def _index_by_label(classes: Classes) -> dict[str, int]:
    """Map mids and display names to class indices; a name of two classes to AMBIGUOUS."""
    index: dict[str, int] = {}
    for label, name in enumerate(classes.names):
        if name:
            index[name] = AMBIGUOUS if name in index else label
    return index | classes.index_by_mid()


def _find_labels(cell: str, index_by_label: Mapping[str, int], longest: int) -> tuple[int, ...]:
    """Give the class indices of a cell, ascending. `longest`: most parts between commas of a name."""
    labels: set[int] = set()
    for text in [cell] if cell.strip() in index_by_label else cell.split(";"):
        parts = text.split(",")
        place = 0
        while place < len(parts):
            for width in range(min(longest, len(parts) - place), 0, -1):
                label = ",".join(parts[place : place + width]).strip()
                if label in index_by_label or (not label and width == 1):
                    break
            else:
                raise NoClip(f"unknown_label: {shorten(label)!r} is no mid and no name of the class list")
            if label and index_by_label[label] == AMBIGUOUS:
                raise NoClip(f"ambiguous_label: {shorten(label)!r} names several classes; give the mid")
            if label:
                labels.add(index_by_label[label])
            place += width
    if not labels:
        raise NoClip("no_label: the row names no class")
    return tuple(sorted(labels))
