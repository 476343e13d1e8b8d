"""Feeds hostile files to every parser, guided by coverage: `python scripts/fuzz.py --target=png`.

Needs atheris (`pip install -e '.[fuzz]'`). The seeds are small valid files made here; mutations
keep the checksums of PNG and zip right half of the time, so that they get past them. A parser may
return or raise UserError. Findings, each with the input that shows it:
- any other exception;
- a crash of the interpreter, or more than --timeout seconds of the processor for an input;
- more than --rss_limit_mb of memory;
- a file opened for writing outside the target's own folder, one read that is no module of Python's,
  a connection, a process started, or a pickle loaded.

Prints progress, and a JSON result at the end; status 1 where there are findings.
"""

from __future__ import annotations

import argparse
import io
import json
import mmap
import os
import random
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

TARGETS = (
    "png jpeg image h5 npz zip torch arrayrecord config_json report_json split_csv groups_csv "
    "checkpoint_metadata"
).split()
_IMAGES = {"jpeg": ["JPEG"], "image": ["BMP", "GIF", "TIFF", "WEBP"]}

Parser = Callable[[bytes], None]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", choices=TARGETS, required=True)
    parser.add_argument("--runs", type=int, default=100_000, help="executions")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--max_len", type=int, default=4096, help="bytes, or twice a seed's")
    parser.add_argument(
        "--timeout",
        type=int,
        default=10,
        help="seconds of the processor an input may take; by the clock 30 times that",
    )
    parser.add_argument("--rss_limit_mb", type=int, default=1500, help="of the whole process")
    parser.add_argument("--seconds", type=int, default=0, help="stop after so many; 0: never")
    parser.add_argument("--output", type=Path, help="folder for findings; default: a new one")
    parser.add_argument("--input", type=Path, help="run this one input instead, uncaught")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


# --- Seeds: what a well-meaning user would give.


def _image(format: str, mode: str = "L", side: int = 6, **options: Any) -> bytes:
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    f = io.BytesIO()
    image = Image.fromarray(pixels)
    if mode == "I;16":
        image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    elif mode != "RGB":
        image = image.convert(mode)
    image.save(f, format, **options)
    return f.getvalue()


def _h5(path: Path) -> list[bytes]:
    import h5py
    import numpy as np

    seeds = []
    for keras3 in (False, True):
        choices: list[dict[str, Any]] = [
            {},
            {"compression": "gzip", "shuffle": True, "chunks": (1, 2)},
        ]
        for options in choices:
            with h5py.File(path, "w") as f:
                place = "layers/dense/vars/0" if keras3 else "dense/dense/kernel:0"
                f.create_dataset(place, data=np.ones((2, 2), np.float32), **options)
                if keras3:
                    f["layers/dense/vars"].attrs["name"] = "dense"
                else:
                    f["dense"].attrs["weight_names"] = [b"dense/kernel:0"]
            seeds.append(path.read_bytes())
    return seeds


def _npz() -> list[bytes]:
    import numpy as np

    seeds = []
    arrays: dict[str, Any] = {
        "dense/kernel": np.ones((2, 2), np.float32),
        "dense/bias": np.zeros(2),
    }
    for save in (np.savez, np.savez_compressed):
        f = io.BytesIO()
        save(f, **arrays)
        seeds.append(f.getvalue())
    return seeds


def _zip(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    f = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(f, "w", method) as z:
        warnings.simplefilter("ignore")  # of names that come twice
        for name, content in members.items():
            z.writestr(name, content)
    return f.getvalue()


def _data_zips() -> list[bytes]:
    import openpyxl

    image = _image("PNG")
    book, xlsx = openpyxl.Workbook(), io.BytesIO()
    book.active.append(["FILE NAME", "URL"])
    book.active.append(["a", "https://example.org"])
    book.save(xlsx)
    members = {"A/a.png": image, "B/b.png": image}
    groups = b"file,group\nA/a.png,1\nB/b.png,2\n"
    return [
        _zip(members, zipfile.ZIP_STORED),
        _zip(members | {"groups.csv": groups}),
        _zip(members | {"A.metadata.xlsx": xlsx.getvalue()}),
    ]


def _torch() -> list[bytes]:
    """As `torch.save` wrote before 1.6, by hand."""
    from covid_flax.pretrained.torch_file import MAGIC

    def number(n: int) -> bytes:
        return b"K" + bytes([n])

    def text(s: str) -> bytes:
        return b"X" + struct.pack("<I", len(s)) + s.encode()

    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu")
    storage += number(4) + b"NtQ"
    order = b"ccollections\nOrderedDict\n)R"
    shape = number(2) + number(2) + b"\x86" + number(2) + number(1) + b"\x86"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n((" + storage[1:] + number(0) + shape
    tensor = tensor.replace(b"((", b"((", 1) + b"\x89" + order + b"tR"
    state = b"\x80\x02" + order + b"q\x00(" + text("conv.weight") + tensor + b"u."
    head = MAGIC + b"\x80\x02M\xe9\x03." + b"\x80\x02}q\x00."
    keys = b"\x80\x02]q\x00" + text("0") + b"a."
    return [head + state + keys + struct.pack("<Q", 4) + bytes(16), head]


def _json_seeds(report: bool) -> list[bytes]:
    from covid_flax.config import to_json
    from ml_collections_configs import base

    names = ["A", "B"]
    figures = {"support": 3, "recall": 0.5, "predicted": 2}
    found: list[dict[str, Any]]
    if report:
        ends = {"accuracy": [0.1, 0.9], "per_class": {"A": {"recall": [0.1, 0.2]}}}
        found = [
            {
                "split": "val", "num_examples": 6, "class_names": names, "accuracy": 0.5,
                "per_class": {name: figures for name in names}, "bad_images": {"A/x.png": "torn"},
                "confusion_matrix": [[1, 2], [3, 0]], "alarms": [
                    {"name": "chance", "level": "alarm", "text": "x", "figures": {"p": 0.1}}],
                "intervals": {"level": 0.95, "clusters": 2, "resamples": 9, "bootstrap": ends},
            },
            {"8": {"temperature": 1.2, "split": "val", "abstain": {"threshold": 0.5}}},
        ]  # fmt: skip
    else:
        found = [
            {"config": config, "class_names": names, "data": {"root": "x"}, "preprocessing": "unit"}
            for config in (to_json(base.get_config()), {"data": {"dir": "x"}, "seed": 3})
        ]
    return [json.dumps(x).encode() for x in found]


# --- Parsers: what the program does with a file.


def _decode(suffix: str) -> Parser:
    from covid_flax.data.decode import decode, resize

    def parse(data: bytes) -> None:
        pixels = decode(data, f"x{suffix}")
        assert pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.dtype == "uint8"
        assert resize(pixels, 8, "bilinear").shape == (8, 8, 3)

    return parse


def _weights(place: Path) -> Parser:
    import numpy as np

    from covid_flax.pretrained.read import read_weights

    path = place / "weights"

    def parse(data: bytes) -> None:
        path.write_bytes(data)
        for array in read_weights(path).values():
            assert array.dtype == "float32" and np.isfinite(array).all()

    return parse


def _torch_parser(place: Path) -> Parser:
    """The tensors too of networks that `read_weights` refuses by their names."""
    from covid_flax.pretrained.torch_file import read_torch

    path, whole = place / "weights", _weights(place)

    def parse(data: bytes) -> None:
        path.write_bytes(data)
        try:
            read_torch(path)
        except ValueError:
            pass
        whole(data)

    return parse


def _zip_parser(place: Path) -> Parser:
    from covid_flax.data.decode import decode
    from covid_flax.data.folder import open_folder
    from covid_flax.data.masks import find_masks
    from covid_flax.data.splits import Row
    from covid_flax.errors import UserError

    path = place / "data.zip"

    def parse(data: bytes) -> None:
        path.write_bytes(data)
        folder = open_folder(str(path))
        folder.fingerprint()
        find_masks(folder, [Row(f.file, f.label, "", "") for f in folder.files[:20]])
        for f in folder.files[:20]:
            try:
                decode(folder.read(f.file), f.file)
            except UserError:
                pass

    return parse


def _records(place: Path) -> tuple[Parser, list[bytes], Callable[[bytes], bytes]]:
    """The shard of records that `prepare` wrote, replaced by the input."""
    from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

    from covid_flax.data import builder
    from covid_flax.data.folder import open_folder

    for label in "AB":
        (place / "data" / label).mkdir(parents=True)
        (place / "data" / label / "x.png").write_bytes(_image("PNG"))
    records = builder.prepare(open_folder(str(place / "data")), place / "cache")
    (shard,) = records.place.rglob("*.array_record*")
    source = records._source
    reader = ArrayRecordReader(str(shard))
    whole = [shard.read_bytes(), *reader.read([0, 1])]

    def parse(data: bytes) -> None:
        shard.write_bytes(data)
        try:
            source.__post_init__()  # opens the shard anew, as another process would
        except (OSError, RuntimeError, ValueError) as e:
            raise builder.UserError("refused on opening") from e
        for i in range(2):
            record = records[i]
            assert isinstance(record["image"], bytes) and isinstance(record["file"], str)

    def wrap(record: bytes) -> bytes:
        """A sound shard of unsound records."""
        path = place / "wrapped"
        writer = ArrayRecordWriter(str(path), "group_size:1")
        writer.write(record)
        writer.write(record)
        writer.close()
        return path.read_bytes()

    return parse, whole, wrap


def _config_parser(place: Path) -> Parser:
    from covid_flax import config
    from covid_flax.report.artefacts import RUN, read_object
    from covid_flax.run_folder import read_run

    path = place / "config.json"

    def parse(data: bytes) -> None:
        path.write_bytes(data)
        saved = read_run(place)
        assert saved is not None
        found = config.from_json(saved["config"])
        config.check(found)
        config.to_json(found)
        read_object(path, RUN)

    return parse


def _report_parser(place: Path) -> Parser:
    from covid_flax.errors import UserError
    from covid_flax.evaluate import _read_calibrations
    from covid_flax.report.artefacts import _read_report
    from covid_flax.report.plots import read_metrics

    path = place / "report.json"

    def parse(data: bytes) -> None:
        path.write_bytes(data)
        for reader in (_read_report, _read_calibrations, read_metrics):
            try:
                reader(path)
            except UserError:
                pass

    return parse


def _split_parser(place: Path) -> Parser:
    from covid_flax.data.splits import read_split_csv, write_split_csv
    from covid_flax.errors import UserError
    from covid_flax.evaluation.predictions import read_predictions

    path, again = place / "split.csv", place / "again.csv"

    def parse(data: bytes) -> None:
        path.write_bytes(data)
        try:
            read_predictions(path)
        except UserError:
            pass
        rows = read_split_csv(path)
        write_split_csv(again, rows)
        assert read_split_csv(again) == rows

    return parse


def _groups_parser(place: Path) -> Parser:
    from covid_flax.data.folder import open_folder
    from covid_flax.data.splits import make_split

    for file in ("A/1.png", "A/2.png", "B/1.png", "B/2.png"):
        (place / "data" / file).parent.mkdir(parents=True, exist_ok=True)
        (place / "data" / file).write_bytes(b"")

    def parse(data: bytes) -> None:
        (place / "data" / "groups.csv").write_bytes(data)
        folder = open_folder(str(place / "data"))
        make_split(folder, split="grouped", val_fraction=0.5)

    return parse


def _checkpoint_parser(place: Path) -> tuple[Parser, list[bytes]]:
    """One metadata file of a checkpoint, told by the first byte, replaced by the rest."""
    import jax.numpy as jnp

    from covid_flax.checkpoint import Checkpoints, has_checkpoints, resolve_step
    from covid_flax.mesh import make_layout

    state = make_layout("jit").put_state({"w": jnp.ones((2, 2)), "n": jnp.int32(1)})
    with Checkpoints(place / "whole", writing=True) as c:
        c.save(3, state, {"epoch": 1}, best=True)
    names = [
        p.relative_to(place / "whole")
        for p in sorted((place / "whole").rglob("*"))
        if p.is_file() and p.stat().st_size < 5000
    ]
    seeds = [bytes([i]) + (place / "whole" / name).read_bytes() for i, name in enumerate(names)]
    shutil.copytree(place / "whole", place / "c")

    def parse(data: bytes) -> None:
        name = names[data[0] % len(names) if data else 0]
        (place / "c" / name).write_bytes(data[1:])
        try:
            assert has_checkpoints(place / "c")
            with Checkpoints(place / "c") as c:
                c.load(resolve_step(c, "best"), state)
        finally:
            shutil.copyfile(place / "whole" / name, place / "c" / name)

    return parse, seeds


# --- Mutations that keep a container sound.


def _with_png_checksums(data: bytes) -> bytes:
    out, at = data[:8], 8
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        body = data[at + 4 : at + 8 + length]
        if at + 12 + length > len(data):
            break
        out += data[at : at + 4] + body + struct.pack(">I", zlib.crc32(body))
        at += 12 + length
    return out + data[at:]


def _with_other_pixels(data: bytes, mutate: Callable[[bytes, int], bytes]) -> bytes:
    """Changes what the IDAT chunk unpacks to, its filter bytes among it."""
    at = data.find(b"IDAT")
    length = int.from_bytes(data[at - 4 : at], "big") if at >= 4 else 0
    try:
        rows = zlib.decompressobj().decompress(data[at + 4 : at + 4 + length], 1 << 16)
    except zlib.error:
        return data
    packed = zlib.compress(mutate(rows, 4096))
    tail = data[at + 4 + length :]
    return data[: at - 4] + struct.pack(">I", len(packed)) + b"IDAT" + packed + tail


_NAMES = (
    *("../x.png", "/x.png", "A/../../x.png", "A\\x.png"),
    *("A/\x1b[2J\n.png", "A/masks/a.png", "A/"),
)


def _with_other_member(data: bytes, mutate: Callable[[bytes, int], bytes], dice: random.Random):
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as z:
            members = {i.filename: z.read(i) for i in z.infolist() if i.file_size < 1 << 16}
    except Exception:  # mutated before
        return data
    if not members:
        return data
    name = dice.choice(list(members))
    content = members.pop(name)
    if dice.random() < 0.3:
        name = dice.choice(_NAMES) if dice.random() < 0.5 else name + dice.choice("/.x\0é")
    else:
        content = mutate(content, 4096)
    try:
        return _zip(members | {name: content}, dice.choice([0, 8, 12, 14]))
    except Exception:
        return data


_JUNK: tuple[Any, ...] = (
    None, True, -1, 0, 1e308, 2**70, float("nan"), float("inf"), "", "x" * 99, "\0\n<b>", "../../x",
    [], {}, [[]], {"": {}}, "config", {"items": 1},
)  # fmt: skip


def _with_other_value(data: bytes, dice: random.Random) -> bytes:
    try:
        root = json.loads(data)
    except (ValueError, RecursionError):
        return data
    at = root
    while isinstance(at, dict | list) and at:
        key = dice.choice(list(at)) if isinstance(at, dict) else dice.randrange(len(at))
        if isinstance(at[key], dict | list) and at[key] and dice.random() < 0.8:
            at = at[key]
            continue
        if dice.random() < 0.2:
            del at[key]
        elif dice.random() < 0.2 and isinstance(at, dict):
            at[dice.choice(["", "x.y", "data", "items", "model", f"{key}!"])] = at.pop(key)
        else:
            at[key] = dice.choice(_JUNK)
        break
    return json.dumps(root).encode()


# --- The worker: one process of libFuzzer's.


class _Guard:
    """Fails the input that opens what it should not, starts a process, or loads a pickle."""

    def __init__(self, place: Path) -> None:
        self.on = False
        self.seen: list[str] = []
        # Orbax reads its own state; Python its modules, its time zones and its source in tracebacks
        self._readable = tuple(
            str(p) for p in (place, sys.prefix, sys.base_prefix, Path(__file__).parents[1])
        ) + ("/proc/", "/sys/", "/dev/null", "/usr/", "/etc/localtime", *sys.path)
        self._place = str(place)
        sys.addaudithook(self)

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open" and isinstance(args[0], str | bytes):
            path = os.path.abspath(os.fsdecode(args[0]))
            flags = args[2] or 0
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            if writes and not path.startswith((self._place, "/dev/null")):
                self.seen.append(f"writes {path}")
            elif not path.startswith(tuple(p for p in self._readable if p)):
                self.seen.append(f"reads {path}")
        elif event in ("pickle.find_class", "subprocess.Popen", "os.system", "socket.connect"):
            self.seen.append(event)


def _make(target: str, place: Path) -> tuple[Parser, list[bytes], Callable[..., bytes] | None]:
    """The parser, its seeds, and a mutation that keeps the container sound."""
    if target == "png":
        modes = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
        return _decode(".png"), [_image("PNG", m) for m in modes], _mutate_png
    if target in _IMAGES:
        formats = _IMAGES[target]
        seeds = [_image(f, m) for f in formats for m in ("L", "RGB")]
        if target == "jpeg":
            seeds += [_image("JPEG", "RGB", 20, progressive=True), _image("JPEG", "CMYK")]
            return _decode(".jpg"), seeds, None
        packed = ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "group4")
        seeds += [_image("TIFF", "1" if c == "group4" else "RGB", compression=c) for c in packed]
        seeds += [_image("WEBP", "RGBA", lossless=True), _image("TIFF", "I;16"), _image("GIF", "P")]
        return _decode(""), seeds, None
    if target == "h5":
        return _weights(place), _h5(place / "seed"), None
    if target == "npz":
        return _weights(place), _npz(), _mutate_zip
    if target == "torch":
        return _torch_parser(place), _torch(), None
    if target == "zip":
        return _zip_parser(place), _data_zips(), _mutate_zip
    if target == "config_json":
        return _config_parser(place), _json_seeds(report=False), _mutate_json
    if target == "report_json":
        return _report_parser(place), _json_seeds(report=True), _mutate_json
    if target == "split_csv":
        seed = 'file,label,split,group\nA/1.png,A,train,g1\n"B/""2"".png",B,val,\n'
        predictions = "file,label,predicted,p_A,p_B\nA/1.png,A,B,0.25,0.75\n"
        return _split_parser(place), [seed.encode(), predictions.encode()], None
    if target == "groups_csv":
        seed = "file,group,label\nA/1.png,1,A\nA/2.png,2,A\nB/1.png,3,B\nB/2.png,4,B\n"
        return _groups_parser(place), [seed.encode(), b"\xef\xbb\xbf" + seed.encode()], None
    if target == "arrayrecord":
        parse, (shard, *records), wrap = _records(place)

        def mutate(data: bytes, generic: Callable[[bytes, int], bytes], dice: random.Random):
            return wrap(generic(dice.choice(records), 1000))

        return parse, [shard], mutate
    parse, seeds = _checkpoint_parser(place)
    return parse, seeds, None


def _mutate_png(data: bytes, generic: Callable[[bytes, int], bytes], dice: random.Random) -> bytes:
    changed = (
        _with_other_pixels(data, generic)
        if dice.random() < 0.3
        else generic(data, max(len(data) + 64, 64))
    )
    return _with_png_checksums(changed)


def _mutate_zip(data: bytes, generic: Callable[[bytes, int], bytes], dice: random.Random) -> bytes:
    return _with_other_member(data, generic, dice)


def _mutate_json(data: bytes, generic: Callable[[bytes, int], bytes], dice: random.Random) -> bytes:
    return _with_other_value(data, dice)


def _work(args: argparse.Namespace) -> None:
    import atheris

    place: Path = args.worker
    guard = _Guard(place)
    with atheris.instrument_imports(include=["covid_flax"]):
        parse, seeds, sound = _make(args.target, place)
    from covid_flax.errors import UserError

    warnings.simplefilter("ignore")
    for seed in seeds:
        try:
            parse(seed)
        except UserError as e:
            print(f"a seed is refused: {e}", flush=True)
    corpus = place / "corpus"
    corpus.mkdir(exist_ok=True)
    for i, seed in enumerate(seeds):
        (corpus / f"seed-{i}").write_bytes(seed)
    counter = mmap.mmap(os.open(place / "count", os.O_RDWR), 16)
    found: set[str] = set(p.stem.partition("-")[2] for p in args.output.glob("finding-*.txt"))

    def finding(what: str, data: bytes, text: str) -> None:
        key = f"{zlib.crc32(what.encode()):08x}"
        if key in found or len(found) > 100:
            return
        found.add(key)
        (args.output / f"finding-{key}.bin").write_bytes(data)
        (args.output / f"finding-{key}.txt").write_text(f"{what}\n{text}")
        print(f"finding {key}: {what}", flush=True)

    def once(data: bytes) -> None:
        counted, refused = struct.unpack("<qq", counter[:16])
        guard.seen.clear()
        start = time.process_time()
        guard.on = True
        try:
            parse(data)
        except UserError:
            refused += 1
        except BaseException as e:
            guard.on = False
            frames = traceback.extract_tb(e.__traceback__)
            ours = [f for f in frames if "covid_flax" in f.filename] or frames
            where = f"{Path(ours[-1].filename).name}:{ours[-1].name}"
            finding(f"{type(e).__name__} in {where}", data, traceback.format_exc())
        finally:
            guard.on = False
        seconds = time.process_time() - start
        if seconds > args.timeout:
            finding(f"slow in {args.target}", data, f"{seconds:.1f} s")
        for what in guard.seen:
            finding(what, data, what)
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        if used > args.rss_limit_mb:
            finding(f"memory {used:,.0f} MB", data, "")
            counter[:16] = struct.pack("<qq", counted + 1, refused)
            os._exit(3)
        counter[:16] = struct.pack("<qq", counted + 1, refused)

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        dice = random.Random(seed)
        if sound is not None and dice.random() < 0.5:
            return sound(data, atheris.Mutate, dice)[:most]
        return atheris.Mutate(data, most)

    if args.input:
        parse(args.input.read_bytes())
        return
    options = [
        f"-runs={args.runs}",
        f"-seed={args.seed}",
        f"-max_len={max(args.max_len, 2 * max(map(len, seeds)))}",
        f"-timeout={30 * args.timeout}",
        f"-rss_limit_mb={args.rss_limit_mb + 500}",
        f"-artifact_prefix={args.output}/native-",
        "-print_final_stats=1",
        "-verbosity=1",
        *([f"-max_total_time={args.seconds}"] if args.seconds else []),
        str(corpus),
    ]
    custom = {"custom_mutator": mutate} if sound is not None else {}
    atheris.Setup([sys.argv[0], *options], once, **custom)
    atheris.Fuzz()


# --- The driver, which outlives a worker's crash.


def _drive(args: argparse.Namespace) -> int:
    shm = "/dev/shm" if os.path.isdir("/dev/shm") else None
    args.output = args.output or Path(tempfile.mkdtemp(prefix=f"fuzz-{args.target}-"))
    args.output.mkdir(parents=True, exist_ok=True)
    start, crashes, features = time.monotonic(), 0, 0
    corpus = 0
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=shm) as directory:
        total = Path(directory, "count")
        total.write_bytes(bytes(16))

        def executed() -> tuple[int, int]:
            return struct.unpack("<qq", total.read_bytes())

        while (left := args.runs - executed()[0]) > 0:
            # A fresh folder, and what was learned.
            place = Path(directory, "work")
            seconds = args.seconds and max(1, args.seconds - round(time.monotonic() - start))
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            if Path(directory, "corpus").is_dir():
                shutil.move(Path(directory, "corpus"), place / "corpus")
            os.link(total, place / "count")
            command = [
                *(sys.executable, __file__, f"--target={args.target}", f"--worker={place}"),
                *(f"--runs={left}", f"--seed={args.seed + crashes}", f"--max_len={args.max_len}"),
                *(f"--timeout={args.timeout}", f"--rss_limit_mb={args.rss_limit_mb}"),
                *(f"--seconds={seconds}", f"--output={args.output}"),
            ]
            env = os.environ | {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
            before = executed()[0]
            with open(args.output / f"log-{crashes}.txt", "w+") as log:
                status = subprocess.run(command, stdout=log, stderr=log, env=env).returncode
                log.seek(0)
                lines = log.read().splitlines()
            counts = [line.split(" ft: ")[1].split()[0] for line in lines if " ft: " in line]
            features = max([features, *map(int, counts)])
            if (place / "corpus").is_dir():
                corpus = len(list((place / "corpus").iterdir()))
                shutil.move(place / "corpus", Path(directory, "corpus"))
            seconds_used = round(time.monotonic() - start)
            print(f"{executed()[0]:,} executions, {seconds_used} s", file=sys.stderr)
            if status == 0:
                break
            crashes += status != 3  # a worker that used too much memory told so as a finding
            tail = "\n".join(lines[-60:])
            (args.output / f"crash-{crashes}.txt").write_text(f"status {status}\n{tail}\n")
            if executed()[0] == before or crashes > 50:
                print(tail, file=sys.stderr)
                break
        executions, refused = executed()
    findings = [p.read_text().partition("\n")[0] for p in args.output.glob("finding-*.txt")]
    result = {
        "target": args.target,
        "seed": args.seed,
        "executions": executions,
        "refused": refused,
        "seconds": round(time.monotonic() - start, 1),
        "features": features,
        "corpus": corpus,
        "findings": sorted(findings),
        "crashes": crashes,
        "output": str(args.output),
    }
    print(json.dumps(result))
    return 1 if findings or crashes else 0


def main() -> None:
    args = _arguments()
    if args.input:
        args.worker = Path(tempfile.mkdtemp(prefix="fuzz-"))
        (args.worker / "count").write_bytes(bytes(16))
        args.output = args.worker
    if args.worker:
        _work(args)
    else:
        sys.exit(_drive(args))


if __name__ == "__main__":
    main()
