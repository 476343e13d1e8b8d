"""Networks whose cue is known."""

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import by_path
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from covid_flax.data.splits import read_split_csv
from covid_flax.run import setup
from covid_flax.train import train

ROOT = Path(__file__).parents[2]
pair_cues = by_path.load("scripts/pair_cues.py")


def _asked(cue, twins_of):
    """Answers by name of a network that says class 1 where `cue` of an image is above 0."""
    rng = np.random.default_rng(0)
    smooth = ndimage.gaussian_filter(rng.uniform(0, 255, (12, 40, 40)), (0, 3, 3))
    originals = 60 + 130 * (smooth - smooth.min()) / np.ptp(smooth)

    def probabilities(source, description):
        images = [np.asarray(source[i]["image"], np.float64).mean(-1) for i in range(len(source))]
        high = np.array([float(cue(x)) for x in images]) > 0
        return np.where(high[:, None], [0.1, 0.9], [0.9, 0.1])

    data = SimpleNamespace(image_size=40, interpolation="bilinear", intermediate_size=0)
    run = SimpleNamespace(probabilities=probabilities, config=SimpleNamespace(data=data))
    twins = twins_of(originals, rng)
    found = pair_cues.answers(run, originals, twins, np.zeros(12, int))
    return {name: (counts[1], factor[1]) for name, counts, factor in found}


def test_a_cue_of_noise_is_found_in_fine_detail_and_in_white_noise():
    got = _asked(
        lambda x: ndimage.laplace(x).std() - 8,
        lambda x, rng: x + 6 + rng.normal(0, 4, x.shape),
    )
    assert got["original"] == (0, 1)
    noisy = ["twin", "twin's detail finer than 1.5 pixels", "twin, original's mean grey"]
    noisy += [name for name in got if name.startswith("original, ")]
    assert len(noisy) == 5
    for name in noisy:
        assert got[name] == (12, pytest.approx(81)), name  # from odds of 1 to 9 to 9 to 1
    assert got["twin's detail coarser than 1.5 pixels"][0] == 0


def test_a_cue_of_grey_is_found_in_coarse_detail_and_in_the_mean():
    got = _asked(lambda x: x.mean() - 126, lambda x, rng: x - x.mean((1, 2), keepdims=True) + 130)
    left = {name: counts for name, (counts, _) in got.items()}
    originals = left.pop("original")
    assert originals < 12 and left.pop("twin") == 12
    for name, counts in left.items():
        assert counts == (12 if "coarser" in name else originals), name


@pytest.mark.slow
def test_a_run_is_asked_about_what_it_was_not_trained_on(tiny_config, tmp_path):
    tiny_config.data.split, tiny_config.data.test_fraction = "grouped", 0.25
    tiny_config.train.epochs = 1
    workdir = tmp_path / "run"
    train(setup(tiny_config, workdir))
    rows = [row for row in read_split_csv(workdir / "split.csv") if row.label == "Normal"]
    for row in rows:
        path = tmp_path / "pairs" / row.file
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.open(Path(tiny_config.data.dir) / row.file).save(path)
    command = [sys.executable, ROOT / "scripts/pair_cues.py", f"--workdir={workdir}"]
    done = subprocess.run(
        [*command, f"--pairs={tmp_path / 'pairs'}"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    held_out = sum(row.split != "train" for row in rows)
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"{held_out} pairs, none trained on")
    assert len(lines) == 1 + 2 + 2 * 3 + 3
    assert lines[1].split()[1:5] == lines[2].split()[1:5]  # twins are copies here
    assert lines[2].endswith("x 1.00")

    moved = tmp_path / "moved"
    shutil.copytree(tiny_config.data.dir, moved)
    done = subprocess.run(
        [*command, f"--pairs={tmp_path / 'pairs'}", f"--data_dir={moved}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.stdout.splitlines() == lines, done.stderr

    image = Image.open(path).resize((30, 30))
    image.save(path)
    done = subprocess.run(
        [*command, f"--pairs={tmp_path / 'pairs'}"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2 and "must all be of one size" in done.stderr
