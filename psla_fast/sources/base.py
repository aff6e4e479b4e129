"""Split: what every source gives the packer."""

from dataclasses import dataclass

from psla_fast.clip import Clip, Rejected


@dataclass(frozen=True)
class Split:
    """One split of a data set: its name (train, val, eval), its clips, and the rows that are none."""

    name: str
    clips: list[Clip]
    rejected: list[Rejected]
