import contextlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest
import torch

from psla_fast.distributed import World
from psla_fast.train.curves import Curves, check_wandb, open_curves
from psla_fast.train.loop import Trainer
from psla_fast.train.progress import Progress, read_gpu
from tests.tiny import tiny_config


class WandbRun:
    """What curves use of a run of Weights & Biases, which keeps rows by their step."""

    def __init__(self, number: str = "abc", step: int = 0) -> None:
        self.id, self.step = number, step
        self.rows: list[tuple[int, dict[str, Any]]] = []
        self.axes: dict[str, str | None] = {}
        self.ended: list[int] = []

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.axes[name] = step_metric

    def log(self, row: dict[str, Any], step: int) -> None:
        assert step >= self.step  # others W&B drops, with a warning
        self.step = step
        self.rows.append((step, dict(row)))

    def finish(self, exit_code: int) -> None:
        self.ended.append(exit_code)


def draw_two_epochs(curves: Curves, first_update: int = 1) -> None:
    for epoch in (1, 2):
        for step in (1, 2):
            update = 2 * (epoch - 1) + step
            if update >= first_update:
                curves.add_step({"epoch": epoch, "step": step, "loss": 1 / update}, update)
        if 2 * epoch >= first_update:
            curves.add_epoch({"val/mean_ap": epoch / 10}, epoch)


def test_weights_and_biases_gets_each_row_once_also_from_a_run_that_repeats_some(tmp_path: Path):
    whole = WandbRun()
    draw_two_epochs(Curves(tmp_path / "whole", wandb=whole))
    places = [place for place, _ in whole.rows]
    assert places == [1, 2, 3, 4, 5, 6]
    assert whole.rows[0][1] == {"step/loss": 1.0, "update": 1}
    assert whole.rows[2][1] == {"val/mean_ap": 0.1, "epoch": 1}
    assert whole.axes == {"update": None, "step/*": "update", "val/mean_ap": "epoch"}
    for sent in range(7):  # rows that W&B has of the run that was killed; it goes on behind update 2
        again = WandbRun(step=places[sent - 1] + 1 if sent else 0)
        draw_two_epochs(Curves(tmp_path / str(sent), 2, 2, again), first_update=3)
        assert again.rows == whole.rows[max(sent, 3) :]


def test_the_end_tells_weights_and_biases_of_a_failure(tmp_path: Path):
    well, ill = WandbRun(), WandbRun()
    curves = Curves(tmp_path, wandb=well)
    curves.close()
    curves.close()
    with contextlib.suppress(KeyError):
        try:
            raise KeyError
        finally:
            Curves(tmp_path, wandb=ill).close()
    assert (well.ended, ill.ended) == ([0], [1])


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A module in wandb's place that notes what init is told."""
    calls: list[dict[str, Any]] = []

    def init(**told: Any) -> WandbRun:
        calls.append(told)
        return WandbRun(told["id"] or f"new{len(calls)}")

    class Error(Exception):
        pass

    stand_in = SimpleNamespace(init=init, calls=calls, errors=SimpleNamespace(Error=Error))
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    return stand_in


def test_a_run_that_goes_on_is_the_same_one_at_weights_and_biases(wandb: SimpleNamespace, tmp_path: Path):
    config = tiny_config(tmp_path, tmp_path / "birds", "--wandb", "tagging")
    assert not wandb.calls
    config.run.mkdir()
    open_curves(config, 1, 0)
    (told,) = wandb.calls
    assert (told["project"], told["name"], told["id"], told["resume"]) == ("tagging", "birds", None, "allow")
    assert told["config"]["optim"]["lr"] == 0.01
    assert told["dir"] == str(config.run)
    assert (config.run / "wandb_id").read_text() == "new1\n"
    open_curves(config, 1, 5)
    open_curves(config, 2, 8)
    assert [call["id"] for call in wandb.calls[1:]] == ["new1", "new1"]
    open_curves(config, 1, 0)  # killed before its first checkpoint, or the folder is used anew
    assert wandb.calls[-1]["id"] is None
    assert (config.run / "wandb_id").read_text() == "new4\n"


def test_where_weights_and_biases_refuses_one_line_says_what_to_do(wandb: SimpleNamespace, tmp_path: Path):
    def refuse(**_: Any) -> None:
        raise wandb.errors.Error("No API key configured.")

    wandb.init = refuse
    config = tiny_config(tmp_path, tmp_path / "run", "--wandb", "tagging")
    with pytest.raises(
        ValueError, match=r"--wandb tagging: No API key configured\. Or set WANDB_MODE=offline"
    ):
        open_curves(config, 1, 0)


@pytest.mark.parametrize("found", [None, SimpleNamespace(origin=None)])
def test_without_the_package_the_run_says_so_before_anything_else(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: object
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: found)
    check_wandb("")
    config = tiny_config(packed, tmp_path / "run", "--wandb", "tagging")
    with pytest.raises(ValueError, match="--wandb tagging needs the package wandb. Install it"):
        Trainer(config, World(0, 1, torch.device("cpu")))
    assert not config.run.exists()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    peaks = iter([3_000_000_000, 1_000_000_000])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: next(peaks))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: 87)
    return torch.device("cuda", 0)


def test_a_gpus_memory_and_utilisation_are_in_the_rows(gpu: torch.device):
    progress = Progress(1, World(0, 1, gpu))
    progress.start_epoch(1, torch.tensor([8, 8]).numpy(), 0)
    row = progress.report(1, 1, 0.5, 0.1)
    assert (row["gpu_memory_gb"], row["gpu_utilisation"]) == (3.0, 0.87)
    assert progress.report(1, 2, 0.5, 0.1)["gpu_memory_gb"] == 1.0
    assert read_gpu(torch.device("cpu")) == {}


@pytest.mark.parametrize(
    "error", [pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED), RuntimeError("no driver")]
)
def test_a_driver_that_tells_no_utilisation_is_left_out(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch, error: Exception
):
    def fail(device: torch.device) -> int:
        raise error

    monkeypatch.setattr(torch.cuda, "utilization", fail)
    assert read_gpu(gpu) == {"gpu_memory_gb": 3.0}
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert read_gpu(gpu) == {"gpu_memory_gb": 1.0}
