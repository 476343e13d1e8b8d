"""Made clones, one image of which is a copy of the database's."""

import csv
import re
import sys
from pathlib import Path

import by_path
import forked
import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from covid_flax.data.phantoms import draw, write_dataset

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "outside_images.py"
outside_images = by_path.load("scripts/outside_images.py")


def _run(*args):
    return forked.command(SCRIPT, *args, cwd=ROOT)


def _save(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(image).squeeze()).save(path)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The script's answer, and the folder it wrote."""
    tmp_path = tmp_path_factory.mktemp("outside")
    known = tmp_path / "known"
    write_dataset(known, 12, seed=5, size=112)
    clones = tmp_path / "clones"
    actualmed = clones / "Actualmed-COVID-chestxray-dataset"
    for i, label in enumerate(("COVID", "Normal", "Normal")):
        _save(actualmed / "images" / f"a{i}.png", draw(label, seed=900 + i, size=224))
    (actualmed / "metadata.csv").write_text(
        "imagename,finding\na0.png,COVID-19\na1.png,No finding\na2.png,\nabsent.png,COVID-19\n"
    )
    cxnet = clones / "COVID-CXNet" / "chest_xray_images" / "covid19"
    _save(cxnet / "001.png", draw("COVID", seed=910, size=200))
    _save(cxnet / "002-p.png", draw("COVID", seed=911, size=200))
    _save(cxnet / "004.png", draw("COVID", seed=900, size=112))  # Actualmed's, smaller
    copied = Image.open(sorted((known / "COVID" / "images").iterdir())[3]).convert("L")
    _save(cxnet / "003.jpg", copied.resize((150, 150)))
    openist = clones / "OpenIST" / "Datasets" / "Chest_x-ray"
    wide = Image.fromarray(draw("Normal", seed=920, size=200).squeeze())
    _save(openist / "1-10.jpg", wide.resize((250, 200)))
    _save(openist / "1-10@.jpg", wide)
    done = _run(f"--clones={clones}", f"--data_dir={known}", f"--output={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    return done, tmp_path / "out"


def test_images_are_sorted_and_copies_left_out(built):
    done, out = built
    files = sorted(str(p.relative_to(out)) for p in out.glob("*/*/images/*"))
    assert files == [
        "choosing/COVID/images/COVID-CXNet~001.png",
        "choosing/Normal/images/OpenIST~1-10.png",
        "held_back/COVID/images/Actualmed-COVID-chestxray-dataset~a0.png",
        "held_back/Normal/images/Actualmed-COVID-chestxray-dataset~a1.png",
    ]
    assert "CXNet: COVID 1, held back in another source 1, in the database 1" in done.stdout
    assert "dataset: COVID 1, Normal 1, missing or unreadable 1" in done.stdout
    assert "Figure1-COVID-chestxray-dataset: no clone" in done.stderr


def test_images_are_made_like_the_database_s(built, tmp_path):
    for path in built[1].glob("*/*/images/*"):
        image = np.asarray(Image.open(path))
        assert image.dtype == np.uint8 and image.shape == (112, 112)
        assert image.min() == 0 and image.max() == 255

    ramp = np.tile(np.arange(0, 5000, 5, dtype=np.uint16), (500, 1))  # 16 bits, twice as wide
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    got = np.asarray(outside_images.like_the_database(tmp_path / "deep.png"), np.float64)
    np.testing.assert_allclose(got, np.tile(np.linspace(0, 255, 112), (112, 1)), atol=2.5)


def test_the_score_is_scikit_learn_s_of_the_odds(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(3), 60)
    labels = np.where(rng.random(60) < 0.4 + 0.4 * (p[:, 0] > p[:, 2]), "COVID", "Normal")
    with open(tmp_path / "predictions.csv", "w", newline="") as f:
        write = csv.writer(f).writerow
        write(["file", "label", "predicted", "p_COVID", "p_Lung_Opacity", "p_Normal"])
        write(["b.png", "Lung_Opacity", "COVID", 0.75, 0.25, 0])  # of neither class
        for i, (label, row) in enumerate(zip(labels, p, strict=True)):
            answer = ("COVID", "Lung_Opacity", "Normal")[row.argmax()]
            write([f"{label}/images/A~{i}.png", label, answer, *row])
    monkeypatch.setattr(outside_images, "_RESAMPLES", 500)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--score", str(tmp_path / "predictions.csv")])
    outside_images.main()
    lines = capsys.readouterr().out.splitlines()
    want = roc_auc_score(labels == "COVID", p[:, 0] / p[:, 2])
    found = re.search(
        r"60 images of COVID and Normal, AUROC ([.\d]+) \(95 %: ([.\d]+) to ([.\d]+)\)", lines[0]
    )
    auroc, low, high = map(float, found.groups())
    assert auroc == round(want, 3) and 0.5 < want < 1
    # Hanley and McNeil (1982)
    n = (labels == "COVID").sum()
    q1, q2 = want / (2 - want), 2 * want**2 / (1 + want)
    variance = want * (1 - want) + (n - 1) * (q1 - want**2) + (59 - n) * (q2 - want**2)
    error = np.sqrt(variance / (n * (60 - n)))
    assert abs((high - low) / (3.92 * error) - 1) < 0.25
    answers = p[labels == "COVID"].argmax(1)
    n = np.bincount(answers, minlength=3)
    assert lines[1] == f"  A COVID called COVID {n[0]}, Lung_Opacity {n[1]}, Normal {n[2]}"


@pytest.mark.slow
def test_what_a_user_can_get_wrong_is_one_line(tmp_path):
    write_dataset(tmp_path / "known", 2, size=64)
    done = _run(f"--clones={tmp_path}", f"--data_dir={tmp_path / 'known'}")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: ") and "--help" in done.stderr

    (tmp_path / "Figure1-COVID-chestxray-dataset").mkdir()
    done = _run(f"--clones={tmp_path}", f"--data_dir={tmp_path / 'known'}")
    assert done.returncode == 2 and "metadata.csv" in done.stderr.splitlines()[-1]

    (tmp_path / "out" / "choosing").mkdir(parents=True)
    there = ("--output", tmp_path / "out")
    done = _run(f"--clones={tmp_path}", f"--data_dir={tmp_path / 'known'}", *there)
    assert done.returncode == 2 and "choosing is there already" in done.stderr

    table = tmp_path / "predictions.csv"
    done = _run("--score", table)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and str(table) in done.stderr
    table.write_text("file,label,predicted,p_COVID,p_Normal\na.png,COVID,COVID,0.75,0.25\n")
    done = _run("--score", table)
    assert done.returncode == 2 and "none of Normal" in done.stderr


def test_copies_make_the_score_no_surer(tmp_path, monkeypatch):
    monkeypatch.setattr(outside_images, "_RESAMPLES", 300)
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(2), 40)
    labels = np.where(rng.random(40) < p[:, 0], "COVID", "Normal")

    def scored(copies):
        (folder := tmp_path / str(copies)).mkdir()
        names = [(f"A~{i}-{k}.png", i) for i in range(40) for k in range(copies)]
        rows = [[n, labels[i], ("COVID", "Normal")[p[i].argmax()], *p[i]] for n, i in names]
        head = ["file", "label", "predicted", "p_COVID", "p_Normal"]
        tables = {"predictions.csv": [head, *rows], "groups.csv": [["file", "group"], *names]}
        for file, table in tables.items():
            with open(folder / file, "w", newline="") as f:
                csv.writer(f).writerows(table)
        return re.search(r"AUROC .*\)", outside_images.score(folder / "predictions.csv"))[0]

    assert scored(1) == scored(4)


def test_each_source_gives_its_images_their_class(tmp_path):
    for name in (
        "dataset/images/JPCNN001.png",
        "dataset/images/JPCLN001.png",
        "images/p1.jpg",
        "images/p2.png",
        "images/p3.png",
    ):
        _save(tmp_path / name, np.zeros((8, 8), np.uint8))
    (tmp_path / "metadata.csv").write_text(
        "patientid,finding\np1,COVID-19\np2,No finding\np3,Pneumonia\n"
    )

    def found(source):
        return {path.name: label for path, label in source(tmp_path)}

    assert found(outside_images._jsrt) == {"JPCNN001.png": "Normal"}  # no nodule
    assert found(outside_images._figure1) == {"p1.jpg": "COVID", "p2.png": "Normal"}
