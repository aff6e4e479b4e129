import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from psla_fast.train.loop import Trainer
from psla_fast.train.profiling import (
    PHASES,
    Event,
    choose_steps,
    count_syncs,
    describe_steps,
    measure_phases,
    read_events,
)
from tests.tiny import step_rows, tiny_config, train_tiny

# 16 steps an epoch, of which those numbered 10 to 14 are profiled; the last one is a log step
FLAGS = (
    "--profile",
    "--optim.batch-size",
    "4",
    "--log-every-steps",
    "100",
    "--optim.optimizer",
    "sgd",
)


def profiled_syncs(run: Path) -> dict[str, int]:
    return count_syncs(read_events(run / "profile/trace.json"))


def test_a_profile_holds_the_phases_and_ops_of_its_steps(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = tiny_config(packed, tmp_path / "run", *FLAGS)
    train_tiny(config)
    train_tiny(tiny_config(packed, tmp_path / "plain", *FLAGS[1:]))
    assert step_rows(config.run) == step_rows(tmp_path / "plain")
    assert {path.name for path in (config.run / "profile").iterdir()} == {"trace.json", "kernels.txt"}
    assert not (tmp_path / "plain/profile").exists()
    assert capsys.readouterr().out.count("profiled some steps") == 1  # in the first of three epochs
    events = read_events(config.run / "profile/trace.json")
    names = [event["name"] for event in events]
    assert [names.count(phase) for phase in PHASES] == [5] * 5
    assert sum(name.startswith("ProfilerStep#") for name in names) == 5
    phases = measure_phases(events)
    assert all(host > 0 for host, _ in phases.values())
    step = sum(event["dur"] for event in events if event["name"].startswith("ProfilerStep#")) / 1000
    assert sum(host for host, _ in phases.values()) < step
    text = (config.run / "profile/kernels.txt").read_text()
    assert text.startswith("profiled steps: 5\n")
    assert "aten::addmm" in text
    assert "Self CPU" in text


def test_steps_between_log_steps_never_wait_for_the_device(packed: Path, tmp_path: Path):
    train_tiny(tiny_config(packed, tmp_path / "run", *FLAGS))
    assert set(profiled_syncs(tmp_path / "run").values()) == {0}


def test_an_item_in_the_step_is_counted(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    take_step = Trainer._step

    def step_and_wait(self: Trainer, *place: object) -> Tensor:
        loss = take_step(self, *place)  # type: ignore[arg-type]
        loss.item()
        return loss

    monkeypatch.setattr(Trainer, "_step", step_and_wait)
    train_tiny(tiny_config(packed, tmp_path / "run", *FLAGS))
    syncs = profiled_syncs(tmp_path / "run")
    assert (syncs["aten::item"], syncs["aten::_local_scalar_dense"]) == (5, 5)
    text = (tmp_path / "run/profile/kernels.txt").read_text()
    assert f"  {'aten::item':<26}{5:>10}" in text


def test_a_profile_that_is_cut_short_is_written_as_far_as_it_got(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    take_step = Trainer._step

    def fail_later(self: Trainer, epoch: int, step: int, *rest: object) -> Tensor:
        if step == 12:
            raise KeyboardInterrupt
        return take_step(self, epoch, step, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_step", fail_later)
        with pytest.raises(KeyboardInterrupt):
            train_tiny(tiny_config(packed, tmp_path / "run", *FLAGS))
    assert (tmp_path / "run/profile/kernels.txt").read_text().startswith("profiled steps: 3\n")
    train_tiny(tiny_config(packed, tmp_path / "next", *FLAGS))  # the profiler is free again
    assert (tmp_path / "next/profile/kernels.txt").read_text().startswith("profiled steps: 5\n")


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 8, 17, 18, 1000])
def test_the_profiled_steps_lie_in_the_epoch(num_steps: int):
    first, last = choose_steps(num_steps)
    assert 0 <= first <= last <= max(0, num_steps - 2)
    assert last - first < 5
    if num_steps >= 18:
        assert (first, last) == (12, 16)


def test_an_epoch_of_one_step_is_profiled_too(packed: Path, tmp_path: Path):
    config = tiny_config(packed, tmp_path / "run", "--profile", "True", "--optim.batch-size", "64")
    train_tiny(config)
    assert (config.run / "profile/kernels.txt").read_text().startswith("profiled steps: 1\n")


def test_a_profiled_compiled_step_has_its_phases(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **_: compiled(f, backend="aot_eager"))  # no C++
    train_tiny(tiny_config(packed, tmp_path / "run", *FLAGS, "--compile", "default", "--optim.epochs", "1"))
    events = read_events(tmp_path / "run/profile/trace.json")
    assert [sum(event["name"] == phase for event in events) for phase in PHASES] == [5] * 5
    assert set(count_syncs(events).values()) == {0}


def event(name: str, category: str, ts: float, dur: float, correlation: int | None = None) -> Event:
    args = {} if correlation is None else {"correlation": correlation}
    return {"ph": "X", "name": name, "cat": category, "ts": ts, "dur": dur, "args": args}


def test_kernels_belong_to_the_phase_that_launched_them_and_the_profilers_own_wait_to_none(tmp_path: Path):
    events = [
        event("ProfilerStep#3", "user_annotation", 0, 1000),
        event("forward", "user_annotation", 100, 200),
        event("backward", "user_annotation", 300, 100),
        event("cudaLaunchKernel", "cuda_runtime", 150, 5, 1),
        event("cuLaunchKernel", "cuda_driver", 350, 5, 2),  # by the autograd thread
        event("cudaMemcpyAsync", "cuda_runtime", 600, 5, 3),
        event("cudaStreamSynchronize", "cuda_runtime", 605, 90, 4),
        event("conv", "kernel", 500, 4000, 1),
        event("conv_backward", "kernel", 4500, 7000, 2),
        event("Memcpy DtoH (Device -> Pageable)", "gpu_memcpy", 11500, 10, 3),
        event("forward", "gpu_user_annotation", 500, 4000),
        event("cudaDeviceSynchronize", "cuda_runtime", 1100, 9000, 5),  # as the profiler stops
        event("before", "kernel", 10, 50, 99),
        {"ph": "M", "name": "process_name"},
    ]
    trace = tmp_path / "trace.json"
    trace.write_text(json.dumps({"traceEvents": events}))
    found = read_events(trace)
    syncs = {name: count for name, count in count_syncs(found).items() if count}
    assert syncs == {"cudaStreamSynchronize": 1, "Memcpy DtoH": 1}
    phases = measure_phases(found)
    assert phases["forward"] == (0.2, 4.0)
    assert phases["backward"] == (0.1, 7.0)
    assert phases["augment"] == (0.0, 0.0)
    assert f"  {'whole step':<26}{1:>10.3f}{11.01:>10.3f}" in describe_steps(found)


def test_syncs_of_a_trace_without_steps_are_all_counted(tmp_path: Path):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        torch.ones(3).sum().item()
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    assert count_syncs(read_events(tmp_path / "trace.json"))["aten::item"] == 1
