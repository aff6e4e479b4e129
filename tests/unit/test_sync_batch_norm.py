from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from psla_fast.distributed import World, sum_over_ranks
from psla_fast.models import ModelConfig, build_model, use_channels_last
from psla_fast.train.sync_batch_norm import SyncedBatchNorm, synchronise_batch_norm
from tests.ranks import run_on_ranks

CPU = torch.device("cpu")
NUM_STEPS = 3


def small_efficientnet() -> nn.Module:
    torch.manual_seed(0)
    config = ModelConfig("efficientnet_b0", num_heads=1, drop_connect=0, batch_norm_momentum=0.1)
    model = build_model(config, 5)
    use_channels_last(model)
    return model


def train(world: World, synced: bool, out: Path) -> None:
    """A few steps on this rank's share of 8 clips; the first one saves losses and weights."""
    model = small_efficientnet()
    names = list(model.state_dict())
    if synced:
        model = synchronise_batch_norm(model, world)
    assert list(model.state_dict()) == names
    whole = DistributedDataParallel(model, static_graph=True) if world.size > 1 else model
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.05), []
    generator = torch.Generator().manual_seed(1)
    for _ in range(NUM_STEPS):
        x = torch.randn(8, 64, 128, generator=generator) * 2
        targets = (torch.rand(8, 5, generator=generator) > 0.5).float()
        share = slice(world.rank * 8 // world.size, (world.rank + 1) * 8 // world.size)
        loss = nn.functional.binary_cross_entropy(whole(x[share]), targets[share])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(sum_over_ranks(loss.detach(), world)) / world.size)
    if world.is_first:
        torch.save({"losses": torch.tensor(losses), **model.state_dict()}, out)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """What one rank gives, whose BatchNorm layers stay torch's."""
    path = tmp_path_factory.mktemp("alone") / "1.pt"
    train(World(0, 1, CPU), True, path)
    state: dict[str, Tensor] = torch.load(path)
    return state


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not torch.allclose(one[name], other[name], rtol=2e-3, atol=2e-4)]


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_any_number_of_ranks_gives_the_losses_and_statistics_of_one(
    alone: dict[str, Tensor], tmp_path: Path, num_ranks: int
):
    run_on_ranks(num_ranks, train, True, tmp_path / "n.pt")
    assert differing(alone, torch.load(tmp_path / "n.pt")) == []


def test_without_it_each_rank_s_statistics_are_its_own(alone: dict[str, Tensor], tmp_path: Path):
    run_on_ranks(2, train, False, tmp_path / "n.pt")
    found = differing(alone, torch.load(tmp_path / "n.pt"))
    assert "losses" in found
    assert "effnet._bn0.running_var" in found


def test_one_rank_keeps_torch_s_own_layers():
    model = small_efficientnet()
    kinds = [type(module) for module in model.modules()]
    assert [type(m) for m in synchronise_batch_norm(model, World(0, 1, CPU)).modules()] == kinds


def test_gpus_take_torch_s_synchronised_layers_under_the_same_names():
    model = small_efficientnet()
    names = list(model.state_dict())
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    converted = synchronise_batch_norm(model, World(0, 2, torch.device("cuda")))
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in converted.modules()) == norms > 0
    assert list(converted.state_dict()) == names


SHAPES = [(8, 3), (8, 3, 5), (8, 3, 4, 5)]


def normalise(world: World, out: Path) -> None:
    """Outputs, gradients and statistics of layers of each shape, this rank's share."""
    cases = product(SHAPES, (0.3, None), (True, False), (torch.float32, torch.bfloat16))
    results = [run_layer(world, *case) for case in cases]
    torch.save(results, out / f"{world.size}_{world.rank}.pt")


def run_layer(
    world: World, shape: tuple[int, ...], momentum: float | None, affine: bool, dtype: torch.dtype
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[len(shape)]
    layer = nn.Sequential(kind(3, momentum=momentum, affine=affine))
    if affine:
        nn.init.uniform_(layer[0].weight, 0.5, 2, generator=generator)
        nn.init.uniform_(layer[0].bias, -1, 1, generator=generator)
    synced = synchronise_batch_norm(layer, world)
    assert isinstance(synced[0], SyncedBatchNorm) == (world.size > 1)  # type: ignore[index]
    kept = []
    for _ in range(2):
        x = torch.randn(shape, generator=generator) * 3 + 100  # a mean far above the deviation
        factor = torch.randn(shape, generator=generator)
        share = slice(world.rank * 8 // world.size, (world.rank + 1) * 8 // world.size)
        mine = x[share].to(dtype).requires_grad_()
        y = synced(mine)
        (y.float() * factor[share]).sum().backward()
        assert mine.grad is not None
        assert y.dtype == mine.grad.dtype == dtype
        kept += [y.detach().float(), mine.grad.float()]
    grads = [sum_over_ranks(parameter.grad, world) for parameter in synced.parameters()]
    synced.eval()
    return [*kept, *grads, *synced.buffers(), synced(torch.ones(shape)).detach()]


def test_outputs_gradients_and_statistics_are_those_of_torch_s_layer_on_the_whole_batch(tmp_path: Path):
    normalise(World(0, 1, CPU), tmp_path)
    run_on_ranks(2, normalise, tmp_path)
    whole = torch.load(tmp_path / "1_0.pt")
    first, second = (torch.load(tmp_path / f"2_{rank}.pt") for rank in range(2))
    for case, (wanted, one, other) in enumerate(zip(whole, first, second, strict=True)):
        in_bf16 = case % 2
        close = {"rtol": 2e-2, "atol": 5e-2} if in_bf16 else {"rtol": 1e-3, "atol": 1e-3}
        for number, tensor in enumerate(wanted):
            got = torch.cat([one[number], other[number]]) if number < 4 else one[number]
            assert torch.allclose(got.float(), tensor.float(), **close), (case, number)
