"""Small splits for the tests of streams, and the processes that those start: -m tests.stream_worker TASK …"""

# B clips of a batch, T frames, F mels

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from psla_fast.classes import read_classes
from psla_fast.distributed import end_world, start_world
from psla_fast.fbank import FbankConfig
from psla_fast.sampling import SamplingConfig
from psla_fast.shards import Shards, Storage, open_shards
from psla_fast.shards.index import write_index
from psla_fast.shards.sums import write_sums
from psla_fast.shards.writer import Origin, ShardWriter
from psla_fast.stream import Batch, BatchShape, DrawPlan, PlanConfig, Stream, StreamConfig, open_stream
from psla_fast.stream.resident import DeviceStream

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
INDEXED = StreamConfig()
NUM_CLASSES, NUM_MELS = 5, 8


def write_split(
    folder: Path,
    fbanks: Sequence[np.ndarray],
    clips_a_shard: int,
    dtype: str = "float16",
    order: Sequence[int] | None = None,
) -> Path:
    """Pack log-mels (T, F) into a split, clip i with 1 to 3 labels drawn for it, in an order of one's own."""
    folder.mkdir(parents=True)
    rows = "".join(f"{number},/m/{number},Class {number}\n" for number in range(NUM_CLASSES))
    (folder.parent / "classes.csv").write_text(f"index,mid,display_name\n{rows}")
    labels = [
        sorted(np.random.default_rng(clip).choice(NUM_CLASSES, size=1 + clip % 3, replace=False))
        for clip in range(len(fbanks))
    ]
    storage, statistics = Storage.of(dtype), []
    placed = list(order if order is not None else range(len(fbanks)))
    for number, first in enumerate(range(0, len(placed), clips_a_shard)):
        with ShardWriter(folder, number, storage, task="t") as writer:
            for clip in placed[first : first + clips_a_shard]:
                writer.add(
                    Origin(f"clip{clip:04d}", f"clip {clip}", f"{clip}.wav"), fbanks[clip], labels[clip]
                )
            statistics.append(writer.close())
    config = FbankConfig(num_mels=fbanks[0].shape[1])
    index = write_index(folder, statistics, config, storage, read_classes(folder.parent / "classes.csv"))
    write_sums(folder, index.num_shards, index.sums)
    return folder


def random_fbanks(lengths: Sequence[int], num_mels: int = NUM_MELS) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.uniform(-15, 8, (length, num_mels)).astype(np.float32) for length in lengths]


def numbered_fbanks(lengths: Sequence[int], dtype: str) -> list[np.ndarray]:
    """Clip i is stored as i + 1 everywhere, so that a batch tells by itself which clips it holds."""
    storage = Storage.of(dtype)
    return [
        storage.decode(np.full((length, NUM_MELS), clip + 1, dtype=storage.numpy))
        for clip, length in enumerate(lengths)
    ]


def make_plan(
    shards: Shards,
    stream: StreamConfig,
    frames: int,
    global_batch: int = 8,
    sampling: SamplingConfig | None = None,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
) -> DrawPlan:
    config = PlanConfig(sampling or SamplingConfig(), stream, seed, global_batch, frames)
    return DrawPlan(shards, config, rank, world_size)


def open_on_cpu(shards: Shards, stream: StreamConfig, shapes: Sequence[BatchShape]) -> Stream:
    """Open a stream; resident with place device is the GPU's own executor, on the CPU."""
    if stream.kind == "resident" and stream.place == "device":
        return DeviceStream(shards, stream, CPU)
    return open_stream(shards, stream, shapes, CPU)


def copy_batch(batch: Batch) -> Batch:
    """A batch that outlives its slab."""
    tensors = (batch.fbank, batch.num_frames, batch.targets, batch.partner_row, batch.lam)
    return Batch(batch.clip_ids.copy(), *(tensor.clone() for tensor in tensors), batch.skipped)


def read_batches(
    shards: Shards, plan: DrawPlan, stream: StreamConfig, epoch: int = 1, start: int = 0
) -> Iterator[Batch]:
    """Every batch of an epoch from a step on, copied out of its slab."""
    opened = open_on_cpu(shards, stream, plan.shapes)
    try:
        for batch in opened.batches(plan.batches(epoch, start)):
            yield copy_batch(batch)
    finally:
        opened.close()


class Sample(NamedTuple):
    """A clip of a batch and its partner, whatever rows they lie in."""

    clip_id: int
    fbank: bytes
    num_frames: int
    targets: bytes
    lam: float
    partner: tuple[bytes, int, bytes] | None


def samples(batch: Batch) -> list[Sample]:
    def row(number: int) -> tuple[bytes, int, bytes]:
        return (
            batch.fbank[number].numpy().tobytes(),
            int(batch.num_frames[number]),
            batch.targets[number].numpy().tobytes(),
        )

    partners = batch.partner_row.tolist()
    return [
        Sample(
            int(clip_id),
            *row(place),
            float(batch.lam[place]),
            row(partners[place]) if partners[place] != place else None,
        )
        for place, clip_id in enumerate(batch.clip_ids)
    ]


def list_open_files() -> list[str]:
    """What this process's descriptors point to."""
    names = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the folder's own
            names.append(os.readlink(link))
    return names


def list_children() -> set[int]:
    """The processes that this one has started and that are there."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found.add(int(stat.parent.name))
    return found


def start_worker(*words: object, **environment: str) -> subprocess.Popen[str]:
    """Start a task of this module in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.stream_worker", *map(str, words)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def read_slowly(seconds: float) -> None:
    """Make every read of a shard take so long; the first one says so on stdout."""
    bare, said = os.preadv, [False]

    def preadv(*arguments: object) -> int:
        if not said[0]:
            said[0] = True
            print("reading", flush=True)
        time.sleep(seconds)
        return bare(*arguments)  # type: ignore[arg-type]

    os.preadv = preadv


def stream_slowly(split: str, kind: str) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have had it ignored
    read_slowly(0.5)
    stream = StreamConfig(kind=kind, num_threads=2)  # type: ignore[arg-type]
    with open_shards(split) as shards:
        for _ in read_batches(shards, make_plan(shards, stream, 40), stream):
            pass


def train_slowly(*words: str) -> None:
    from psla_fast.train.__main__ import main
    from tests import tiny

    assert tiny.TinyNet
    signal.signal(signal.SIGINT, signal.default_int_handler)
    read_slowly(0.5)
    main(list(words))


def measure_memory(split: str, kind: str) -> None:
    """Print the resident memory in bytes after each of 25 epochs."""
    stream = StreamConfig(kind=kind, num_threads=2)  # type: ignore[arg-type]
    with open_shards(split) as shards:
        plan = make_plan(shards, stream, 40)
        opened = open_on_cpu(shards, stream, plan.shapes)
        for epoch in range(25):
            for _ in opened.batches(plan.batches(epoch)):
                pass
            print(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
        opened.close()


def share_on_ranks(split: str, out: str) -> None:
    """Read an epoch on this rank from memory shared by all; save its batches, its reads and its mappings."""
    torch.set_num_threads(1)
    world = start_world("cpu")
    reads, bare = [0], os.preadv

    def preadv(*arguments: object) -> int:
        reads[0] += 1
        return bare(*arguments)  # type: ignore[arg-type]

    os.preadv = preadv
    stream = StreamConfig(kind="resident", place="shared", num_threads=2)
    with open_shards(split) as shards:
        plan = make_plan(shards, stream, 40, rank=world.rank, world_size=world.size)
        opened = open_on_cpu(shards, stream, plan.shapes)
        batches = [copy_batch(batch) for batch in opened.batches(plan.batches(1))]
        maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
        inodes = [words[4] for words in maps if words[-1] == "(deleted)" and "psla-fast" in words[-2]]
        opened.close()
        after = Path("/proc/self/maps").read_text().count("psla-fast-resident")
        after += sum("psla-fast-resident" in name for name in list_open_files())
        torch.distributed.barrier()
        refusal = refuse_to_share(shards, stream, plan, world.rank)
    result = {
        "batches": [[tuple(sample) for sample in samples(batch)] for batch in batches],
        "reads": reads[0],
        "inodes": inodes,
        "after": after,
        "refusal": refusal,
    }
    (Path(out) / f"{world.rank}.pickle").write_bytes(pickle.dumps(result))
    end_world()


def refuse_to_share(shards: Shards, stream: StreamConfig, plan: DrawPlan, rank: int) -> str:
    """Open the stream where the first rank finds no memory free; give what this rank is told."""
    from psla_fast.stream import resident

    if rank == 0:
        resident.available_memory = lambda: 1000
    try:
        open_on_cpu(shards, stream, plan.shapes).close()
    except ValueError as error:
        return str(error)
    return ""


def share_and_wait(split: str) -> None:
    """Say that the split is shared, then read on until killed."""
    torch.set_num_threads(1)
    world = start_world("cpu")
    stream = StreamConfig(kind="resident", place="shared", num_threads=2)
    with open_shards(split) as shards:
        plan = make_plan(shards, stream, 40, rank=world.rank, world_size=world.size)
        opened = open_on_cpu(shards, stream, plan.shapes)
        print("shared", flush=True)
        for epoch in range(10**9):
            for batch in opened.batches(plan.batches(epoch)):
                if epoch == 1 and not len(batch.clip_ids):
                    raise AssertionError
            if epoch % 20 == 19:
                print(epoch, flush=True)


def train_stop_and_go_on(shards: str, run: str) -> None:
    """Train the tiny net on this rank, skipping; stop in the first epoch and go on."""
    from psla_fast.train.loop import Trainer
    from psla_fast.train.signals import Stopped
    from tests.tiny import tiny_config

    torch.set_num_threads(1)
    world = start_world("cpu")
    take_step = Trainer._step

    def stop_there(self: Trainer, epoch: int, step: int, *rest: object) -> torch.Tensor:
        if (epoch, step) == (1, 5):
            os.kill(os.getpid(), signal.SIGTERM)
        return take_step(self, epoch, step, *rest)  # type: ignore[arg-type]

    Trainer._step = stop_there  # type: ignore[assignment]
    config = tiny_config(Path(shards), Path(run), "--stream.on-error", "skip", "--optim.epochs", "1")
    try:
        Trainer(config, world).run()
        raise AssertionError
    except Stopped:
        Trainer._step = take_step  # type: ignore[method-assign]
    Trainer(config, world).run()
    end_world()


if __name__ == "__main__":
    TASKS = (
        stream_slowly,
        train_slowly,
        measure_memory,
        share_on_ranks,
        share_and_wait,
        train_stop_and_go_on,
    )
    {task.__name__: task for task in TASKS}[sys.argv[1]](*sys.argv[2:])
