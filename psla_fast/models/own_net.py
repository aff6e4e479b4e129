"""A user's own network, by the class that `PACKAGE.MODULE:CLASS` names."""

import difflib
import importlib
import inspect

from torch import nn

from psla_fast.models.config import ModelConfig

GIVEN = ("num_classes", "num_mels", "config")


def build_own(config: ModelConfig, num_classes: int, num_mels: int) -> nn.Module:
    """Build the nn.Module that the config names; its constructor gets those of GIVEN that it names.

    Nothing but a subclass of nn.Module is called, as the name may come out of a checkpoint. Raises ValueError
    where the class isn't there or wants more.
    """
    if config.pretrained == "imagenet":
        raise ValueError(
            f"{config.name} has no ImageNet weights that are known here. Use --model.pretrained none or the "
            "path of a state dict."
        )
    kind = _find_class(config.name)
    given = {"num_classes": num_classes, "num_mels": num_mels, "config": config}
    wanted = inspect.signature(kind).parameters
    fixed = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    for name, parameter in wanted.items():
        if parameter.default is parameter.empty and parameter.kind not in fixed and name not in given:
            raise ValueError(
                f"{config.name} wants {name!r}, which is none of {', '.join(GIVEN)}. Give it a default."
            )
    return kind(**{name: value for name, value in given.items() if name in wanted})


def _find_class(name: str) -> type[nn.Module]:
    """Import PACKAGE.MODULE and give its CLASS.

    Only where Python looks anyway, as a checkpoint may name it; `python -m` looks in the current folder, too.
    """
    module_name, _, class_name = name.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), class_name)):
        raise ValueError(f"model {name!r} is no PACKAGE.MODULE:CLASS, for instance my_nets.small:SmallNet.")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, SyntaxError, ValueError) as error:
        raise ValueError(
            f"model {name}: {module_name} can't be imported ({error}). Put the folder that it is in on "
            "PYTHONPATH."
        ) from error
    kind = getattr(module, class_name, None)
    where = getattr(module, "__file__", module_name)
    if kind is None:
        networks = [own for own, value in vars(module).items() if _is_network(value)]
        close = difflib.get_close_matches(class_name, networks, n=1, cutoff=0) or ["none"]
        raise ValueError(f"{where} has no {class_name!r}; of its networks the closest is {close[0]}.")
    if not _is_network(kind):
        raise ValueError(f"{class_name} of {where} is no class of torch.nn.Module. Give one.")
    found: type[nn.Module] = kind
    return found


def _is_network(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, nn.Module)
