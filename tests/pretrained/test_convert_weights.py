"""The converter as a command."""

from pathlib import Path

import by_path
import forked
import numpy as np
import pytest

from covid_flax.models import MODELS
from covid_flax.pretrained.load import shapes_of
from covid_flax.pretrained.names import keras_name
from covid_flax.pretrained.read import read_weights
from ml_collections_configs import base

ROOT = Path(__file__).parents[2]


def run(*args):
    return forked.command(ROOT / "scripts" / "convert_weights.py", *args, cwd=ROOT)


@pytest.fixture
def arrays(model_trees, leaves):
    _, *trees = model_trees("resnet14_small", num_classes=7, hidden_units=0)
    rng = np.random.default_rng(0)
    return {
        keras_name(path): rng.normal(size=leaf.shape).astype(np.float32)
        for tree in trees
        for path, leaf in leaves(tree).items()
    }


def test_converts_and_reports(arrays, write_official_h5, tmp_path):
    import hashlib

    write_official_h5(tmp_path / "in.h5", arrays)
    out = tmp_path / "out.npz"
    done = run(tmp_path / "in.h5", out, "--model", "resnet14_small")
    assert done.returncode == 0, done.stderr
    with np.load(out) as npz:
        assert set(npz.files) == set(arrays)
        assert all(np.array_equal(npz[n], arrays[n]) for n in arrays)
    for path in (tmp_path / "in.h5", out):
        assert hashlib.sha256(path.read_bytes()).hexdigest() in done.stdout
    table = {r[0]: r[1:] for r in map(str.split, done.stdout.splitlines()) if len(r) == 3}
    assert table["conv1"] == ["6", f"{7 * 7 * 3 * 16 + 5 * 16:,}"]
    assert table["head"] == ["2", f"{512 * 7 + 7:,}"]


def test_names_the_loader_reads_otherwise_are_written_as_it_reads_them(arrays, tmp_path):
    """Keras 2 wrote `BatchNorm` in some names. A file beside the output stays."""
    older = {n.replace("conv1_bn/", "conv1_BatchNorm/"): v for n, v in arrays.items()}
    np.savez(tmp_path / "in.npz", **older)
    (tmp_path / "out.npz.part").write_text("mine")
    done = run(tmp_path / "in.npz", tmp_path / "out.npz", "--model", "resnet14_small")
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "out.npz") as npz:
        assert set(npz.files) == set(arrays)
        assert all(np.array_equal(npz[n], arrays[n]) for n in arrays)
    assert (tmp_path / "out.npz.part").read_text() == "mine"


def test_opt_in_writes_what_is_there(arrays, tmp_path):
    gone = "conv5_block1_2_conv/kernel"
    partial = {n: v for n, v in arrays.items() if n not in (gone, "predictions/kernel")}
    np.savez(tmp_path / "in.npz", **partial)
    args = (tmp_path / "in.npz", tmp_path / "out.npz", "--model", "resnet14_small")
    done = run(*args, "--may_miss", "conv5")
    assert done.returncode == 0, done.stderr
    assert gone in done.stdout and "set aside predictions/bias" in done.stdout
    assert set(read_weights(tmp_path / "out.npz")) == set(partial) - {"predictions/bias"}


def test_refusals_are_one_line_and_write_nothing(arrays, tmp_path, capsys, monkeypatch):
    """In process, to save the start of Python; the exit status is what main returns."""
    script = by_path.load("scripts/convert_weights.py")
    np.savez(tmp_path / "in.npz", **arrays)
    (tmp_path / "there.npz").write_text("mine")
    for args, word in [
        (("in.npz", "out.npz"), "these look like resnet14_small"),
        (("none.h5", "out.npz"), "no such"),
        (("in.npz", "there.npz", "--model", "resnet14_small"), "exists"),
        (("in.npz", "there.npz/out.npz", "--model", "resnet14_small"), "cannot write"),
        (("in.npz", "out.npz", "--may_miss", "conv9"), "conv9"),
    ]:
        paths = [str(tmp_path / a) if ".npz" in a or ".h5" in a else a for a in args]
        assert script.main(paths) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1, captured.err
        assert captured.err.startswith("error: ") and word in captured.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.npz", "there.npz"]
    assert (tmp_path / "there.npz").read_text() == "mine"


@pytest.mark.parametrize("model", ["mobilenet_v3_small", "efficientnet_lite0_small", "densenet121"])
def test_light_networks_too(model, leaves, tmp_path):
    whole = {"efficientnet_lite0_small": "efficientnet_lite0"}.get(model, model)
    config = base.get_config().model
    config.name, config.hidden_units = whole, 0
    arrays = {
        keras_name(path): np.full(leaf.shape, 0.5, np.float32)
        for tree in shapes_of(config, 7)
        for path, leaf in leaves(tree).items()
    }
    np.savez(tmp_path / "in.npz", **arrays)
    done = run(tmp_path / "in.npz", tmp_path / "out.npz", "--model", model)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "out.npz") as npz:
        assert set(npz.files) <= set(arrays)
        assert (set(npz.files) == set(arrays)) == (model == whole)
        assert "predictions/kernel" in npz.files or model != whole
    table = {r[0]: r[1:] for r in map(str.split, done.stdout.splitlines()) if len(r) == 3}
    assert len([stage for stage in table if stage in MODELS[model].stages]) >= 5
    refused = run(tmp_path / "in.npz", tmp_path / "no.npz", "--model", model, "--may_miss", "conv5")
    assert refused.returncode == 2 and "stages of ResNets" in refused.stderr
