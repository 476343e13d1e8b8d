"""Which files of a folder are images, of which class, group and source."""

import csv
import os
import shutil
import socket
import zipfile
from pathlib import Path
from typing import Any

import openpyxl
import pytest

from covid_flax.data.folder import ImageFile, open_folder
from covid_flax.errors import UserError

KAGGLE = "COVID-19_Radiography_Dataset"


def make(root: Path, *files: str) -> str:
    """Files with their own name as content (the folder layer opens none)."""
    for file in files:
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(file)
    return str(root)


def listed(path: str, **options: Any) -> list[str]:
    return [f.file for f in open_folder(path, **options).files]


def kaggle_tree(root: Path, prefix: str = "") -> str:
    classes = ("COVID", "Viral Pneumonia")
    files = [
        f"{prefix}{c}/{d}/{c}-{i}.png"
        for c in classes
        for d in ("images", "masks")
        for i in (1, 2, 10)
    ]
    return make(root, *files, f"{prefix}README.md.txt")


KAGGLE_FILES = [f"{c}/images/{c}-{i}.png" for c in ("COVID", "Viral Pneumonia") for i in (1, 10, 2)]


@pytest.mark.parametrize("prefix", ["", f"{KAGGLE}/", f"archive/{KAGGLE}/", "unpacked/"])
def test_kaggle_layout_without_masks_at_any_depth(tmp_path, prefix):
    root = kaggle_tree(tmp_path, prefix)
    folder = open_folder(root)
    assert folder.class_names == ("COVID", "Viral Pneumonia")
    assert [f.file for f in folder.files] == [prefix + f for f in KAGGLE_FILES]
    assert folder.files[0] == ImageFile(f"{prefix}COVID/images/COVID-1.png", "COVID", "")
    assert folder.read(folder.files[0].file) == folder.files[0].file.encode()
    assert folder.root == tmp_path and folder.groups is None


def test_kaggle_folder_is_preferred_to_its_neighbours(tmp_path):
    root = kaggle_tree(tmp_path, f"{KAGGLE}/")
    make(tmp_path, "control/Normal/images/Normal-1.png", "other/a/1.png")
    assert listed(root) == [f"{KAGGLE}/{f}" for f in KAGGLE_FILES]


@pytest.mark.parametrize("prefix", ["", f"archive/{KAGGLE}/"])
@pytest.mark.parametrize("folder_entries", [False, True])
def test_zip_reads_as_the_folder(tmp_path, prefix, folder_entries):
    root = kaggle_tree(tmp_path / "tree", prefix)
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        for path in sorted(Path(root).rglob("*"), reverse=True):
            if path.is_file() or folder_entries:
                archive.write(path, path.relative_to(root))
        archive.writestr("__MACOSX/COVID/._COVID-1.png", "x")
    zipped, plain = open_folder(str(tmp_path / "data.zip")), open_folder(root)
    assert zipped.files == plain.files and zipped.class_names == plain.class_names
    for f in plain.files:
        assert zipped.read(f.file) == plain.read(f.file)
    assert zipped.fingerprint() == open_folder(str(tmp_path / "data.zip")).fingerprint()


def test_plain_layout_and_what_is_ignored(tmp_path):
    make(
        tmp_path, "b/2.JPG", "b/1.tiff", "b/deep/3.webp", "a/x.png", "a/.hidden.png",
        "a/Thumbs.db", "a/notes.txt", "a/masks/x.png", ".git/x.png", "__MACOSX/a/x.png",
        "a/lung masks/x.png", "b/infection_Masks/y.png",
        "loose.png", "Face_Masks/x.png", "masks/readme.txt",
    )  # fmt: skip
    folder = open_folder(str(tmp_path))
    assert [f.file for f in folder.files] == ["a/x.png", "b/1.tiff", "b/2.JPG", "b/deep/3.webp"]
    assert folder.ignored == {"hidden": 1, ".db": 1, ".txt": 1}
    assert folder.passed_over() == (
        "1 .db, 1 .txt, 1 hidden in the class folders, no images; "
        "1 images beside the class folders, of no class; Face_Masks, masks by name: no class"
    )
    for name in ("a/1.2.840.17", "a/1.2.840.18", "b/x.caf\udce9"):  # DICOM's own names
        (tmp_path / name).touch()
    folder = open_folder(str(tmp_path))
    assert folder.ignored == {"hidden": 1, ".db": 1, ".txt": 1, "other": 3}
    assert folder.without_classes(["a"]).ignored == {"other": 1}


def test_links_are_followed(tmp_path):
    make(tmp_path / "far", "1.png")
    make(tmp_path / "data", "a/1.png")
    (tmp_path / "data" / "b").symlink_to(tmp_path / "far")
    (tmp_path / "data" / "a" / "2.png").symlink_to(tmp_path / "far" / "1.png")
    assert listed(str(tmp_path / "data")) == ["a/1.png", "a/2.png", "b/1.png"]
    (tmp_path / "data" / "a" / "loop").symlink_to(tmp_path / "data" / "a")
    with pytest.raises(UserError, match="nested too deeply"):
        open_folder(str(tmp_path / "data"))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (("COVID/images/1.png", "Normal/images/notes.txt"), "class folder .*Normal: fill it"),
        (("COVID/images/1.png",), r"one class only \(COVID\)"),
        (("images/1.png", "masks/1.png"), "folder of one class"),
        (("loose.png",), r"<Class>/images/\*\.png \(Kaggle's\) or <Class>/\*\.png"),
        (("1.png", "2.png"), "no image found.*; 2 lie in no class folder: move them into <Class>"),
        (("a/1.dcm", "b/2.DCM", "b/x"), "no image found.*; 2 .dcm, 1 other are not read"),
        (("a/1.png", "b/2\r.png"), r"b/2\\r\.png' holds a carriage return: rename"),
        (("COVID/COVID-1.png", "Normal/covid-2.png"), "Normal/covid-2.png names COVID"),
        (("x/Train/a/1.png", "x/test/a/1.png"), r"parts of a split \(Train, test\).*x/Train"),
        (("x/val/a/1.png", "x/test/a/1.png", "x/x/a/1.png"), r"split \(test, val\).*x/test"),
    ],
)
def test_unusable_folders_are_named(tmp_path, files, message):
    with pytest.raises(UserError, match=message) as e:
        open_folder(make(tmp_path, *files))
    assert "\n" not in str(e.value)


def test_mislabelled_names_are_counted(tmp_path):
    make(tmp_path, "a/a-0.png", *(f"b/a-{i}.png" for i in range(1, 8)), "b/b-1.png", "b/aa-9.png")
    with pytest.raises(UserError, match=r"^7 mislabelled .*b/a-5.png names a and 2 more"):
        open_folder(str(tmp_path))


def test_a_name_that_only_begins_like_a_class_is_not_mislabelled(tmp_path):
    names = ("covid-19-negative.png", "COVID-19 negative 7.png", "covid-19 (2) late.png")
    root = make(tmp_path, "COVID/COVID-1.png", *(f"Normal/{name}" for name in names))
    assert len(open_folder(root).files) == 4
    make(tmp_path, "Normal/COVID-1 (2).png")
    with pytest.raises(UserError, match=r"COVID-1 \(2\).png names COVID"):
        open_folder(root)


def test_numbers_are_patients_and_no_classes(tmp_path):
    root = make(tmp_path, "0/1-11.png", "0/2-3.png", "1/0-7.png", "1/1-2.png")
    assert len(open_folder(root).files) == 4


def test_patients_folders_in_the_only_class_are_no_classes(tmp_path):
    root = make(tmp_path, "Normal/p1/1.png", "Normal/p2/2.png")
    folder = open_folder(root, require_two_classes=False, classes={"COVID", "Normal"})
    assert folder.class_names == ("Normal",) and len(folder.files) == 2
    assert open_folder(root, require_two_classes=False).class_names == ("p1", "p2")


def test_one_class_for_evaluation(tmp_path):
    root = make(tmp_path, "Normal/images/COVID-1.png", "Normal/images/Normal-1.png")
    folder = open_folder(root, require_two_classes=False)
    assert folder.class_names == ("Normal",) and len(folder.files) == 2


def test_a_zip_that_cannot_be_read_is_not_called_broken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a socket's path may not be long
    with socket.socket(socket.AF_UNIX) as unreadable:
        unreadable.bind("a.zip")
        with pytest.raises(UserError, match=r"cannot read a\.zip \(No such device"):
            open_folder("a.zip")


def test_paths_that_are_no_folder(tmp_path):
    (tmp_path / "file.txt").write_text("x")
    (tmp_path / os.fsdecode(b"caf\xe9")).mkdir()
    (tmp_path / "broken.zip").write_bytes(b"PK\x03\x04 and then nothing")
    for path, message in [
        ("", "no data folder given"),
        (str(tmp_path / "none"), "does not exist"),
        (str(tmp_path / "file.txt"), "neither a folder nor a zip"),
        (str(tmp_path / "broken.zip"), "broken zip"),
        (os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"), "not valid UTF-8: rename the folder"),
    ]:
        with pytest.raises(UserError, match=message):
            open_folder(path)


def test_a_tilde_is_the_home(tmp_path, monkeypatch):
    make(tmp_path / "data", *FOUR)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_folder("~/data").root == tmp_path / "data"


def test_damaged_zip_member(tmp_path):
    path = tmp_path / "data.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/1.png", b"a" * 1000)
        archive.writestr("b/1.png", b"b" * 1000)
    path.write_bytes(path.read_bytes().replace(b"a" * 1000, b"a" * 999 + b"c"))
    folder = open_folder(str(path))
    assert folder.read("b/1.png") == b"b" * 1000
    with pytest.raises(UserError, match="cannot read a/1.png"):
        folder.read("a/1.png")


def test_fingerprint_changes_with_what_the_records_hold(tmp_path):
    root = make(tmp_path / "data", "a/1.png", "b/1.png")
    first = open_folder(root).fingerprint()
    assert open_folder(root).fingerprint() == first
    copy = shutil.copytree(root, tmp_path / "copy")  # keeps the times
    assert open_folder(str(copy)).fingerprint() == first
    seen = {first}
    os.utime(Path(root, "a/1.png"), ns=(1, 1))
    seen.add(open_folder(root).fingerprint())
    Path(root, "a/1.png").write_text("longer than before")
    os.utime(Path(root, "a/1.png"), ns=(1, 1))
    seen.add(open_folder(root).fingerprint())
    make(Path(root), "a/2.png")
    seen.add(open_folder(root).fingerprint())
    assert len(seen) == 4


def write_csv(path: Path, header: list[str], *rows: tuple[str, ...]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([header, *rows])


FOUR = ("a/1.png", "a/2%0, x.png", "b/4.png", "b/ü.png")


def test_groups_csv_comes_before_the_manifest(tmp_path):
    root = make(tmp_path, *FOUR)
    write_csv(tmp_path / "manifest.csv", ["file", "near_dup_group"], *((f, "m") for f in FOUR))
    manifest = open_folder(root)
    assert set(manifest.groups.values()) == {"m"} and not manifest.ungrouped
    write_csv(tmp_path / "groups.csv", ["file", "group"], *((f, "g") for f in FOUR[:3]))
    folder = open_folder(root)
    assert folder.groups == {FOUR[0]: "g", FOUR[1]: "g", FOUR[2]: "g", FOUR[3]: FOUR[3]}
    assert folder.ungrouped == {FOUR[3]}


def test_a_csv_that_is_named_adds_to_the_folder_s_own(tmp_path):
    """An audit's may be older than the patients' csv; neither may be lost by naming the other."""
    root = make(tmp_path, *FOUR)
    named = tmp_path / "elsewhere.csv"
    write_csv(tmp_path / "groups.csv", ["file", "patient_id"], (FOUR[1], "p"), (FOUR[2], "p"))
    write_csv(named, ["file", "group", "style"], (FOUR[0], "c", "g"), (FOUR[1], "c", "h"))
    folder = open_folder(root, groups_file=str(named))
    groups = folder.groups
    assert groups[FOUR[0]] == groups[FOUR[1]] == groups[FOUR[2]] != groups[FOUR[3]]
    assert folder.ungrouped == {FOUR[3]} and folder.unused == ""
    # A column that is named is meant alone, as clusters of style are.
    groups = open_folder(root, groups_file=str(named), group_column="style").groups
    assert groups[FOUR[0]] == "g" and groups[FOUR[1]] == "h" and groups[FOUR[2]] == FOUR[2]
    # One that tells nothing is passed over.
    write_csv(tmp_path / "groups.csv", ["file", "age"], (FOUR[1], "60"), (FOUR[2], "60"))
    folder = open_folder(root, groups_file=str(named))
    assert folder.groups[FOUR[1]] != folder.groups[FOUR[2]]
    assert "groups.csv has no column group or" in folder.unused


def test_why_a_table_tells_no_groups(tmp_path):
    root = make(tmp_path, *FOUR)
    (tmp_path / "manifest.csv").write_text("file;patient_id\na/1.png;p\n")
    folder = open_folder(root)
    assert folder.groups is None
    assert "manifest.csv has no column `file` (it has file;patient_id)" in folder.unused
    (tmp_path / "groups.csv").write_text("file;group\na/1.png;p\n")
    other = open_folder(root, classes=("a", "b"))
    assert other.groups is None and "groups.csv has no column `file`" in other.unused


def test_what_any_of_several_columns_puts_together_stays_together(tmp_path):
    root = make(tmp_path, *FOUR, "b/5.png", "b/6.png")
    rows = [(FOUR[0], "n1", "p1"), (FOUR[1], "", "p1"), (FOUR[2], "n1", ""), (FOUR[3], "n2", "")]
    columns = ["file", "near_dup_group", "patient_id"]
    write_csv(tmp_path / "groups.csv", columns, *rows, ("b/5.png", "", "n2"))
    folder = open_folder(root)
    together = [{f for f in folder.groups if folder.groups[f] == g} for g in folder.groups.values()]
    assert {frozenset(g) for g in together} == {
        frozenset(FOUR[:3]), frozenset({FOUR[3]}), frozenset({"b/5.png"}), frozenset({"b/6.png"}),
    }  # fmt: skip
    assert folder.ungrouped == {"b/6.png"} and not folder.without(["b/6.png"]).ungrouped
    # A name is the first column's, so that a column which joins nothing changes no split.
    assert folder.groups[FOUR[3]] == "n2"
    one = open_folder(root, group_column="patient_id").groups
    assert one[FOUR[0]] == one[FOUR[1]] == "p1" and one[FOUR[2]] == FOUR[2]


def test_an_unlisted_image_never_joins_a_group_of_its_own_name(tmp_path):
    root = make(tmp_path, *FOUR)
    write_csv(tmp_path / "groups.csv", ["file", "group"], (FOUR[0], FOUR[3]))
    assert len(set(open_folder(root).groups.values())) == 4


def test_groups_file_and_column_as_given(tmp_path, monkeypatch):
    root = make(tmp_path / "data", *FOUR)
    columns = ["file", "label", "patient_id", "scanner"]
    rows = [(f, f[0], f"p{i}", f"s{i // 2}") for i, f in enumerate(FOUR)]
    write_csv(tmp_path / "data" / "labels.csv", columns, *rows)
    assert open_folder(root).groups is None
    by_patient = open_folder(root, groups_file="labels.csv")
    assert list(by_patient.groups.values()) == ["p0", "p1", "p2", "p3"]
    elsewhere = shutil.move(tmp_path / "data" / "labels.csv", tmp_path / "far.csv")
    by_scanner = open_folder(root, groups_file=str(elsewhere), group_column="scanner")
    assert list(by_scanner.groups.values()) == ["s0", "s0", "s1", "s1"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_folder(root, groups_file="~/far.csv").groups == by_patient.groups


def test_a_row_that_could_mean_two_folders_groups_nothing(tmp_path):
    root = make(tmp_path / "data", *FOUR)
    listed = [("x/a/1.png", "g"), ("y/a/1.png", "h"), ("x/b/4.png", "g"), ("y/b/ü.png", "g")]
    write_csv(tmp_path / "far.csv", ["file", "group"], *listed)
    folder = open_folder(root, groups_file=str(tmp_path / "far.csv"))
    assert [folder.groups[f] for f in FOUR] == [FOUR[0], FOUR[1], "g", "g"]


def test_manifest_above_the_folder_is_matched_by_its_paths(tmp_path):
    kaggle_tree(tmp_path, f"{KAGGLE}/")
    make(tmp_path, *(f"control/{f}" for f in KAGGLE_FILES))
    rows = [(f"{KAGGLE}/{f}", str(i), f"site{i}") for i, f in enumerate(KAGGLE_FILES)]
    write_csv(tmp_path / "manifest.csv", ["file", "near_dup_group", "source_repo"], *rows)
    top, below = open_folder(str(tmp_path)), open_folder(str(tmp_path / KAGGLE))
    assert list(top.groups.values()) == list(below.groups.values()) == list("012345")
    assert [f.source for f in below.files] == [f"site{i}" for i in range(6)]
    control = str(tmp_path / "control")
    assert open_folder(control).groups is None
    named = open_folder(control, groups_file=str(tmp_path / "manifest.csv"))
    assert list(named.groups.values()) == list("012345")


def test_groups_as_a_spreadsheet_on_windows_writes_them(tmp_path):
    """Two names of a patient, apart by a blank, would put his images on both sides of a split."""
    root = make(tmp_path, "a/1.png", "a/2.png", "b/1.png")
    text = "\ufefffile,group\r\na\\1.png,p1 \r\na\\2.png, p1\r\nb\\1.png,p2\r\n"
    (tmp_path / "groups.csv").write_bytes(text.encode())
    assert open_folder(root).groups == {"a/1.png": "p1", "a/2.png": "p1", "b/1.png": "p2"}


def test_groups_are_found_by_names_that_look_alike(tmp_path):
    """A Mac decomposes letters, a spreadsheet adds blanks; exact names come first."""
    root = make(
        tmp_path, "a/Mu\u0308ller.png", "a/2.png", "b/M\u00fcller.png", "b/x .png", "b/x.png"
    )
    text = "file,group\na/M\u00fcller.png,p1\na/2.png ,p1\nb/M\u00fcller.png,p2\n"
    (tmp_path / "groups.csv").write_text(text + "b/x .png,p3\nb/x.png,p4\n")
    assert open_folder(root).groups == {
        "a/Mu\u0308ller.png": "p1",
        "a/2.png": "p1",
        "b/M\u00fcller.png": "p2",
        "b/x .png": "p3",
        "b/x.png": "p4",
    }


def test_unusable_groups(tmp_path):
    root = make(tmp_path, *FOUR)
    cases = [
        (["file", "group"], [("x/1.png", "1")], {}, "lists none of the images"),
        (["name", "group"], [("a/1.png", "1")], {}, "no column `file`"),
        (["file", "colour"], [("a/1.png", "1")], {}, "no column group or"),
        (["file", "group"], [("a/1.png", "1")], {"group_column": "site"}, "no column site"),
        (["file", "group"], [("a/1.png", "1"), ("a/1.png", "2")], {}, "twice"),
        (["file", "group", "label"], [("a/1.png", "1", "b")], {}, "a/1.png is b in"),
    ]
    for header, rows, options, message in cases:
        write_csv(tmp_path / "mine.csv", header, *rows)
        with pytest.raises(UserError, match=message):
            open_folder(root, groups_file="mine.csv", **options)
    (tmp_path / "mine.csv").write_bytes(b"file,group\n\xff\xfe,1\n")
    with pytest.raises(UserError, match="not a readable UTF-8 csv"):
        open_folder(root, groups_file="mine.csv")
    with pytest.raises(UserError, match="groups_file=none.csv is neither"):
        open_folder(root, groups_file="none.csv")
    with pytest.raises(UserError, match="group_column=site, but"):
        open_folder(root, group_column="site")


def test_sources_from_the_metadata_workbooks(tmp_path):
    root = kaggle_tree(tmp_path, f"{KAGGLE}/")
    book = openpyxl.Workbook()
    book.active.append(["FILE NAME", "FORMAT", "SIZE", "URL"])
    book.active.append(["COVID-1", "PNG", "256*256", "https://example.org/1"])
    book.active.append(["covid-10", "PNG", "256*256", "https://example.org/10"])
    book.save(tmp_path / KAGGLE / "COVID.metadata.xlsx")
    book = openpyxl.Workbook()
    book.active.append(["FILE NAME", "FORMAT", "SIZE", "URL"])
    book.active.append(["VIRAL PNEUMONIA-2.png", "PNG", "256*256", "https://example.org/v2"])
    book.active.append(["COVID-2", "PNG", "256*256", "of another class"])
    book.save(tmp_path / KAGGLE / "Viral Pneumonia.metadata.xlsx")
    found = {f.file.rpartition("/")[2]: f.source for f in open_folder(root).files}
    assert found == {
        "COVID-1.png": "https://example.org/1",
        "COVID-10.png": "https://example.org/10",
        "COVID-2.png": "",
        "Viral Pneumonia-1.png": "",
        "Viral Pneumonia-10.png": "",
        "Viral Pneumonia-2.png": "https://example.org/v2",
    }
    (tmp_path / KAGGLE / "COVID.metadata.xlsx").write_bytes(b"no workbook")
    assert open_folder(root).files[0].source == ""


def test_the_real_folders():
    shared = Path(os.environ.get("COVID_FLAX_SHARED", "../shared"))
    if not (shared / "data").is_dir():
        pytest.skip(f"no real images: {shared}/data does not exist (set COVID_FLAX_SHARED)")
    top = open_folder(str(shared / "data/radiography"))
    assert top.class_names == ("COVID", "Lung_Opacity", "Normal", "Viral Pneumonia")
    assert len(top.files) == 14_646 and all(f.file.startswith(KAGGLE) for f in top.files)
    assert len(set(top.groups.values())) == 14_646 - 420 + 182 and not top.ungrouped
    below = open_folder(str(shared / "data/radiography" / KAGGLE))
    assert list(below.groups.values()) == list(top.groups.values())
    control = str(shared / "data/radiography/pipeline_control")
    assert open_folder(control, require_two_classes=False).class_names == ("Normal",)
    ct = str(shared / "data/covid_ct")
    slices = open_folder(ct, groups_file="labels.csv", group_column="group_from_name")
    assert len(slices.files) == 746 and not slices.ungrouped


@pytest.mark.parametrize("prefix", ["", f"{KAGGLE}/"])
def test_a_csv_beside_the_classes_is_found_from_above(tmp_path, prefix):
    root = kaggle_tree(tmp_path / "data", f"{KAGGLE}/")
    rows = [(prefix + f, "g") for f in KAGGLE_FILES]
    write_csv(tmp_path / "data" / KAGGLE / "groups.csv", ["file", "group"], *rows)
    folder = open_folder(root)
    assert set(folder.groups.values()) == {"g"} and not folder.ungrouped


def test_what_a_nas_and_a_recycle_bin_hold_is_no_image(tmp_path):
    others = ("a/@eaDir/1.png/SYNOPHOTO_THUMB_M.jpg", "@eaDir/x/1.png", "lost+found/1.png")
    root = make(tmp_path, "a/1.png", "b/1.png", *others, "$RECYCLE.BIN/1.png")
    folder = open_folder(root)
    assert folder.class_names == ("a", "b")
    assert [f.file for f in folder.files] == ["a/1.png", "b/1.png"]


@pytest.mark.parametrize(
    "parts", [("Testing", "Training"), ("train", "valid"), ("test", "validation")]
)
def test_every_name_of_a_split_s_part_is_known(tmp_path, parts):
    root = make(tmp_path, *(f"x/{p}/{c}/1.png" for p in parts for c in "ab"))
    with pytest.raises(UserError, match=rf"parts of a split \({', '.join(parts)}\)"):
        open_folder(root)


def test_sources_come_from_a_csv_that_is_named_or_tells_groups(tmp_path):
    root = make(tmp_path / "data", *FOUR)
    rows = [(f, f"p{i}", f"site{i}") for i, f in enumerate(FOUR)]
    columns, want = ["file", "patient_id", "source_repo"], [f"site{i}" for i in range(4)]
    write_csv(tmp_path / "far.csv", columns, *rows)
    named = open_folder(root, groups_file=str(tmp_path / "far.csv"))
    assert [f.source for f in named.files] == want
    write_csv(tmp_path / "data" / "groups.csv", columns, *rows)
    assert [f.source for f in open_folder(root).files] == want
