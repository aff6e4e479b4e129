"""Clip: one labelled excerpt, before its audio is read."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Clip:
    """One labelled excerpt of a source.

    name is its original name, unique in its split; source where the data set keeps it, relative to the data
    set, so that what is packed doesn't depend on where that lies; path its audio file; labels its class
    indices, ascending.
    """

    name: str
    source: str
    path: Path
    labels: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Rejected:
    """A clip that was left out: its name, where it came from, and why (`missing_audio: …`)."""

    name: str
    source: str
    reason: str
