"""Trainings of the tiny net in processes that die where a test says: -m tests.training_worker FLAG… | serve

`serve` imports once and forks a process for each rank of each training that it is asked for.
"""

import atexit
import contextlib
import gc
import io
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
import torch._dynamo  # torch.optim imports it late, which would take each training a second
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils import tensorboard

from psla_fast.checkpoint import load_checkpoint
from psla_fast.train.__main__ import main
from tests.stream_worker import ROOT, random_fbanks, write_split
from tests.tiny import TinyNet, step_rows

assert tensorboard
TINY = ["--model.name", "tiny", "--precision", "fp32", "--device", "cpu", "--input.clip-frames", "100"]
TINY += ["--optim.batch-size", "8", "--optim.epochs", "3", "--optim.warmup-steps", "4", "--optim.lr", "0.01"]
TINY += ["--optim.warmup-every-steps", "1", "--wa.start", "2", "--wa.end", "3", "--log-every-steps", "1"]
TINY += ["--augment.time-mask-frames", "30"]
STEPS = 7  # of an epoch: 61 clips in batches of 8
CSV = ("result.csv", "best_single_result.csv", "wa_result.csv", "ensemble_result.csv")
PACKAGE = str(ROOT / "psla_fast")
SECONDS = 250  # after which a training is taken to hang


@dataclass(frozen=True)
class Kill:
    """A moment at which a rank ends itself by SIGKILL: the nth time that `event` happens to `place`.

    event: update (of the weights), score (a batch), half (of a file that torch or Path writes), call (or
    return, in psla_fast or by it), write (anything within the folder `place`), or an audit event of Python
    (os.rename, os.link, open …), of which a path ends with `place`.
    Instead of a kill there may be another `signal`, which torchrun can be sent for its ranks (`by_agent`); or
    the disk is full from then on: `fills` is a file that takes all the room, and with the event `room` no
    file may ever be larger than nth bytes.
    """

    event: str
    place: str = ""
    nth: int = 1
    rank: int = 0
    fills: str = ""
    signal: int = signal.SIGKILL
    by_agent: bool = False


def write_shards(folder: Path) -> Path:
    """61, 13 and 11 clips, which neither batches of 8 nor 2 or 4 ranks share evenly."""
    rng = np.random.default_rng(1)
    for name, clips in (("train", 61), ("val", 13), ("eval", 11)):
        write_split(folder / name, random_fbanks(rng.integers(20, 120, clips).tolist(), 128), 16)
    return folder


def command(shards: Path, run: Path, *flags: str) -> list[str]:
    return ["--data.shards", str(shards), "--run", str(run), *TINY, *flags]


@dataclass(frozen=True)
class Ended:
    """How one rank ended: its exit status (minus the signal that killed it), the time, what it printed."""

    status: int
    at: float
    output: str


class Nursery:
    """Starts trainings by forking a process that has imported everything."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._number = folder, count()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.training_worker", "serve"],
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def train(self, flags: Sequence[str], kill: Kill | None = None, ranks: int = 1) -> list[Ended]:
        """Train on so many ranks, without torchrun where it is more than one; returns when all have ended."""
        output = self.folder / str(next(self._number))
        request = {"flags": [*flags], "kill": kill and asdict(kill), "ranks": ranks, "output": str(output)}
        assert self._process.stdin
        assert self._process.stdout
        print(json.dumps(request), file=self._process.stdin, flush=True)
        answer = json.loads(self._process.stdout.readline())
        return [Ended(*end, Path(f"{output}.{rank}").read_text()) for rank, end in enumerate(answer)]

    def finish(self, flags: Sequence[str], ranks: int = 1) -> str:
        """Train to the end; returns what the first rank printed."""
        ends = self.train(flags, ranks=ranks)
        assert [end.status for end in ends] == [0] * ranks, "\n".join(end.output for end in ends)
        return ends[0].output

    def kill(self, flags: Sequence[str], kill: Kill, ranks: int = 1) -> list[Ended]:
        """Train until the kill."""
        ends = self.train(flags, kill, ranks)
        assert ends[kill.rank].status == -signal.SIGKILL, f"{kill} never came: {ends[kill.rank].output}"
        return ends

    def close(self) -> None:
        try:
            self._process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise


@contextlib.contextmanager
def open_nursery(folder: Path) -> Iterator[Nursery]:
    folder.mkdir()
    nursery = Nursery(folder)
    try:
        yield nursery
    finally:
        nursery.close()


def environment(**settings: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **settings}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(path).state


def assert_same_run(run: Path, whole: Path) -> None:
    """A run folder holds what another one does, to the bit, and nothing half-written."""
    assert step_rows(run) == step_rows(whole)
    for name in CSV:
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    names = sorted(path.name for path in (whole / "checkpoints").iterdir())
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == names
    for name in names:
        if name == "previous.pt":  # is of another step where saves aren't each epoch's
            continue
        one, other = weights_of(run / "checkpoints" / name), weights_of(whole / "checkpoints" / name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), name
    for name in ("val.h5", "eval.h5"):
        one, other = scores_of(run / "scores" / name), scores_of(whole / "scores" / name)
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[key], other[key]) for key in one), name
    assert not list(run.rglob("*.tmp"))


def scores_of(path: Path) -> dict[str, Any]:
    """Every array of a score file."""
    found: dict[str, Any] = {}
    with h5py.File(path) as file:
        file.visititems(
            lambda name, item: found.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None
        )
    return found


def serve() -> list[str] | None:
    """Fork as asked on stdin and tell how the forks ended; in a fork, return the flags to train by."""
    assert len(os.listdir("/proc/self/task")) == 1  # a fork has none of the other threads
    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        shared = {"WORLD_SIZE": str(request["ranks"]), "MASTER_ADDR": "127.0.0.1"}
        shared |= {"MASTER_PORT": str(free_port()), "TRAINING_KILL": json.dumps(request["kill"])}
        pids = []
        for rank in range(request["ranks"]):
            pid = os.fork()
            if not pid:
                signal.alarm(SECONDS)
                for file, flags in (
                    (os.devnull, os.O_RDONLY),
                    (f"{request['output']}.{rank}", os.O_WRONLY | os.O_CREAT),
                ):
                    opened = os.open(file, flags, 0o600)
                    os.dup2(opened, 0 if flags == os.O_RDONLY else 1)
                os.dup2(1, 2)
                if request["ranks"] > 1:
                    os.environ |= {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                os.environ["TRAINING_KILL"] = shared["TRAINING_KILL"]
                return [flag.replace("{rank}", str(rank)) for flag in request["flags"]]
            pids.append(pid)
        ends = {}
        while len(ends) < len(pids):
            pid, status = os.wait()
            ends[pid] = (os.waitstatus_to_exitcode(status), time.monotonic())
        print(json.dumps([ends[pid] for pid in pids]), flush=True)
    return None


def leave(flags: list[str]) -> None:
    """Train in a fork and end it, without the second that freeing all modules takes."""
    status: Any = 0
    try:
        arm()
        main(flags)
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(status)


def arm() -> None:
    """Have this process die as TRAINING_KILL says, unless that is another rank or a restart."""
    told = json.loads(os.environ.get("TRAINING_KILL", "null"))
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if not told or told["rank"] != int(os.environ.get("RANK", "0")) or restarted:
        return
    kill, left = Kill(**told), [told["nth"]]

    def passes(*_: object) -> None:
        left[0] -= 1
        if not left[0]:
            act(kill)

    if kill.event == "update":
        register_optimizer_step_pre_hook(passes)
    elif kill.event == "score":
        torch.nn.modules.module.register_module_forward_pre_hook(
            lambda module, _: passes() if isinstance(module, TinyNet) and not module.training else None
        )
    elif kill.event == "half":
        die_half_way(kill, passes)
    elif kill.event == "call":
        sys.setprofile(lambda frame, *_: passes() if frame.f_code.co_filename.startswith(PACKAGE) else None)
    elif kill.event == "write":
        sys.addaudithook(
            lambda event, args: passes() if writes(event, args) and kill.place in str(args[0]) else None
        )
    elif kill.event == "room":
        resource.setrlimit(resource.RLIMIT_FSIZE, (kill.nth, kill.nth))
    else:
        sys.addaudithook(
            lambda event, args: (
                passes()
                if event == kill.event and any(str(path).endswith(kill.place) for path in args)
                else None
            )
        )


def act(kill: Kill) -> None:
    """Do what was told for this moment."""
    if kill.fills:
        with contextlib.suppress(OSError), open(kill.fills, "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
    elif kill.by_agent:
        came, note = threading.Event(), signal.getsignal(kill.signal)

        def hear(number: int, frame: Any) -> None:
            note(number, frame)  # type: ignore[operator]
            came.set()

        signal.signal(kill.signal, hear)
        os.kill(os.getppid(), kill.signal)
        assert came.wait(60)
    else:
        os.kill(os.getpid(), kill.signal)


def writes(event: str, args: tuple[Any, ...]) -> bool:
    """Whether an audit event changes a file or folder."""
    if event == "open":
        return bool(args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    return event in ("os.rename", "os.link", "os.mkdir", "os.remove", "os.rmdir", "shutil.copyfile")


def die_half_way(kill: Kill, passes: Any) -> None:
    """Die as soon as half of a file is written."""
    save, write_bytes = torch.save, Path.write_bytes

    def write_half(content: bytes, path: Path) -> None:
        if not str(path).endswith(kill.place):
            return
        write_bytes(path, content[: len(content) // 2])
        passes()

    def save_half(content: object, path: Path) -> None:
        buffer = io.BytesIO()
        save(content, buffer)
        write_half(buffer.getvalue(), path)
        save(content, path)

    def write_bytes_half(path: Path, content: bytes) -> int:
        write_half(content, path)
        return write_bytes(path, content)

    torch.save, Path.write_bytes = save_half, write_bytes_half  # type: ignore[assignment, method-assign]


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:] != ["serve"]:
        arm()
        main(sys.argv[1:])
    elif flags := serve():
        leave(flags)
