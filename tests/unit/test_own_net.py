import sys
from pathlib import Path

import pytest
import torch

from psla_fast.models import ModelConfig, build_model

MODULE = """
from pathlib import Path
import torch
from torch import nn

class Whole(nn.Module):
    def __init__(self, config, num_mels, num_classes, width=3):
        super().__init__()
        self.given = (config.name, num_mels, num_classes, width)
        self.last = nn.Linear(num_mels, num_classes)

    def forward(self, fbank):
        return self.last(fbank.mean(dim=1)).sigmoid()

class Plain(nn.Module):
    pass

class Loose(nn.Module):
    def __init__(self, num_classes, **options):
        super().__init__()
        self.given = (num_classes, options)

class Greedy(nn.Module):
    def __init__(self, num_classes, depth):
        super().__init__()

def make(*_, **__):
    Path(__file__).with_name("called").touch()
    return nn.Linear(1, 1)

ready = Plain()
"""


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module of networks on Python's path."""
    (tmp_path / "their_nets.py").write_text(MODULE)
    (tmp_path / "broken_nets.py").write_text("import nowhere_at_all\n")
    (tmp_path / "odd_nets.py").write_text("class (:\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "their_nets", raising=False)
    return "their_nets"


def test_a_class_gets_what_its_signature_names(nets: str) -> None:
    config = ModelConfig(name=f"{nets}:Whole")
    model = build_model(config, 5, num_mels=32)
    assert model.given == (config.name, 32, 5, 3)
    assert model(torch.zeros(2, 10, 32)).shape == (2, 5)
    assert isinstance(build_model(ModelConfig(name=f"{nets}:Plain"), 5), torch.nn.Module)
    assert build_model(ModelConfig(name=f"{nets}:Loose"), 5).given == (5, {})


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (
            "their_net:Whole",
            "their_net can't be imported .No module named 'their_net'.. Put the folder",
        ),
        ("broken_nets:Whole", "broken_nets can't be imported .No module named 'nowhere_at_all'"),
        ("odd_nets:Whole", "odd_nets can't be imported .invalid syntax"),
        ("their_nets:Hole", "their_nets.py has no 'Hole'; of its networks the closest is Whole"),
        ("their_nets:make", "make of .*their_nets.py is no class of torch.nn.Module"),
        ("their_nets:ready", "ready of .*their_nets.py is no class of torch.nn.Module"),
        ("their_nets:Path", "Path of .*their_nets.py is no class of torch.nn.Module"),
        ("their_nets:Greedy", "wants 'depth', which is none of num_classes, num_mels, config"),
        ("their_nets:", "is no PACKAGE.MODULE:CLASS"),
        (":Whole", "is no PACKAGE.MODULE:CLASS"),
        (".their_nets:Whole", "is no PACKAGE.MODULE:CLASS"),
        ("os:system", "system of .*os.py is no class"),
    ],
)
def test_what_is_no_network_is_refused_in_one_line_and_never_called(
    nets: str, name: str, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        build_model(ModelConfig(name=name), 5)
    assert "\n" not in str(caught.value)
    assert not Path("called").exists()


def test_weights_of_a_users_net_come_from_a_file_and_not_from_imagenet(nets: str, tmp_path: Path) -> None:
    first = build_model(ModelConfig(name=f"{nets}:Whole"), 5, num_mels=32)
    torch.save(first.state_dict(), tmp_path / "first.pth")
    second = build_model(ModelConfig(name=f"{nets}:Whole", pretrained=str(tmp_path / "first.pth")), 5, 32)
    assert torch.equal(second.last.weight, first.last.weight)
    with pytest.raises(ValueError, match="has no ImageNet weights that are known here"):
        build_model(ModelConfig(name=f"{nets}:Whole", pretrained="imagenet"), 5)


def test_a_module_of_a_folder_that_is_not_on_pythons_path_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "planted_nets.py").write_text("from pathlib import Path\nPath('ran').touch()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    with pytest.raises(ValueError, match="planted_nets can't be imported .* on PYTHONPATH"):
        build_model(ModelConfig(name="planted_nets:Net"), 5)
    assert not (tmp_path / "ran").exists()
