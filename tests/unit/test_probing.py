from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from psla_fast.models import Backbone, ModelConfig, TaggerNet, build_model, check_input
from psla_fast.models.probing import Shapes, TimeGrid, probe_time_grid


class Strided(nn.Module):
    """One convolution over time and one beside it, as a branch that is added."""

    def __init__(self, kernel: int, stride: int, padding: int) -> None:
        super().__init__()
        self.main = nn.Conv2d(1, 3, (3, kernel), (2, stride), (1, padding))
        self.beside = nn.Conv2d(1, 3, (3, kernel), (2, stride), (1, padding))
        self.norm = nn.BatchNorm2d(3)
        self.never = nn.Linear(2, 2)

    def extract_features(self, picture: Tensor) -> Tensor:
        return self.norm(self.main(picture) + self.beside(picture))


class Resized(Strided):
    """Whatever the clip's length, it gives five steps."""

    def extract_features(self, picture: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(picture, (1, 5))


class Reading(Strided):
    """How far it goes depends on values, which a network of shapes alone hasn't got."""

    def extract_features(self, picture: Tensor) -> Tensor:
        return picture[..., : int(picture.abs().sum().item()) + 1]


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"),
    [(3, 2, 1), (7, 4, 3), (5, 4, 0), (1, 32, 0), (3, 1, 1), (7, 7, 0), (2, 16, 5), (64, 64, 63)],
)
def test_a_grid_is_that_of_the_convolution(kernel: int, stride: int, padding: int) -> None:
    net = Strided(kernel, stride, padding)
    grid = probe_time_grid(net, 16)
    assert grid == TimeGrid(stride, 2 * padding - kernel + stride)
    for frames in (64, 65, 100, 333, 1056, 3001):
        maps = net.extract_features(torch.zeros(1, 1, 16, frames))
        assert maps.shape[3] == grid.count_steps(frames), frames


def test_probing_changes_nothing_of_a_network() -> None:
    net = Strided(3, 2, 1)
    net.main.eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    probe_time_grid(net, 16)
    assert (net.training, net.main.training, net.beside.training) == (True, False, True)
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())
    assert all(value.device.type == "cpu" and value.grad is None for value in net.parameters())


def test_parameters_without_a_part_in_the_maps_are_found() -> None:
    net = Strided(3, 2, 1)
    assert {id(p) for p in Shapes(net, 16).find_unused(64)} == {id(p) for p in net.never.parameters()}


@pytest.mark.parametrize(
    ("kind", "reason"), [(Resized, "aren't evenly spaced"), (Reading, "can't be counted")]
)
def test_a_network_without_a_grid_is_refused_only_where_padding_is_masked(
    kind: type[Strided], reason: str
) -> None:
    backbone = Backbone(kind(3, 2, 1), 1, 16)
    assert TaggerNet(backbone, 4, ModelConfig()).mask_padding is False
    with pytest.raises(ValueError, match=reason):
        TaggerNet(backbone, 4, ModelConfig(mask_padding=True))


# --- an input is checked before a run ---


class Given(nn.Module):
    """Scores made by a function of log-mels (B, T, F)."""

    def __init__(self, score: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.norm, self.score = nn.BatchNorm1d(8), score

    def forward(self, fbank: Tensor) -> Any:
        return self.score(self.norm(fbank.mT).mean(dim=2))


WRONG: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "classes": (lambda x: x[:, :4].sigmoid(), r"makes \(1, 4\) of a clip .* return scores \(1, 5\)"),
    "steps": (lambda x: x[:, :5, None].sigmoid(), r"makes \(1, 5, 1\)"),
    "tuple": (lambda x: (x[:, :5],), "makes a tuple"),
    "logits": (lambda x: x[:, :5] - 3, "from -3 to -3; scores go from 0 to 1. Let it end in a sigmoid"),
    "percent": (lambda x: 100 * x[:, :5].sigmoid(), "from 50 to 50"),
    "nan": (lambda x: x[:, :5] / 0, "from nan to nan"),
    "raises": (lambda x: x[:, 9], "can't score a clip of 40 frames × 8 mels .index 9 is out of bounds"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_network_that_gives_no_scores_is_refused_in_one_line(fault: str) -> None:
    score, reason = WRONG[fault]
    with pytest.raises(ValueError, match=reason) as caught:
        check_input(Given(score), 8, [40], 5)
    assert "\n" not in str(caught.value)


def test_a_network_that_scores_passes_and_nothing_has_changed() -> None:
    model = Given(lambda x: nn.functional.dropout(x[:, :5], 0.5).sigmoid())  # dropout that draws always
    model.norm.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    check_input(model, 8, [40, 1, 77], 5)
    assert torch.equal(torch.get_rng_state(), state)
    assert (model.training, model.norm.training) == (True, False)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_each_length_is_tried_and_the_masks_lengths_are_given() -> None:
    seen = []

    class Masking(Given):
        mask_padding = True

        def forward(self, fbank: Tensor, num_frames: Tensor | None = None) -> Tensor:
            seen.append((fbank.shape[1], num_frames.tolist()))
            return fbank[:, 0, :5].sigmoid()

    check_input(Masking(torch.sigmoid), 8, [40, 77], 5)
    assert seen == [(40, [40]), (77, [77])]


def test_a_lack_of_memory_stays_what_it_is() -> None:
    def lack(_: Tensor) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

    with pytest.raises(RuntimeError, match="out of memory"):
        check_input(Given(lack), 8, [40], 5)


@pytest.mark.parametrize("size", [(1, 128), (10, 16), (333, 64)])
def test_an_efficientnet_takes_any_size(size: tuple[int, int]) -> None:
    check_input(build_model(ModelConfig(name="efficientnet_lite0"), 5, size[1]), size[1], [size[0]], 5)
