"""Functions on several gloo ranks, each in a process of its own."""

import os
import socket
from collections.abc import Callable

import torch

from psla_fast.distributed import World, end_world, start_world


def _run_rank(rank: int, size: int, port: int, task: Callable[..., None], words: tuple[object, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    world: World = start_world("cpu")
    task(world, *words)
    end_world()


def run_on_ranks(size: int, task: Callable[..., None], *words: object) -> None:
    """Call task(world, *words) on each rank; fails where one does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    arguments = [(rank, size, port, task, words) for rank in range(size)]
    ranks = [context.Process(target=_run_rank, args=one, daemon=True) for one in arguments]
    try:
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(300)
        codes = [process.exitcode for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert codes == [0] * size
