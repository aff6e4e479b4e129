from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from psla_fast.distributed import World
from psla_fast.models import ModelConfig, build_model
from psla_fast.train.batch_norm import find_batch_norms, recompute_statistics
from tests.ranks import run_on_ranks

ALONE = World(0, 1, torch.device("cpu"))
NAMES = ("running_mean", "running_var", "num_batches_tracked")


def small_model(name: str = "efficientnet_lite0") -> nn.Module:
    torch.manual_seed(0)
    return build_model(ModelConfig(name, drop_connect=0, batch_norm_momentum=0.1), 5)


def some_inputs(num_batches: int, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 64, 128, generator=generator) for _ in range(num_batches)]


def assert_same_statistics(model: nn.Module, wanted: nn.Module, atol: float = 1e-5) -> None:
    state, other = model.state_dict(), wanted.state_dict()
    for name in state:
        assert torch.allclose(state[name], other[name], atol=atol, rtol=1e-4), name


@pytest.mark.parametrize("name", ["efficientnet_lite0", "efficientnet_b0"])
def test_recomputed_statistics_are_those_of_torch_s_update_bn(name: str):
    model, wanted, before = small_model(name), small_model(name), small_model(name).state_dict()
    inputs = some_inputs(3)
    assert recompute_statistics(model, ((x,) for x in inputs), "fp32", ALONE) == 0
    update_bn(inputs, wanted)
    assert_same_statistics(model, wanted)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items() if not k.endswith(NAMES))
    assert {norm.momentum for norm in find_batch_norms(model)} == {0.1}
    assert not torch.equal(model.state_dict()["effnet._bn0.running_mean"], before["effnet._bn0.running_mean"])


def test_a_batch_that_is_not_finite_is_left_out_and_counted():
    model, wanted, inputs = small_model(), small_model(), some_inputs(3)
    inputs[1][0, 0] = torch.nan
    assert recompute_statistics(model, ((x,) for x in inputs), "fp32", ALONE) == 1
    update_bn(inputs[::2], wanted)
    assert_same_statistics(model, wanted)
    with pytest.raises(ValueError, match="no batch gave BatchNorm finite statistics"):
        recompute_statistics(model, [(inputs[1],)], "fp32", ALONE)


def test_a_model_without_batch_norm_has_none_to_recompute():
    assert find_batch_norms(nn.Linear(2, 2)) == []


def recompute_share(world: World, out: Path) -> None:
    model = small_model()
    share = some_inputs(4)[world.rank :: world.size]
    recompute_statistics(model, ((x,) for x in share), "fp32", world)
    torch.save(model.state_dict(), out / f"{world.rank}.pt")


def test_ranks_that_share_the_batches_get_the_statistics_of_all(tmp_path: Path):
    run_on_ranks(2, recompute_share, tmp_path)
    wanted = small_model()
    update_bn(some_inputs(4), wanted)
    for rank in range(2):
        model = small_model()
        model.load_state_dict(torch.load(tmp_path / f"{rank}.pt"))
        assert_same_statistics(model, wanted)
