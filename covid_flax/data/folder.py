"""A folder (or zip) of labelled images: which files, which classes, which groups."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath

from covid_flax.data.decode import is_image
from covid_flax.data.file_tree import LAYOUTS, FileTree, join, open_tree
from covid_flax.data.tables import Tables, ToldSplit, refuse_mislabelled
from covid_flax.errors import UserError
from covid_flax.files import expanded

KAGGLE_FOLDER = "COVID-19_Radiography_Dataset"

_SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation"}
# Of masks also `lung masks` and `infection_masks`, as other collections call them.
_SKIPPED_FOLDER = re.compile(
    r"\..*|__macosx|@eadir|lost\+found|\$recycle\.bin|(.*[ _-])?masks", re.I
)


@dataclasses.dataclass(frozen=True)
class ImageFile:
    """One image.

    Attributes:
      file: posix path relative to the data folder (or inside the zip).
      label: name of its class.
      source: where it was published, as the folder's metadata says; "" where unknown.
    """

    file: str
    label: str
    source: str = ""


@dataclasses.dataclass(frozen=True)
class DataFolder:
    """The images of a data folder.

    Attributes:
      root: the folder or zip, as given.
      class_names: sorted by name, as Keras numbers them.
      files: sorted by class, then in the order in which Keras lists them.
      groups: group of every file, or None where no csv tells groups.
      ignored_of: of each class, the files that are not images, counted by suffix (`.dcm`, else
        `hidden` or `other`).
      ungrouped: images to which no csv gives a group; each is its own.
      unreadable: metadata workbooks that could not be read; their sources are left out.
      empty: class folders without an image, where those are passed over.
      loose: how many images lie beside the class folders.
      masks: folders beside the classes whose names say that they hold masks, and that hold images.
      unused: why the folder's own csv tells no groups, where there is one.
      told_split: the split that a csv tells, where one was named.
    """

    root: Path
    class_names: tuple[str, ...]
    files: list[ImageFile]
    groups: dict[str, str] | None
    ignored_of: Mapping[str, Mapping[str, int]]
    ungrouped: frozenset[str]
    unreadable: tuple[str, ...]
    _tree: FileTree = dataclasses.field(repr=False)
    empty: tuple[str, ...] = ()
    loose: int = 0
    masks: tuple[str, ...] = ()
    unused: str = ""
    told_split: ToldSplit | None = None

    def read(self, file: str) -> bytes:
        """The content of `file`. Thread safe. UserError where it cannot be read."""
        return self._tree.read(file)

    def has(self, file: str) -> bool:
        """Whether there is such a file, an image or not."""
        return self._tree.has(file)

    def num_bytes(self, file: str) -> int:
        """Size of `file`, 0 where it cannot be read."""
        return self._stamp(file)[0]

    @property
    def ignored(self) -> dict[str, int]:
        """Files in the class folders that are not images, counted by suffix."""
        total: Counter[str] = Counter()
        for counts in self.ignored_of.values():
            total.update(counts)
        return dict(total)

    @functools.cached_property
    def same_bytes(self) -> dict[str, str]:
        """A name of every file's content, equal for files of identical bytes.

        Where a csv tells groups it has those files only whose size another has too: the others
        need no reading. A file that is empty or cannot be read is named by itself.
        """
        sizes = {f.file: self.num_bytes(f.file) for f in self.files}
        having = Counter(sizes.values())
        contents = {}
        for file, size in sizes.items():
            if self.groups is None or having[size] > 1:
                contents[file] = file
                if size:
                    with contextlib.suppress(UserError):  # told with all that cannot be read
                        contents[file] = hashlib.sha256(self.read(file)).hexdigest()[:16]
        return contents

    def without(self, files: Collection[str]) -> DataFolder:
        """The folder as if it had not these images. UserError where a class has no other."""
        left = [f for f in self.files if f.file not in files]
        kept = {f.label for f in left}
        for label in self.class_names:
            if label not in kept:
                raise UserError(
                    f"no image of class {label} in {self.root} can be read: replace them, or "
                    "remove the class"
                )
        return self._with_files(left)

    def without_classes(self, labels: Collection[str]) -> DataFolder:
        """The folder as if it had not these classes."""
        names = tuple(name for name in self.class_names if name not in labels)
        left = [f for f in self.files if f.label not in labels]
        ignored = {name: n for name, n in self.ignored_of.items() if name not in labels}
        return dataclasses.replace(self._with_files(left), class_names=names, ignored_of=ignored)

    def passed_over(self) -> str:
        """`5 .dcm, 1 other in the class folders, no images`, images of no class, or ""."""
        said = []
        if self.ignored:
            said.append(f"{_by_suffix(self.ignored)} in the class folders, no images")
        if self.loose:
            said.append(f"{self.loose:,} images beside the class folders, of no class")
        if self.masks:
            said.append(f"{', '.join(self.masks)}, masks by name: no class")
        return "; ".join(said)

    def only(self, files: Collection[str]) -> DataFolder:
        """The folder as if it had these images alone, or those of them that it has."""
        return self._with_files([f for f in self.files if f.file in files])

    def _with_files(self, files: list[ImageFile]) -> DataFolder:
        groups = self.groups and {f.file: self.groups[f.file] for f in files}
        ungrouped = self.ungrouped & {f.file for f in files}
        return dataclasses.replace(self, files=files, groups=groups, ungrouped=ungrouped)

    def fingerprint(self) -> str:
        """SHA-256 (hex) over every image's name, class, source, size and time of change.

        A zip's images count with their checksum instead of the time. Reads no image.
        """
        digest = hashlib.sha256()
        for f in sorted(self.files, key=lambda f: f.file):
            line = (f.file, f.label, f.source, *self._stamp(f.file))
            digest.update(repr(line).encode())
        return digest.hexdigest()

    def _stamp(self, file: str) -> tuple[int, int]:
        try:
            return self._tree.stamp(file)
        except UserError:  # told together with all that cannot be read
            return 0, 0


def open_folder(
    path: str,
    *,
    groups_file: str = "",
    group_column: str = "",
    split_file: str = "",
    require_two_classes: bool = True,
    classes: Collection[str] = (),
) -> DataFolder:
    """Lists the labelled images under `path`; opens none of them.

    The class folders lie in `path`, or one or two levels below it: in a folder of the
    Kaggle database's name, or in the only folder there is. `masks` folders (`lung masks` too)
    are never entered.

    Args:
      path: folder, or zip of one (read without unpacking).
      groups_file: csv with a `file` column, relative to `path` or to the working
        directory, beside the folder's own: `groups.csv`, else `manifest.csv`, in `path`, in the
        folder that holds the classes, or in the folder above `path`.
      group_column: its column of groups; one that is named counts alone, and no other csv does. ""
        takes `GROUP_COLUMNS`: images that one of those which are there puts together stay together.
      split_file: csv with the columns `file` and `split`, looked for as `groups_file` is; its
        groups, where it tells some, count beside the others.
      require_two_classes: whether one class alone is an error.
      classes: names known to be of classes, where images are scored, not learned from: such a
        folder, if it is the only one, is a class, whatever folders lie in it; folders without an
        image are passed over; and so is a csv that tells no groups, unless `groups_file` or
        `group_column` asks for it.

    Raises:
      UserError: no such folder, a broken zip, no image, an empty class, a single class,
        an image whose name or csv row says another class, unusable groups or parts, or
        folders of a split in place of classes.
    """
    path = os.path.expanduser(path)
    try:
        path.encode()
    except UnicodeEncodeError as e:
        raise UserError(f"the name of {path!r} is not valid UTF-8: rename the folder") from e
    tree = open_tree(path)
    dataset = _find_dataset(tree, classes)
    class_names, listed, ignored = _list_images(tree, dataset, path, skip_empty=bool(classes))
    if require_two_classes and len(class_names) < 2:
        raise UserError(
            f"{path} has one class only ({class_names[0]}): training needs two or more folders, "
            f"{LAYOUTS}"
        )
    files = [ImageFile(f, label) for f, label in listed]
    _refuse_other_class_names(files, class_names)

    tables = Tables(
        tree,
        path,
        dataset,
        dict(listed),
        groups_file,
        group_column,
        split_file,
        tolerant=bool(classes),
    )
    groups, ungrouped = tables.groups()
    sources, unreadable = tables.sources()
    files = [dataclasses.replace(f, source=sources.get(f.file, "")) for f in files]
    empty = tuple(n for n in _folders(tree, dataset) if n not in class_names)
    return DataFolder(
        Path(path),
        class_names,
        files,
        groups,
        ignored,
        ungrouped,
        unreadable,
        tree,
        empty,
        loose=_loose(tree, dataset),
        masks=_masks(tree, dataset),
        unused=tables.unused,
        told_split=tables.split(),
    )


def refuse_inside(
    output: Path, data_dir: str | Path, flag: str, *, makes_folders: bool = True
) -> None:
    """Refuses to make folders in a data folder, where folders are classes.

    Args:
      output: folder to be written to.
      data_dir: the folder (or zip) of images.
      flag: what names `output`, for the message.
      makes_folders: whether folders are made in `output` too, or files alone.

    Raises:
      UserError: it lies where the classes lie, or is the folder that holds them.
    """
    data, place = (Path(os.path.realpath(expanded(p))) for p in (data_dir, output))
    classes = data / KAGGLE_FOLDER
    if classes.is_dir():
        data = classes
    if makes_folders and place == data and place.is_dir():
        raise UserError(
            f"{output} is the data folder, where what is written would be taken for classes: "
            f"choose another {flag}"
        )
    if data not in place.parents:
        return
    top = place.relative_to(data).parts[0]
    if not _SKIPPED_FOLDER.fullmatch(top):
        raise UserError(
            f"{output} lies in the data folder {data_dir}, where it would be taken for a class: "
            f"choose another {flag}"
        )


def _folders(tree: FileTree, folder: str) -> list[str]:
    names, _ = tree.children(folder)
    return sorted(n for n in names if not _SKIPPED_FOLDER.fullmatch(n))


def _find_dataset(tree: FileTree, classes: Collection[str]) -> str:
    """The folder that holds the class folders, relative to the top."""
    folder = ""
    for _ in range(2):
        names = _folders(tree, folder)
        if KAGGLE_FOLDER in names:
            folder = join(folder, KAGGLE_FOLDER)
        elif len(names) == 1 and names[0] in classes:
            break
        elif len(names) == 1 and _looks_like_dataset(tree, join(folder, names[0])):
            folder = join(folder, names[0])
        else:
            break
    return folder


def _looks_like_dataset(tree: FileTree, folder: str) -> bool:
    names = _folders(tree, folder)
    if KAGGLE_FOLDER in names:
        return True
    has_images = any(is_image(n) for n in tree.children(folder)[1])
    return len(names) >= 2 and not has_images and "images" not in [n.lower() for n in names]


def walk(tree: FileTree, folder: str, depth: int = 0) -> Iterator[tuple[str, str]]:
    """Folder and name of every file below `folder`, hidden folders and those of masks left out."""
    if depth > 32:
        raise UserError(f"{folder} is nested too deeply: does a link point to a folder above it?")
    for name in tree.children(folder)[1]:
        yield folder, name
    for name in _folders(tree, folder):
        yield from walk(tree, join(folder, name), depth + 1)


def _list_images(
    tree: FileTree, dataset: str, path: str, *, skip_empty: bool
) -> tuple[tuple[str, ...], list[tuple[str, str]], dict[str, Counter[str]]]:
    """Class names, `(file, class)` in Keras's order, and each class's other files by suffix."""
    names = _folders(tree, dataset)
    where = join(path.rstrip("/"), dataset) if dataset else path
    if "images" in [n.lower() for n in names]:
        raise UserError(f"{where} is the folder of one class: give the folder that holds it")
    images: dict[str, list[tuple[str, str]]] = {}
    ignored: dict[str, Counter[str]] = {}
    for label in names:
        found = list(walk(tree, join(dataset, label)))
        # Keras lists folder by folder, both sorted as strings.
        images[label] = sorted((d, n) for d, n in found if is_image(n))
        ignored[label] = Counter(_kind(n) for _, n in found if not is_image(n))
    parts = [name for name in names if name.casefold() in _SPLITS]
    if len(parts) > 1:
        raise UserError(
            f"{where} holds parts of a split ({', '.join(parts)}), not classes: give one of them, "
            f"like {join(where, parts[0])}, or put their classes' images together"
        )
    if not any(images.values()):
        kinds = sum(ignored.values(), Counter[str]())
        others = f"; {_by_suffix(kinds)} are not read: save them as PNG" if kinds else ""
        if loose := _loose(tree, dataset):
            others += f"; {loose:,} lie in no class folder: move them into <Class>"
        raise UserError(f"no image found in {where}: it must hold {LAYOUTS}{others}")
    empty = [label for label in names if not images[label]]
    if skip_empty:
        names = [label for label in names if images[label]]
    elif empty:
        others = f" ({_by_suffix(ignored[empty[0]])} are not read: save them as PNG)"
        raise UserError(
            f"no image in the class folder {join(where, empty[0])}: fill it or remove it"
            f"{others if ignored[empty[0]] else ''}"
        )
    listed = [(join(d, n), label) for label in names for d, n in images[label]]
    for file, _ in listed:
        try:
            file.encode()
        except UnicodeEncodeError as e:
            raise UserError(f"the name of {file!r} is not valid UTF-8: rename the file") from e
        if "\r" in file:  # the csv files that name images are read by lines
            raise UserError(f"the name of {file!r} holds a carriage return: rename the file")
    return tuple(names), listed, ignored


def _loose(tree: FileTree, dataset: str) -> int:
    """How many images lie in no class folder."""
    return sum(map(is_image, tree.children(dataset)[1]))


def _masks(tree: FileTree, dataset: str) -> tuple[str, ...]:
    """Folders in place of classes that are passed over for their names, though they hold images."""
    names = tree.children(dataset)[0]
    return tuple(
        name
        for name in sorted(names)
        if name.lower().endswith("masks") and _SKIPPED_FOLDER.fullmatch(name)
        if any(is_image(n) for _, n in walk(tree, join(dataset, name)))
    )


def _kind(name: str) -> str:
    """A file's suffix, where it is one that a person would know."""
    suffix = PurePosixPath(name).suffix.lower()
    if name.startswith("."):
        return "hidden"
    return suffix if re.fullmatch(r"\.[a-z][a-z0-9]{0,7}", suffix) else "other"


def _by_suffix(ignored: Mapping[str, int]) -> str:
    """`5 .dcm, 1 other`, the commonest first."""
    by_number = sorted(ignored.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{n:,} {kind}" for kind, n in by_number[:4]]
    return ", ".join([*shown, "and more"] if len(by_number) > 4 else shown)


def _refuse_other_class_names(files: list[ImageFile], class_names: tuple[str, ...]) -> None:
    """Kaggle names images `<Class>-<number>`; one that names another class is misplaced."""
    # Numbers name patients and slices.
    by_folded = {c.casefold(): c for c in class_names if not c.isdecimal()}
    wrong = []
    for f in files:
        # The whole name, but for the number of a copy: `COVID-19 negative 7` names no class COVID.
        named = re.fullmatch(r"(.+)-\d+(?: ?\(\d+\))?", PurePosixPath(f.file).stem)
        said = by_folded.get(named[1].casefold()) if named else None
        if said is not None and said != f.label:
            wrong.append(f"{f.file} names {said}")
    refuse_mislabelled(wrong)
