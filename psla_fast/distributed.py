"""Distributed: rank, world size and device from torchrun's environment; exact gathers."""

import contextlib
import os
import sys
import time
import traceback
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from psla_fast.allocator import keep_freed_memory

START_SECONDS = 1800
DeviceName = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class World:
    """This process among its peers; one rank without torchrun."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Tell whether this rank writes and prints."""
        return self.rank == 0


def start_world(device: DeviceName) -> World:
    """Join torchrun's process group (NCCL on GPUs, gloo on CPUs), or be the only rank."""
    cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    if cuda and not torch.cuda.is_available():
        raise ValueError("--device cuda: this torch sees no CUDA device. Use --device cpu.")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if cuda and local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"this machine has {torch.cuda.device_count()} GPUs, fewer than ranks. Start fewer ranks."
        )
    place = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(place)
        torch.backends.cudnn.benchmark = True  # shapes are few
    else:
        keep_freed_memory()
    if "WORLD_SIZE" not in os.environ:
        return World(0, 1, place)
    store, rank, size = next(rendezvous("env://"))
    store = PrefixStore(_agree_on_start(store, rank, size), store)
    backend, device_id = ("nccl", place) if cuda else ("gloo", None)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, device_id=device_id)
    return World(rank, size, place)


def _agree_on_start(store: Store, rank: int, size: int) -> str:
    """Give a name that the ranks which are starting share, and none that torchrun started before.

    torchrun keeps its store when it restarts ranks, and with it the addresses of those that died.
    """
    mine = uuid.uuid4().hex
    if rank:
        store.set(f"hello/{rank}", mine)
        first = bytes(store.get(f"answer/{mine}")).decode()  # waits; no dead rank has answered this
        store.set(f"heard/{first}/{rank}", "")
        return first
    waiting, deadline = set(range(1, size)), time.monotonic() + START_SECONDS
    answered: set[str] = set()
    while waiting := {other for other in waiting if not store.check([f"heard/{mine}/{other}"])}:
        for other in waiting:
            hello = bytes(store.get(f"hello/{other}")).decode() if store.check([f"hello/{other}"]) else ""
            if hello not in answered | {""}:
                store.set(f"answer/{hello}", mine)  # or a dead one's, which hears nothing
                answered.add(hello)
        if time.monotonic() > deadline:
            raise ValueError(f"rank {min(waiting)} didn't start in {START_SECONDS} s. See its machine's log.")
        time.sleep(0.01)
    return mine


def end_world() -> None:
    """Leave the process group, where there is one, once every rank has come to it.

    (torchrun kills what still writes when another rank has ended.)
    """
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


@contextlib.contextmanager
def ending_at_once() -> Iterator[None]:
    """Have an exception that leaves the block end this process at once, where it is one of several ranks.

    Python's own way out would, now and then, wait for ever: torch joins gloo's thread while it holds Python's
    lock, which that thread wants. Exit status and traceback are the same.
    """
    try:
        yield
    except BaseException as error:
        if not dist.is_initialized():
            raise
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1)


def gather_rows(local: Tensor, num_rows: int, world: World) -> Tensor:
    """Gather rows dealt out as r, r + size, …: (≤ ⌈N/size⌉, C) a rank -> (N, C) in order, everywhere."""
    if world.size == 1:
        return local
    share = -(-num_rows // world.size)
    padded = torch.zeros(share, *local.shape[1:], dtype=local.dtype, device=world.device)
    padded[: len(local)] = local
    parts = [torch.empty_like(padded) for _ in range(world.size)]
    dist.all_gather(parts, padded)
    return torch.stack(parts, dim=1).flatten(0, 1)[:num_rows]


def sum_over_ranks(value: Tensor, world: World) -> Tensor:
    """Sum a tensor over the ranks."""
    if world.size > 1:
        dist.all_reduce(value)
    return value


def find_difference(values: list[int], world: World) -> tuple[int, list[int]] | None:
    """Find a rank with other values than the first one, and its values; None where all have the same."""
    mine = torch.tensor(values, device=world.device)
    every = [torch.empty_like(mine) for _ in range(world.size)]
    if world.size > 1:
        dist.all_gather(every, mine)
        for rank, others in enumerate(every):
            if not torch.equal(others, every[0]):
                return rank, others.tolist()
    return None


def broadcast_model(model: nn.Module, world: World) -> None:
    """Give every rank the first rank's parameters and buffers."""
    if world.size > 1:
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, src=0)
