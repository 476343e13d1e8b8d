"""Synthetic chest X-ray phantoms: four classes drawn from formulas, no outside data.

They exist so that the program can be tried and tested without a patient's image. A phantom is a
frontal chest radiograph (bright is dense): body outline, two lungs, heart and mediastinum, spine,
ribs, clavicles, diaphragm, vessels, film noise. All of these vary from "patient" to "patient"
in the same way for every class; only what lies in the lungs tells the classes apart:

* COVID: patchy ground-glass opacities, mostly both sides, peripheral and in the lower zones;
* Lung_Opacity: one denser consolidation, a part of one lung, sharp along a fissure;
* Normal: none;
* Viral Pneumonia: haze around both hila, thickened streaks and a fine mesh.

Severity reaches down to nearly invisible, so the classes overlap. The pictures teach nothing
about disease, and a figure reached on them says nothing about radiographs.

    python -m covid_flax.data.phantoms --output=DIR --per_class=N [--seed=0] [--size=128]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

from covid_flax.errors import UserError, run_script
from covid_flax.files import expanded, part_of

CLASSES = ("COVID", "Lung_Opacity", "Normal", "Viral Pneumonia")
SETTINGS_FILE = "phantoms.json"
# Of the drawing itself: raised whenever the same seed no longer gives the same picture, so that
# a folder drawn by an older version is not taken for a current one.
VERSION = 1
MIN_SIZE = 32


@dataclass
class _Chest:
    """One patient: the maps of a picture before any opacity, and the geometry to place one.

    Lengths are in half picture sides: x runs from -1 (the patient's right) to 1, y from -1 (top)
    to 1. Maps are float64 [size, size].
    """

    x: np.ndarray
    y: np.ndarray
    base: np.ndarray  # brightness, 0 to about 1
    lung: np.ndarray  # 0 outside the aerated lungs, 1 inside
    noise: np.ndarray
    to_pixels: np.ndarray  # [2, 3], patient coordinates to pixels
    apex: float
    width: float
    domes: dict[int, float]  # height of the diaphragm by side, -1 or 1
    gain: float
    offset: float
    gamma: float

    def lateral(self, u: Any) -> Any:
        """|x| of the lung's outer edge at the height u, 0 at the apex and 1 at the base."""
        return 0.28 + (self.width - 0.28) * np.sqrt(1 - (1 - np.clip(u, 0, 1)) ** 2.2)

    def medial(self, u: Any) -> Any:
        return 0.28 - 0.15 * np.sqrt(1 - (1 - np.clip(u, 0, 1)) ** 4)

    def height(self, side: int) -> np.ndarray:
        """u at each pixel for the lung of that side."""
        return (self.y - self.apex) / (self.domes[side] - self.apex)

    def point(self, side: int, across: float, u: float) -> tuple[float, float]:
        """The place in a lung: across from 0 (medial) to 1 (lateral), u from apex to base."""
        inner, outer = self.medial(u), self.lateral(u)
        x = side * (inner + across * (outer - inner))
        return x, self.apex + u * (self.domes[side] - self.apex)


def draw(label: str, seed: int, size: int = 128) -> np.ndarray:
    """One phantom, uint8 [size, size], grey, bright where dense.

    The same seed gives the same patient for every label: outside the lungs the pictures of two
    labels are equal.

    Raises:
      UserError: the label is none of CLASSES, or the size is below 32.
    """
    return _draw(label, seed, size)[0]


def write_dataset(directory: Path, per_class: int, *, seed: int = 0, size: int = 128) -> None:
    """Writes `per_class` phantoms of each class in Kaggle's layout, all or nothing.

    `<Class>/images/<Class>-<n>.png` with n from 1, lung masks of the same name under
    `<Class>/masks/`, and the settings in `phantoms.json`. A folder already drawn with the same
    settings is left as it is.

    Raises:
      UserError: bad settings, the folder holds something else, or it cannot be written.
    """
    directory = Path(directory)
    if per_class < 1:
        raise UserError(f"per_class must be at least 1, got {per_class}")
    if seed < 0:
        raise UserError(f"the phantoms' seed must not be negative, got {seed}")
    _check_size(size)
    settings = {"version": VERSION, "per_class": per_class, "seed": seed, "size": size}
    if _holds(directory, settings):
        return
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(
            f"{directory} exists and is not a complete set of phantoms with {settings}: "
            "remove it or name another folder"
        )
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        part = part_of(directory)
        part.mkdir()
    except OSError as error:
        raise UserError(f"cannot write phantoms to {directory}: {error.strerror}") from error
    try:
        _write(part, settings)
        os.replace(part, directory)
    except OSError as error:
        # Another process may have finished the same folder meanwhile.
        if not _holds(directory, settings):
            raise UserError(f"cannot write phantoms to {directory}: {error.strerror}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def main(arguments: list[str] | None = None) -> None:
    """The command. Raises UserError."""
    parser = argparse.ArgumentParser(prog="python -m covid_flax.data.phantoms")
    parser.description = "Draws synthetic chest X-rays of four classes."
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--per_class", type=int, required=True, help="pictures of each class")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=128, help="side in pixels")
    args = parser.parse_args(arguments)
    output = expanded(args.output)
    write_dataset(output, args.per_class, seed=args.seed, size=args.size)
    print(f"{len(CLASSES) * args.per_class} phantoms in {output}")


def _holds(directory: Path, settings: dict[str, int]) -> bool:
    try:
        found = json.loads((directory / SETTINGS_FILE).read_text())
    except (OSError, ValueError):
        return False
    names = range(1, settings["per_class"] + 1)
    return found == settings and all(
        (directory / label / folder / f"{label}-{n}.png").is_file()
        for label in CLASSES
        for folder in ("images", "masks")
        for n in names
    )


def _write(directory: Path, settings: dict[str, int]) -> None:
    total = settings["per_class"] * len(CLASSES)
    with tqdm(total=total, desc="Drawing phantoms", unit=" pictures", leave=False) as bar:
        _draw_all(directory, settings, bar)
    (directory / SETTINGS_FILE).write_text(json.dumps(settings) + "\n")


def _draw_all(directory: Path, settings: dict[str, int], bar: tqdm) -> None:
    for k, label in enumerate(CLASSES):
        for folder in ("images", "masks"):
            (directory / label / folder).mkdir(parents=True)
        for n in range(1, settings["per_class"] + 1):
            # A patient of their own for each picture: shared ones would be near-duplicates.
            sequence = np.random.SeedSequence([settings["seed"], k, n])
            pixels, mask = _draw(label, int(sequence.generate_state(1)[0]), settings["size"])
            for folder, array in (("images", pixels), ("masks", mask)):
                path = directory / label / folder / f"{label}-{n}.png"
                Image.fromarray(array).save(path, compress_level=1)
            bar.update()


def _check_size(size: int) -> None:
    if size < MIN_SIZE:
        raise UserError(f"phantoms need a size of at least {MIN_SIZE} pixels, got {size}")


def _draw(label: str, seed: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Picture and lung mask (255 in the lungs), both uint8 [size, size]."""
    if label not in CLASSES:
        raise UserError(f"no phantom of class {label!r}: choose one of {', '.join(CLASSES)}")
    _check_size(size)
    # Two streams, so that the class cannot reach anything but the opacity.
    chest = _chest(np.random.default_rng([seed, 0]), size)
    rng = np.random.default_rng([seed, 1])
    opacity = {
        "COVID": _ground_glass,
        "Lung_Opacity": _consolidation,
        "Normal": lambda chest, rng: 0.0,
        "Viral Pneumonia": _interstitial,
    }[label](chest, rng)
    # The denser the tissue already in the way, the less an opacity adds. The square root lets it
    # reach the lung's soft edge, where a dark seam would remain.
    brightness = chest.base + opacity * np.sqrt(chest.lung) * (1 - chest.base)
    brightness = np.clip(brightness, 0, None) ** chest.gamma * chest.gain + chest.offset
    pixels = np.clip(np.rint(255 * (brightness + chest.noise)), 0, 255).astype(np.uint8)
    mask = np.where(chest.lung > 0.5, 255, 0).astype(np.uint8)
    return pixels, mask


def _step(distance: np.ndarray, softness: float) -> np.ndarray:
    """0 to 1 as the signed distance passes 0, smooth over about `softness`."""
    t = np.clip(distance / (2 * softness) + 0.5, 0, 1)
    return t * t * (3 - 2 * t)


def _clouds(rng: np.random.Generator, size: int, cells: int) -> np.ndarray:
    """Smooth noise of unit variance (nearly) whose blobs are 1/cells of the picture."""
    grid = rng.standard_normal((cells, cells)).astype(np.float32)
    image = Image.fromarray(grid).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image, np.float64) * 1.4


def _chest(rng: np.random.Generator, size: int) -> _Chest:
    scale = rng.normal(1.0, 0.05)
    tilt = np.deg2rad(rng.normal(0, 2.5))
    shift = rng.normal(0, 0.035, 2)
    stretch = rng.normal(1.0, 0.04)
    # Pixels to patient: p = R^-1 (q - shift) / scale; to_pixels is its inverse.
    cos, sin = np.cos(tilt), np.sin(tilt)
    axis = (np.arange(size) + 0.5) / size * 2 - 1
    qx, qy = np.meshgrid(axis - shift[0], axis - shift[1])
    x = (cos * qx + sin * qy) / scale
    y = (-sin * qx + cos * qy) / (scale * stretch)
    linear = scale * np.array([[cos, -sin * stretch], [sin, cos * stretch]])
    to_pixels = np.column_stack([linear, shift + 1]) * size / 2
    ax = np.abs(x)
    px = 2 / size  # edges are never sharper than a pixel

    right = rng.normal(0.36, 0.07)
    chest = _Chest(
        x=x,
        y=y,
        base=np.zeros_like(x),
        lung=np.zeros_like(x),
        noise=np.zeros_like(x),
        to_pixels=to_pixels,
        apex=rng.normal(-0.78, 0.03),
        width=rng.normal(0.72, 0.03),
        domes={-1: right, 1: right + rng.normal(0.06, 0.03)},
        gain=rng.uniform(0.82, 1.08),
        offset=rng.uniform(0.0, 0.07),
        gamma=rng.uniform(0.8, 1.25),
    )

    # Body: neck, shoulders, trunk. The outline is a half-width for each height.
    trunk = rng.normal(0.93, 0.04)
    neck = rng.uniform(0.24, 0.3)
    shoulder = rng.normal(-0.96, 0.04)
    half = neck + (1.15 - neck) * np.clip((y - shoulder) / 0.36, 0, 1) ** 1.4
    half = half - (1.15 - trunk) * _step(y + 0.1, 0.3)
    body = _step(half - ax, 1.5 * px)
    depth = np.sqrt(np.clip(1 - (ax / half) ** 2, 0, 1))
    picture = body * (0.34 + 0.28 * depth)

    # Lungs, diaphragm and what lies below.
    lung = np.zeros_like(x)
    below = np.zeros_like(x)
    for side in (-1, 1):
        half_plane = side * x > 0
        u = chest.height(side)
        angle = rng.uniform(0.14, 0.24)  # how deep the costophrenic angle lies under the dome
        floor = chest.domes[side] + angle * ((ax - 0.28) / 0.42) ** 2 - y
        edge = np.minimum(chest.lateral(u) - ax, ax - chest.medial(u))
        edge = np.minimum(np.minimum(edge, y - chest.apex), floor)
        lung = np.where(half_plane, _step(edge, 1.5 * px), lung)
        below += _step(side * x, 0.1) * _step(-floor, 1.5 * px)
    liver = 0.16 + 0.04 * _step(-x, 0.4)
    picture += body * below * liver * (0.5 + 0.5 * depth)
    if rng.random() < 0.5:  # gas in the stomach
        cx, cy = rng.uniform(0.25, 0.45), chest.domes[1] + rng.uniform(0.14, 0.22)
        bubble = 1 - np.hypot((x - cx) / rng.uniform(0.12, 0.2), (y - cy) / 0.07)
        picture -= 0.2 * _step(bubble, 0.25) * below

    # Heart and great vessels.
    span = rng.normal(1.0, 0.09)
    heart_y = chest.domes[1] - 0.2
    hx, hy = x - 0.12, y - heart_y
    hx, hy = 0.82 * hx - 0.57 * hy, 0.57 * hx + 0.82 * hy
    heart = _step(1 - np.hypot(hx / (0.24 * span), hy / (0.42 * span)), 0.06)
    root = _step(1 - np.hypot((x - 0.07) / 0.15, (y + 0.12) / 0.2), 0.1)
    heart = np.maximum(heart, root)
    column = 0.13 + 0.05 * _step(y + 0.1, 0.5) + 0.02 * _step(-0.6 - y, 0.2)
    column = _step(column - ax, 0.02)
    arch = _step(1 - np.hypot((x - 0.1) / 0.08, (y + 0.36) / 0.1), 0.2)
    centre = np.maximum(np.maximum(heart, arch), column)
    lung = lung * (1 - centre)
    # Aeration varies, and the bases look denser where breath was held badly.
    haze = 0.05 * rng.random() * _step(y - 0.1, 0.5)
    picture -= body * lung * (rng.uniform(0.3, 0.36) - haze)
    picture += body * centre * 0.14 * _step(y + 0.95, 0.2)
    picture -= 0.07 * _step(0.045 - ax, 0.02) * _step(-0.28 - y, 0.1) * body  # the windpipe

    _add_bones(picture, chest, body, below, rng)
    _add_breasts(picture, chest, body, rng)

    # Hila and vessels.
    chest.lung = lung
    hilum = rng.uniform(0.04, 0.12)
    for side in (-1, 1):
        r2 = ((side * x - 0.2) / 0.09) ** 2 + ((y + 0.1) / 0.15) ** 2
        picture += hilum * lung * np.exp(-r2)
    vessels = _branches(chest, rng, trunks=7, width=0.016)
    picture += rng.uniform(0.1, 0.2) * lung * vessels

    chest.base = picture + body * 0.012 * _clouds(rng, size, 10)
    grain = 0.006 + np.abs(rng.normal(0, 0.008))
    chest.noise = grain * rng.standard_normal((size, size)) + 0.01 * _clouds(rng, size, 4)
    return chest


def _add_bones(
    picture: np.ndarray,
    chest: _Chest,
    body: np.ndarray,
    below: np.ndarray,
    rng: np.random.Generator,
) -> None:
    """To the picture: spine, ribs, clavicles, shoulder blades. `below` is 1 under the diaphragm."""
    x, y, ax = chest.x, chest.y, np.abs(chest.x)

    # Spine: a bright column with discs.
    period = rng.uniform(0.125, 0.15)
    discs = 0.5 + 0.5 * np.cos(2 * np.pi * (y + rng.random()) / period)
    picture += body * _step(0.085 - ax, 0.03) * (0.05 + 0.03 * discs)

    # Ribs: nearly parallel curves, so one periodic phase draws them all.
    spacing = rng.uniform(0.145, 0.175)
    cage = _step(chest.width + 0.05 - ax, 0.03) * _step(y - chest.apex + 0.1, 0.06)
    cage *= _step(0.75 - y, 0.3)
    strength = rng.uniform(0.06, 0.12)
    lateral = ax / chest.width
    back = y + 0.1 * np.sin(np.pi * np.clip(lateral, 0, 1)) - 0.4 * lateral**4
    phase = np.mod(back / spacing + rng.random(), 1) - 0.5
    rib = _step(0.24 - np.abs(phase), 0.08)
    rim = np.exp(-(((np.abs(phase) - 0.22) / 0.06) ** 2))
    # The exposure saturates: bone shows less against the abdomen than against the lungs.
    seen = body * cage * (1 - 0.7 * below)
    picture += seen * _step(ax - 0.08, 0.03) * strength * (0.75 * rib + 0.35 * rim)
    front = y - 0.4 * np.clip(1 - lateral, 0, 1) ** 1.3 - 0.1 * lateral
    phase = np.mod(front / (spacing * 1.5) + rng.random(), 1) - 0.5
    fade = _step(ax - 0.32, 0.12)
    picture += seen * fade * 0.3 * strength * _step(0.2 - np.abs(phase), 0.1)
    rim = np.exp(-(((ax - chest.lateral(chest.height(1)) - 0.025) / 0.025) ** 2))
    picture += seen * 0.1 * rim * _step(y + 0.55, 0.2)

    # Clavicles and shoulder blades.
    rise = rng.normal(0.0, 0.02)
    for side in (-1, 1):
        t = np.clip((side * x - 0.08) / 0.75, 0, 1)
        line = -0.6 + rise * side - 0.2 * t - 0.05 * np.sin(2 * np.pi * t)
        clavicle = _step(0.028 - np.abs(y - line), 0.02)
        picture += body * 0.13 * clavicle * _step(side * x - 0.09, 0.02) * _step(0.82 - ax, 0.05)
        blade = np.abs(side * x - 0.74 - 0.25 * (y + 0.4)) - 0.05
        picture += body * 0.06 * _step(-blade, 0.05) * _step(0.35 - np.abs(y + 0.35), 0.1)


def _add_breasts(
    picture: np.ndarray, chest: _Chest, body: np.ndarray, rng: np.random.Generator
) -> None:
    """To the picture of half of the patients: shadows that look like faint basal opacities."""
    x, y = chest.x, chest.y
    if rng.random() < 0.5:
        amount, size_y = rng.uniform(0.02, 0.07), rng.uniform(0.2, 0.3)
        for side in (-1, 1):
            shadow = np.hypot((side * x - 0.47) / 0.34, (y - 0.18) / size_y)
            picture += body * amount * _step(1 - shadow, 0.1)


def _branches(
    chest: _Chest, rng: np.random.Generator, *, trunks: int, width: float, wander: float = 0.16
) -> np.ndarray:
    """Branching lines that taper from both hila outwards, 0 to 1, float64 [size, size]."""
    size = chest.x.shape[0]
    fine = 2  # drawn at twice the resolution: lines are thinner than a pixel at their ends
    lines: list[tuple[float, float, float, float, float]] = []

    def grow(x: float, y: float, angle: float, side: int, thick: float, left: int) -> None:
        for _ in range(left):
            step = rng.uniform(0.05, 0.09)
            nx, ny = x + side * step * math.cos(angle), y + step * math.sin(angle)
            lines.append((x, y, nx, ny, thick))
            x, y, left, thick = nx, ny, left - 1, thick * 0.84
            angle += rng.normal(0, wander)
            if left > 2 and rng.random() < 0.4:
                turn = rng.uniform(0.4, 0.9) * (1 if rng.random() < 0.5 else -1)
                grow(x, y, angle + turn, side, thick * 0.75, left - 1)

    for side in (-1, 1):
        for k in range(trunks):
            angle = -1.35 + 2.7 * (k + rng.uniform(0.1, 0.9)) / trunks
            start = rng.normal(0, 0.03) - 0.08 + 0.12 * math.sin(angle)
            grow(side * 0.16, start, angle, side, width, 8)

    table = np.array(lines)
    ends = table[:, :4].reshape(-1, 2) @ chest.to_pixels[:, :2].T + chest.to_pixels[:, 2]
    image = Image.new("L", (fine * size, fine * size))
    pen = ImageDraw.Draw(image)
    pixels = (table[:, 4] * fine * size / 2).tolist()
    for points, thick in zip((ends * fine).reshape(-1, 4).tolist(), pixels, strict=True):
        # What is thinner than a pixel is drawn fainter instead.
        pen.line(points, fill=int(255 * min(1.0, max(thick, 0.3))), width=max(1, round(thick)))
    image = image.filter(ImageFilter.GaussianBlur(0.6 * fine)).resize(
        (size, size), Image.Resampling.BOX
    )
    return np.asarray(image, np.float64) / 255


def _blob(chest: _Chest, x: float, y: float, rx: float, ry: float, turn: float) -> np.ndarray:
    """A Gaussian spot with the two radii, turned by radians."""
    dx, dy = chest.x - x, chest.y - y
    cos, sin = np.cos(turn), np.sin(turn)
    a, b = cos * dx + sin * dy, cos * dy - sin * dx
    return np.exp(-((a / rx) ** 2) - (b / ry) ** 2)


def _ground_glass(chest: _Chest, rng: np.random.Generator) -> np.ndarray:
    """COVID: patches in the outer and lower lung, both sides in nine of ten."""
    severity = rng.beta(1.8, 1.8)
    count = 4 + rng.poisson(1 + 4 * severity)
    first = int(rng.choice([-1, 1]))
    both = rng.random() < 0.9
    field = np.zeros_like(chest.x)
    for k in range(count):
        side = first * (-1) ** k if both else first
        x, y = chest.point(side, rng.beta(3.5, 1.3), rng.beta(3.5, 1.5))
        rx, ry = rng.uniform(0.07, 0.17, 2) * (0.8 + 0.4 * severity)
        field += rng.uniform(0.5, 1.2) * _blob(chest, x, y, rx, ry, rng.uniform(0, np.pi))
    texture = np.clip(1 + 0.6 * _clouds(rng, chest.x.shape[0], 20), 0.1, None)
    return (0.16 + 0.3 * severity) * (1 - np.exp(-field * texture))


def _consolidation(chest: _Chest, rng: np.random.Generator) -> np.ndarray:
    """Lung_Opacity: one dense region of one lung that ends sharply at a fissure."""
    severity = rng.beta(1.8, 1.8)
    side = int(rng.choice([-1, 1]))
    u = chest.height(side)
    span = np.maximum(chest.lateral(u) - chest.medial(u), 0.05)  # 0 at the apex
    across = (side * chest.x - chest.medial(u)) / span
    # The fissure falls or rises towards the outer wall; the region lies above or below it.
    fissure = rng.uniform(0.4, 0.65) + rng.uniform(-0.25, 0.25) * (across - 0.5)
    below = rng.random() < 0.6
    distance = (u - fissure) if below else (fissure - u)
    reach = rng.uniform(0.18, 0.45)
    region = _step(distance, 0.02) * _step(reach - distance, 0.12)
    middle = rng.uniform(0.1, 0.9)
    region *= np.exp(-(((across - middle) / rng.uniform(0.35, 0.8)) ** 4))
    region *= side * chest.x > 0
    texture = np.clip(1 + 0.18 * _clouds(rng, chest.x.shape[0], 12), 0.3, 1.4)
    return (0.2 + 0.4 * severity) * region * texture


def _interstitial(chest: _Chest, rng: np.random.Generator) -> np.ndarray:
    """Viral Pneumonia: haze around both hila, thick streaks, a fine mesh."""
    severity = rng.beta(1.8, 1.8)
    size = chest.x.shape[0]
    haze = np.zeros_like(chest.x)
    for side in (-1, 1):
        y = rng.normal(-0.02, 0.06)
        haze += rng.uniform(0.75, 1.25) * _blob(chest, side * 0.24, y, 0.32, 0.48, 0.0)
    mesh = np.abs(_clouds(rng, size, 34))
    streaks = _branches(chest, rng, trunks=10, width=0.022, wander=0.3)
    amount = 0.1 + 0.28 * severity
    return amount * (0.6 * haze * (0.7 + 0.3 * mesh) + 0.15 * mesh + 0.8 * streaks)


if __name__ == "__main__":
    run_script(main)
