import json
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from psla_fast.checkpoint import load_checkpoint, read_safetensors, save_safetensors
from psla_fast.export import export_checkpoint
from tests.small_net import make_checkpoint, write_checkpoint


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    made = make_checkpoint()
    save_safetensors(tmp_path / "m.safetensors", tmp_path / "m.json", made.card, made.state, made.epoch)
    return tmp_path / "m.safetensors"


def test_all_tensors_come_back_with_their_types_and_the_card_too(exported: Path):
    made, loaded = make_checkpoint(), load_checkpoint(exported)
    assert (loaded.card, loaded.epoch, loaded.extra) == (made.card, 5, {})
    assert loaded.state.keys() == made.state.keys()
    for name, value in made.state.items():
        assert loaded.state[name].dtype == value.dtype, name
        assert loaded.state[name].shape == value.shape, name
        assert torch.equal(loaded.state[name], value), name
    counter = loaded.state["backbone.norm.num_batches_tracked"]
    assert counter.dtype == torch.int64
    assert counter == 7


def test_tensors_that_share_memory_or_lie_otherwise_are_written_as_they_read(tmp_path: Path):
    made = make_checkpoint()
    base = torch.arange(24.0).view(2, 3, 2, 2)
    state = {"a": base, "b": base, "c": base[1], "d": base.to(memory_format=torch.channels_last)}
    save_safetensors(tmp_path / "m.safetensors", tmp_path / "m.json", made.card, state, 0)
    loaded = read_safetensors(tmp_path / "m.safetensors")
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


def test_two_exports_are_the_same_bytes_and_others_may_read_them(exported: Path, tmp_path: Path):
    write_checkpoint(tmp_path / "c.pt")
    for name in ("one", "two"):
        export_checkpoint(tmp_path / "c.pt", "safetensors", tmp_path / f"{name}.safetensors")
    contents = [path.read_bytes() for path in (exported, tmp_path / "one.safetensors")]
    assert contents[0] == contents[1] == (tmp_path / "two.safetensors").read_bytes()
    (tmp_path / "plain").touch()
    modes = {
        stat.S_IMODE(path.stat().st_mode) for path in (exported, tmp_path / "m.json", tmp_path / "plain")
    }
    assert len(modes) == 1


@pytest.mark.parametrize("content", ['["Dog"]', "Dog, Cat", '{"version": 1, "labels": ["Dog"]}', b"\xff"])
def test_a_json_file_of_someone_s_own_is_not_replaced_by_the_card(tmp_path: Path, content: str | bytes):
    write_checkpoint(tmp_path / "c.pt")
    wanted = content.encode() if isinstance(content, str) else content
    for kind, out, name in (("safetensors", "m.safetensors", "m.json"), ("hub", "hub", "hub/config.json")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(wanted)
        before = set(tmp_path.rglob("*"))
        with pytest.raises(
            ValueError, match=rf"{name}, where the model's card goes, .* is no card\. Move it"
        ):
            export_checkpoint(tmp_path / "c.pt", kind, tmp_path / out)
        assert (tmp_path / name).read_bytes() == wanted
        assert set(tmp_path.rglob("*")) == before


def test_an_export_replaces_its_own_card_and_never_what_it_is_made_of(exported: Path, tmp_path: Path):
    card = exported.with_suffix(".json")
    card.write_text(json.dumps({**json.loads(card.read_text()), "epoch": 99}))
    write_checkpoint(tmp_path / "c.pt")
    export_checkpoint(tmp_path / "c.pt", "safetensors", exported)
    assert load_checkpoint(exported).epoch == 5
    export_checkpoint(exported, "hub", tmp_path / "hub")
    (tmp_path / "link").symlink_to(tmp_path / "hub")
    sources = {path: path.read_bytes() for path in (exported, card, *(tmp_path / "hub").iterdir())}
    hub = tmp_path / "hub"
    for path, kind, out in (
        (exported, "safetensors", tmp_path / "link/../m.safetensors"),
        (hub, "hub", tmp_path / "link"),
        (hub, "safetensors", hub / "model.safetensors"),
        (hub, "safetensors", hub / "config.safetensors"),
        (hub / "model.safetensors", "hub", hub),
    ):
        with pytest.raises(ValueError, match=r"is the checkpoint itself\. Give another name"):
            export_checkpoint(path, kind, out)
    assert {path: path.read_bytes() for path in (exported, card, *hub.iterdir())} == sources


@pytest.mark.parametrize("at", [0, 9, b"backbone", b"F32", -20000, -1])
def test_a_changed_byte_of_sizes_names_types_or_values_is_found(exported: Path, at: int | bytes):
    content = bytearray(exported.read_bytes())
    content[content.index(at) if isinstance(at, bytes) else at] ^= 0x41
    exported.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"m\.safetensors is (not a whole safetensors file|damaged)"
    ) as caught:
        load_checkpoint(exported)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [0, 7, 500, 20000])
def test_a_file_cut_short_is_refused(exported: Path, length: int):
    exported.write_bytes(exported.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"m\.safetensors is not a whole safetensors file"):
        load_checkpoint(exported)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, r"m\.json not found\. It belongs beside m\.safetensors"),
        ("{", r"m\.json is not JSON"),
        ("[]", r"m\.json holds a list, not a psla_fast model's card"),
        ('{"architectures": ["Bert"]}', r"m\.json is not a psla_fast checkpoint \(no version\)"),
        ('{"version": 1, "model_config": {"name": "small", "wings": 2}}', r"another version .*wings"),
        ("epoch", r"m\.json: epoch is 'last'; give a number"),
    ],
)
def test_a_foreign_or_missing_config_is_one_line(exported: Path, config: str | None, message: str):
    path = exported.with_suffix(".json")
    if config == "epoch":
        config = json.dumps({**json.loads(path.read_text()), "epoch": "last"})
    path.unlink()
    if config is not None:
        path.write_text(config)
    with pytest.raises(ValueError, match=message) as caught:
        load_checkpoint(exported)
    assert "\n" not in str(caught.value)


def test_weights_of_other_programs_are_read_and_those_of_another_model_refused(exported: Path):
    plain = {name: value.contiguous() for name, value in make_checkpoint().state.items()}
    save_file(plain, exported)  # without our checksum
    assert torch.equal(
        load_checkpoint(exported).state["attention.head_weight"], plain["attention.head_weight"]
    )
    save_file({"bert.weight": torch.zeros(3)}, exported)
    with pytest.raises(ValueError, match="the checkpoint is another model"):
        load_checkpoint(exported).build()


def test_an_empty_folder_is_no_checkpoint(tmp_path: Path):
    with pytest.raises(ValueError, match=r"config\.json not found"):
        load_checkpoint(tmp_path)
