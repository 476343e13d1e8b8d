"""What csv tables and workbooks beside images tell of them: groups and sources."""

from __future__ import annotations

import csv
import dataclasses
import io
import os
import unicodedata
import zipfile
from collections.abc import Collection, Mapping
from pathlib import PurePosixPath

from covid_flax.data.decode import is_image
from covid_flax.data.file_tree import Disk, FileTree, join
from covid_flax.data.groups import GROUP_COLUMNS, joined
from covid_flax.errors import UserError

_MAX_WORKBOOK = 100_000_000  # bytes, unpacked: openpyxl holds the texts in memory


def refuse_mislabelled(wrong: list[str]) -> None:
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise UserError(
            f"{len(wrong)} mislabelled image(s) in the folder of another class: "
            f"{'; '.join(wrong[:5])}{more}: move or remove them"
        )


PARTS = ("train", "val", "test")


@dataclasses.dataclass(frozen=True)
class _Table:
    """A csv of files: its name for messages, columns, and the row of each listed image.

    `strangers` are rows of no image that is here.
    """

    name: str
    columns: list[str]
    rows: dict[str, dict[str, str]]
    strangers: int = 0


@dataclasses.dataclass(frozen=True)
class ToldSplit:
    """A split that a csv tells.

    Attributes:
      name: the csv's, for messages.
      parts: of each file that has one, which of `PARTS`.
      strangers: how many rows are of no image that is here.
    """

    name: str
    parts: Mapping[str, str]
    strangers: int


class Tables:
    """Finds the tables that tell of some images, and matches their rows to them.

    Args:
      tree: where the images lie, `path` its name for a person.
      dataset: the folder of it that holds the class folders.
      labels: class of every image, by its file.
      groups_file, group_column, split_file: as `open_folder` takes them.
      tolerant: whether a csv that was not asked for and is unusable is passed over.

    Raises:
      UserError: a csv cannot be read or lists none of the images, says another class of one, or
        tells no groups where they are asked for.
    """

    def __init__(
        self,
        tree: FileTree,
        path: str,
        dataset: str,
        labels: Mapping[str, str],
        groups_file: str,
        group_column: str,
        split_file: str,
        *,
        tolerant: bool,
    ) -> None:
        self._told_in = {*GROUP_COLUMNS, "source_repo"} | ({group_column} - {""})
        self._tree, self._path, self._dataset, self._labels = tree, path, dataset, labels
        self._name = os.path.basename(os.path.abspath(path))
        self._manifest: _Table | None = None
        self.unused = ""  # why the folder's own csv tells no groups, where there is one
        try:
            self._manifest = self._find("manifest.csv")
        except UserError as e:
            if not tolerant:
                raise
            self.unused = str(e)
        # A csv that is named adds to what the folder's own tells: an audit's may be older than
        # the patients' csv, or have never seen it. A column that is named is meant alone.
        self._of_groups: list[tuple[_Table, list[str]]] = []
        if groups_file:
            named = self._explicit(groups_file, "groups_file")
            self._of_groups = [(named, self._group_columns(named, group_column))]
            self._of_groups += [] if group_column else self._own("", tolerant=True)
        else:
            self._of_groups = self._own(group_column, tolerant=tolerant)
        self._split = self._explicit(split_file, "data.split_file") if split_file else None
        if self._split is not None and not group_column:
            told = [c for c in GROUP_COLUMNS if c in self._split.columns]
            if any(row[column].strip() for row in self._split.rows.values() for column in told):
                self._of_groups.append((self._split, told))
        self._refuse_other_labels()

    def groups(self) -> tuple[dict[str, str] | None, frozenset[str]]:
        """Group of every file, or None where no csv tells groups; and the files it gives none."""
        labels = self._labels
        if not self._of_groups:
            return None, frozenset()
        told = [
            {file: table.rows.get(file, {}).get(column, "").strip() for file in labels}
            for table, columns in self._of_groups
            for column in columns
        ]
        ungrouped = frozenset(file for file in labels if not any(of[file] for of in told))
        groups = dict(told[0])
        taken = set(groups.values())
        for file in [f for f, name in groups.items() if not name]:
            own = file
            while own in taken:
                own = f"{own} (own)"
            groups[file] = own
        return joined(groups, *told[1:]), ungrouped

    def split(self) -> ToldSplit | None:
        """What the csv `split_file`, if one was named, tells; nothing of images without a part.

        Raises:
          UserError: it has no column `split`, or one of other parts than `PARTS`.
        """
        table = self._split
        if table is None:
            return None
        if "split" not in table.columns:
            raise UserError(
                f"{table.name} has no column `split` (it has {', '.join(table.columns)}): give "
                "the one of the parts that name"
            )
        parts = {}
        for file, row in table.rows.items():
            part = row["split"].strip()
            if part not in (*PARTS, ""):
                raise UserError(
                    f"{table.name} puts {file} into {part!r}: its `split` is {', '.join(PARTS)}, "
                    "or empty for an image that is left out"
                )
            if part:
                parts[file] = part
        return ToldSplit(table.name, parts, table.strangers)

    def _refuse_other_labels(self) -> None:
        # By name: one csv may tell both groups and the split.
        tables = {table.name: table for table, _ in self._of_groups}
        if self._split is not None:
            tables[self._split.name] = self._split
        names = set(self._labels.values())
        refuse_mislabelled(
            [
                f"{file} is {said} in {table.name}"
                for table in tables.values()
                for file, label in self._labels.items()
                if (said := table.rows.get(file, {}).get("label", "")) in names and said != label
            ]
        )

    def sources(self) -> tuple[dict[str, str], tuple[str, ...]]:
        """Source of each file: Kaggle's `<Class>.metadata.xlsx`, else a csv's `source_repo`.

        And the workbooks that could not be read.
        """
        unreadable: list[str] = []
        sources = {
            file: row["source_repo"]
            for table in (*(table for table, _ in self._of_groups[::-1]), self._manifest)
            if table is not None
            for file, row in table.rows.items()
            if row.get("source_repo")
        }
        beside = {n.casefold(): n for n in self._tree.children(self._dataset)[1]}
        for label in dict.fromkeys(self._labels.values()):
            name = beside.get(f"{label}.metadata.xlsx".casefold())
            if name is None:
                continue
            try:
                urls = _read_metadata(self._tree.read(join(self._dataset, name)))
            except UserError:
                urls = None
            if urls is None:
                unreadable.append(join(self._dataset, name))
                continue
            for file, of in self._labels.items():
                url = urls.get(PurePosixPath(file).stem.casefold())
                if of == label and url:
                    sources[file] = url
        return sources, tuple(unreadable)

    def _explicit(self, name: str, key: str) -> _Table:
        """The csv `name` that the setting `key` names."""
        name = os.path.expanduser(name)
        if not os.path.isabs(name) and self._tree.has(name):
            content = self._tree.read(name)
        elif os.path.isfile(name):
            content = Disk(os.path.dirname(name)).read(os.path.basename(name))
        else:
            raise UserError(
                f"{key}={name} is neither in {self._path} nor in the working "
                "directory: name a csv that is there"
            )
        columns, rows = _read_csv(name, content)
        found = [self._matched(rows, prefix) for prefix in ("", self._dataset, f"../{self._name}")]
        from_class_on = _from_class_on(rows, set(self._labels.values()))
        found.append(self._matched(from_class_on, self._dataset))
        matched = max(found, key=len)
        used = {id(row) for row in matched.values()}  # a row may be of two names, alike folded
        return self._usable(_Table(name, columns, matched, len(rows) - len(used)))

    def _own(self, asked: str, *, tolerant: bool) -> list[tuple[_Table, list[str]]]:
        """The folder's own csv and its columns; none where there is none, or it is of no use."""
        try:
            table = self._groups_csv_or_manifest(asked)
            if table is not None:
                return [(table, self._group_columns(table, asked))]
        except UserError as e:
            if not tolerant or asked:
                raise
            self.unused = str(e)
            return []
        if asked:
            raise UserError(
                f"data.group_column={asked}, but {self._path} has no groups.csv or manifest.csv "
                "with that column: name the csv with data.groups_file"
            )
        return []

    def _groups_csv_or_manifest(self, asked: str) -> _Table | None:
        groups = self._find("groups.csv")
        if groups is not None:
            return self._usable(groups)
        if self._manifest is None or not self._manifest.rows:
            if self._manifest is not None and "file" not in self._manifest.columns:
                listed = ", ".join(self._manifest.columns)
                self.unused = f"{self._manifest.name} has no column `file` (it has {listed})"
            return None
        columns = (asked,) if asked else GROUP_COLUMNS
        return self._manifest if any(c in self._manifest.columns for c in columns) else None

    def _find(self, name: str) -> _Table | None:
        for folder in dict.fromkeys(("", self._dataset)):
            file = join(folder, name)
            if self._tree.has(file):
                columns, rows = _read_csv(file, self._tree.read(file))
                found = [self._matched(rows, prefix) for prefix in ("", self._dataset)]
                return _Table(file, columns, max(found, key=len))
        above = os.path.dirname(os.path.abspath(self._path))
        if isinstance(self._tree, Disk) and os.path.isfile(os.path.join(above, name)):
            # A csv up there may well be about something else.
            try:
                columns, rows = _read_csv(name, Disk(above).read(name))
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
            names = {f: join(relative_to[3:], f) for f in self._labels}
        else:
            names = {f: f.removeprefix(f"{relative_to}/") for f in self._labels}
        folded: dict[str, dict[str, str] | None] = {}
        for name, row in rows.items():
            # Two rows alike but for this are told apart by their exact names alone.
            folded[_folded(name)] = None if _folded(name) in folded else row
        found = {f: rows.get(name) or folded.get(_folded(name)) for f, name in names.items()}
        return {file: row for file, row in found.items() if row is not None}

    def _group_columns(self, table: _Table, asked: str) -> list[str]:
        columns = [c for c in ((asked,) if asked else GROUP_COLUMNS) if c in table.columns]
        if not columns:
            raise UserError(
                f"{table.name} has no column {asked or ' or '.join(GROUP_COLUMNS)} "
                f"(it has {', '.join(table.columns)}): rename its column of groups, or in training "
                "name it with config.data.group_column"
            )
        return columns

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


def _folded(name: str) -> str:
    """The name in composed letters, without blanks at its ends: Macs and spreadsheets add both."""
    return unicodedata.normalize("NFC", name).strip()


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
                stem = PurePosixPath(image).stem if is_image(image) else image
                urls[stem.casefold()] = str(row[url_at]).strip()
        book.close()
    except Exception:  # a damaged workbook raises anything
        return None
    return urls
