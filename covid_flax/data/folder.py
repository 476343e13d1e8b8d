"""A folder (or zip) of labelled images: which files, which classes, which groups."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import functools
import hashlib
import io
import os
import re
import stat
import zipfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Protocol

from covid_flax.data.decode import FORMATS_BY_SUFFIX, MAX_PIXELS
from covid_flax.data.groups import GROUP_COLUMNS, joined
from covid_flax.errors import UserError

KAGGLE_FOLDER = "COVID-19_Radiography_Dataset"
MAX_BYTES = 8 * MAX_PIXELS  # of a file: 16-bit RGBA without compression
LAYOUTS = "<Class>/images/*.png (Kaggle's) or <Class>/*.png"

_MAX_WORKBOOK = 100_000_000  # bytes, unpacked: openpyxl holds the texts in memory
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
      ungrouped: images that the groups' csv does not list; each is its own group.
      unreadable: metadata workbooks that could not be read; their sources are left out.
      empty: class folders without an image, where those are passed over.
    """

    root: Path
    class_names: tuple[str, ...]
    files: list[ImageFile]
    groups: dict[str, str] | None
    ignored_of: Mapping[str, Mapping[str, int]]
    ungrouped: frozenset[str]
    unreadable: tuple[str, ...]
    _tree: _Tree = dataclasses.field(repr=False)
    empty: tuple[str, ...] = ()

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

    def not_images(self) -> str:
        """`no images in the class folders: 5 .dcm, 1 other`, or ""."""
        if not self.ignored:
            return ""
        return f"{_by_suffix(self.ignored)} in the class folders, no images"

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
        directory. "" looks for `groups.csv`, then `manifest.csv`, in `path`, in the folder
        that holds the classes, and in the folder above `path`.
      group_column: its column of groups. "" takes `GROUP_COLUMNS`: images that one of those
        which are there puts together stay together.
      require_two_classes: whether one class alone is an error.
      classes: names known to be of classes, where images are scored, not learned from: such a
        folder, if it is the only one, is a class, whatever folders lie in it; folders without an
        image are passed over; and so is a csv that tells no groups, unless `groups_file` or
        `group_column` asks for it.

    Raises:
      UserError: no such folder, a broken zip, no image, an empty class, a single class,
        an image whose name or csv row says another class, unusable groups, or folders of a
        split in place of classes.
    """
    path = os.path.expanduser(path)
    try:
        path.encode()
    except UnicodeEncodeError as e:
        raise UserError(f"the name of {path!r} is not valid UTF-8: rename the folder") from e
    tree = _open_tree(path)
    dataset = _find_dataset(tree, classes)
    class_names, listed, ignored = _list_images(tree, dataset, path, skip_empty=bool(classes))
    if require_two_classes and len(class_names) < 2:
        raise UserError(
            f"{path} has one class only ({class_names[0]}): training needs two or more folders, "
            f"{LAYOUTS}"
        )
    files = [ImageFile(f, label) for f, label in listed]
    _refuse_other_class_names(files, class_names)

    tables = _Tables(tree, path, dataset, files, group_column, tolerant=bool(classes))
    groups_table = tables.explicit(groups_file) if groups_file else None
    if groups_table is None:
        try:
            groups_table = tables.automatic(group_column)
            if groups_table is not None:
                _group_columns(groups_table, group_column)
        except UserError:
            if not classes or group_column:
                raise
            groups_table = None
    groups, ungrouped = None, frozenset[str]()
    if groups_table is not None:
        groups, ungrouped = _groups(groups_table, files, group_column)
    elif group_column:
        raise UserError(
            f"data.group_column={group_column}, but {path} has no groups.csv or manifest.csv with "
            "that column: name the csv with data.groups_file"
        )
    tables_with_sources = [groups_table, tables.manifest]
    sources, unreadable = _sources(tree, dataset, class_names, files, tables_with_sources)
    files = [dataclasses.replace(f, source=sources.get(f.file, "")) for f in files]
    empty = tuple(n for n in _folders(tree, dataset) if n not in class_names)
    return DataFolder(
        Path(path), class_names, files, groups, ignored, ungrouped, unreadable, tree, empty
    )


def refuse_inside(output: Path, data_dir: str | Path, flag: str) -> None:
    """Refuses to write below a data folder, where folders are classes.

    Args:
      output: folder to be written to; the data folder itself is none of them.
      data_dir: the folder (or zip) of images.
      flag: what names `output`, for the message.

    Raises:
      UserError: it lies where the classes lie.
    """
    data, place = (Path(p).expanduser().resolve() for p in (data_dir, output))
    classes = data / KAGGLE_FOLDER
    if classes.is_dir():
        data = classes
    if data not in place.parents:
        return
    top = place.relative_to(data).parts[0]
    if not _SKIPPED_FOLDER.fullmatch(top):
        raise UserError(
            f"{output} lies in the data folder {data_dir}, where it would be taken for a class: "
            f"choose another {flag}"
        )


class _Tree(Protocol):
    """Read access to a folder's files by posix path relative to it."""

    def children(self, folder: str) -> tuple[list[str], list[str]]:
        """Names of the folders and of the files in `folder` ("" is the top)."""

    def has(self, file: str) -> bool: ...

    def read(self, file: str) -> bytes: ...

    def stamp(self, file: str) -> tuple[int, int]:
        """The file's size, and a number that changes with its content."""


class _Disk:
    def __init__(self, root: str) -> None:
        self._root = root

    def children(self, folder: str) -> tuple[list[str], list[str]]:
        path = os.path.join(self._root, folder)
        try:
            with os.scandir(path) as entries:
                kinds = [(e.name, e.is_dir()) for e in entries]
        except OSError as e:
            raise UserError(f"cannot list {path}: {e.strerror}") from e
        # A link to nothing counts as a file: it is refused when read, not passed over.
        return [n for n, d in kinds if d], [n for n, d in kinds if not d]

    def has(self, file: str) -> bool:
        return os.path.isfile(os.path.join(self._root, file))

    def read(self, file: str) -> bytes:
        path = os.path.join(self._root, file)
        _refuse_large(file, self.stamp(file)[0])
        try:
            with open(path, "rb") as f:
                return f.read(MAX_BYTES)
        except OSError as e:
            raise UserError(f"cannot read {path}: {e.strerror}: mend or remove it") from e

    def stamp(self, file: str) -> tuple[int, int]:
        path = os.path.join(self._root, file)
        try:
            status = os.stat(path)
        except OSError as e:
            raise UserError(f"cannot read {path}: {e.strerror}: mend or remove it") from e
        if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for ever
            raise UserError(f"{path} is no regular file: remove it")
        return status.st_size, status.st_mtime_ns


class _Zip:
    def __init__(self, path: str) -> None:
        self._path = path
        try:
            self._zip = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as e:
            raise UserError(f"{path} is a broken zip ({e}): download it again") from e
        if "" in self._zip.namelist():
            raise UserError(f"{path} is a broken zip (a member without a name): pack it again")
        if len(set(self._zip.namelist())) < len(self._zip.namelist()):
            raise UserError(f"{path} holds a name twice: pack it again")
        self._folders: dict[str, dict[str, None]] = {}
        self._files: dict[str, list[str]] = {}
        for info in self._zip.infolist():
            if info.flag_bits & 1:
                raise UserError(f"{path} is encrypted: unpack it and give the folder")
            parent, _, name = info.filename.rstrip("/").rpartition("/")
            if info.is_dir():
                self._add_folder(_join(parent, name))
            else:
                self._add_folder(parent)
                self._files.setdefault(parent, []).append(name)

    def _add_folder(self, folder: str) -> None:
        while folder:
            folder, _, name = folder.rpartition("/")
            self._folders.setdefault(folder, {})[name] = None

    def children(self, folder: str) -> tuple[list[str], list[str]]:
        return list(self._folders.get(folder, {})), self._files.get(folder, [])

    def has(self, file: str) -> bool:
        parent, _, name = file.rpartition("/")
        return name in self._files.get(parent, [])

    def read(self, file: str) -> bytes:
        _refuse_large(file, self.stamp(file)[0])
        try:
            return self._zip.read(file)
        except Exception as e:  # what it raises on damaged content depends on the compression
            reason = " ".join(str(e).split()) or type(e).__name__
            raise UserError(
                f"cannot read {file} in {self._path} ({reason}): download the zip again"
            ) from e

    def stamp(self, file: str) -> tuple[int, int]:
        info = self._zip.getinfo(file)
        return info.file_size, info.CRC


def _refuse_large(file: str, size: int) -> None:
    """What a zip says a member unpacks to is more than it ever will."""
    if size > MAX_BYTES:
        raise UserError(
            f"{file} has {size:,} bytes, above the limit of {MAX_BYTES:,}: shrink or remove it"
        )


def _open_tree(path: str) -> _Tree:
    if not path:
        raise UserError(f"no data folder given: name a folder of {LAYOUTS}, or its zip")
    if os.path.isdir(path):
        return _Disk(path)
    if not os.path.exists(path):
        raise UserError(f"{path} does not exist: name a folder of {LAYOUTS}, or its zip")
    if zipfile.is_zipfile(path):
        return _Zip(path)
    if path.lower().endswith(".zip"):
        raise UserError(f"{path} is a broken zip: download it again")
    raise UserError(f"{path} is neither a folder nor a zip: name a folder of {LAYOUTS}")


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _is_image(name: str) -> bool:
    return not name.startswith(".") and PurePosixPath(name).suffix.lower() in FORMATS_BY_SUFFIX


def _folders(tree: _Tree, folder: str) -> list[str]:
    names, _ = tree.children(folder)
    return sorted(n for n in names if not _SKIPPED_FOLDER.fullmatch(n))


def _find_dataset(tree: _Tree, classes: Collection[str]) -> str:
    """The folder that holds the class folders, relative to the top."""
    folder = ""
    for _ in range(2):
        names = _folders(tree, folder)
        if KAGGLE_FOLDER in names:
            folder = _join(folder, KAGGLE_FOLDER)
        elif len(names) == 1 and names[0] in classes:
            break
        elif len(names) == 1 and _looks_like_dataset(tree, _join(folder, names[0])):
            folder = _join(folder, names[0])
        else:
            break
    return folder


def _looks_like_dataset(tree: _Tree, folder: str) -> bool:
    names = _folders(tree, folder)
    if KAGGLE_FOLDER in names:
        return True
    has_images = any(_is_image(n) for n in tree.children(folder)[1])
    return len(names) >= 2 and not has_images and "images" not in [n.lower() for n in names]


def _walk(tree: _Tree, folder: str, depth: int = 0) -> Iterator[tuple[str, str]]:
    if depth > 32:
        raise UserError(f"{folder} is nested too deeply: does a link point to a folder above it?")
    for name in tree.children(folder)[1]:
        yield folder, name
    for name in _folders(tree, folder):
        yield from _walk(tree, _join(folder, name), depth + 1)


def _list_images(
    tree: _Tree, dataset: str, path: str, *, skip_empty: bool
) -> tuple[tuple[str, ...], list[tuple[str, str]], dict[str, Counter[str]]]:
    """Class names, `(file, class)` in Keras's order, and each class's other files by suffix."""
    names = _folders(tree, dataset)
    where = _join(path.rstrip("/"), dataset) if dataset else path
    if "images" in [n.lower() for n in names]:
        raise UserError(f"{where} is the folder of one class: give the folder that holds it")
    images: dict[str, list[tuple[str, str]]] = {}
    ignored: dict[str, Counter[str]] = {}
    for label in names:
        found = list(_walk(tree, _join(dataset, label)))
        # Keras lists folder by folder, both sorted as strings.
        images[label] = sorted((d, n) for d, n in found if _is_image(n))
        ignored[label] = Counter(_kind(n) for _, n in found if not _is_image(n))
    parts = [name for name in names if name.casefold() in _SPLITS]
    if len(parts) > 1:
        raise UserError(
            f"{where} holds parts of a split ({', '.join(parts)}), not classes: give one of them, "
            f"like {_join(where, parts[0])}, or put their classes' images together"
        )
    if not any(images.values()):
        kinds = sum(ignored.values(), Counter[str]())
        others = f"; {_by_suffix(kinds)} are not read: save them as PNG" if kinds else ""
        raise UserError(f"no image found in {where}: it must hold {LAYOUTS}{others}")
    empty = [label for label in names if not images[label]]
    if skip_empty:
        names = [label for label in names if images[label]]
    elif empty:
        raise UserError(
            f"no image in the class folder {_join(where, empty[0])}: fill it or remove it"
        )
    listed = [(_join(d, n), label) for label in names for d, n in images[label]]
    for file, _ in listed:
        try:
            file.encode()
        except UnicodeEncodeError as e:
            raise UserError(f"the name of {file!r} is not valid UTF-8: rename the file") from e
        if "\r" in file:  # the csv files that name images are read by lines
            raise UserError(f"the name of {file!r} holds a carriage return: rename the file")
    return tuple(names), listed, ignored


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
        named = re.match(r"(.+)-\d+\b", PurePosixPath(f.file).name)
        said = by_folded.get(named[1].casefold()) if named else None
        if said is not None and said != f.label:
            wrong.append(f"{f.file} names {said}")
    _refuse_mislabelled(wrong)


def _refuse_mislabelled(wrong: list[str]) -> None:
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise UserError(
            f"{len(wrong)} mislabelled image(s) in the folder of another class: "
            f"{'; '.join(wrong[:5])}{more}: move or remove them"
        )


@dataclasses.dataclass(frozen=True)
class _Table:
    """A csv of files: its name for messages, columns, and the row of each listed image."""

    name: str
    columns: list[str]
    rows: dict[str, dict[str, str]]


class _Tables:
    """Finds the csv files that tell of the images, and matches their rows to them."""

    def __init__(
        self,
        tree: _Tree,
        path: str,
        dataset: str,
        files: list[ImageFile],
        group_column: str,
        *,
        tolerant: bool,
    ) -> None:
        self._told_in = {*GROUP_COLUMNS, "source_repo"} | ({group_column} - {""})
        self._tree = tree
        self._path = path
        self._dataset = dataset
        self._files = files
        self._name = os.path.basename(os.path.abspath(path))
        try:
            self.manifest = self._find("manifest.csv")
        except UserError:
            if not tolerant:
                raise
            self.manifest = None

    def explicit(self, groups_file: str) -> _Table:
        groups_file = os.path.expanduser(groups_file)
        if not os.path.isabs(groups_file) and self._tree.has(groups_file):
            content = self._tree.read(groups_file)
        elif os.path.isfile(groups_file):
            content = _Disk(os.path.dirname(groups_file)).read(os.path.basename(groups_file))
        else:
            raise UserError(
                f"data.groups_file={groups_file} is neither in {self._path} nor in the working "
                "directory"
            )
        columns, rows = _read_csv(groups_file, content)
        found = [self._matched(rows, prefix) for prefix in ("", self._dataset, f"../{self._name}")]
        from_class_on = _from_class_on(rows, {f.label for f in self._files})
        found.append(self._matched(from_class_on, self._dataset))
        return self._usable(_Table(groups_file, columns, max(found, key=len)))

    def automatic(self, group_column: str) -> _Table | None:
        groups = self._find("groups.csv")
        if groups is not None:
            return self._usable(groups)
        if self.manifest is None or not self.manifest.rows:
            return None
        columns = (group_column,) if group_column else GROUP_COLUMNS
        return self.manifest if any(c in self.manifest.columns for c in columns) else None

    def _find(self, name: str) -> _Table | None:
        for folder in dict.fromkeys(("", self._dataset)):
            file = _join(folder, name)
            if self._tree.has(file):
                columns, rows = _read_csv(file, self._tree.read(file))
                found = [self._matched(rows, prefix) for prefix in ("", self._dataset)]
                return _Table(file, columns, max(found, key=len))
        above = os.path.dirname(os.path.abspath(self._path))
        if isinstance(self._tree, _Disk) and os.path.isfile(os.path.join(above, name)):
            # A csv up there may well be about something else.
            try:
                columns, rows = _read_csv(name, _Disk(above).read(name))
            except UserError:
                return None
            matched = self._matched(rows, f"../{self._name}")
            # A groups.csv about these very images is meant, however it names its column.
            told = matched and (name == "groups.csv" or self._told_in & set(columns))
            return _Table(os.path.join(above, name), columns, matched) if told else None
        return None

    def _matched(
        self, rows: dict[str, dict[str, str]], relative_to: str
    ) -> dict[str, dict[str, str]]:
        """Row of each image, the rows' files being relative to the dataset's folder,
        the data folder ("") or the one above it (which adds the data folder's name)."""
        if relative_to.startswith("../"):
            names = {f.file: _join(relative_to[3:], f.file) for f in self._files}
        else:
            names = {f.file: f.file.removeprefix(f"{relative_to}/") for f in self._files}
        return {file: rows[name] for file, name in names.items() if name in rows}

    def _usable(self, table: _Table) -> _Table:
        if "file" not in table.columns:
            raise UserError(
                f"{table.name} has no column `file` (it has {', '.join(table.columns)})"
            )
        if not table.rows:
            raise UserError(
                f"{table.name} lists none of the images of {self._path}: its `file` column must be "
                "relative to that folder"
            )
        return table


def _read_csv(name: str, content: bytes) -> tuple[list[str], dict[str, dict[str, str]]]:
    """Columns, and rows by their `file`; no rows where there is no such column."""
    try:
        reader = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True)
        columns = list(reader.fieldnames or [])
        listed = [{k: v or "" for k, v in row.items() if k} for row in reader]
    except (UnicodeDecodeError, csv.Error) as e:
        raise UserError(f"{name} is not a readable UTF-8 csv: {e}") from e
    rows: dict[str, dict[str, str]] = {}
    for row in listed if "file" in columns else []:
        file = row["file"] if "/" in row["file"] else row["file"].replace("\\", "/")
        key = str(PurePosixPath(file))
        if rows.setdefault(key, row) != row:
            raise UserError(f"{name} lists {key} twice with different values: remove one row")
    return columns, rows


def from_class_on(file: str, labels: Collection[str]) -> str | None:
    """The part of a path that begins with a class; None where none does."""
    parts = file.split("/")
    start = next((i for i, part in enumerate(parts) if part in labels), None)
    return None if start is None else "/".join(parts[start:])


def _from_class_on(rows: dict[str, dict[str, str]], labels: set[str]) -> dict[str, dict[str, str]]:
    """Rows by the part of their path that begins with a class; ambiguous ones left out."""
    short: dict[str, dict[str, str]] = {}
    ambiguous = set()
    for file, row in rows.items():
        key = from_class_on(file, labels)
        if key is not None:
            if short.setdefault(key, row) is not row:
                ambiguous.add(key)
    return {k: v for k, v in short.items() if k not in ambiguous}


def _group_columns(table: _Table, asked: str) -> list[str]:
    columns = [c for c in ((asked,) if asked else GROUP_COLUMNS) if c in table.columns]
    if not columns:
        raise UserError(
            f"{table.name} has no column {asked or ' or '.join(GROUP_COLUMNS)} "
            f"(it has {', '.join(table.columns)}): rename its column of groups, or in training "
            "name it with config.data.group_column"
        )
    return columns


def _groups(
    table: _Table, files: list[ImageFile], group_column: str
) -> tuple[dict[str, str], frozenset[str]]:
    """Group of every file, and the files that the table gives none."""
    columns = _group_columns(table, group_column)
    labels = {f.label for f in files}
    _refuse_mislabelled(
        [
            f"{f.file} is {said} in {table.name}"
            for f in files
            if (said := table.rows.get(f.file, {}).get("label", "")) in labels and said != f.label
        ]
    )
    told = [
        {f.file: table.rows.get(f.file, {}).get(column, "").strip() for f in files}
        for column in columns
    ]
    ungrouped = frozenset(f.file for f in files if not any(names[f.file] for names in told))
    groups = dict(told[0])
    taken = set(groups.values())
    for file in [f for f, name in groups.items() if not name]:
        own = file
        while own in taken:
            own = f"{own} (own)"
        groups[file] = own
    return joined(groups, *told[1:]), ungrouped


def _sources(
    tree: _Tree,
    dataset: str,
    class_names: tuple[str, ...],
    files: list[ImageFile],
    tables: list[_Table | None],
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Source of each file: Kaggle's `<Class>.metadata.xlsx`, else a csv's `source_repo`.

    And the workbooks that could not be read.
    """
    unreadable: list[str] = []
    sources = {
        file: row["source_repo"]
        for table in tables
        if table is not None
        for file, row in table.rows.items()
        if row.get("source_repo")
    }
    beside = {n.casefold(): n for n in tree.children(dataset)[1]}
    for label in class_names:
        name = beside.get(f"{label}.metadata.xlsx".casefold())
        if name is None:
            continue
        try:
            urls = _read_metadata(tree.read(_join(dataset, name)))
        except UserError:
            urls = None
        if urls is None:
            unreadable.append(_join(dataset, name))
            continue
        for f in files:
            url = urls.get(PurePosixPath(f.file).stem.casefold())
            if f.label == label and url:
                sources[f.file] = url
    return sources, tuple(unreadable)


def _read_metadata(content: bytes) -> dict[str, str] | None:
    """URL by image name without suffix, case folded (the workbooks write NORMAL-1).

    None for a workbook that cannot be read: the images do not need it.
    """
    import openpyxl  # slow to import, and rarely needed

    try:
        with zipfile.ZipFile(io.BytesIO(content)) as parts:
            if sum(part.file_size for part in parts.infolist()) > _MAX_WORKBOOK:
                return None
        book = openpyxl.load_workbook(io.BytesIO(content), read_only=True, data_only=True)
        sheet = book.worksheets[0]
        sheet.reset_dimensions()  # some writers store wrong ones
        rows = sheet.iter_rows(values_only=True)
        header = [str(cell or "").strip().casefold() for cell in next(rows, ())]
        file_at, url_at = header.index("file name"), header.index("url")
        urls = {}
        for row in rows:
            if len(row) > max(file_at, url_at) and row[file_at] is not None and row[url_at]:
                image = str(row[file_at]).strip()
                stem = PurePosixPath(image).stem if _is_image(image) else image
                urls[stem.casefold()] = str(row[url_at]).strip()
        book.close()
    except Exception:  # a damaged workbook raises anything
        return None
    return urls
