"""Splits, judged by Keras's own class and by counting."""

import collections
import hashlib
import os
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")

import numpy as np
import pytest
from keras.src.legacy.preprocessing.image import ImageDataGenerator

from covid_flax.data.folder import DataFolder, open_folder
from covid_flax.data.groups import joined
from covid_flax.data.splits import Row, crossing, make_split, read_split_csv, write_split_csv
from covid_flax.errors import UserError

KAGGLE_COUNTS = {"COVID": 3616, "Lung_Opacity": 6012, "Normal": 10192, "Viral Pneumonia": 1345}


def touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY))


def keras_files(root: Path, val_fraction: float, subset: str) -> list[str]:
    generator = ImageDataGenerator(validation_split=val_fraction)
    return generator.flow_from_directory(str(root), subset=subset).filenames


def of(rows: list[Row], split: str) -> list[str]:
    return [row.file for row in rows if row.split == split]


def counts(rows: list[Row], split: str) -> list[int]:
    counter = collections.Counter(row.label for row in rows if row.split == split)
    return [counter[label] for label in sorted({row.label for row in rows})]


def each_once(rows: list[Row], folder: DataFolder) -> bool:
    return [(r.file, r.label) for r in rows] == [(f.file, f.label) for f in folder.files]


@pytest.fixture(scope="module")
def full_database(tmp_path_factory) -> Path:
    """The Kaggle database's names and counts, with empty files."""
    root = tmp_path_factory.mktemp("full")
    for label, n in KAGGLE_COUNTS.items():
        (root / label / "images").mkdir(parents=True)
        for i in range(1, n + 1):
            os.close(os.open(root / label / "images" / f"{label}-{i}.png", os.O_CREAT))
    return root


def test_paper_sorted_is_keras_on_the_full_database(full_database):
    folder = open_folder(str(full_database))
    rows = make_split(folder, split="paper-sorted", val_fraction=0.2)
    assert counts(rows, "val") == [723, 1202, 2038, 269]
    assert of(rows, "val") == keras_files(full_database, 0.2, "validation")
    assert of(rows, "train") == keras_files(full_database, 0.2, "training")
    assert each_once(rows, folder)


@pytest.mark.parametrize("seed", range(4))
def test_paper_sorted_is_keras_on_odd_trees(tmp_path, seed):
    rng = np.random.default_rng(seed)
    for label in ("b", "A", "a c"):
        for _ in range(int(rng.integers(15, 60))):
            inner = rng.choice(["", "x/", "x-y/", "x/z/", "X/"])
            name = rng.choice(list("aB_-é (")) + str(rng.integers(1000))
            touch(
                tmp_path / label / f"{inner}{name}{rng.choice(['.png', '.JPG', '.jpeg', '.txt'])}"
            )
    folder = open_folder(str(tmp_path))
    for fraction in (0.1, 0.2, 0.29, 1 / 3, 0.7):
        rows = make_split(folder, split="paper-sorted", val_fraction=fraction)
        assert of(rows, "val") == keras_files(tmp_path, fraction, "validation")
        assert of(rows, "train") == keras_files(tmp_path, fraction, "training")


def test_paper_random(full_database):
    folder = open_folder(str(full_database))
    rows = make_split(folder, split="paper-random", val_fraction=0.2, seed=3)
    assert counts(rows, "val") == [723, 1202, 2038, 269] and each_once(rows, folder)
    assert rows == make_split(folder, split="paper-random", val_fraction=0.2, seed=3)
    other = make_split(folder, split="paper-random", val_fraction=0.2, seed=4)
    # Two independent draws of a fifth share a fifth; 4,232 of them leave 26 for one sigma.
    shared = len(set(of(rows, "val")) & set(of(other, "val")))
    assert abs(shared - 0.2 * 4232) < 5 * 26
    numbers = [int(f.rpartition("-")[2][:-4]) for f in of(rows, "val") if f.startswith("Normal")]
    assert abs(np.mean(numbers) - 10193 / 2) < 5 * 10192 / np.sqrt(12 * 2038)


@pytest.mark.parametrize("split", ["paper-sorted", "paper-random"])
def test_nested_test(full_database, split):
    folder = open_folder(str(full_database))
    plain = make_split(folder, split=split, val_fraction=0.2, seed=1)
    nested = make_split(folder, split=split, val_fraction=0.2, seed=1, nested_test=True)
    assert of(nested, "test") == of(plain, "val") and each_once(nested, folder)
    rest = [3616 - 723, 6012 - 1202, 10192 - 2038, 1345 - 269]
    assert counts(nested, "val") == [int(0.2 * n) for n in rest]
    # Drawn, not the first of what is left in the order of names.
    numbers = {
        part: [int(f.rpartition("-")[2][:-4]) for f in of(nested, part) if f.startswith("Normal")]
        for part in ("train", "val")
    }
    spread = np.std(numbers["train"]) / np.sqrt(len(numbers["val"]))
    assert abs(np.mean(numbers["val"]) - np.mean(numbers["train"])) < 5 * spread
    assert nested == make_split(folder, split=split, val_fraction=0.2, seed=1, nested_test=True)
    if split == "paper-sorted":
        other = make_split(folder, split=split, val_fraction=0.2, seed=2, nested_test=True)
        assert of(other, "test") == of(nested, "test") and of(other, "val") != of(nested, "val")


def grouped_folder(root: Path, seed: int) -> DataFolder:
    """Random trees: groups of 1 to 9 images, a tenth of them across classes."""
    rng = np.random.default_rng(seed)
    lines = ["file,group"]
    group = 0
    for label, n in (("a", 150), ("b", 60), ("c", 400)):
        done = 0
        while done < n:
            group += 1
            for _ in range(min(int(rng.choice([1, 1, 1, 2, 3, 9])), n - done)):
                shown = label if rng.random() > 0.03 else rng.choice(["a", "b", "c"])
                touch(root / shown / f"{label}_{done}.png")
                lines.append(f"{shown}/{label}_{done}.png,g{group}")
                done += 1
    (root / "groups.csv").write_text("\n".join(lines))
    return open_folder(str(root))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("fractions", [(0.2, 0.0), (0.15, 0.15), (0.1, 0.3)])
def test_groups_never_cross_and_shares_are_met(tmp_path, seed, fractions):
    folder = grouped_folder(tmp_path, seed)
    labels = collections.defaultdict(set)
    for f in folder.files:
        labels[folder.groups[f.file]].add(f.label)
    assert max(len(found) for found in labels.values()) > 1  # some groups span classes
    val, test = fractions
    rows = make_split(folder, split="grouped", val_fraction=val, test_fraction=test, seed=seed)
    assert each_once(rows, folder)
    assert [r.group for r in rows] == [folder.groups[f.file] for f in folder.files]
    parts = collections.defaultdict(set)
    for row in rows:
        parts[row.group].add(row.split)
    assert len(parts) > 150 and {len(p) for p in parts.values()} == {1}
    totals = np.array([sum(counts(rows, s)[k] for s in ("train", "val", "test")) for k in range(3)])
    for split, fraction in (("val", val), ("test", test)):
        # Within half of the largest group and what groups across classes cost.
        assert np.all(np.abs(np.array(counts(rows, split)) - fraction * totals) <= 4)


def test_groups_of_every_size_reach_every_part(tmp_path):
    lines = ["file,group"]
    for label in ("a", "b"):
        for group in range(40):
            for i in range(1 if group < 20 else 6):
                touch(tmp_path / label / f"{group}_{i}.png")
                lines.append(f"{label}/{group}_{i}.png,{label}{group}")
    (tmp_path / "groups.csv").write_text("\n".join(lines))
    rows = make_split(
        open_folder(str(tmp_path)), split="grouped", val_fraction=0.2, test_fraction=0.2
    )
    for split in ("val", "test"):
        sizes = collections.Counter(collections.Counter(
            r.group for r in rows if r.split == split).values())  # fmt: skip
        assert sizes == {1: 8, 6: 8}  # a fifth of the 40 groups of each size


@pytest.mark.parametrize(("n", "fraction"), [(7, 0.2), (23, 0.3), (58, 0.03), (91, 0.02)])
def test_single_images_are_shared_to_the_nearest_number(tmp_path, n, fraction):
    for label in ("a", "b"):
        for i in range(n):
            touch(tmp_path / label / f"{i}.png")
            (tmp_path / label / f"{i}.png").write_text(f"{label}{i}")
    rows = make_split(open_folder(str(tmp_path)), split="grouped", val_fraction=fraction)
    assert counts(rows, "val") == [round(fraction * n)] * 2


def test_grouped_depends_on_seed_and_names_alone(tmp_path):
    folder = grouped_folder(tmp_path, 0)
    first = make_split(folder, split="grouped", val_fraction=0.2, seed=0)
    assert make_split(folder, split="grouped", val_fraction=0.2, seed=0) == first
    assert make_split(folder, split="grouped", val_fraction=0.2, seed=1) != first
    lines = (tmp_path / "groups.csv").read_text().splitlines()
    (tmp_path / "groups.csv").write_text("\n".join([lines[0], *reversed(lines[1:])]))
    again = open_folder(str(tmp_path))
    assert make_split(again, split="grouped", val_fraction=0.2, seed=0) == first


@pytest.mark.parametrize("told", [False, True])
def test_identical_files_stay_together(tmp_path, told):
    rng = np.random.default_rng(0)
    for label in ("a", "b"):
        for i in range(60):
            touch(tmp_path / label / f"{i}.png")
            (tmp_path / label / f"{i}.png").write_bytes(bytes([int(rng.integers(40))]))
    if told:
        (tmp_path / "groups.csv").write_text("file,group\na/0.png,p\nb/0.png,p\na/1.png,p\n")
    folder = open_folder(str(tmp_path))
    rows = make_split(folder, split="grouped", val_fraction=0.25, test_fraction=0.25)
    parts = collections.defaultdict(set)
    for row in rows:
        parts[hashlib.md5(folder.read(row.file)).hexdigest()].add(row.split)
    assert len(parts) > 30 and {len(p) for p in parts.values()} == {1}
    if told:
        assert (
            len({row.split for row in rows if row.file in ("a/0.png", "b/0.png", "a/1.png")}) == 1
        )
    assert each_once(rows, folder)


@pytest.mark.parametrize("n", [3, 4, 6])
def test_tiny_classes_reach_every_part_where_they_can(tmp_path, n):
    for label, size in (("a", n), ("b", 50)):
        for i in range(size):
            touch(tmp_path / label / f"{i}.png")
            (tmp_path / label / f"{i}.png").write_text(f"{label}{i}")
    rows = make_split(
        open_folder(str(tmp_path)), split="grouped", val_fraction=0.1, test_fraction=0.1
    )
    for split in ("train", "val", "test"):
        assert min(counts(rows, split)) >= 1


def test_impossible_splits_are_refused(tmp_path):
    lines = ["file,group"]
    for label, n in (("a", 4), ("b", 40)):
        for i in range(n):
            touch(tmp_path / label / f"{i}.png")
            lines.append(f"{label}/{i}.png,{label if label == 'a' else i}")
    (tmp_path / "groups.csv").write_text("\n".join(lines))
    folder = open_folder(str(tmp_path))
    for options, message in [
        (dict(split="sorted", val_fraction=0.2), "split=sorted is unknown: take one of paper-sort"),
        (dict(split="grouped", val_fraction=0.0), "val_fraction=0.0 must lie between"),
        (dict(split="grouped", val_fraction=1.0), "val_fraction=1.0 must lie between"),
        (dict(split="grouped", val_fraction=0.5, test_fraction=0.5), "test_fraction=0.5 must"),
        (dict(split="grouped", val_fraction=0.5, test_fraction=-0.1), "test_fraction=-0.1 must"),
        (dict(split="grouped", val_fraction=0.2), r"class a \(4 images\) without a val image"),
        (dict(split="paper-sorted", val_fraction=0.2), r"class a \(4 images\) without a val image"),
        (
            dict(split="paper-random", val_fraction=0.25, nested_test=True),
            r"class a \(4 images\) without a val image",
        ),
    ]:
        with pytest.raises(UserError, match=message):
            make_split(folder, **options)


def test_a_split_is_what_a_csv_says(tmp_path):
    """Of another folder's names, in any order; what it does not tell is left out."""
    for label in ("a", "b"):
        for i in range(6):
            (tmp_path / "data" / label).mkdir(parents=True, exist_ok=True)
            (tmp_path / "data" / label / f"{i}.png").write_bytes(b"same" if i < 2 else b"")
    parts = ["train", "val", "test", "", "val", "train "]
    lines = [f"/old/place/{c}/{i}.png,{p}" for i, p in enumerate(parts) for c in "ba"]
    csv_file = tmp_path / "parts.csv"
    csv_file.write_text("\n".join(["file,split", *lines, "/old/place/a/9.png,test"]))
    folder = open_folder(str(tmp_path / "data"), split_file=str(csv_file))
    assert folder.told_split.strangers == 1
    rows = make_split(folder, split="file", val_fraction=0.0, test_fraction=0.7)
    assert [row.file for row in rows] == [f"{c}/{i}.png" for c in "ab" for i in (0, 1, 2, 4, 5)]
    assert [row.split for row in rows] == ["train", "val", "test", "val", "train"] * 2
    assert crossing(rows) == 1 and rows[0].group == rows[1].group == rows[5].group != ""


def test_a_split_s_csv_tells_groups_too(tmp_path):
    for file in ("a/0.png", "a/1.png", "b/0.png", "b/1.png"):
        touch(tmp_path / "data" / file)
        (tmp_path / "data" / file).write_bytes(file.encode())
    (tmp_path / "data/groups.csv").write_text("file,patient_id\na/0.png,p\nb/0.png,p\n")
    csv_file = tmp_path / "parts.csv"
    for groups in (("g", "g", "", "h"), ("", "", "", "")):
        lines = [
            f"{c}/{i}.png,{part},{group}"
            for (c, i, part), group in zip(
                (("a", 0, "train"), ("a", 1, "val"), ("b", 0, "train"), ("b", 1, "val")),
                groups,
                strict=True,
            )
        ]
        csv_file.write_text("\n".join(["file,split,group", *lines]))
        folder = open_folder(str(tmp_path / "data"), split_file=str(csv_file))
        rows = make_split(folder, split="file", val_fraction=0.2)
        together = {(a.file, b.file) for a in rows for b in rows if a.group == b.group != ""}
        apart = {(a, b) for a, b in together if a < b}
        if groups[0]:
            assert apart == {("a/0.png", "a/1.png"), ("a/0.png", "b/0.png"), ("a/1.png", "b/0.png")}
        else:
            assert apart == {("a/0.png", "b/0.png")}
        assert crossing(rows) == bool(groups[0])


def test_a_row_of_two_names_alike_is_of_no_stranger(tmp_path):
    for label in ("a", "b"):
        for name in ("e\u0301.png", "\u00e9.png"):
            touch(tmp_path / "data" / label / name)
    lines = [f"{c}/e\u0301.png,train" for c in "ab"]
    (tmp_path / "parts.csv").write_text("\n".join(["file,split", *lines]), encoding="utf-8")
    folder = open_folder(str(tmp_path / "data"), split_file=str(tmp_path / "parts.csv"))
    assert folder.told_split.strangers == 0 and len(folder.told_split.parts) == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,part\na/0.png,train\n", "no column `split`"),
        ("file,split\nx/0.png,train\n", "lists none of the images"),
        ("file,split\na/0.png,training\n", "puts a/0.png into 'training': its `split` is train"),
        ("file,split,label\na/0.png,train,b\n", "a/0.png is b in"),
        ("file,split\na/0.png,train\na/1.png,val\nb/0.png,train\n", "b .2 images. without a val"),
        (
            "file,split\na/0.png,train\na/1.png,val\nb/0.png,train\nb/1.png,val\na/2.png,test\n",
            "without a test image: give one in data.split_file",
        ),
    ],
)
def test_a_csv_that_tells_no_split_is_refused(tmp_path, text, message):
    for file in ("a/0.png", "a/1.png", "a/2.png", "b/0.png", "b/1.png"):
        touch(tmp_path / file)
    (tmp_path / "parts.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        make_split(
            open_folder(str(tmp_path), split_file="parts.csv"), split="file", val_fraction=0.2
        )


def test_csv_round_trip_with_odd_names(tmp_path):
    rows = [
        Row('a/with, comma "quoted".png', "a", "train", "g,1"),
        Row("b/ü-肺 %0.png", "b", "val", ""),
        Row("b/new\nline\r.png", "b", "test", "'"),
    ]
    path = tmp_path / "split.csv"
    write_split_csv(path, rows)
    assert read_split_csv(path) == rows
    assert path.read_text(encoding="utf-8").splitlines()[0] == "file,label,split,group"
    assert [p.name for p in tmp_path.iterdir()] == ["split.csv"]
    with pytest.raises(UserError, match="cannot write .*split.csv/below.csv"):
        write_split_csv(path / "below.csv", rows)
    path.write_text("file,label\na,b\n")
    with pytest.raises(UserError, match="is not a split file"):
        read_split_csv(path)
    with pytest.raises(UserError, match="cannot read"):
        read_split_csv(tmp_path / "none.csv")


def test_only_groups_that_are_told_or_shared_are_written(tmp_path):
    """What is but an image's own name would pass for a known group."""
    for label in ("a", "b"):
        for i in range(8):
            (tmp_path / label).mkdir(exist_ok=True)
            (tmp_path / label / f"{i}.png").write_text(f"{label}{max(i, 2)}")  # 0, 1, 2 are alike
    rows = make_split(open_folder(str(tmp_path)), split="grouped", val_fraction=0.4)
    assert {row.file for row in rows if row.group} == {
        f"{label}/{i}.png" for label in "ab" for i in range(3)
    }
    (tmp_path / "groups.csv").write_text("file,group\na/5.png,p\nb/5.png,q\na/6.png,\n")
    rows = make_split(open_folder(str(tmp_path)), split="grouped", val_fraction=0.4)
    named = {row.file for row in rows if row.group}
    assert {"a/5.png", "b/5.png", "a/0.png"} <= named and len(named) == 8


def test_folds_do_not_ask_for_a_share_of_val(tmp_path):
    folder = grouped_folder(tmp_path, 0)
    how = {"split": "grouped", "folds": 2, "fold": 0, "test_fraction": 0.6}
    rows = make_split(folder, val_fraction=0.9, **how)
    assert rows == make_split(folder, val_fraction=0.2, **how)


def test_a_joined_group_bears_its_least_name():
    """Else a split would hang on the order of a set, which no two processes have alike."""
    groups = {f"{i}.png": f"g{i}" for i in range(100, 300)}
    assert set(joined(groups, dict.fromkeys(groups, "p")).values()) == {"g100"}
