"""Signals: SIGTERM and SIGUSR1 -> a stop that all ranks make at the same step."""

import signal
from types import FrameType

import torch

from psla_fast.distributed import World


class Stopped(Exception):  # noqa: N818 - not an error: the run goes on later
    """A signal asked the run to stop; its state is saved."""


class StopSignals:
    """Notes the signals that ask this rank to stop, and tells them to the others."""

    def __init__(self, world: World) -> None:
        """Nothing is noted before `listen`."""
        self._world = world
        self.noted = 0

    def listen(self) -> None:
        """Note SIGTERM and SIGUSR1 (Slurm's warnings) instead of ending at them."""
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._note)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.noted = number

    def agree(self, save: bool = False) -> tuple[int, bool]:
        """Give the signal that any rank has noted, 0 for none, and whether any asks to save.

        Waits for the other ranks: every one must call it.
        """
        if self._world.size == 1:
            return self.noted, save
        asked = torch.tensor([self.noted, int(save)], device=self._world.device)
        torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MAX)
        return int(asked[0]), bool(asked[1])


def name_signal(number: int) -> str:
    """Name a signal: SIGTERM."""
    return signal.Signals(number).name
