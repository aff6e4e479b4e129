"""AudioFolder: a folder of AudioSet-like audio files -> the file of a clip, found by its id and start."""

import os
import re
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Self

import numpy as np

SUFFIXES = ("wav", "flac", "ogg", "opus", "mp3", "m4a")  # the first is preferred
PREFERENCE = {suffix: place for place, suffix in enumerate(SUFFIXES)}
SECONDS = r"_([0-9]{1,9}(?:\.[0-9]{1,9})?)"
# An id has 11 characters, so that a file name can be read in one way only, though ids may hold Y, - and _.
STEM = re.compile(rf"Y?([A-Za-z0-9_-]{{11}})(?:{SECONDS}(?:{SECONDS})?)?")
TOLERANCE_SECONDS = 1.0


class AudioFolder:
    """Index of audio files, by relative path; about 70 bytes a file, so that 2M take 150 MB or less.

    Held: all paths in one buffer, their places in it, and the hash of the id each file name tells, sorted.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        """Index relative paths of audio files (as `scan_audio` gives them)."""
        hashes, offsets, arena = array("q"), array("q"), bytearray()
        for path in paths:
            hashes.append(hash(_id_of(path[path.rfind("/") + 1 : path.rfind(".")])))
            offsets.append(len(arena))
            arena += path.encode("utf-8", "surrogateescape")
            arena.append(0)
        order = np.argsort(np.array(hashes, dtype=np.int64), kind="stable")
        self._hashes = np.array(hashes, dtype=np.int64)[order].data
        del hashes
        self._offsets = np.array(offsets, dtype=np.int64)[order].data
        self._arena = arena

    @classmethod
    def scan(cls, root: Path) -> Self:
        """Index a folder and all folders in it."""
        return cls(scan_audio(root))

    def __len__(self) -> int:
        """Give the number of files."""
        return len(self._hashes)

    def find(
        self, clip_id: str, start: float, end: float, cuts: bool = True, whole: bool = True
    ) -> str | None:
        """Give the relative path of a clip's audio, or None.

        Taken are `<id>.wav` and `Y<id>.wav` (where `whole`), and, for ids of 11 characters and where `cuts`,
        `<id>_<start>.wav` and `<id>_<start>_<end>.wav`, also with Y, whose start agrees within 1 s, in
        seconds or milliseconds. Of several files that fit, those named with a start come first, nearest
        start before others, then those whose end agrees; then in the order of SUFFIXES; then by path.
        """
        best: tuple[bool, float, bool, int, str] | None = None
        for key in {_id_of(clip_id), _id_of(f"Y{clip_id}")}:
            for path in self._paths(hash(key)):
                stem, _, suffix = path[path.rfind("/") + 1 :].rpartition(".")
                is_whole = stem in (clip_id, f"Y{clip_id}")
                if is_whole:
                    fit = (0.0, False) if whole else None
                else:
                    fit = _compare_cut(stem, clip_id, start, end) if cuts else None
                if fit is not None:
                    rank = (is_whole, *fit, PREFERENCE[suffix.lower()], path)
                    best = rank if best is None else min(best, rank)
        return None if best is None else best[-1]

    def _paths(self, key: int) -> Iterator[str]:
        place = bisect_left(self._hashes, key)
        while place < len(self._hashes) and self._hashes[place] == key:
            offset = self._offsets[place]
            yield self._arena[offset : self._arena.index(0, offset)].decode("utf-8", "surrogateescape")
            place += 1


def scan_audio(root: Path, nested: bool = True) -> Iterator[str]:
    """Yield the paths, relative to root, of all audio files in it and, if nested, its folders, by suffix.

    Links are followed, a folder is entered once however many links lead to it, and names that start with a
    dot are skipped. Folders come in sorted order, the files of one in the order of the disk.
    """
    visited: set[tuple[int, int]] = set()
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        status = os.stat(root / folder)
        if (status.st_dev, status.st_ino) in visited:
            continue
        visited.add((status.st_dev, status.st_ino))
        inner = []
        with os.scandir(root / folder) as entries:
            for entry in entries:
                name = entry.name
                if name.startswith("."):
                    continue
                stem, _, suffix = name.rpartition(".")
                if stem and suffix.lower() in PREFERENCE and not entry.is_dir(follow_symlinks=False):
                    yield folder + name
                elif nested and entry.is_dir():
                    inner.append(f"{folder}{name}/")
        waiting.extend(sorted(inner, reverse=True))


def _id_of(stem: str) -> str:
    """Give the id of 11 characters that a file's stem tells, or else the whole stem."""
    told = STEM.fullmatch(stem)
    return told[1] if told else stem


def _compare_cut(stem: str, clip_id: str, start: float, end: float) -> tuple[float, bool] | None:
    """Give (distance of the starts in seconds, whether the ends disagree) of a cut; None if it's another.

    A number below 1000 is taken for milliseconds only where it agrees to the millisecond.
    """
    told = STEM.fullmatch(stem)
    if told is None or told[1] != clip_id or told[2] is None:
        return None
    told_start, told_end = float(told[2]), float(told[3] or "inf")
    fits = []
    for unit in (1.0, 1000.0):
        distance = abs(told_start / unit - start)
        in_doubt = unit > 1 and (told_start < 1000 and distance > 0.001 or told_end - told_start < 100)
        if distance <= TOLERANCE_SECONDS and not in_doubt:
            ends_disagree = told[3] is not None and abs(told_end / unit - end) > TOLERANCE_SECONDS
            fits.append((distance, ends_disagree))
    return min(fits, default=None)
