"""Split: what every source gives the packer."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from psla_fast.clip import Clip, Rejected


@dataclass(frozen=True)
class Split:
    """One split of a data set: its name (train, val, eval), and its rows, read anew by each call of `read`.

    `read` yields a Clip, or a Rejected for a row that is none, in the order of the data set's own list, one
    at a time: a list of 2M rows is never held as objects. Names may repeat; the packer rejects all but the
    first. root is the folder that the clips' `source` is relative to. missing_is_normal: the data set is
    known to lack audio (AudioSet's deleted videos), so missing clips don't count as rejected ones. scanned:
    the source has looked for each clip's audio, so one that was found and isn't there later has vanished.
    """

    name: str
    root: Path
    read: Callable[[], Iterator[Clip | Rejected]]
    missing_is_normal: bool = False
    scanned: bool = False
