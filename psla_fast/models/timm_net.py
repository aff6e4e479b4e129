"""Any backbone of timm's, convolutional or a transformer with maps, as one-channel backbone of TaggerNet."""

import contextlib
import difflib
import re
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from psla_fast.models.config import ModelConfig
from psla_fast.models.probing import FAILURES, Shapes, first_line
from psla_fast.models.tagger_net import Backbone, TaggerNet

PREFIX = "timm:"
MULTIPLES = (1, 2, 4, 8, 16, 32)  # of which some networks want height and width to be
PROBED = 321  # frames; one more than a multiple of each


class TimmBackbone(nn.Module):
    """A network of timm's and which of its maps are the features.

    Those are what it ends in before its classifier, where that is maps (B, D, F', T'), else its last stage's,
    with its final norm applied where timm does that.
    """

    def __init__(self, net: Any, multiple: int, takes_norm: bool) -> None:
        """Take a network without classifier; a picture is padded to a multiple of so many positions."""
        super().__init__()
        self.net, self.multiple, self.takes_norm = net, multiple, takes_norm
        self.ends_in_maps = False

    def extract_features(self, picture: Tensor) -> Tensor:
        """Maps (B, D, F', T') of (B, 1, F, T)."""
        height, width = picture.shape[2:]
        if height % self.multiple or width % self.multiple:  # with zeros, the mean of a normalised log-mel
            picture = functional.pad(picture, (0, -width % self.multiple, 0, -height % self.multiple))
        found = self.net.forward_intermediates(
            picture,
            indices=[-1],
            norm=self.takes_norm,
            output_fmt="NCHW",
            intermediates_only=not self.ends_in_maps,
        )
        maps: Tensor = found[0]  # the end; or the only one of the stages
        return maps


def build_timm(config: ModelConfig, num_classes: int, num_mels: int) -> nn.Module:
    """Build `timm:NAME`; pretrained imagenet takes the weights that timm has for it, its stem summed.

    timm's own names with their tags (resnet18.a1_in1k) choose among its weights. Raises ValueError for an
    unknown name, for weights that can't be had, and for networks that take pictures of one size only.
    """
    try:
        import timm
    except ImportError as error:
        raise ValueError(f"{config.name} needs the extra timm: pip install 'psla-fast[timm]'.") from error
    name = config.name.removeprefix(PREFIX)
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=1, cutoff=0.3) or ["resnet18"]
        raise ValueError(f"timm has no model {name!r}. Did you mean '{PREFIX}{close[0]}'?")
    if config.pretrained == "imagenet" and not timm.is_model_pretrained(name):
        known = timm.list_pretrained(f"{name.partition('.')[0]}.*")
        way = f"It has {', '.join(known[:3])}." if known else "Use --model.pretrained none."
        raise ValueError(f"timm has no weights of {name}. {way}")
    net = _create(timm, name, config)
    for module in net.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = config.batch_norm_momentum
    backbone, num_features = _fit(net, config.name, num_mels)
    return TaggerNet(Backbone(backbone, num_features, num_mels), num_classes, config)


def _create(timm: Any, name: str, config: ModelConfig) -> Any:
    """Create a network of one input channel that takes any size and leaves out blocks, where it has that."""
    options: dict[str, Any] = {
        "drop_path_rate": config.drop_connect,
        "dynamic_img_size": True,
        "dynamic_img_pad": True,
        "strict_img_size": False,
    }
    pretrained = config.pretrained == "imagenet"
    while True:
        try:
            with _cache_alone_if_offline() if pretrained else contextlib.nullcontext():
                return timm.create_model(name, pretrained=pretrained, in_chans=1, num_classes=0, **options)
        except TypeError as error:  # a network that knows nothing of an option
            _, found, names = str(error).partition("unexpected keyword argument")
            unknown = set(re.findall(r"'(\w+)'", names)) & options.keys() if found else set()
            if not unknown:
                raise ValueError(f"timm can't build {name} ({first_line(error)}).") from error
            for option in unknown:
                del options[option]
        except Exception as error:  # of the hub's client, of the network, of a file that isn't whole
            if not pretrained:
                raise ValueError(f"timm can't build {name} ({first_line(error)}).") from error
            reason = first_line(error).partition(". ")[0]
            raise ValueError(
                f"timm's weights of {name} can't be had ({reason}). Fetch them where there is a network and "
                "set HF_HOME to that cache, or use --model.pretrained none."
            ) from error


@contextlib.contextmanager
def _cache_alone_if_offline() -> Iterator[None]:
    """Where the Hub's name isn't known, let its client ask its cache alone: it would try for a minute."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    try:
        if not before and not getproxies():
            socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _fit(net: Any, name: str, num_mels: int) -> tuple[TimmBackbone, int]:
    """Find how a network takes pictures of any size, and which of its maps to use: a backbone and its D."""
    size = (getattr(net, "pretrained_cfg", {}).get("input_size") or (3, 224, 224))[1]
    reason = ""
    for takes_norm in (True, False):
        for multiple in (*MULTIPLES, size):
            backbone = TimmBackbone(net, multiple, takes_norm)
            try:
                num_features = _choose_maps(backbone, num_mels)
            except FAILURES as error:
                reason = first_line(error) if multiple == 1 else reason
                continue
            _leave_out_unused(backbone, num_mels)
            return backbone, num_features
    raise ValueError(
        f"{name} can't take log-mels of {num_mels} mels and any number of frames ({reason}). Choose a "
        "convolutional network, a vit or a swin."
    )


def _choose_maps(backbone: TimmBackbone, num_mels: int) -> int:
    """Set whether the features are the network's end; returns their channels D."""
    shapes = Shapes(backbone, num_mels)
    stage = shapes.maps(PROBED)
    backbone.ends_in_maps = True
    end: Any = shapes.maps(PROBED)  # tokens, channels-last maps or lists elsewhere
    backbone.ends_in_maps = isinstance(end, Tensor) and end.ndim == 4 and end.shape[2:] == stage.shape[2:]
    return (end if backbone.ends_in_maps else stage).shape[1]


def _leave_out_unused(backbone: TimmBackbone, num_mels: int) -> None:
    """Take what has no part in the features out, and let nothing train that has none."""
    unused = set(Shapes(backbone, num_mels).find_unused(PROBED))
    for name, part in list(backbone.net.named_children()):
        parameters = set(part.parameters())
        if not parameters or not parameters <= unused:
            continue
        setattr(backbone.net, name, nn.Identity())
        try:
            Shapes(backbone, num_mels).maps(PROBED)
        except FAILURES:  # it is called, for nothing
            setattr(backbone.net, name, part)
    for parameter in unused:
        parameter.requires_grad_(False)
