"""Rows: a data set's CSV file -> its rows, one at a time; and what makes a row a Clip or a Rejected."""

import csv
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TextIO

from psla_fast.classes import shorten
from psla_fast.clip import Clip, Rejected

LONGEST_ROW = 2**20  # characters; so that a file that is no list of clips doesn't fill the memory
LONGEST_NAME, LONGEST_SOURCE = 1000, 4000  # characters; Linux takes paths of 4096 bytes
LATEST_SECONDS = 1e7


class NoClip(ValueError):
    """Why a row is no clip; begins with one word for statistics (`bad_times: …`)."""


def read_rows(path: Path, comment: str = "", skip_blanks: bool = False) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number, cells) of each row of a CSV file in UTF-8; empty lines are skipped.

    comment: lines that start with it are skipped. skip_blanks: blanks after a comma are no part of a cell.
    Raises ValueError that names file and line where it isn't such a file, a quote isn't closed, or a row is
    longer than LONGEST_ROW.
    """
    if not path.is_file():
        raise ValueError(f"{path} not found. Pass a CSV file.")
    line_number, spent = 0, 0

    def lines(file: TextIO) -> Iterator[str]:
        nonlocal line_number, spent
        while line := file.readline(LONGEST_ROW + 1):
            line_number += 1
            spent += len(line)
            if spent > LONGEST_ROW:
                raise csv.Error(f"a row is longer than {LONGEST_ROW} characters")
            if not line.isascii() and any("\udc80" <= character <= "\udcff" for character in line):
                raise csv.Error("it holds bytes of another coding")
            yield "\n" if comment and line.startswith(comment) else line

    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        try:
            for row in csv.reader(lines(file), skipinitialspace=skip_blanks, strict=True):
                spent = 0
                if row:
                    yield line_number, row
        except csv.Error as error:
            where = f"{path}, line {line_number}"
            raise ValueError(f"{where}: not a CSV file in UTF-8 ({error}). Restore the original.") from error


def read_columns(
    path: Path, needed: Sequence[str], optional: Sequence[str] = ()
) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number, cells of the needed, then of the optional columns) of a CSV file with a header.

    The file's columns may stand in any order; others are ignored; an optional one that isn't there gives "".
    Raises ValueError as `read_rows` does, and for a needed column that is missing, a column that stands
    twice, or a row with more or fewer cells than the header.
    """
    rows = read_rows(path)
    _, header = next(rows, (0, []))
    columns = [cell.strip() for cell in header]
    for column in (*needed, *optional):
        count = columns.count(column)
        if count > 1 or (count == 0 and column in needed):
            got = shorten(",".join(columns))
            raise ValueError(f"{path}: columns are {got!r}, expected {','.join(needed)}, each once.")
    places = [columns.index(column) if column in columns else -1 for column in (*needed, *optional)]
    for line, row in rows:
        if len(row) != len(columns):
            got = f"got {len(row)} cells, expected {len(columns)}"
            raise ValueError(f"{path}, line {line}: {got}. Quote cells with commas.")
        yield line, [row[place] if place >= 0 else "" for place in places]


def make_row(name: str, source: str, build: Callable[..., Clip], *cells: object) -> Clip | Rejected:
    """Give the Clip that `build(*cells)` gives, or a Rejected where it raises NoClip."""
    try:
        clip = build(*cells)
        check_path(clip.name, "bad_name", LONGEST_NAME)
        check_path(clip.source, "bad_path", LONGEST_SOURCE)
    except NoClip as error:
        return Rejected(_printable(name), _printable(source), str(error))
    return clip


def check_path(text: str, reason: str, longest: int) -> None:
    """Raise NoClip where a name or path is empty, too long, or can't be written in UTF-8 or on a disk."""
    if text.isascii() and 0 < len(text) <= longest and text.isprintable():
        return
    if not text:
        raise NoClip(f"{reason}: it is empty")
    if len(text) > longest:
        raise NoClip(f"{reason}: {len(text)} characters, expected at most {longest}")
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise NoClip(f"{reason}: {text!r} holds NUL or is not UTF-8")


def find_labels(mids: Iterable[str], index_by_mid: Mapping[str, int]) -> tuple[int, ...]:
    """Give the class indices of mids, ascending; blanks around a mid and empty ones are skipped.

    Raises NoClip for a mid that isn't a class (unknown_label), and where there is none (no_label).
    """
    labels: set[int] = set()
    for mid in mids:
        if stripped := mid.strip():
            label = index_by_mid.get(stripped)
            if label is None:
                raise NoClip(f"unknown_label: {shorten(stripped)!r} is not in the class list")
            labels.add(label)
    if not labels:
        raise NoClip("no_label: the row names no class")
    return tuple(sorted(labels))


def parse_times(start: str, end: str) -> tuple[float, float | None]:
    """Read start and end in seconds; blank stands for 0 and for the recording's end.

    Raises NoClip (bad_times) for what is no number, negative, above LATEST_SECONDS, or ends before it starts.
    """
    try:
        start_seconds = float(start) if start.strip() else 0.0
        end_seconds = float(end) if end.strip() else None
    except ValueError:
        raise NoClip(f"bad_times: {shorten(start)!r} to {shorten(end)!r} are no seconds") from None
    last = start_seconds + 1 if end_seconds is None else end_seconds
    if not (math.isfinite(last) and 0 <= start_seconds < last <= LATEST_SECONDS):
        raise NoClip(f"bad_times: {shorten(start)!r} to {shorten(end)!r} seconds is no excerpt")
    return start_seconds, end_seconds


def format_seconds(seconds: float) -> str:
    """Write seconds for a name: microseconds, no trailing zeros (30.0 is `30`)."""
    return f"{seconds:.6f}".rstrip("0").rstrip(".")


def get_stem(path: str) -> str:
    """Give a path's file name without its last suffix."""
    name = path[path.rfind("/") + 1 :]
    stem, dot, _ = name.rpartition(".")
    return stem if dot and stem else name


def _printable(text: str) -> str:
    return shorten(text, LONGEST_NAME).encode("utf-8", "backslashreplace").decode()
