"""A run's folder: what config.json says of it, and what must not be lost there."""

from __future__ import annotations

import contextlib
import fcntl
import functools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from covid_flax import config as config_lib
from covid_flax.console import say
from covid_flax.data.splits import Row, read_split_csv
from covid_flax.data.tables import from_class_on
from covid_flax.errors import UserError
from covid_flax.files import expanded, parse_json
from ml_collections_configs import base

# What changes no figure.
WITHOUT_EFFECT = (
    "data.cache_dir",
    "data.store_gb",
    "data.num_threads",
    "data.prefetch",
    "data.on_device",
    "eval.batch_size",
    "train.feature_cache_gb",
    "train.feature_disk_gb",
    "train.log_every_steps",
    "train.parallel",
    "train.shard_state",
    "train.checkpoint_every_steps",
    "train.on_non_finite",  # where it matters, the run could not go on without the change
)
# What may differ when a run goes on: the images used, their split and the teacher's arrays are
# compared by themselves.
_FREE_ON_RESUME = (
    *WITHOUT_EFFECT,
    "data.dir",
    "data.groups_file",
    "data.split_file",
    "data.on_bad_image",
    "train.teacher",
)


def read_run(workdir: Path) -> dict[str, Any] | None:
    """The `config.json` of a run's folder, None where there is none. Raises UserError."""
    refuse_file(workdir)
    path = workdir / "config.json"
    if not path.exists():
        return None
    try:
        saved = parse_json(path.read_text(encoding="utf-8"))
        if isinstance(saved, dict) and "baseline" in saved:
            raise UserError(
                f"{workdir} is a classical baseline of a run: its scores are in its eval/, and "
                "only the run itself can be scored again"
            )
        names = saved["class_names"]
        whole = (
            isinstance(saved["config"], dict)
            and isinstance(saved["data"]["root"], str)
            and isinstance(saved["data"]["images"], dict)
            and isinstance(saved["preprocessing"], str)
            and isinstance((saved.get("weights") or {}).get("run", ""), str)
            and isinstance(names, list)
            and all(isinstance(name, str) for name in names)
            and all(Path(name).name == name != ".." for name in saved.get("members", ()))
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise UserError(f"{path} is damaged: restore it, or choose another --workdir")
    return saved


def saved_run(workdir: Path) -> dict[str, Any]:
    """The config.json of a run. Raises UserError where `workdir` holds none."""
    saved = read_run(workdir)
    if saved is None:
        raise UserError(
            f"{workdir} holds no run (no config.json): give a run's folder as --workdir"
        )
    return saved


def named_run(key: str, folder: Path, mend: str) -> dict[str, Any]:
    """The config.json of the run that a configuration's key names.

    Raises:
      UserError: a damaged one; none, and the `mend` for that.
    """
    try:
        saved = read_run(folder)
    except UserError as e:
        raise UserError(
            f"{key}={folder} is a file, a baseline, or a run whose config.json is damaged: "
            "give the folder of a run"
        ) from e
    if saved is None:
        raise UserError(f"{key}={folder} holds no run (no config.json): {mend}")
    return saved


def learned_files(workdir: Path) -> set[str]:
    """The files that a run learned from: its own, and those of all that its weights come from.

    That is all members of a repeated one, teachers, and runs whose weights it began with. Those of
    a run that is gone, or came without its split.csv, cannot be told. Raises UserError where the
    run's own split.csv, or a config.json, cannot be read.
    """
    learned: set[str] = set()
    asked: set[Path] = set()
    folders = [workdir]
    while folders:
        folder = folders.pop()
        if folder.resolve() in asked or (saved := read_run(folder)) is None:
            continue
        asked.add(folder.resolve())
        for part in [folder / name for name in saved.get("members", ())] or [folder]:
            if not (part / "split.csv").exists():
                lacks = f"{part} has no split.csv: what it has learned from cannot be told"
                if folder == workdir:
                    raise UserError(f"{lacks}: restore the file")
                say(f"note: {lacks}")
                continue
            rows = read_split_csv(part / "split.csv")
            learned |= {row.file for row in rows if row.split == "train"}
        config = config_lib.from_json(saved["config"])
        started_from = (saved.get("weights") or {}).get("run")
        for known, given, what in (
            (saved.get("teacher_folder"), config.train.teacher, "a teacher"),
            (started_from, config.model.weights if started_from else "", "which a run began with"),
        ):
            if not given:
                continue
            # Where it was, whatever the working directory; or as given, where all were moved
            # together.
            places = [expanded(p) for p in (known, given) if p]
            found = next((p for p in places if read_run(p) is not None), None)
            if found is None:
                say(f"note: {places[0]}, {what}, is gone: what it has learned from cannot be told")
            else:
                folders.append(found)
    return learned


def fitted_rows(workdir: Path) -> list[Row]:
    """A run's split, and without a label what else it has learned from.

    Empty where it came without its split, as a model that is passed on may.
    """
    rows: list[Row] = []
    others: set[str] = set()
    with contextlib.suppress(UserError):
        rows = read_split_csv(workdir / "split.csv")
        others = learned_files(workdir) - {row.file for row in rows}
    return rows + [Row(file, "", "train", "") for file in sorted(others)]


def learned_of(workdir: Path, files: Iterable[str], class_names: Collection[str]) -> int:
    """How many of these images that run, or what it comes from, has learned from."""
    # Of one data set as a whole and of the folder of its classes the files are the same.
    these, learned = (
        {from_class_on(file, class_names) or file for file in named}
        for named in (files, learned_files(workdir))
    )
    return len(learned & these)


def has_figures(workdir: Path) -> bool:
    """Whether the folder holds figures of a training, with or without its checkpoints."""
    metrics = workdir / "metrics.jsonl"
    return metrics.exists() and metrics.stat().st_size > 0


def refuse_file(workdir: Path) -> None:
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"{workdir} is a file: give a folder as --workdir")


def refuse_foreign_files(workdir: Path) -> None:
    """In a folder that holds no run. Raises UserError: what is not a run's would be lost."""
    foreign = workdir / "metrics.jsonl" if has_figures(workdir) else None
    if (workdir / "calibration.json").exists():
        foreign = workdir / "calibration.json"
    split = workdir / "split.csv"
    if split.exists():
        try:
            read_split_csv(split)  # of a run that was killed before it had a config.json
        except UserError:
            foreign = split
    if foreign:
        raise UserError(f"{foreign} is of no run and would be lost: choose another --workdir")


def refuse_another_split(workdir: Path, rows: Sequence[Row]) -> None:
    """In a folder without a config.json, where a split.csv would be lost. Raises UserError."""
    split = workdir / "split.csv"
    if split.exists() and not (workdir / "config.json").exists():
        if read_split_csv(split) != list(rows):
            raise UserError(
                f"{split} is not the split that this configuration makes, and would be lost: "
                "remove it, or choose another --workdir"
            )


def refuse_folds(workdir: Path, saved: Mapping[str, Any], what: str) -> None:
    """For what needs images that no member has learned from: folds have none but the test images.

    Args:
      what: names what the user asked for, for the message.

    Raises:
      UserError: the run is a whole cross-validation.
    """
    if "members" in saved and config_lib.is_cross_validation(saved["config"]["data"]):
        raise UserError(
            f"{workdir} is a cross-validation, where one run's held-out images trained the others: "
            f"for {what} give one of them, like {workdir / saved['members'][0]}"
        )


def refuse_changes(saved: dict[str, Any], now: dict[str, Any], workdir: Path) -> None:
    """Where a run would go on under other figures. Raises UserError, naming the keys.

    Args:
      saved: its configuration, as config.json has it.
      now: the one it would go on with.
      workdir: its folder.
    """
    # Keys that came after the run was begun had their defaults.
    defaults = config_lib.to_json(base.get_config())
    changed = config_lib.changes(saved, now, defaults)
    said = [line for key, line in changed.items() if key not in _FREE_ON_RESUME]
    if said:
        raise UserError(
            f"{workdir} holds a run of another configuration ({'; '.join(said)}): "
            "choose another --workdir"
        )


@contextlib.contextmanager
def only_trainer(workdir: Path) -> Iterator[None]:
    """Keeps a second process from training the same run. Raises UserError."""
    with open(workdir / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{workdir} is being trained by another process: wait for it, or choose another "
                "--workdir"
            ) from None
        except OSError as e:  # a file system without locks, as Lustre and NFS may be
            _say_no_lock(workdir, e.strerror)
        yield


@functools.cache
def _say_no_lock(workdir: Path, why: str) -> None:
    """Once."""
    say(
        f"note: {workdir} cannot be locked ({why}): nothing keeps a second process from training "
        "there too"
    )


def default_workdir(config_file: str) -> Path:
    """`runs/paper-frozen` for `configs/paper.py:frozen`."""
    path, _, variant = config_file.partition(":")
    return Path("runs") / "-".join(filter(None, [Path(path).stem, *variant.split(",")]))
