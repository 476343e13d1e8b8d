"""Every key is checked, documented and survives JSON; every configuration file loads."""

import copy
import re
from pathlib import Path

import by_path
import pytest

from covid_flax import config as config_lib
from covid_flax.errors import UserError
from covid_flax.run_folder import refuse_changes
from ml_collections_configs import base

ROOT = Path(__file__).parent.parent


def _load(name, *argument):
    return by_path.load(f"configs/{name}.py").get_config(*argument)


@pytest.mark.parametrize(
    ("name", "argument"),
    [(path.stem, []) for path in sorted((ROOT / "configs").glob("*.py"))]
    + [("finetune", ["conv5"]), ("full_224", ["tpu"]), ("full_299", ["tpu"])]
    + [("paper", [v]) for v in ("frozen", "caffe", "resize", "random", "nested", "frozen,nested")],
)
def test_every_configuration_is_valid_and_differs_as_said(name, argument):
    config = _load(name, *argument)
    config_lib.check(config)
    assert config.is_locked
    if argument and name == "paper":
        plain = config_lib.flatten(_load("paper"))
        changed = {k for k, v in config_lib.flatten(config).items() if v != plain[k]}
        expected = {
            "frozen": {"model.trainable"},
            "caffe": {"model.preprocessing"},
            "resize": {"data.intermediate_size"},
            "random": {"data.split"},
            "nested": {"data.nested_test"},
        }
        assert changed == set().union(*(expected[v] for v in argument[0].split(",")))


def test_unknown_variants_are_refused():
    for name in ("paper", "finetune", "full_224", "full_299"):
        with pytest.raises(ValueError, match="no variant 'x'"):
            _load(name, "x")


def test_every_key_has_a_line_of_meaning():
    text = (ROOT / "ml_collections_configs" / "base.py").read_text()
    lines = re.findall(r"^    \w\.(\w+) = (?!.*ConfigDict)(.*)$", text, re.M)
    names = [name for name, _ in lines]
    known = [key.rpartition(".")[2] for key in config_lib.flatten(base.get_config())]
    assert sorted(names) == sorted(known)
    assert not [name for name, rest in lines if "  # " not in rest]


def test_json_gives_the_configuration_back():
    config = base.get_config()
    config.model.weights_may_miss = ("conv5", "conv4")
    config.optimizer.learning_rate = 0.1 + 0.2
    again = config_lib.from_json(config_lib.to_json(config))
    assert config_lib.flatten(again) == config_lib.flatten(config)
    saved = config_lib.to_json(config)
    saved["data"]["new_key"] = 1
    with pytest.raises(UserError, match="data.new_key"):
        config_lib.from_json(saved)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.name", "resnet51"),
        ("data.interpolation", "cubic"),
        ("train.batch_size", 0),
        ("seed", -1),
        ("seed", 2**32),
        ("model.dropout", 1.0),
        ("optimizer.learning_rate", float("nan")),
        ("model.trainable", "pool"),
        ("eval.bn_own_until", "pool"),
        ("eval.bn_own_until", "block2"),  # of another network
        ("train.monitor", "loss"),
        ("train.swa_start", -1),
    ],
)
def test_values_no_run_could_use_are_refused_by_key(key, value):
    config = base.get_config()
    section, _, name = key.rpartition(".")
    (config[section] if section else config)[name] = value
    with pytest.raises(UserError, match=re.escape(f"config.{key}")):
        config_lib.check(config)


@pytest.mark.parametrize("key", ["split", "split_file"])
def test_a_split_s_file_goes_with_its_rule(key):
    config = base.get_config()
    config.data[key] = "file"
    with pytest.raises(UserError, match="set both, or neither"):
        config_lib.check(config)


def test_a_fold_of_none_is_refused():
    config = base.get_config()
    config.data.split, config.data.fold = "grouped", 2
    with pytest.raises(UserError, match=r"data\.fold=2 is one of data\.folds=0"):
        config_lib.check(config)


def test_an_average_that_would_never_begin_is_refused():
    config = base.get_config()
    config.train.epochs, config.train.swa_start = 8, 7
    config_lib.check(config)
    config.train.swa_start = 8
    with pytest.raises(UserError, match=r"swa_start=8: after train\.epochs=8"):
        config_lib.check(config)


def test_a_share_of_no_average_is_refused():
    config = base.get_config()
    config.train.start_share = 0.5
    with pytest.raises(UserError, match=r"start_share .*: set train\.swa_start or"):
        config_lib.check(config)
    config.train.ema_decay = 0.9
    config_lib.check(config)


def test_two_kinds_of_averages_are_refused():
    config = base.get_config()
    config.train.ema_decay, config.train.swa_start = 0.99, 2
    with pytest.raises(UserError, match=r"swa_start and train\.ema_decay"):
        config_lib.check(config)


def test_a_run_goes_on_with_other_values_of_the_documented_keys_alone():
    """Of docs/training.md; every other key is refused by its name."""
    text = (Path(__file__).parents[1] / "docs" / "training.md").read_text(encoding="utf-8")
    listed = text[text.index("Only the keys below may") : text.index("Any other changed key")]
    free = set(re.findall(r"`((?:eval)[.][a-z_]+)`", listed))
    for section, keys in re.findall(r"^- `([a-z]+)[.]`: (.*)$", listed, re.M):
        free |= {f"{section}.{key}" for key in re.findall(r"`([a-z_]+)`", keys)}
    assert len(free) >= 16
    now = config_lib.to_json(base.get_config())
    for key in config_lib.flatten(base.get_config()):
        saved = copy.deepcopy(now)
        *sections, last = key.split(".")
        place = saved
        for section in sections:
            place = place[section]
        place[last] = "another"
        if key in free:
            refuse_changes(saved, now, Path("runs/x"))
        else:
            with pytest.raises(UserError, match=rf"configuration \({re.escape(key)} was 'another'"):
                refuse_changes(saved, now, Path("runs/x"))
