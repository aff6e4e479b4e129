"""Clip: one labelled excerpt, before its audio is read."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Clip:
    """One labelled excerpt of a source.

    name is its original name, unique in its split; labels its class indices, ascending. source says where its
    audio is, relative to the split's root, so that what is packed doesn't depend on where that lies: an audio
    file, or an HDF5 file of which `row` is the clip's. start_seconds and end_seconds (None: to the end) cut
    it out of a longer recording. found is False where the source looked for the audio and it isn't there.
    """

    name: str
    source: str
    labels: tuple[int, ...]
    row: int | None = None
    start_seconds: float = 0.0
    end_seconds: float | None = None
    found: bool = True


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row of a source that is no clip: its name, where it came from, and why (`unknown_label: …`)."""

    name: str
    source: str
    reason: str
