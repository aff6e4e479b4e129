"""AudioSet: its official segment lists and a folder of audio files -> the clips of one split."""

from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from psla_fast.classes import Classes, shorten
from psla_fast.clip import Clip, Rejected
from psla_fast.sources.audio_folder import AudioFolder
from psla_fast.sources.base import Split
from psla_fast.sources.rows import find_labels, format_seconds, make_row, parse_times, read_rows


def read_audioset(
    segments: Sequence[Path], audio: Path, classes: Classes, name: str, full_length: bool = False
) -> Split:
    """Read segment lists (`YTID, start_seconds, end_seconds, "mid,mid"`), one after the other, as one split.

    The audio folder is scanned once, now; how its files may be named says `AudioFolder.find`. full_length:
    the files are whole videos, named by the id alone, of which start to end is the clip; otherwise a file is
    the clip already. A clip's name is its YTID; where an id comes again with another start, the later rows
    are YTID_start (`abcdefghijk_30`), and only a file named with that start can be theirs, since one named
    by the id alone is the first row's. Raises ValueError where a list or the folder isn't there or is
    something else.
    """
    if not segments:
        raise ValueError("no segment list. Pass AudioSet's CSV files, such as balanced_train_segments.csv.")
    for path in segments:
        next(_read_segments([path]), None)  # another kind of file is an error now
    if not audio.is_dir():
        raise ValueError(f"{audio} not found. Pass the folder that holds AudioSet's audio files.")
    folder = AudioFolder.scan(audio)
    if not len(folder):
        raise ValueError(f"{audio} holds no audio file. Pass the folder that holds AudioSet's audio files.")
    index_by_mid = classes.index_by_mid()

    def read() -> Iterator[Clip | Rejected]:
        repeated = _find_repeated(segments)
        starts: dict[
            str, str
        ] = {}  # of ids that come more than once, their first row's, whatever becomes of it

        def build(ytid: str, start: str, end: str, mids: str) -> Clip:
            first = starts.setdefault(ytid, start) if hash(ytid) in repeated else start
            start_seconds, end_seconds = parse_times(start, end)
            labels = find_labels(mids.split(","), index_by_mid)
            last = float("inf") if end_seconds is None else end_seconds
            again = _seconds(first) != start_seconds
            clip_name = f"{ytid}_{format_seconds(start_seconds)}" if again else ytid
            if full_length:
                found = folder.find(ytid, start_seconds, last, cuts=False)
                span = (start_seconds, end_seconds)
            else:
                found = folder.find(ytid, start_seconds, last, whole=not again)
                span = (0.0, None)
            return Clip(clip_name, found or f"{ytid}.wav", labels, None, *span, found is not None)

        for _, row in _read_segments(segments):
            yield make_row(row[0], f"{row[0]}.wav", build, *row)

    return Split(name, audio, read, missing_is_normal=True, scanned=True)


def _read_segments(segments: Sequence[Path]) -> Iterator[tuple[int, list[str]]]:
    """Yield (line, [YTID, start, end, mids]) of every row of every list."""
    for path in segments:
        for line, row in read_rows(path, comment="#", skip_blanks=True):
            if len(row) != 4:
                got = shorten(", ".join(row))
                raise ValueError(
                    f'{path}, line {line}: got {got!r}, expected YTID, start_seconds, end_seconds, "mid,mid".'
                )
            yield line, row


def _find_repeated(segments: Sequence[Path]) -> set[int]:
    """Give the hashes of the ids that stand in more than one row."""
    hashes = np.array(array("q", (hash(row[0]) for _, row in _read_segments(segments))), dtype=np.int64)
    hashes.sort()
    return set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())


def _seconds(text: str) -> float:
    """Read seconds; NaN, which equals no start, for what is no number."""
    try:
        return float(text) if text.strip() else 0.0
    except ValueError:
        return float("nan")
