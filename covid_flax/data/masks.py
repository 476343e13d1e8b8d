"""Lung masks that lie beside images, as in Kaggle's `<Class>/masks/<same name>.png`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from covid_flax.console import say
from covid_flax.data.decode import decode, resize
from covid_flax.data.folder import KAGGLE_FOLDER, DataFolder
from covid_flax.data.splits import Row
from covid_flax.errors import UserError


@dataclasses.dataclass(frozen=True)
class LungMasks:
    """Masks of some images.

    Attributes:
      files: of each image that has one, the file of its mask.
    """

    files: dict[str, str]
    _read: Callable[[str], bytes] = dataclasses.field(repr=False)

    def mask(self, image: str, size: int) -> np.ndarray:
        """Where the lungs of `image` are, for it resized to a square: bool `[size, size]`.

        Bright is lung (above 127, in any channel). Nearest pixels, for a mask has no greys between.

        Raises:
          UserError: the mask cannot be decoded.
        """
        return resize(self._pixels(image), size, "nearest").max(-1) > 127

    def that_show_lung(self, images: Iterable[str]) -> LungMasks:
        """The masks of `images` but for blank ones, and such as are stored as 0 and 1.

        With those nothing would be hidden, as if a run could do without the lungs.

        Raises:
          UserError: they are all so, or one cannot be decoded.
        """
        asked = sorted(set(images) & self.files.keys())
        shown = [image for image in asked if self._pixels(image).max() > 127]
        if asked and not shown:
            raise UserError(
                f"no mask shows a lung, such as {self.files[asked[0]]}, whose brightest pixel is "
                f"{self._pixels(asked[0]).max()} of 255: save lungs as 255"
            )
        return dataclasses.replace(self, files={image: self.files[image] for image in shown})

    def _pixels(self, image: str) -> np.ndarray:
        return decode(self._read(self.files[image]), self.files[image])


def find_masks(folder: DataFolder, rows: Sequence[Row], directory: str = "") -> LungMasks:
    """The masks of the images `rows`; those that have none are left out.

    Args:
      folder: the images. A mask lies in `masks` or `lung masks` beside their `images` folder, or
        in the folder of the images, under the image's name with any suffix replaced by .png.
      rows: of those images.
      directory: another folder of `<Class>/masks/*.png` or `<Class>/*.png`.

    Raises:
      UserError: `directory` holds no mask of any of the images, or one that fits several (which
        is left out where nobody asked for masks).
    """
    # Those of the folder may lie in a zip.
    top = Path(directory)
    has: Callable[[str], bool] = folder.has
    read: Callable[[str], bytes] = folder.read
    if directory:
        has, read = (lambda file: (top / file).is_file()), _read_from(top)
    label = {f.file: f.label for f in folder.files}  # the folder's own, not the run's
    found: dict[str, str] = {}
    images_of: dict[str, list[str]] = {}
    for row in rows:
        image = PurePosixPath(row.file)
        name = f"{image.stem}.png"
        if directory:
            near = PurePosixPath(label.get(row.file, row.label))
            places = [*_masks(near), near, *_masks(PurePosixPath(KAGGLE_FOLDER) / near)]
        else:
            above = image.parent.parent if image.parent.name.lower() == "images" else image.parent
            places = _masks(above)
        for place in places:
            mask = str(place / name)
            if not has(mask):
                continue
            if directory and _is_image(top / mask, folder.root / row.file):
                continue
            found[row.file] = mask
            images_of.setdefault(mask, []).append(row.file)
            break
    for mask, images in images_of.items():
        if len(images) > 1 and directory:
            raise UserError(
                f"the mask {mask} fits several images, {images[0]} and {images[1]}: give the "
                "images names of their own"
            )
        if len(images) > 1:
            say(f"note: the mask {mask} fits {len(images)} images: taken for none")
            found = {file: of for file, of in found.items() if of != mask}
    if directory and not found:
        raise UserError(
            f"{directory} holds no mask of the images (<Class>/masks/<image's name>.png): "
            "give the folder that holds the classes"
        )
    return LungMasks(found, read)


def _is_image(mask: Path, image: Path) -> bool:
    """Whether the mask's place is that of the image itself."""
    return image.exists() and mask.samefile(image)


def _masks(folder: PurePosixPath) -> list[PurePosixPath]:
    return [folder / "masks", folder / "lung masks"]


def _read_from(top: Path) -> Callable[[str], bytes]:
    def read(file: str) -> bytes:
        try:
            return (top / file).read_bytes()
        except OSError as e:
            raise UserError(f"cannot read {top / file}: {e.strerror}") from e

    return read
