"""The commands as a person runs them: exit status, the one line of an error, nothing lost."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import forked
import h5py
import pytest

from covid_flax import main
from covid_flax.checkpoint import Checkpoints
from covid_flax.errors import UserError
from covid_flax.run_folder import default_workdir

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROOT = Path(__file__).parent.parent


def _command(module, *args, **env):
    return subprocess.run(
        [sys.executable, "-m", f"covid_flax.{module}", *map(str, args)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **env},
    )


def _main(workdir, *args, config="quickstart.py"):
    return forked.main(f"--config=configs/{config}", f"--workdir={workdir}", *args, cwd=ROOT)


def _refused(done, *words):
    """Exit 2, one line on stderr, no traceback, naming the thing."""
    assert done.returncode == 2, (done.returncode, done.stderr[-2000:])
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in done.stderr, done.stderr[-2000:]
    for word in words:
        assert word in errors[0], errors[0]


@pytest.fixture
def args(phantom_dir, cache_dir):
    return [f"--config.data.dir={phantom_dir}", f"--config.data.cache_dir={cache_dir}"]


def test_train_evaluate_and_no_tensorflow(tmp_path, args):
    """Both commands, real processes; TensorFlow, torch and Keras are made unimportable."""
    blocker = tmp_path / "block"
    blocker.mkdir()
    for name in ("tensorflow", "torch", "keras"):
        (blocker / f"{name}.py").write_text(f"raise ImportError('{name} was imported')\n")
    env = {"PYTHONPATH": str(blocker)}
    small = ["--config.train.epochs=2", "--config.data.image_size=32", "--config.seed=3"]
    small.append("--config.train.min_delta=100")  # so the first epoch, of four steps, is best
    small.append("--config.train.batch_size=20")  # of 60: one shape to compile
    small.append("--config.model.name=lenet5")  # a third of the small ResNet's compiling
    what = ["--config=configs/quickstart.py", f"--workdir={tmp_path / 'run'}"]
    done = _command("main", *what, *args, *small, **env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "accuracy" in done.stdout and "confusion_matrix.png" in done.stdout
    assert json.loads((tmp_path / "run" / "config.json").read_text())["seed"] == 3
    report = tmp_path / "run" / "eval" / "val" / "report.json"
    found = json.loads(report.read_text())
    assert (found["checkpoint"]["which"], found["checkpoint"]["step"]) == ("best", 4)
    report.unlink()
    again = forked.command("covid_flax.evaluate", f"--workdir={tmp_path / 'run'}", cwd=tmp_path)
    assert again.returncode == 0, again.stderr[-2000:]
    assert json.loads(report.read_text()) == found
    done = _command(
        "evaluate",
        f"--workdir={tmp_path / 'run'}",
        "--split=all",
        "--checkpoint=latest",
        f"--output={tmp_path / 'out'}",
        **env,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert found["num_examples"] == 80 and found["checkpoint"]["step"] == 8
    of_test = [f"--workdir={tmp_path / 'run'}", "--split=test"]
    _refused(forked.command("covid_flax.evaluate", *of_test, cwd=tmp_path), "no test")
    _refused(forked.command("covid_flax.evaluate", "--split=val", cwd=tmp_path), "workdir")


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (["--config.data.imagesize=64"], ["imagesize", "image_size"]),
        (["--config.train.epochs=many"], ["epochs", "many"]),
        (["--config.model.name=resnet51"], ["model.name", "resnet50"]),
        (["--config.train.batch_size=0"], ["train.batch_size"]),
        (["--config.data.dir=/nowhere"], ["/nowhere"]),
        (["--config.model.weights=/nowhere.h5"], ["/nowhere.h5"]),
        (["--config.model.weights=~no-such-user/x.h5"], ["~no-such-user/x.h5"]),
        (["--config.data.dir=~no-such-user/x"], ["~no-such-user/x"]),
        ([f"--config.model.weights={'x' * 300}"], ["xxx", "give a shorter name"]),
        (["--splat=1"], ["splat"]),
        (["--epochs=3"], ["unknown flag --epochs: here it is --config.train.epochs"]),
        (["--data_dir=x"], ["unknown flag --data_dir: here it is --config.data.dir"]),
        (["stray"], ["stray"]),
    ],
)
def test_bad_arguments(bad, words, tmp_path, args):
    _refused(_main(tmp_path / "run", *args, *bad), *words)
    assert not (tmp_path / "run" / "config.json").exists()


def test_bad_config_files(tmp_path, args):
    _refused(_main(tmp_path / "run", config="nowhere.py"), "nowhere.py")
    lost = forked.main("--config=configs/papr.py", "--config.seed=1", cwd=ROOT)
    _refused(lost, "--config=configs/papr.py: no such file")
    _refused(forked.main("--config.data.dir=x", cwd=ROOT), "--config.data.dir=... needs --config=")
    _refused(_main(tmp_path / "run", *args, config="paper.py:frozzen"), "frozzen", "frozen")
    _refused(forked.main(cwd=ROOT), "config")
    bad = tmp_path / "bad.py"
    bad.write_text(
        "from ml_collections_configs import base\n"
        "def get_config():\n    c = base.get_config()\n    c.train.epoch = 3\n    return c\n"
    )
    _refused(forked.main(f"--config={bad}", cwd=ROOT), "epoch", "epochs")
    bad.write_text("def get_config():\n    return {'seed': 1}\n")
    _refused(forked.main(f"--config={bad}", cwd=ROOT), "base.get_config()")
    bad.write_text(
        "import ml_collections\ndef get_config():\n"
        "    return ml_collections.ConfigDict({'train': {'epochs': 1}})\n"
    )
    _refused(forked.main(f"--config={bad}", cwd=ROOT), "base.get_config()")
    lost = tmp_path / "mine.py"
    lost.write_text((ROOT / "configs" / "student.py").read_text())
    _refused(forked.main(f"--config={lost}", cwd=ROOT), "best.py", "beside it")


def _truncate(image):
    image.write_bytes(image.read_bytes()[: image.stat().st_size // 2])


def _mislabel(image):
    from PIL import Image

    with Image.open(image) as opened:
        opened.save(image, format="JPEG")


@pytest.mark.parametrize(
    "break_image",
    [
        _truncate,
        lambda image: image.write_bytes(b""),
        lambda image: image.write_text("no image"),
        _mislabel,
        lambda image: image.rename(image.with_name("COVID-77.png")),
    ],
    ids=["truncated", "empty", "no image", "JPEG named png", "another class's name"],
)
def test_a_bad_image_is_named_before_training(break_image, phantom_dir, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(phantom_dir, data)
    break_image(data / "Normal" / "images" / "Normal-7.png")
    done = _main(
        tmp_path / "run", f"--config.data.dir={data}", f"--config.data.cache_dir={tmp_path / 'c'}"
    )
    _refused(done, "Normal/images")
    assert not (tmp_path / "run").exists()


def test_empty_and_single_classes(phantom_dir, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(phantom_dir, data)
    shutil.rmtree(data / "COVID" / "images")
    (data / "COVID" / "images").mkdir()
    _refused(_main(tmp_path / "run", f"--config.data.dir={data}"), "COVID")
    for name in ("COVID", "Lung_Opacity", "Viral Pneumonia"):
        shutil.rmtree(data / name)
    _refused(_main(tmp_path / "run", f"--config.data.dir={data}"), "one class")
    shutil.rmtree(data / "Normal")
    _refused(_main(tmp_path / "run", f"--config.data.dir={data}"), "no image")


def test_bad_weights(tmp_path, args):
    (tmp_path / "text.h5").write_text("no h5")
    with h5py.File(tmp_path / "other.h5", "w") as f:
        f["layer"] = [1.0]
    for name in ("text.h5", "other.h5"):
        weights = f"--config.model.weights={tmp_path / name}"
        _refused(_main(tmp_path / "run", *args, weights, config="paper.py"), name)


def test_places_that_cannot_be_written(tmp_path, args):
    (tmp_path / "file").write_text("kept")
    _refused(_main(tmp_path / "file", *args), "file")
    _refused(_main(tmp_path / "file" / "below", *args), "file")
    assert (tmp_path / "file").read_text() == "kept"
    _refused(_main("/proc/run", *args), "/proc")


@pytest.mark.slow
def test_a_full_disk(tmp_path, args):
    """A limit on file size stands for the full disk: checkpoints outgrow it."""
    import resource

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "covid_flax.main",
            "--config=configs/quickstart.py",
            f"--workdir={tmp_path / 'run'}",
            *args,
            "--config.train.epochs=1",
            "--config.data.image_size=32",
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        preexec_fn=limit,
        env=os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"},  # which would keep a part
    )
    _refused(done, "cannot write")


@pytest.mark.slow
def test_the_same_command_twice_gives_the_same_bits(tmp_path, args):
    """Each in a process of its own, that compiles everything itself."""
    arrays, predictions = [], []
    for name in ("one", "two"):
        run = tmp_path / name
        what = ["--config=configs/lenet.py", f"--workdir={run}", *args]
        small = ["--config.train.epochs=2", "--config.augment.flip=True", "--config.seed=5"]
        done = _command("main", *what, *small, JAX_ENABLE_COMPILATION_CACHE="false")
        assert done.returncode == 0, done.stderr[-3000:]
        with Checkpoints(run / "checkpoints") as c:
            arrays.append([c._contents(step)["record"]["arrays"] for step in c.steps])
        predictions.append((run / "eval" / "val" / "predictions.csv").read_bytes())
    assert arrays[0] == arrays[1] and len(arrays[0][0]) == 64
    assert predictions[0] == predictions[1]


def test_a_dry_run_trains_nothing(tmp_path, args):
    small = ["--config.data.image_size=32", "--config.model.name=lenet5"]
    done = _main(tmp_path / "run", "--dry_run", *small, *args)
    assert done.returncode == 0, done.stderr[-2000:]
    left = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert {"config.json", "split.csv"} <= set(left)
    assert not {"checkpoints", "metrics.jsonl", "eval"} & set(left)


def test_runs_are_named_by_their_configuration():
    assert default_workdir("configs/best.py") == Path("runs/best")
    assert default_workdir("configs/paper.py:frozen,nested") == Path("runs/paper-frozen-nested")


def test_steps_to_profile():
    assert main._profiled_steps("") is None and main._profiled_steps("10:12") == (10, 12)
    for wrong in ("3:2", "0:1", "7", "a:b", "1:2:3"):
        with pytest.raises(UserError, match=f"--profile={wrong}: give the first and the last"):
            main._profiled_steps(wrong)


def test_what_is_no_command_says_so():
    _refused(_command("train"), "covid_flax.train is no command: python -m covid_flax.main")
