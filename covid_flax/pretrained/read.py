"""Weight files into one plain form: `{"conv1_conv/kernel": float32 array, ...}`.

Told apart by content: Keras's official h5 (and whole-model h5), Keras 3's `.weights.h5`, npz
under Keras's names, and the PyTorch files of EfficientNet-Lite. Only the latter's names are
those of certain networks.
"""

from __future__ import annotations

import math
import re
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from covid_flax.errors import UserError, printable
from covid_flax.files import expanded
from covid_flax.pretrained.names import from_lite_pytorch
from covid_flax.pretrained.torch_file import MAGIC, NoStateDictError, read_torch

# Of what a file says it unpacks to: bytes, and times its own size, which deflate cannot exceed.
_MAX_BYTES = 4_000_000_000
_MAX_RATIO = 1100

_HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
_ZIP_MAGICS = (b"PK\x03\x04", b"PK\x05\x06")  # with members, without

# Keras 3 stores a layer's variables by number, in the order in which the layer makes them.
_KERNEL_BIAS = ("kernel", "bias")
_NORMALIZATION = ("mean", "variance", "count")
_BATCH_NORM = ("gamma", "beta", "moving_mean", "moving_variance")


def read_weights(path: str | Path) -> dict[str, np.ndarray]:
    """Reads a weight file.

    A network inside another (a ResNet50 in a Sequential) is read as if it stood alone, unless
    Keras 2 wrote it and its layers' names hold slashes (DenseNet121, MobileNetV3); the optimiser's
    state is left out.

    Args:
      path: an h5, npz or EfficientNet-Lite's PyTorch file, whatever its suffix.

    Returns:
      float32 arrays by `layer/array`, Keras's names; kernels HWIO or `[inputs, outputs]`.
      Other float types are converted.

    Raises:
      UserError: no such file, not of these layouts, truncated, without layer names, one name
        twice, or an array that is not of a float type or not finite.
    """
    path = expanded(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder: name the weight file (.h5 or .npz) inside it")
    try:
        with path.open("rb") as file:
            head = file.read(8)
    except FileNotFoundError:
        raise UserError(f"{path}: no such weight file; check the path") from None
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror}") from None
    if not head:
        raise UserError(f"{path} is empty: copy or download it again")
    try:
        if head == _HDF5_MAGIC:
            raw = _read_h5(path)
        elif head.startswith(_ZIP_MAGICS):
            raw = _read_npz(path)
        elif head == MAGIC[: len(head)]:
            raw = _read_lite(path)
        else:
            raise UserError(
                f"{path} is neither an HDF5 nor an npz file: give Keras's .h5, a Keras 3 "
                ".weights.h5, or an .npz with Keras's names"
            )
    except UserError:
        raise
    except Exception as e:  # h5py, zipfile, the decompressors and NumPy raise many types
        raise _damaged(path, e) from None
    if not raw:
        raise UserError(f"{path} holds no weights: save the network's weights again")
    return {name: _as_float32(path, name, value) for name, value in raw.items()}


def _damaged(path: Path, error: Exception) -> UserError:
    why = printable(str(error))[:200] or type(error).__name__
    return UserError(
        f"{path} is truncated, damaged or no weight file ({why}): copy, download or export it again"
    )


def _as_float32(path: Path, name: str, value: Any) -> np.ndarray:
    if not isinstance(value, np.ndarray) or not np.issubdtype(value.dtype, np.floating):
        kind = getattr(value, "dtype", "no array")
        raise UserError(f"{path}: {name} is {kind}, not of a float type: save it as float32")
    with np.errstate(over="ignore"):  # what overflows is refused just below
        value = np.asarray(value, np.float32)
    if not np.isfinite(value).all():
        raise UserError(f"{path}: {name} has values that are not finite: export it again")
    return value


def _read_lite(path: Path) -> dict[str, Any]:
    try:
        return dict(from_lite_pytorch(read_torch(path)))
    except (KeyError, NoStateDictError) as e:
        raise UserError(
            f"{path} is a PyTorch file, but no state dict of EfficientNet-Lite0 to Lite2 as their "
            f"packages have it ({e.args[0]}): convert it to an .npz with Keras's names"
        ) from None


def _read_npz(path: Path) -> dict[str, Any]:
    # By NumPy's own reader on an open file: given a name, it would go by the suffix.
    with path.open("rb") as file, np.load(file, allow_pickle=False) as npz:
        members = npz.zip.namelist()
        _refuse_bomb(path, sum(info.file_size for info in npz.zip.infolist()))
        if "model.weights.h5" in members:
            raise UserError(
                f"{path} is a whole Keras model: load it in Keras and "
                "save_weights('name.weights.h5'), then give that file"
            )
        if strange := [m for m in members if not m.endswith(".npy")]:
            raise UserError(f"{path} is a zip but no npz (it holds {strange[0]}): give an .npz")
        if len(set(npz.files)) != len(npz.files):
            raise UserError(f"{path} holds an array's name twice: write the npz again")
        for info in npz.zip.infolist():
            _refuse_short(npz.zip, info)
        return {name: npz[name] for name in npz.files}


def _refuse_short(npz: zipfile.ZipFile, info: zipfile.ZipInfo) -> None:
    """NumPy reserves the memory that an array's header asks for, whatever follows it."""
    with npz.open(info) as member:
        version = np.lib.format.read_magic(member)
        if version == (1, 0):
            shape, _, dtype = np.lib.format.read_array_header_1_0(member)
        else:
            shape, _, dtype = np.lib.format.read_array_header_2_0(member)
    if math.prod(shape) * dtype.itemsize > info.file_size:
        raise ValueError(f"{info.filename} is shorter than its shape {shape}")


def _refuse_bomb(path: Path, unpacked: int) -> None:
    if unpacked > min(_MAX_BYTES, _MAX_RATIO * path.stat().st_size):
        raise UserError(
            f"{path} claims to unpack to {unpacked:,} bytes, more than it can hold: export it again"
        )


def _read_h5(path: Path) -> dict[str, Any]:
    with h5py.File(path, "r") as file:
        root = file
        if "model_weights" in file:
            if not isinstance(file.get("model_weights", getlink=True), h5py.HardLink):
                raise UserError(f"{path} links to another place: export it again")
            root = file["model_weights"]
        datasets: list[tuple[str, h5py.Dataset]] = []
        root.visititems(  # follows no link out of the file
            lambda name, item: (
                datasets.append((name, item)) if isinstance(item, h5py.Dataset) else None
            )
        )
        if any(d.external or d.is_virtual for _, d in datasets):
            raise UserError(f"{path} keeps values in other files: export it again")
        _refuse_bomb(path, sum(d.nbytes for _, d in datasets if d.dtype.kind == "f"))
        if any("/vars/" in f"/{name}" for name, _ in datasets):
            named = _keras3_names(path, root, datasets)
        else:
            named = [(_layer_and_array(name), dataset) for name, dataset in datasets]
        raw: dict[str, Any] = {}
        for name, dataset in named:
            if re.search(r"(^|/)normalization(_\d+)?/count$", name):  # of images, no weight
                continue
            if name in raw:
                raise UserError(f"{path} holds {name} twice: save one network's weights alone")
            # What is not of a float type is refused without being read.
            raw[name] = dataset[()] if dataset.dtype.kind == "f" else np.empty(0, dataset.dtype)
        return raw


def _layer_and_array(name: str) -> str:
    """`layer/array` of `.../layer/array` or `.../layer/array:0`, whatever groups are around it.

    Keras 2 has layers with slashes in their names, and writes a layer's name twice:
    `conv1/bn/conv1/bn/gamma:0` is `conv1_bn/gamma`.
    """
    *groups, array = name.removesuffix(":0").split("/")
    half = len(groups) // 2
    twice = half and groups[:half] == groups[half:]
    return "/".join([*(["_".join(groups[:half])] if twice else groups[-1:]), array])


def _keras3_names(
    path: Path, root: h5py.Group, datasets: list[tuple[str, h5py.Dataset]]
) -> list[tuple[str, h5py.Dataset]]:
    """Names for `layers/<class>_<n>/vars/<i>`; the layer's own name is an attribute of `vars`."""
    layers: dict[str, dict[int, h5py.Dataset]] = {}
    for name, dataset in datasets:
        group, _, index = name.rpartition("/")
        if "optimizer" in group.split("/"):  # of this model or of one inside it
            continue
        if not group.endswith("vars") or not index.isdigit():
            raise UserError(f"{path}: {name} is not of Keras 3's layout: save the weights again")
        layers.setdefault(group, {})[int(index)] = dataset
    named = []
    for group, variables in layers.items():
        layer = root[group].attrs.get("name")
        if not isinstance(layer, str):
            raise UserError(
                f"{path}: {group} has no layer name (an older Keras 3 wrote the file): load and "
                "save the weights in a current Keras, or give an .npz with Keras's names"
            )
        values = [variables[i] for i in sorted(variables)]
        # A batch norm's four are vectors; a kernel has two axes or more.
        if len(values) == 4 and all(v.ndim == 1 for v in values):
            arrays: tuple[str, ...] = _BATCH_NORM
        elif len(values) <= 2 and values[0].ndim >= 2:
            arrays = _KERNEL_BIAS[: len(values)]
        elif [v.ndim for v in values] == [1, 1, 0]:
            arrays = _NORMALIZATION
        else:
            raise UserError(
                f"{path}: layer {layer} is no convolution, batch norm or dense layer "
                f"({len(values)} arrays): the file is of another network"
            )
        named += [(f"{layer}/{a}", v) for a, v in zip(arrays, values, strict=True)]
    return named
