"""Judge: a folder whose copies, labels, splits and odd images are known: they were put there."""

import csv
import json
import os
import shutil
import subprocess
from pathlib import Path

import forked
import numpy as np
import pytest
from PIL import Image

from covid_flax.data import phantoms
from covid_flax.data.audit import Audit, audit, summary, write_audit
from covid_flax.data.folder import open_folder
from covid_flax.data.splits import Row, make_split, write_split_csv
from covid_flax.errors import UserError

PER_CLASS = 14


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Path:
    """Two classes of 14 phantoms, all different patients."""
    root = tmp_path_factory.mktemp("clean")
    for k, label in enumerate(("COVID", "Normal")):
        (root / label).mkdir()
        for n in range(PER_CLASS):
            save(root / label / f"{n:02}.png", phantoms.draw(label, 100 * k + n + 1, 96))
    return root


@pytest.fixture
def folder(clean, tmp_path) -> Path:
    root = tmp_path / "data"
    shutil.copytree(clean, root)
    return root


def save(path: Path, pixels: np.ndarray) -> None:
    Image.fromarray(pixels).save(path)


def pixels(path: Path) -> np.ndarray:
    return np.array(Image.open(path))


def run(root: Path, rows: list[Row] | None = None) -> Audit:
    return audit(open_folder(str(root), require_two_classes=False), rows or [])


def members(result: Audit) -> list[list[str]]:
    return [[result.files[i] for i in images] for images in result.members().values()]


def kinds(result: Audit) -> dict[str, str]:
    return {s.file: s.kind for s in result.suspicions}


def test_a_clean_folder(clean):
    result = run(clean)
    assert result.pairs == () and result.suspicions == () and result.known_groups is None
    assert result.groups == result.files and len(result.files) == 2 * PER_CLASS
    assert "0 pairs are equal, 0 altered" in summary(result)


def test_copies_within_and_across_classes(folder):
    shutil.copy(folder / "COVID/03.png", folder / "COVID/copy.png")
    save(folder / "Normal/copy.png", pixels(folder / "COVID/05.png")[4:, 5:])
    result = run(folder)
    assert members(result) == [
        ["COVID/03.png", "COVID/copy.png"],
        ["COVID/05.png", "Normal/copy.png"],
    ]
    assert [p.exact for p in result.pairs] == [True, False]
    (across,) = result.across_classes()
    assert result.files[across.second] == "Normal/copy.png"
    assert "across classes: 1 pairs, such as COVID/05.png and Normal/copy.png" in summary(result)


def test_copies_across_splits(folder):
    save(folder / "COVID/copy.png", pixels(folder / "COVID/00.png")[:, 6:])
    shutil.copy(folder / "Normal/01.png", folder / "Normal/copy.png")
    shutil.copy(folder / "Normal/02.png", folder / "Normal/twin.png")
    val = {"COVID/copy.png", "Normal/copy.png", "Normal/05.png"}
    files = [f for f in open_folder(str(folder)).files if f.file != "Normal/13.png"]
    rows = [Row(f.file, f.label, "val" if f.file in val else "train", "") for f in files]
    result = run(folder, rows)
    crossing = {(result.files[p.first], result.files[p.second]) for p in result.across_splits()}
    assert crossing == {("COVID/00.png", "COVID/copy.png"), ("Normal/01.png", "Normal/copy.png")}
    assert result.shared() == {"train": {"val": 2}, "val": {"train": 2}}
    text = summary(result)
    assert "2 of 3 val images have one of their group in train; 1 images are in no split" in text

    tested = [Row(r.file, r.label, "test" if r.split == "val" else r.split, "") for r in rows]
    text = summary(run(folder, tested))
    assert "2 of 3 test images have one of their group in train" in text

    apart = [Row(r.file, r.label, "train", "") for r in rows]
    assert run(folder, apart).shared() == {}
    assert "across splits: no group" in summary(run(folder, apart))


def test_a_split_of_another_folder_is_refused(clean):
    with pytest.raises(UserError, match="none of the images"):
        run(clean, [Row("elsewhere.png", "COVID", "train", "")])


def test_known_groups_and_found_copies_are_joined(folder):
    save(folder / "COVID/copy.png", pixels(folder / "COVID/01.png")[3:])
    lines = ["file,patient_id", "COVID/01.png,p", "Normal/04.png,p", "Normal/06.png,q"]
    (folder / "manifest.csv").write_text("\n".join(lines))
    result = run(folder)
    assert members(result) == [["COVID/01.png", "COVID/copy.png", "Normal/04.png"]]
    assert result.known_groups == 1 and len(result.pairs) == 1


def test_images_that_are_no_chest_x_rays(folder):
    rng = np.random.default_rng(0)
    chest = phantoms.draw("Normal", 999, 96)
    odd = {
        "blank.png": np.full((96, 96), 17, np.uint8),
        "nearly blank.png": rng.integers(100, 104, (96, 96), np.uint8),
        "mask.png": np.where(chest > 90, 255, 0).astype(np.uint8),
        "negative.png": 255 - chest,
        "photo.png": rng.integers(0, 256, (12, 12, 3), np.uint8).repeat(8, 0).repeat(8, 1),
    }
    for name, image in odd.items():
        save(folder / "COVID" / name, image)
    Image.fromarray(odd["mask.png"]).save(folder / "COVID/mask.jpg", quality=80)
    displaced = np.roll(phantoms.draw("Normal", 6, 96), 48, axis=1)
    save(folder / "COVID/displaced.png", displaced)
    (folder / "COVID/empty.png").write_bytes(b"")
    (folder / "COVID/torn.png").write_bytes((folder / "COVID/00.png").read_bytes()[:900])
    result = run(folder)
    assert kinds(result) == {
        "COVID/blank.png": "blank",
        "COVID/displaced.png": "unlike",
        "COVID/empty.png": "unreadable",
        "COVID/mask.jpg": "two-valued",
        "COVID/mask.png": "two-valued",
        "COVID/nearly blank.png": "blank",
        "COVID/negative.png": "inverted",
        "COVID/photo.png": "colour",
        "COVID/torn.png": "unreadable",
    }
    assert "two-valued: 2 images, such as COVID/mask.jpg" in summary(result)
    assert members(result) == [["COVID/mask.jpg", "COVID/mask.png"]]
    assert len(result.groups) == 2 * PER_CLASS + 9


def test_a_tinted_or_annotated_x_ray_is_not_a_photograph(folder):
    grey = pixels(folder / "COVID/00.png")
    tinted = np.stack([grey, grey, np.clip(grey.astype(int) + 12, 0, 255).astype(np.uint8)], 2)
    tinted[:8, :20] = (255, 0, 0)
    save(folder / "COVID/00.png", tinted)
    assert run(folder).suspicions == ()


def test_files_and_what_the_grouped_split_makes_of_them(folder, tmp_path):
    for n in range(6):
        save(folder / f"COVID/copy{n}.png", pixels(folder / f"COVID/{n:02}.png")[2 * n : 90, 5:])
    opened = open_folder(str(folder))
    result = audit(opened)
    write_audit(result, opened, tmp_path / "out")
    with open(tmp_path / "out/groups.csv", newline="") as f:
        listed = list(csv.DictReader(f))
    assert [row["file"] for row in listed] == [f.file for f in opened.files]

    grouped = open_folder(str(folder), groups_file=str(tmp_path / "out/groups.csv"))
    for seed in range(5):
        rows = make_split(grouped, split="grouped", val_fraction=0.3, seed=seed)
        part = {row.file: row.split for row in rows}
        assert all(part[f"COVID/copy{n}.png"] == part[f"COVID/{n:02}.png"] for n in range(6))

    told = json.loads((tmp_path / "out/audit.json").read_text())
    assert told["counts"] == {
        "pairs": 6,
        "exact_pairs": 0,
        "mirrored_pairs": 0,
        "groups": 6,
        "images_in_groups": 12,
        "largest_group": 2,
        "known_groups": None,
        "cross_class_pairs": 0,
        "cross_split_pairs": None,
        "suspicious": {},
    }
    assert told["pairs"][0]["files"] == ["COVID/00.png", "COVID/copy0.png"]

    shutil.copy(tmp_path / "out/groups.csv", folder / "groups.csv")
    again = run(folder)
    assert again.groups == result.groups and again.known_groups == 6


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return forked.command("covid_flax.data.audit", *arguments, cwd=cwd)


def test_the_command_on_a_zip_of_one_class(clean, tmp_path):
    shutil.copytree(clean / "COVID", tmp_path / "data/COVID")
    shutil.copy(tmp_path / "data/COVID/00.png", tmp_path / "data/COVID/copy.png")
    archive = shutil.make_archive(str(tmp_path / "images"), "zip", tmp_path / "data")
    shutil.rmtree(tmp_path / "data")
    folder = open_folder(archive, require_two_classes=False)
    rows = [Row(f.file, f.label, "val" if "copy" in f.file else "train", "") for f in folder.files]
    write_split_csv(tmp_path / "split.csv", rows)
    done = command(f"--data_dir={archive}", "--split_csv=split.csv", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "copies: 1 pairs are equal" in done.stdout
    assert "1 of 1 val images have one of their group in train" in done.stdout
    groups = tmp_path / "audit/groups.csv"
    assert f"--config.data.groups_file={groups}" in done.stdout
    assert sorted(os.listdir(tmp_path)) == ["audit", "images.zip", "split.csv"]
    grouped = open_folder(archive, groups_file=str(groups), require_two_classes=False)
    assert grouped.groups["COVID/copy.png"] == grouped.groups["COVID/00.png"]


def test_the_command_loses_no_groups_that_are_another_s(clean, tmp_path):
    """A csv of the user's own, and an audit of other images that a run may use."""
    shutil.copytree(clean, tmp_path / "data")
    mine = tmp_path / "data/groups.csv"
    mine.write_text("file,patient_id,age\nCOVID/00.png,p1,60\n")
    done = command("--data_dir=data", "--output=data", cwd=tmp_path)
    assert done.returncode == 2 and "groups.csv is of no audit" in done.stderr
    assert "age" in mine.read_text()
    for _ in range(2):  # once more is no loss
        done = command("--data_dir=data", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    shutil.copy(tmp_path / "audit/audit.json", tmp_path / "data")  # as of an audit before
    done = command("--data_dir=data", "--output=data", cwd=tmp_path)
    assert done.returncode == 2 and "age" in mine.read_text()
    (tmp_path / "odd/groups.csv").mkdir(parents=True)
    done = command("--data_dir=data", "--output=odd", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    (tmp_path / "data").rename(tmp_path / "others")
    done = command("--data_dir=others", cwd=tmp_path)
    assert done.returncode == 2 and "choose another --output" in done.stderr


def test_shared_images_are_counted_one_by_one_and_between_val_and_test(folder):
    for name in ("c1", "c2"):
        shutil.copy(folder / "COVID/00.png", folder / f"COVID/{name}.png")
    part = {"COVID/c1.png": "test", "COVID/c2.png": "test", "COVID/00.png": "val"}
    files = open_folder(str(folder)).files
    result = run(folder, [Row(f.file, f.label, part.get(f.file, "train"), "") for f in files])
    assert result.shared() == {"test": {"val": 2}, "val": {"test": 1}}
    assert "2 of 2 test images have one of their group in val" in summary(result)


def test_12_bits_in_a_file_of_16_are_dark_and_no_mask(folder):
    chest = phantoms.draw("Normal", 999, 96).astype(np.uint16)
    save(folder / "COVID/deep.png", chest * 16)
    result = run(folder)
    assert kinds(result) == {"COVID/deep.png": "dark"}
    assert "scale them to the full range" in summary(result)
