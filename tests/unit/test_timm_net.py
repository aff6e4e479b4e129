import socket
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from psla_fast.models import ModelConfig, TaggerNet, build_model, check_input
from psla_fast.models.timm_net import TimmBackbone

# one of each kind: maps, maps behind a last convolution, tokens, windows, convolutions without padding
NAMES = {
    "test_resnet": (32, 31),
    "test_efficientnet": (32, 31),
    "test_vit": (16, 15),
    "swin_tiny_patch4_window7_224": (32, 31),
    "test_convnext": (32, 0),
    "mobilenetv3_small_050": (32, 31),
}


def build(name: str, num_classes: int = 4, num_mels: int = 64, **config: Any) -> TaggerNet:
    torch.manual_seed(0)
    model = build_model(ModelConfig(name=f"timm:{name}", **config), num_classes, num_mels)
    assert isinstance(model, TaggerNet)
    return model


@pytest.mark.parametrize("name", NAMES)
def test_a_network_of_timms_scores_and_masks_clips_of_any_length_and_trains_whole(name: str) -> None:
    model = build(name, mask_padding=True)
    assert tuple(model.time_grid) == NAMES[name]
    check_input(model, 64, [64, 101], 4)
    fbank = torch.randn(2, 101, 64)
    maps = model.backbone.extract_features(fbank.mT[:, None])
    assert maps.shape[3] == model.time_grid.count_steps(101)
    model.train()(fbank, torch.tensor([101, 40])).sum().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.requires_grad, parameter_name
        assert parameter.grad is not None, parameter_name
    assert all(name.startswith(("backbone.net.", "attention.")) for name in model.state_dict())


def test_the_features_are_what_the_network_itself_gives_its_classifier() -> None:
    for name, shape in {"test_efficientnet": (256, 2, 4), "mobilenetv3_small_050": (288, 2, 4)}.items():
        model = build(name).eval()
        picture = torch.randn(1, 1, 64, 100)
        with torch.no_grad():
            maps = model.backbone.extract_features(picture)
            assert maps.shape[1:] == shape
            assert torch.equal(maps, model.backbone.net.forward_features(picture))
    assert isinstance(model.backbone.net.conv_head, nn.Identity), "it follows timm's pooling: nothing uses it"


@pytest.mark.parametrize(("name", "multiple"), [("test_vit", 1), ("swin_tiny_patch4_window7_224", 4)])
def test_transformers_give_maps_of_channels_mels_and_time(name: str, multiple: int) -> None:
    model = build(name).eval()
    backbone = model.backbone
    assert isinstance(backbone, TimmBackbone)
    assert backbone.multiple == multiple
    picture = torch.randn(1, 1, 64, 96)
    with torch.no_grad():
        maps = backbone.extract_features(picture)
        louder = backbone.extract_features(torch.cat([picture[..., :80], 9 * picture[..., 80:]], dim=3))
        later = backbone.extract_features(torch.nn.functional.pad(picture, (0, 2)))
    assert maps.shape[1] == model.attention.cla[0].weight.shape[1]
    change = (louder - maps).abs().mean(dim=(0, 1, 2))
    assert change.argmax() == len(change) - 1, "the last frames matter most for the last step"
    assert later.shape[3] == model.time_grid.count_steps(98)


def test_drop_connect_and_batch_norm_momentum_are_what_the_config_says() -> None:
    fbank = torch.randn(4, 64, 64)
    for name in ("mobilenetv3_small_050", "test_vit"):
        still = build(name, drop_connect=0.0, batch_norm_momentum=0.3).train()
        norms = {m.momentum for m in still.modules() if isinstance(m, nn.BatchNorm2d)}
        assert norms == ({0.3} if name == "mobilenetv3_small_050" else set())
        dropping = build(name, drop_connect=0.9).train()
        with torch.no_grad():
            assert torch.equal(still(fbank), still(fbank))
            assert not torch.equal(dropping(fbank), dropping(fbank))


@pytest.mark.parametrize(
    ("name", "suggested"), [("resnet19", "resnet"), ("vit_tiny_patch16", "vit_tiny"), ("", "resnet18")]
)
def test_an_unknown_name_is_refused_with_a_near_one(name: str, suggested: str) -> None:
    with pytest.raises(ValueError, match=f"timm has no model '{name}'. Did you mean 'timm:{suggested}"):
        build(name)


@pytest.mark.parametrize("name", ["hf-hub:someone/something", "local-dir:somewhere"])
def test_nothing_is_fetched_by_a_name_that_isnt_timms_own(name: str) -> None:
    with pytest.raises(ValueError, match="timm has no model"):
        build(name, pretrained="imagenet")


def test_a_network_for_pictures_of_one_size_is_refused_when_it_is_built() -> None:
    with pytest.raises(ValueError, match=r"cait_xxs24_224 can't take log-mels of 64 mels .*224") as caught:
        build("cait_xxs24_224")
    assert "\n" not in str(caught.value)


def test_clips_shorter_than_a_network_can_take_are_refused() -> None:
    model = build("test_convnext")
    check_input(model, 64, [128], 4)
    with pytest.raises(ValueError, match="can't score a clip of 20 frames × 64 mels"):
        check_input(model, 64, [128, 20], 4)


# --- pretrained weights ---


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the Hugging Face Hub, and no network."""

    def fail(*_: Any, **__: Any) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(socket, "getaddrinfo", fail)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return tmp_path


def put_in_cache(cache: Path, name: str) -> dict[str, Tensor]:
    """Lay random RGB weights of timm's network where the Hub's client keeps a downloaded file."""
    net = timm.create_model(name)
    state = {
        key: torch.rand_like(value) if value.is_floating_point() else value
        for key, value in net.state_dict().items()
    }
    folder = cache / f"models--{net.pretrained_cfg['hf_hub_id'].replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    save_file(state, folder / "snapshots" / "abc" / "model.safetensors")
    return state


@pytest.mark.parametrize(
    ("name", "stem"), [("test_resnet", "conv1.0.weight"), ("test_vit", "patch_embed.proj.weight")]
)
def test_imagenet_weights_come_from_the_hubs_cache_and_the_stem_is_summed(
    hub_cache: Path, name: str, stem: str
) -> None:
    official = put_in_cache(hub_cache, name)
    loaded = build(name, pretrained="imagenet").backbone.net.state_dict()
    assert official[stem].shape[1] == 3
    assert torch.allclose(loaded[stem], official[stem].sum(dim=1, keepdim=True))
    others = loaded.keys() - {stem}
    assert len(others) > 10
    for other in others:
        assert torch.equal(loaded[other], official[other]), other
    assert huggingface_hub.constants.HF_HUB_OFFLINE is False


def test_weights_that_cant_be_had_are_refused_at_once_with_the_ways_out(hub_cache: Path) -> None:
    with pytest.raises(ValueError, match="timm's weights of test_resnet can't be had") as caught:
        build("test_resnet", pretrained="imagenet")
    assert "HF_HOME" in str(caught.value)
    assert "--model.pretrained none" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_damaged_file_in_the_cache_is_refused(hub_cache: Path) -> None:
    put_in_cache(hub_cache, "test_resnet")
    (path,) = hub_cache.rglob("model.safetensors")
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match="timm's weights of test_resnet can't be had"):
        build("test_resnet", pretrained="imagenet")


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("efficientnet_b0_gn", "Use --model.pretrained none"),
        ("test_resnet.nothing", "It has test_resnet.r160_in1k"),
    ],
)
def test_a_network_without_weights_says_so(name: str, way: str) -> None:
    with pytest.raises(ValueError, match=f"timm has no weights of {name}. {way}"):
        build(name, pretrained="imagenet")
