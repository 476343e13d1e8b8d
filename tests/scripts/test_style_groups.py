"""The styles of made images are known."""

import csv
from pathlib import Path

import by_path
import forked
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from covid_flax.data.folder import open_folder
from covid_flax.data.splits import make_split

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "style_groups.py"

style_groups = by_path.load("scripts/style_groups.py")

PER_STYLE = 8


def _image(rng, style):
    """0: soft and dark; 1: grainy and bright; 2: soft, with a black frame."""
    x = ndimage.gaussian_filter(rng.uniform(0, 255, (150, 140)), 6)
    x = (x - x.min()) / np.ptp(x) * 120 + (100 if style == 1 else 20)
    if style == 1:
        x = x + rng.normal(0, 12, x.shape)
    if style == 2:
        x[:20] = x[-20:] = 0
        x[:, :20] = x[:, -20:] = 0
    return np.clip(x, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    rng = np.random.default_rng(0)
    root = tmp_path_factory.mktemp("styles")
    for label in ("A", "B"):
        (root / label).mkdir()
        for i in range(3 * PER_STYLE):
            Image.fromarray(_image(rng, i % 3)).save(root / label / f"{i:02}.png")
    return root


def _run(*args):
    return forked.command(SCRIPT, *args, cwd=ROOT)


def _groups(path):
    with open(path, newline="") as f:
        return {row["file"]: row["group"] for row in csv.DictReader(f)}


def test_styles_are_found_and_held_out_whole(folder, tmp_path):
    done = _run(f"--data_dir={folder}", f"--output={tmp_path / 'styles.csv'}", "--styles=3")
    assert done.returncode == 0, done.stderr
    found = _groups(tmp_path / "styles.csv")
    assert len(found) == 6 * PER_STYLE
    for label in ("A", "B"):
        by_style = [{found[f"{label}/{i:02}.png"] for i in range(s, 24, 3)} for s in range(3)]
        assert all(len(names) == 1 for names in by_style) and len(set.union(*by_style)) == 3

    data = open_folder(str(folder), groups_file=str(tmp_path / "styles.csv"))
    for fold in range(3):
        rows = make_split(data, split="grouped", val_fraction=0.1, folds=3, fold=fold, seed=0)
        held = {row.group for row in rows if row.split == "val"}
        assert sorted(name[0] for name in held) == ["A", "B"]
        assert not held & {row.group for row in rows if row.split == "train"}


def test_images_that_belong_together_stay_together(folder, tmp_path):
    rows = ["file,group"] + [f"A/{i:02}.png,{'same' if i < 3 else i}" for i in range(24)]
    (tmp_path / "groups.csv").write_text("\n".join(rows) + "\n")
    args = [f"--data_dir={folder}", f"--groups_file={tmp_path / 'groups.csv'}", "--styles=3"]
    assert _run(*args, f"--output={tmp_path / 'styles.csv'}").returncode == 0
    found = _groups(tmp_path / "styles.csv")
    assert len({found[f"A/{i:02}.png"] for i in range(3)}) == 1


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (["--styles=40"], "fewer --styles"),
        pytest.param(["--styles=1"], "at least 2", marks=pytest.mark.slow),
    ],
)
def test_a_user_s_error_is_one_line(folder, tmp_path, args, word):
    done = _run(f"--data_dir={folder}", f"--output={tmp_path / 's.csv'}", *args)
    assert done.returncode == 2 and word in done.stderr.splitlines()[-1]
    assert not (tmp_path / "s.csv").exists()


def test_figures_do_not_depend_on_anatomy_alone():
    """Sharpness and frame move their own figures, and a shift of a pixel hardly any."""
    rng = np.random.default_rng(1)
    x = ndimage.gaussian_filter(rng.uniform(0, 255, (112, 112)), 3)
    x = (x - x.min()) / np.ptp(x) * 255
    plain, shifted = style_groups.style(x), style_groups.style(np.roll(x, 1, 0))
    grainy = style_groups.style(np.clip(x + rng.normal(0, 20, x.shape), 0, 255))
    fine = slice(19, 22)  # power of 17 cycles an image and more
    assert np.all(grainy[fine] - plain[fine] > 2)
    assert np.all(np.abs(shifted[fine] - plain[fine]) < 0.5)
