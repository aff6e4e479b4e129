"""Fine-tuning: the head of new classes, a backbone that is frozen first and learns slower then."""

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from psla_fast.checkpoint import load_checkpoint, save_checkpoint, save_safetensors
from psla_fast.classes import Classes
from psla_fast.models import ModelConfig, build_model
from tests.tiny import step_rows, tiny_config, train_tiny, train_tiny_on_ranks
from tests.training_worker import Kill, Nursery, assert_same_run, command

LITE0 = ["--model.name", "efficientnet_lite0", "--input.clip-frames", "64", "--sampling.num-draws", "16"]
FREEZE = ["--optim.freeze-epochs", "2", "--optim.backbone-lr-factor", "0.1"]
EACH_STEP = ["--checkpoint-minutes", "0"]


def state_of(run: Path, epoch: int) -> dict[str, Tensor]:
    return load_checkpoint(run / f"checkpoints/epoch_{epoch:02d}.pt").state


def same(one: dict[str, Tensor], other: dict[str, Tensor], part: str) -> list[bool]:
    return [torch.equal(one[name], other[name]) for name in one if name.startswith(part)]


def test_a_frozen_backbone_stays_to_the_bit_until_its_epoch_while_the_head_learns(
    packed: Path, tmp_path: Path
):
    train_tiny(tiny_config(packed, tmp_path / "run", *LITE0, *FREEZE, "--optim.epochs", "3"))
    first, second, third = (state_of(tmp_path / "run", epoch) for epoch in (1, 2, 3))
    assert all(same(first, second, "effnet."))
    assert not any(same(first, second, "attention."))
    moved = [not value for value in same(second, third, "effnet.")]
    assert sum(moved) / len(moved) > 0.9
    start = {name: value for name, value in first.items() if name.endswith("num_batches_tracked")}
    assert start
    assert all(int(value) == 0 for value in start.values())


def test_the_backbone_moves_by_its_share_of_the_rate(packed: Path, tmp_path: Path):
    moves = {}
    for factor in ("1", "0.1"):
        sgd = ["--optim.optimizer", "sgd", "--optim.momentum", "0", "--optim.weight-decay", "0"]
        one_step = ["--optim.epochs", "1", "--sampling.num-draws", "8", "--optim.warmup-steps", "0"]
        run = tmp_path / factor
        train_tiny(
            tiny_config(packed, run, *sgd, *one_step, "--wa.start", "1", "--optim.backbone-lr-factor", factor)
        )
        moves[factor] = {name: value.double() for name, value in state_of(run, 1).items()}
    start = {
        name: (moves["0.1"][name] - 0.1 * moves["1"][name]) / 0.9 for name in moves["1"] if "layers" in name
    }
    for name, value in start.items():  # linear in the factor, so this is where both began
        whole, share = moves["1"][name] - value, moves["0.1"][name] - value
        assert whole.abs().max() > 0
        assert torch.allclose(share, 0.1 * whole, atol=1e-9)
    for name in ("attention.weight", "attention.bias"):
        assert torch.equal(moves["1"][name], moves["0.1"][name])


def test_a_backbone_for_other_classes_is_taken_and_what_was_not_used_is_said(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    name = LITE0[:2]
    torch.manual_seed(3)
    state = build_model(ModelConfig(name=name[1], num_heads=1), num_classes=5).state_dict()
    torch.save({f"module.{key}": value for key, value in state.items()}, tmp_path / "other.pth")
    start = ["--model.pretrained", str(tmp_path / "other.pth"), "--optim.freeze-epochs", "1"]
    flags = [*LITE0, *start, "--optim.epochs", "1", "--wa.start", "1"]
    with pytest.raises(
        ValueError, match=r"other.pth is another model: 17 tensors missing, 4 unknown.*--strict"
    ):
        train_tiny(tiny_config(packed, tmp_path / "refused", *flags))
    train_tiny(tiny_config(packed, tmp_path / "run", *flags, "--strict", "false"))
    said = capsys.readouterr().out
    assert hashlib.sha256((tmp_path / "other.pth").read_bytes()).hexdigest() in said
    assert "its head was not used: attention.att.bias (5,), attention.att.weight (5, 1280, 1, 1), " in said
    learnt = state_of(tmp_path / "run", 1)
    assert all(torch.equal(learnt[key], state[key]) for key in learnt if key.startswith("effnet."))
    assert learnt["attention.head_weight"].shape == (4,)
    wrong = ["--model.name", "efficientnet_b0", "--model.pretrained", str(tmp_path / "other.pth")]
    with pytest.raises(ValueError, match="other.pth is another model"):
        train_tiny(tiny_config(packed, tmp_path / "wrong", *flags, *wrong, "--strict", "false"))


def test_a_checkpoints_classes_pooling_and_padding_are_compared_with_the_runs(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    flags = [*LITE0, "--optim.epochs", "1", "--wa.start", "1", "--optim.freeze-epochs", "1"]
    train_tiny(tiny_config(packed, tmp_path / "first", *flags, "--model.num-heads", "0"))
    first = load_checkpoint(tmp_path / "first/checkpoints/wa.pt")
    names = tuple(f"other {name}" for name in first.card.classes.names)
    renamed = replace(
        first.card, classes=Classes(tuple(f"/x/{mid}" for mid in first.card.classes.mids), names)
    )
    save_checkpoint(tmp_path / "renamed.pt", renamed, first.state, 1)
    save_safetensors(tmp_path / "first.safetensors", tmp_path / "first.json", first.card, first.state, 1)
    for path, change, reason in (
        (tmp_path / "renamed.pt", ["--model.num-heads", "0"], "its classes are others"),
        (
            tmp_path / "first.safetensors",
            ["--model.pooling", "max"],
            "its num_heads is 0, not 4, its pooling",
        ),
        (tmp_path / "first.safetensors", ["--model.same-padding", "asymmetric"], "its num_heads is 0, not 4"),
    ):
        start = [*flags, *change, "--model.pretrained", str(path)]
        with pytest.raises(ValueError, match=reason):
            train_tiny(tiny_config(packed, tmp_path / "refused", *start))
        run = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        capsys.readouterr()
        train_tiny(tiny_config(packed, run, *start, "--strict", "false"))
        said = capsys.readouterr().out
        assert f"note: {reason.split(',')[0]}" in said
        assert "its head was not used: attention.cla.bias" in said
        assert all(same(first.state, state_of(run, 1), "effnet."))
    same_model = [*flags, "--model.num-heads", "0", "--model.pretrained", str(tmp_path / "first.safetensors")]
    train_tiny(tiny_config(packed, tmp_path / "again", *same_model))


@pytest.mark.parametrize("update", [4, 14, 17])
def test_a_run_killed_frozen_at_the_thaw_or_after_goes_on_as_if_nothing_had_been(
    nursery: Nursery, shards: Path, tmp_path: Path, update: int
):
    nursery.finish(command(shards, tmp_path / "whole", *FREEZE))
    flags = command(shards, tmp_path / "run", *FREEZE, *EACH_STEP)
    nursery.kill(flags, Kill("update", nth=update))
    nursery.finish(flags)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_two_ranks_freeze_and_thaw_like_one(packed: Path, tmp_path: Path):
    flags = [*FREEZE, "--model.drop-connect", "0"]
    train_tiny(tiny_config(packed, tmp_path / "one", *flags))
    train_tiny_on_ranks(2, packed, tmp_path / "two", *flags)
    one, two = step_rows(tmp_path / "one"), step_rows(tmp_path / "two")
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=1e-5)
    ends = (state_of(tmp_path / name, 3) for name in ("one", "two"))
    for one_value, two_value in zip(*(end.values() for end in ends), strict=True):
        assert torch.allclose(one_value, two_value, atol=1e-6)
