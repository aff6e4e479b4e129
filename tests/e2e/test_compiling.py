"""Compiled training: the eager loss curve, one graph a shape, none after the first epoch."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from psla_fast.distributed import World
from psla_fast.stream import BatchShape, SequentialPlan
from psla_fast.train import compiling
from psla_fast.train.loop import Trainer
from tests.tiny import step_rows, tiny_config, train_tiny, train_tiny_on_ranks

BUCKETS = [
    str(frames) for frames in (60, 68, 72, 76, 80, 84, 88, 92, 96, 100)
]  # more than torch's limit of 8
SHORT = ["--stream.buckets", *BUCKETS, "--stream.bucket-by", "clips", "--optim.batch-size", "2"]


@pytest.fixture
def no_inductor(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Graphs are captured and counted as ever, but run as they are: C++ for ten shapes takes minutes."""
    torch.compiler.reset()
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    with torch._dynamo.config.patch(recompile_limit=8):
        yield
    torch.compiler.reset()


@pytest.mark.usefixtures("no_inductor")
def test_with_ten_buckets_nothing_is_compiled_after_each_shape_s_first_batch(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    before = compiling.count_graphs()
    config = tiny_config(packed, tmp_path / "run", *SHORT, "--compile", "default", "--optim.epochs", "4")
    train_tiny(config)
    said = re.findall(r"^(\d+) graphs compiled by epoch (\d)", capsys.readouterr().out, flags=re.MULTILINE)
    trainer = Trainer(config, World(0, 1, torch.device("cpu")))
    scored = set()
    for _, shards in trainer.scored:
        sequential = SequentialPlan(shards.index.num_frames, 2, tuple(map(int, BUCKETS)))
        scored |= {plan.shape for plan in sequential.batches()}
    trained: set[BatchShape] = set()
    count = before
    for epoch in (1, 2, 3, 4):
        trained |= {plan.shape for plan in trainer.plan.batches(epoch)}
        count = max([count, *(int(number) for number, at_epoch in said if int(at_epoch) == epoch)])
        # of each shape the augmentation and the model, and once it is scored that
        assert count - before == 2 * len(trained) + (len(scored) if epoch > 1 else 0)
    assert len(trained) > 8


@pytest.mark.usefixtures("no_inductor")
def test_a_graph_too_many_is_noticed(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The count above rises where a shape is new: what the test before this one relies on."""
    before = compiling.count_graphs()
    compiled = torch.compile(lambda x: x + 1, backend="eager", dynamic=False)
    for size in (1, 2, 3, 3, 2):
        compiled(torch.zeros(size))
    assert compiling.count_graphs() - before == 3


def test_two_ranks_that_compile_have_the_losses_of_two_that_do_not(packed: Path, tmp_path: Path):
    flags = ["--model.drop-connect", "0", "--optim.epochs", "1", "--wa.start", "1", "--optim.accumulate", "2"]
    train_tiny_on_ranks(2, packed, tmp_path / "plain", *flags)
    train_tiny_on_ranks(2, packed, tmp_path / "compiled", *flags, "--compile", "default")
    plain, compiled = ([row["loss"] for row in step_rows(tmp_path / n)] for n in ("plain", "compiled"))
    assert compiled == pytest.approx(plain, rel=1e-4)


def test_cuda_graphs_are_refused_where_they_would_fail(packed: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="optim.accumulate can't add to them"):
        tiny_config(packed, tmp_path, "--compile", "graphs", "--optim.accumulate", "2")
    config = tiny_config(packed, tmp_path, "--compile", "graphs")
    with pytest.raises(ValueError, match="compile graphs is for one rank"):
        Trainer(config, World(0, 2, torch.device("cpu")))
