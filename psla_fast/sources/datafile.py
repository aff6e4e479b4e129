"""Datafile: PSLA's JSON ({"data": [{"wav": path, "labels": "mid,mid"}, …]}) -> the clips of one split."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import ijson

from psla_fast.classes import Classes, shorten
from psla_fast.clip import Clip, Rejected
from psla_fast.sources.base import Split
from psla_fast.sources.rows import find_labels, get_stem, make_row

LONGEST_TEXT = 2**20  # bytes; so that a file that is no datafile doesn't fill the memory
BLOCK = 2**16
OPENING, CLOSING = ("start_map", "start_array"), ("end_map", "end_array")


def read_datafile(path: Path, classes: Classes, name: str) -> Split:
    """Read a datafile as one split, in constant memory; a clip's name is its wav's, without suffix.

    A wav that isn't absolute is relative to the datafile's folder. Raises ValueError that names the file and
    the row where it isn't a datafile.
    """
    next(_read_data(path), None)  # another kind of file is an error now
    index_by_mid = classes.index_by_mid()

    def build(wav: str, labels: str) -> Clip:
        return Clip(get_stem(wav), wav, find_labels(labels.split(","), index_by_mid))

    def read() -> Iterator[Clip | Rejected]:
        for wav, labels in _read_data(path):
            yield make_row(get_stem(wav), wav, build, wav, labels)

    return Split(name, path.parent, read)


def read_label_rows(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield (stem of the wav, mids) of each row of a datafile. Raises ValueError as `read_datafile` does."""
    for wav, labels in _read_data(path):
        yield get_stem(wav), [mid.strip() for mid in labels.split(",") if mid.strip()]


def read_wavs(path: Path) -> Iterator[str]:
    """Yield the wav of each row of a datafile. Raises ValueError as `read_datafile` does."""
    for wav, _ in _read_data(path):
        yield wav


class _Reader:
    """A datafile being parsed: gives its bytes without a BOM, and knows the row for messages.

    Refuses to read on where a name or text doesn't end within LONGEST_TEXT bytes.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file = path, file
        self.num_rows = self.spent = 0
        if file.read(3) != b"\xef\xbb\xbf":
            file.seek(0)

    def read(self, size: int) -> bytes:
        block = self.file.read(size)
        self.spent += len(block)
        if self.spent > LONGEST_TEXT + BLOCK:
            raise ValueError(f"a text is longer than {LONGEST_TEXT} bytes")
        return block

    def events(self) -> Iterator[tuple[str, Any]]:
        """Yield the parser's events. With use_float, since ijson 3.6 fails (SystemError) on 5000 digits."""
        try:
            for event in ijson.basic_parse(self, buf_size=BLOCK, use_float=True):
                self.spent = 0
                yield event
        except (ijson.JSONError, ValueError, ArithmeticError) as error:
            raise self.error("is not JSON", f" ({_first_line(error)})") from error

    def error(self, fault: str, detail: str = "") -> ValueError:
        where = f"{self.path}, row {self.num_rows}," if self.num_rows else self.path
        shape = '{"data": [{"wav": path, "labels": "mid,mid"}, …]}'
        return ValueError(f"{where} {fault}{detail}. Expected {shape}.")


def _read_data(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (wav, labels) of each row; the parser's events are counted, so that any nesting is harmless."""
    if not path.is_file():
        raise ValueError(f"{path} not found. Pass a datafile (JSON).")
    with open(path, "rb") as file:
        reader = _Reader(path, file)
        events = reader.events()
        has_data = False
        if next(events)[0] != "start_map":
            raise reader.error("is not an object")
        for event, key in events:
            if event == "end_map":
                break
            first = next(events)
            if key != "data":
                _skip(events, first[0])
                continue
            if first[0] != "start_array" or has_data:
                raise reader.error("has more or other than one list 'data'")
            has_data = True
            for event, _ in events:
                if event == "end_array":
                    break
                reader.num_rows += 1
                yield _read_row(reader, events, event)
            reader.num_rows = 0
        if not has_data:
            raise reader.error("has no list 'data'")
        for _ in events:  # none; what follows the object is the parser's error
            pass


def _read_row(reader: _Reader, events: Iterator[tuple[str, Any]], event: str) -> tuple[str, str]:
    if event != "start_map":
        raise reader.error("is not an object")
    row: dict[str, str] = {}
    for event, key in events:
        if event == "end_map":
            break
        event, value = next(events)
        if key in ("wav", "labels"):
            if event != "string" or key in row:
                raise reader.error(f"has more or other than one text {key!r}")
            row[key] = value
        else:
            _skip(events, event)
    if len(row) < 2:
        raise reader.error(f"has no {'labels' if 'wav' in row else 'wav'!r}")
    return row["wav"], row["labels"]


def _skip(events: Iterator[tuple[str, Any]], event: str) -> None:
    """Read to the end of the value that `event` begins."""
    depth = (event in OPENING) - (event in CLOSING)
    while depth > 0:
        event, _ = next(events)
        depth += (event in OPENING) - (event in CLOSING)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return shorten(lines[0])
