"""Profiling: a few steps of a run -> their trace, each phase's time, the costliest ops, and what waited."""

import json
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from torch.profiler import ProfilerAction, ProfilerActivity, profile

from psla_fast.distributed import World
from psla_fast.files import replacing, write_atomically
from psla_fast.train.config import TrainConfig

Item = TypeVar("Item")
Event = dict[str, Any]  # of a Chrome trace: name, cat(egory), ts and dur in µs, args

PHASES = ("loader wait", "augment", "forward", "backward", "optimiser")
SYNCS = (
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
    "Memcpy DtoH",
    "aten::item",
    "aten::_local_scalar_dense",
)
FIRST_STEP, WARM_UP, NUM_STEPS, NUM_OPS = 10, 2, 5, 30
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset", "gpu_user_annotation")


class StepProfiler:
    """Profiles some steps of the first epoch that a process trains, where the config asks; on one rank."""

    def __init__(self, config: TrainConfig, world: World, say: Callable[[str], None]) -> None:
        """Write to RUN/profile; `say` prints a line."""
        self.folder, self._device, self._say = config.run / "profile", world.device, say
        self._wanted = config.profile and world.is_first
        self._running: profile | None = None

    def watch(self, batches: Iterator[Item], num_steps: int) -> Iterator[Item]:
        """Pass an epoch's `num_steps` batches on; a step goes from asking for one to asking for the next."""
        if not self._wanted or num_steps < 1:
            yield from batches
            return
        self._wanted = False
        first, last = choose_steps(num_steps)
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        else:  # the profiler's library would print that it finds no GPU
            os.environ.setdefault("KINETO_LOG_LEVEL", "5")

        def choose_action(step: int) -> ProfilerAction:
            if step == last:
                return ProfilerAction.RECORD_AND_SAVE
            if first <= step < last:
                return ProfilerAction.RECORD
            return ProfilerAction.WARMUP if first - WARM_UP <= step < first else ProfilerAction.NONE

        self._running = profile(
            activities=activities, schedule=choose_action, on_trace_ready=self._write, acc_events=True
        )
        self._running.start()
        for step, batch in enumerate(batches):
            yield batch
            if self._running is not None:
                self._running.step()
            if step == last:
                self.close()
        self.close()

    def close(self) -> None:
        """End a profile that is under way; what it has is written."""
        if self._running is not None:
            running, self._running = self._running, None
            running.stop()

    def _write(self, done: profile) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        trace = self.folder / "trace.json"
        with replacing(trace) as temporary:
            done.export_chrome_trace(str(temporary))
        on = "device" if self._device.type == "cuda" else "cpu"
        ops = done.key_averages().table(
            sort_by=f"self_{on}_time_total", row_limit=NUM_OPS, max_name_column_width=80
        )
        summary = self.folder / "kernels.txt"
        write_atomically(summary, f"{describe_steps(read_events(trace))}\n\n{ops}\n".encode())
        self._say(f"profiled some steps: {summary}, and {trace} for ui.perfetto.dev or TensorBoard")


def choose_steps(num_steps: int) -> tuple[int, int]:
    """Choose the first and last profiled step, from 0: past the warm-up, short of the epoch's last."""
    free = max(1, num_steps - 1)
    warm_up = min(WARM_UP, free // 3)
    count = min(NUM_STEPS, free - warm_up)
    first = min(FIRST_STEP + WARM_UP, free - count)
    return first, first + count - 1


def read_events(trace: Path) -> list[Event]:
    """Read what happened in the profiled steps of torch.profiler's Chrome trace; all, where none is marked.

    What the device did belongs to the step that launched it.
    """
    events = [e for e in json.loads(trace.read_bytes())["traceEvents"] if e.get("ph") == "X"]
    steps = _named(events, "ProfilerStep#")
    if not steps:
        return events
    start, end = min(e["ts"] for e in steps), max(e["ts"] + e["dur"] for e in steps)
    on_host = [e for e in events if e["cat"] not in ON_DEVICE and start <= e["ts"] <= end]
    launches = _launch_times(on_host)
    return on_host + [e for e in events if e["cat"] in ON_DEVICE and _launch_id(e) in launches]


def count_syncs(events: list[Event]) -> dict[str, int]:
    """Count what may make the host wait for the device, by SYNCS; an item() counts under each part of it.

    On CPUs Adam's fused kernel has an item() a parameter, of its count of steps; on GPUs it has none.
    """
    return {name: sum(e["name"].startswith(name) for e in events) for name in SYNCS}


def measure_phases(events: list[Event]) -> dict[str, tuple[float, float]]:
    """Measure each of PHASES: ms of the host, and ms of the kernels and copies that it launched meanwhile."""
    ranges = sorted((e["ts"], e["ts"] + e["dur"], e["name"]) for name in PHASES for e in _named(events, name))
    host, device = dict.fromkeys(PHASES, 0.0), dict.fromkeys(PHASES, 0.0)
    for start, end, name in ranges:
        host[name] += (end - start) / 1000
    starts = [start for start, _, _ in ranges]
    launches = _launch_times(events)
    for event in events:
        launched = launches.get(_launch_id(event))
        if event["cat"] not in ON_DEVICE or launched is None:
            continue
        place = bisect_right(starts, launched) - 1
        if place >= 0 and launched <= ranges[place][1]:
            device[ranges[place][2]] += event["dur"] / 1000
    return {name: (host[name], device[name]) for name in PHASES}


def describe_steps(events: list[Event]) -> str:
    """Put a profile's phases and waits into lines."""
    steps = _named(events, "ProfilerStep#")
    count = max(1, len(steps))
    whole = sum(e["dur"] for e in steps) / 1000 / count
    busy = sum(e["dur"] for e in events if e["cat"] in ON_DEVICE[:3]) / 1000 / count
    lines = [f"profiled steps: {len(steps)}", "", f"{'ms a step':<28}{'host':>10}{'device':>10}"]
    rows = {name: (host / count, device / count) for name, (host, device) in measure_phases(events).items()}
    rows["whole step"] = (whole, busy)
    lines += [f"  {name:<26}{host:>10.3f}{device:>10.3f}" for name, (host, device) in rows.items()]
    lines += ["", "what may wait for the device, in all these steps"]
    return "\n".join(lines + [f"  {name:<26}{number:>10}" for name, number in count_syncs(events).items()])


def _named(events: list[Event], start: str) -> list[Event]:
    """Pick the ranges that the program has marked on the host."""
    return [e for e in events if e["cat"] == "user_annotation" and e["name"].startswith(start)]


def _launch_id(event: Event) -> Any:
    return event.get("args", {}).get("correlation")


def _launch_times(events: list[Event]) -> dict[Any, float]:
    """Map the launches of kernels and copies, by their number, to their time in µs."""
    calls = [e for e in events if e["cat"] in ("cuda_runtime", "cuda_driver")]
    return {_launch_id(e): e["ts"] for e in calls if _launch_id(e) is not None}
