"""Every planted fault is found and named, and repaired where the source is there."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import soundfile

from psla_fast.cli import main
from psla_fast.pack.log import read_log
from psla_fast.shards import open_shards
from tests.makers import read_tree

FLIPS_A_FILE = 6


@pytest.fixture(scope="module")
def shards(synthetic_fsd50k: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("verify") / "shards"
    root = Path(shutil.copytree(synthetic_fsd50k, out.parent / "data"))
    sorted((root / "FSD50K.dev_audio").iterdir())[0].write_bytes(b"no audio")
    lenient = ["--max-rejected-fraction", "0.1"]
    main(["pack", "fsd50k", str(root), str(out), "--workers", "1", "--plots", *lenient])
    return out


@pytest.fixture
def copy(shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shards, tmp_path / "shards"))


def verify(shards: Path, *flags: str) -> tuple[int, str]:
    """Give exit status and output of the command."""
    status = 0
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("builtins.print", lambda *words, **_: lines.append(" ".join(map(str, words))))
        try:
            main(["verify", str(shards), "--workers", "2", *flags])
        except SystemExit as stop:
            status = int(stop.code or 0)
    return status, "\n".join(lines)


def test_a_whole_set_is_told_whole(shards: Path):
    status, output = verify(shards)
    assert status == 0
    assert output.count("every byte is as it was packed") == 3


def test_any_flipped_bit_of_any_file_is_found_and_its_file_named(copy: Path):
    rng = random.Random(0)
    for path in [p for p in sorted(copy.rglob("*")) if p.is_file() and p.stat().st_size]:
        content = path.read_bytes()
        positions = {0, len(content) - 1, *(rng.randrange(len(content)) for _ in range(FLIPS_A_FILE))}
        for position in sorted(positions):
            flipped = bytearray(content)
            flipped[position] ^= 1 << rng.randrange(8)
            path.write_bytes(flipped)
            status, output = verify(path.parent if path.parent != copy else copy)
            assert status == 1, f"{path}, byte {position}"
            assert path.name in output or "SHA256SUMS" in output, f"{path}, byte {position}: {output}"
        path.write_bytes(content)
    assert verify(copy)[0] == 0


def test_a_flipped_byte_of_a_clip_names_shard_and_key(copy: Path):
    with open_shards(copy / "train") as train:
        key, offset = train.keys[20], int(train.index.offset[20])
        tar = train.shard_path(int(train.index.shard[20]))
        labels = offset + len(train.fbank(20)) * 256
    content = tar.read_bytes()
    for position, part in (
        (offset + 5, "fbank"),
        (offset - 400, "tar header"),
        (labels + -labels % 512 + 512, "labels"),
    ):
        flipped = bytearray(content)
        flipped[position] ^= 1
        tar.write_bytes(flipped)
        status, output = verify(copy / "train")
        assert status == 1
        assert f"train/{tar.name}, key {key}: {part}" in output


def truncate(path: Path, other: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cut_last_byte(path: Path, other: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path, other: Path) -> None:
    path.write_bytes(b"")


def delete(path: Path, other: Path) -> None:
    path.unlink()


def swap(path: Path, other: Path) -> None:
    mine, its = path.read_bytes(), other.read_bytes()
    path.write_bytes(its)
    other.write_bytes(mine)


@pytest.mark.parametrize("damage", [truncate, cut_last_byte, empty, delete, swap])
def test_every_file_cut_emptied_deleted_or_swapped_is_found(
    shards: Path, copy: Path, damage: Callable[[Path, Path], None]
):
    names = sorted(p.relative_to(shards) for p in shards.rglob("*") if p.is_file())
    for name in names:
        other = copy / ("val" if name.parts[0] == "train" else "train") / name.name
        if damage is swap and (not other.is_file() or other.read_bytes() == (copy / name).read_bytes()):
            continue
        before = (copy / name).read_bytes()
        damage(copy / name, other)
        if (copy / name).is_file() and (copy / name).read_bytes() == before:
            continue  # an empty rejected.jsonl was emptied
        status, output = verify(copy)
        assert status != 0, f"{damage.__name__} {name}: {output}"
        shutil.rmtree(copy)
        shutil.copytree(shards, copy)


def test_swapped_shards_are_found(copy: Path):
    for ending in ("tar", "idx", "json"):
        swap(copy / f"train/00000.{ending}", copy / f"train/00001.{ending}")
    status, output = verify(copy)
    assert status == 1
    assert "00000.tar" in output
    assert "00001.json" in output


def test_repair_packs_only_the_broken_shards_and_the_set_is_whole_again(shards: Path, copy: Path):
    before = read_tree(shards)
    damages: list[tuple[str, Callable[[Path, Path], None]]] = [
        ("train/00001.tar", truncate),
        ("train/index.h5", cut_last_byte),
        ("train/pack.json", empty),
        ("train/pack.log", cut_last_byte),
        ("val/00000.json", delete),
        ("eval/00000.idx", truncate),
        ("eval/SHA256SUMS", empty),
        ("eval/class_counts.png", delete),
    ]
    for name, damage in damages:
        damage(copy / name, copy / name)
    kept = (copy / "train/00000.tar").stat().st_mtime_ns
    status, output = verify(copy, "--repair")
    assert status == 0, output
    assert read_tree(copy) == before
    assert (copy / "train/00000.tar").stat().st_mtime_ns == kept
    assert verify(copy)[0] == 0


def test_a_broken_index_is_repaired_without_the_source(shards: Path, copy: Path):
    lines = (copy / "train/pack.log").read_bytes()
    (copy / "train/pack.log").write_bytes(lines.replace(b"fsd50k", b"FSD50K"))
    (copy / "train/index.h5").write_bytes(b"nothing")
    (copy / "train/rejected.jsonl").write_bytes(b"nothing")
    status, output = verify(copy / "train", "--repair")
    assert status == 0, output
    assert read_tree(copy) == read_tree(shards)


def test_without_its_source_nothing_is_touched_and_one_line_says_what_to_do(copy: Path):
    (copy / "train/pack.log").unlink()
    truncate(copy / "train/00001.tar", copy)
    before = read_tree(copy)
    status, output = verify(copy, "--repair")
    assert status == 2
    assert "pack.log doesn't say what it was packed from. Delete the .json" in output
    assert read_tree(copy) == before


def test_the_same_sound_and_the_same_key_are_reported(synthetic_fsd50k: Path, tmp_path: Path):
    root = Path(shutil.copytree(synthetic_fsd50k, tmp_path / "data"))
    dev, evaluation = root / "FSD50K.dev_audio", root / "FSD50K.eval_audio"
    truth = (root / "FSD50K.ground_truth/dev.csv").read_text().splitlines()
    names = [line.split(",")[0] for line in truth[1:] if line.endswith(",train")]
    shutil.copy(dev / f"{names[0]}.wav", dev / f"{names[1]}.wav")
    same = sorted(evaluation.iterdir())[0]
    samples, rate = soundfile.read(dev / f"{names[2]}.wav", dtype="int16")
    soundfile.write(same, samples, rate, subtype="PCM_24")  # another file, the same sound
    main(["pack", "fsd50k", str(root), str(tmp_path / "out"), "--workers", "1"])
    status, output = verify(tmp_path / "out")
    assert status == 0
    assert "2 pairs of clips hold the same sound" in output
    pairs = {frozenset(line.split(" = ")) for line in output.replace("  ", "").splitlines() if " = " in line}
    assert frozenset({f"train/{names[0]}", f"train/{names[1]}"}) in pairs
    assert frozenset({f"eval/{same.stem}", f"train/{names[2]}"}) in pairs


def test_the_log_tells_who_packed_what_and_a_torn_line_is_dropped(shards: Path, copy: Path):
    rows, damaged = read_log(copy / "train/pack.log")
    assert not damaged
    assert [row["event"] for row in rows][:2] == ["start", "shard"]
    assert rows[-1]["event"] == "end"
    assert rows[0]["command"]["arguments"][0] == "fsd50k"
    with open(copy / "train/pack.log", "ab") as log:
        log.write(b"0123 {half a li")
    assert verify(copy / "train")[0] == 1
    main(["pack", "merge", str(copy / "train"), "--max-rejected-fraction", "0.1"])
    assert verify(copy / "train")[0] == 0


def test_a_repair_that_fails_leaves_everything_as_it_was(shards: Path, copy: Path):
    source = shards.parent / "data"
    (copy / "train/00001.tar").write_bytes((copy / "train/00001.tar").read_bytes() + b"x")
    before = read_tree(copy)
    source.rename(shards.parent / "away")
    try:
        status, output = verify(copy, "--repair")
    finally:
        (shards.parent / "away").rename(source)
    assert status == 2
    assert "vocabulary.csv not found" in output
    assert read_tree(copy) == before


def test_sums_rewritten_over_changed_statistics_or_a_removed_shard_are_found(copy: Path):
    import h5py

    from psla_fast.shards.sums import write_sums

    with h5py.File(copy / "train/index.h5", "a") as file:
        file.attrs["mean"] = 3.0
        file["name"][...] = file["name"][:][::-1]
    write_sums(copy / "train", 4, {})
    (copy / "eval/pack.log").unlink()
    status, output = verify(copy)
    assert status == 1
    assert "name isn't what the shards' statistics give" in output
    assert "its attribute mean is 3.0" in output
    assert "SHA256SUMS: isn't the one that pack.log tells of" in output
    for ending in ("tar", "idx", "json"):
        (copy / f"train/00003.{ending}").unlink()
    write_sums(copy / "train", 3, {})
    assert verify(copy / "train")[0] == 1


def test_verify_and_weights_work_from_inside_a_split(copy: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(copy / "train")
    assert verify(Path("."))[0] == 0
    main(["weights", "."])
    assert (copy / "train_weight.csv").is_file()
    (copy / "train/my picture.png").write_bytes(b"mine")
    assert verify(Path("."))[0] == 0
