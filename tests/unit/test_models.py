import contextlib
import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from efficientnet_pytorch import EfficientNet
from torch import Tensor, nn

from psla_fast.models import (
    ModelConfig,
    TaggerNet,
    build_model,
    clean_state_dict,
    read_state_dict,
    register,
    registry,
)
from psla_fast.models.depthwise import DepthwiseConv2d

B0 = ModelConfig(name="efficientnet_b0")
FEATURES = dict(zip(range(8), (1280, 1280, 1408, 1536, 1792, 2048, 2304, 2560), strict=True))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def build(config: ModelConfig, num_classes: int = 3, seed: int = 0) -> TaggerNet:
    """Build in eval mode, with weights that let the input through: a fresh network's scores hardly vary."""
    torch.manual_seed(seed)
    model = build_model(config, num_classes)
    assert isinstance(model, TaggerNet)
    for module in model.backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value in (module.weight.data, module.running_var):
                value.uniform_(0.5, 1.5)
            module.running_mean.normal_(0, 0.1)
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return model.eval()


def build_on_meta(config: ModelConfig, num_classes: int) -> nn.Module:
    with torch.device("meta"):
        return build_model(config, num_classes)


def scores_of(model: nn.Module, fbank: Tensor) -> Tensor:
    with torch.no_grad():
        return model(fbank)


@pytest.mark.parametrize("size", range(8))
def test_every_efficientnet_is_built_by_its_name_with_its_number_of_channels(size: int) -> None:
    model = build_on_meta(ModelConfig(name=f"efficientnet_b{size}", num_heads=1), 3)
    assert model.attention.cla.weight.shape == (3, FEATURES[size], 1, 1)
    stock = EfficientNet.from_name(f"efficientnet-b{size}", in_channels=1) if size < 4 else None
    if stock is not None:
        names = {f"effnet.{name}" for name in stock.state_dict() if not name.startswith("_fc.")}
        assert {name for name in model.state_dict() if name.startswith("effnet.")} == names


@pytest.mark.parametrize(
    "name",
    [
        "efficientnet_b0",
        "efficientnet_b2",
        "efficientnet_lite0",
        "efficientnet_lite3",
        "resnet50",
        "mobilenet_v2",
    ],
)
def test_a_model_scores_every_clip_and_class_between_0_and_1(name: str) -> None:
    model = build(ModelConfig(name=name), num_classes=5)
    scores = scores_of(model, normal(2, 70, 128))
    assert scores.shape == (2, 5)
    assert scores.dtype == torch.float32
    assert 0 < scores.min() < scores.max() < 1
    assert (scores[0] - scores[1]).abs().max() > 1e-3
    alone = torch.cat([scores_of(model, clip[None]) for clip in normal(2, 70, 128)])
    assert torch.allclose(scores, alone, atol=1e-5), "a clip's scores don't depend on its batch"


@pytest.mark.parametrize(("num_classes", "expected"), [(527, 13_640_766), (200, 9_954_822)])
def test_b2_with_4_heads_has_pslas_number_of_parameters(num_classes: int, expected: int) -> None:
    model = build_on_meta(ModelConfig(name="efficientnet_b2", num_heads=4), num_classes)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


def test_the_heads_have_the_official_state_dict_names() -> None:
    both, four = ("weight", "bias"), range(4)
    expected = {
        4: {f"attention.{part}.{i}.{kind}" for part in ("att", "cla") for i in four for kind in both}
        | {"attention.head_weight"},
        1: {f"attention.{part}.{kind}" for part in ("att", "cla") for kind in both},
        0: {f"attention.cla.{kind}" for kind in both},
    }
    for num_heads, names in expected.items():
        state = build_on_meta(replace(B0, num_heads=num_heads), 3).state_dict()
        assert {name for name in state if not name.startswith("effnet.")} == names
    state = build(B0).state_dict()
    assert state["attention.att.2.weight"].shape == (3, 1280, 1, 1)
    assert state["attention.head_weight"].tolist() == [0.25] * 4
    assert not any("_fc" in name for name in state)


@pytest.mark.parametrize("padding", ["symmetric", "asymmetric"])
@pytest.mark.parametrize(
    "name",
    [
        *(f"efficientnet_b{size}" for size in range(8)),
        *(f"efficientnet_lite{size}" for size in range(5)),
        "resnet50",
        "mobilenet_v2",
    ],
)
def test_a_models_time_grid_counts_the_steps_of_its_features(name: str, padding: Any) -> None:
    model = build_on_meta(ModelConfig(name=name, same_padding=padding), 3).eval()
    stride, rounding = model.time_grid
    assert stride == 32
    if padding == "symmetric":
        assert rounding == 31, "⌈T/32⌉"
    for num_frames in (250, 333, 1056, 3000, 85, 92, 108):
        with torch.no_grad():
            maps = model.backbone.extract_features(torch.empty(1, 1, 128, num_frames, device="meta"))
        assert maps.shape[3] == (num_frames + rounding) // stride, num_frames


@pytest.mark.parametrize("padding", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("num_heads", [0, 4])
def test_a_model_pools_the_steps_of_a_clips_own_frames_where_the_config_says_so(
    num_heads: int, padding: Any
) -> None:
    config = replace(B0, num_heads=num_heads, same_padding=padding)
    plain, masking = build(config), build(replace(config, mask_padding=True))
    fbank, num_frames = normal(5, 130, 128), torch.tensor([130, 96, 97, 40, 0])
    steps = torch.tensor([5, 3, 4, 2, 1] if padding == "symmetric" else [4, 3, 3, 1, 1])
    with torch.no_grad():
        every = plain(fbank)
        assert torch.equal(plain(fbank, num_frames), every)
        assert torch.equal(masking(fbank), every)
        assert torch.equal(masking(fbank, torch.full((5,), 130)), every)
        scores = masking(fbank, num_frames)
        assert torch.equal(scores, masking.attention(masking.features(fbank), steps))
    assert torch.equal(scores[0], every[0])
    assert ((scores - every)[1:].abs().amax(dim=1) > 1e-4).all()
    assert torch.isfinite(scores).all()


def test_masking_changes_nothing_for_a_registered_model_that_takes_log_mels_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(registry, "_BUILDERS", dict(registry._BUILDERS))

    class Mine(nn.Module):
        def __init__(self, num_classes: int) -> None:
            super().__init__()
            self.last = nn.Linear(16, num_classes)

        def forward(self, fbank: Tensor) -> Tensor:
            return self.last(fbank.mean(dim=1)).sigmoid()

    register("mine")(lambda config, num_classes, num_mels: Mine(num_classes))
    scores = []
    for mask_padding in (False, True):
        torch.manual_seed(0)
        model = build_model(ModelConfig(name="mine", mask_padding=mask_padding), 3)
        scores.append(scores_of(model, normal(2, 40, 16)))
    assert torch.equal(*scores)


def test_asymmetric_padding_is_the_installed_librarys_own_and_symmetric_is_not() -> None:
    asymmetric = build(replace(B0, same_padding="asymmetric"))
    symmetric = build(replace(B0, same_padding="symmetric"))
    symmetric.load_state_dict(asymmetric.state_dict())
    stock = EfficientNet.from_name("efficientnet-b0", in_channels=1).eval()
    stock.load_state_dict(
        {name.removeprefix("effnet."): value for name, value in asymmetric.state_dict().items()}, strict=False
    )
    fbank = normal(2, 128, 128)
    with torch.no_grad():
        expected = stock.extract_features(fbank.mT.unsqueeze(1)).mean(dim=2)
        assert (expected[0] - expected[1]).abs().max() > 0.1 * expected.abs().max()
        assert (asymmetric.features(fbank) - expected).abs().max() < 1e-4 * expected.abs().max()
        assert (symmetric.features(fbank) - expected).abs().max() > 0.1 * expected.abs().max()


def test_drop_connect_and_batch_norm_momentum_are_what_the_config_says() -> None:
    fbank = normal(4, 64, 128)
    still = build(replace(B0, drop_connect=0.0, batch_norm_momentum=0.3)).train()
    assert {m.momentum for m in still.modules() if isinstance(m, nn.BatchNorm2d)} == {0.3}
    assert torch.equal(scores_of(still, fbank), scores_of(still, fbank))
    dropping = build(replace(B0, drop_connect=0.9)).train()
    assert not torch.equal(scores_of(dropping, fbank), scores_of(dropping, fbank))


def test_dropout_zeroes_its_share_of_the_features_in_training_alone() -> None:
    model, fbank, seen = build(replace(B0, dropout=0.4, drop_connect=0.0)), normal(2, 64, 128), []
    model.attention.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    features = model.features(fbank).detach()
    assert torch.equal(scores_of(model, fbank), scores_of(model, fbank))
    assert torch.equal(seen[0], features)
    scores_of(model.train(), fbank)
    dropped = (seen[-1] == 0).float().mean()
    assert 0.3 < dropped < 0.5
    assert not torch.equal(scores_of(model, fbank), scores_of(model, fbank))


# torch 2.11's own tracing of autograd functions warns of itself
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*:DeprecationWarning")
def test_a_model_compiles_to_one_graph_for_training_and_for_scoring() -> None:
    torch.compiler.reset()
    model, fbank = build(replace(B0, drop_connect=0.0)), normal(2, 64, 128)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.allclose(scores_of(compiled, fbank), scores_of(model, fbank), atol=1e-6)
    model.train()
    compiled(fbank).sum().backward()
    got = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model(fbank).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 0, name
        assert (got[name] - parameter.grad).abs().max() <= 1e-3 * parameter.grad.abs().max(), name


@pytest.mark.parametrize("size", [(7, 9), (4, 4), (13, 6), (2, 3)])
@pytest.mark.parametrize("padding", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5])
def test_a_depthwise_convolution_has_torchs_gradients(
    kernel: int, stride: int, padding: str, size: tuple[int, int]
) -> None:
    half = kernel // 2
    own = half if padding == "symmetric" else 0
    plain = nn.Conv2d(6, 6, kernel, stride, own, groups=6, bias=False).double()
    # (half - 1, half) on either axis, as 'same' padding of an even size with stride 2
    plain.static_padding = nn.Identity() if own else nn.ZeroPad2d((half - 1, half, half - 1, half))
    ours = DepthwiseConv2d.of(plain)
    x = normal(2, 6, *size).double().requires_grad_()
    expected = plain(plain.static_padding(x))
    weights = normal(*expected.shape, seed=1).double()
    wanted = torch.autograd.grad((expected * weights).sum(), (x, plain.weight))
    result = ours(x)
    got = torch.autograd.grad((result * weights).sum(), (x, ours.weight))
    assert torch.equal(result, expected)
    for gradient, reference in zip(got, wanted, strict=True):
        assert torch.allclose(gradient, reference, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("size", "num_blocks"), list(enumerate((16, 21, 21, 24, 30))))
def test_a_lite_network_has_its_depth_and_the_stem_and_head_of_lite0(size: int, num_blocks: int) -> None:
    model = build_on_meta(ModelConfig(name=f"efficientnet_lite{size}", num_heads=1), 3)
    assert len(model.effnet._blocks) == num_blocks
    assert model.effnet._conv_stem.weight.shape == (32, 1, 3, 3)
    assert model.attention.cla.weight.shape == (3, 1280, 1, 1)


@pytest.mark.parametrize(
    ("name", "suggested"),
    [
        ("efficientnetb2", "efficientnet_b2"),
        ("EfficientNet-B2", "efficientnet_b"),
        ("lite0", "efficientnet_lite0"),
        ("?", "efficientnet_b0"),
    ],
)
def test_an_unknown_model_is_refused_with_a_near_one(name: str, suggested: str) -> None:
    with pytest.raises(ValueError, match=f"is unknown. Did you mean '{suggested}"):
        build_model(ModelConfig(name=name), 3)


def test_a_registered_model_is_built_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_BUILDERS", dict(registry._BUILDERS))

    @register("mine", "mine_too")
    def build_mine(config: ModelConfig, num_classes: int, num_mels: int) -> nn.Module:
        return nn.Linear(num_mels, num_classes)

    assert build_model(ModelConfig(name="mine_too"), 3, num_mels=7).weight.shape == (3, 7)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_heads", -1),
        ("drop_connect", 1.0),
        ("drop_connect", -0.1),
        ("dropout", 1.0),
        ("batch_norm_momentum", 0.0),
    ],
)
def test_a_setting_out_of_range_is_refused_by_its_flag(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"model.{field} is {value}"):
        ModelConfig(**{field: value})


def test_a_model_for_no_class_is_refused() -> None:
    with pytest.raises(ValueError, match="0 classes"):
        build_model(B0, 0)


# --- weights from files ---


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A released file: names behind `module.`, and the ImageNet classifier left over."""
    state = build(B0, seed=5).state_dict()
    released = {f"module.{name}": value for name, value in state.items()}
    released["module.effnet._fc.weight"], released["module.effnet._fc.bias"] = (
        normal(1000, 1280),
        normal(1000),
    )
    path = tmp_path_factory.mktemp("weights") / "released.pth"
    torch.save(released, path)
    return path, state


def test_a_released_file_is_loaded_whole(saved: tuple[Path, dict[str, Tensor]]) -> None:
    path, state = saved
    loaded = build_model(replace(B0, pretrained=str(path)), 3).state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_what_wrappers_put_before_names_is_dropped(prefix: str) -> None:
    names = ("effnet._conv_stem.weight", "attention.cla.weight", "effnet._fc.bias")
    cleaned = clean_state_dict({f"{prefix}{name}": torch.ones(1) for name in names})
    assert list(cleaned) == ["effnet._conv_stem.weight", "attention.cla.weight"]


def test_the_model_of_a_checkpoint_is_read(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "model": {"module.a": torch.ones(2)}, "extra": {}}, tmp_path / "last.pt")
    assert torch.equal(read_state_dict(tmp_path / "last.pt")["a"], torch.ones(2))


def test_weights_for_another_class_list_are_refused(saved: tuple[Path, dict[str, Tensor]]) -> None:
    with pytest.raises(ValueError, match=r"attention\.\S+ has shape \(3, 1280, 1, 1\), this model \(4,"):
        build_model(replace(B0, pretrained=str(saved[0])), 4)


@pytest.mark.parametrize("other", [replace(B0, num_heads=1), ModelConfig(name="efficientnet_b1")])
def test_weights_of_another_model_are_refused(
    saved: tuple[Path, dict[str, Tensor]], other: ModelConfig
) -> None:
    with pytest.raises(ValueError, match="another model.*--model.name and --model.num-heads"):
        build_model(replace(other, pretrained=str(saved[0])), 3)


class Code:
    """What it makes of itself on unpickling is a call."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("form", ["pickle", "legacy", "zip", "inside"])
def test_a_file_with_code_is_refused_and_the_code_never_runs(tmp_path: Path, form: str) -> None:
    path, marker = tmp_path / "a.pth", tmp_path / "ran"
    if form == "pickle":
        path.write_bytes(pickle.dumps(Code(marker), protocol=2))
    elif form == "inside":
        torch.save({"model": {"a": torch.ones(1)}, "extra": Code(marker)}, path)
    else:
        torch.save(Code(marker), path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(ValueError, match="a.pth is not a whole torch file of tensors"):
        build_model(replace(B0, pretrained=str(path)), 3)
    assert not marker.exists()
    with contextlib.suppress(RuntimeError):  # a plain pickle is refused after it has run
        torch.load(path, weights_only=False)
    assert marker.exists(), "the file does hold code"


NO_TORCH_FILES = {
    "nothing": b"",
    "text": b"index,mid,display_name\n0,/m/0mkg,Accordion\n",
    "web page": b"<!DOCTYPE html><html><body>404</body></html>",
    "pickle": pickle.dumps({"model": {}}, protocol=2),
    # what torch's reader meets with an IndexError or a struct.error
    "dot": b"./run.sh\n",
    "letter G": b"G",
    "letter K": b"K",
    "tuple of nothing": b"\x80\x02\x85.",
}


@pytest.mark.parametrize("name", NO_TORCH_FILES)
def test_a_file_that_is_no_torch_file_is_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.pth").write_bytes(NO_TORCH_FILES[name])
    with pytest.raises(ValueError, match="a.pth"):
        read_state_dict(tmp_path / "a.pth")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_torch_file_cut_short_is_refused_by_name(tmp_path: Path, zipped: bool) -> None:
    whole = tmp_path / "whole.pth"
    torch.save({"a": normal(50), "b": normal(7)}, whole, _use_new_zipfile_serialization=zipped)
    content = whole.read_bytes()
    for size in range(0, len(content), 13):
        (tmp_path / "a.pth").write_bytes(content[:size])
        with pytest.raises(ValueError, match="a.pth"):
            read_state_dict(tmp_path / "a.pth")


def test_an_old_torch_file_whose_keys_are_damaged_is_refused_by_name(tmp_path: Path) -> None:
    path, value = tmp_path / "a.pth", normal(50)
    torch.save({"a": value}, path, _use_new_zipfile_serialization=False)
    key = str(value.untyped_storage()._cdata).encode()
    assert key in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(key, key[::-1], 1))
    with pytest.raises(ValueError, match="a.pth"):
        read_state_dict(path)


@pytest.mark.parametrize("content", [[1, 2], {}, {"model": {"a": 1.0}}, {"a": torch.ones(1), "b": "text"}])
def test_a_torch_file_without_weights_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="a.pth holds"):
        read_state_dict(tmp_path / "a.pth")


def test_weights_that_are_not_there_are_refused_by_their_path(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere.pth not found"):
        build_model(replace(B0, pretrained=str(tmp_path / "nowhere.pth")), 3)
