"""What is kept, and that what comes back is what went in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from covid_flax.checkpoint import Checkpoints, resolve_step
from covid_flax.errors import UserError
from covid_flax.mesh import make_layout


def _tree(value):
    tree = {
        "params": {"conv1": {"kernel": jnp.full((3, 2), value, jnp.float32)}},
        "opt": (jnp.float32(value), {"count": jnp.int32(value)}),
        "rng": jax.random.key_data(jax.random.key(int(value))),
    }
    return make_layout("jit").put_state(tree)


def test_best_and_latest_are_kept_while_validation_worsens(tmp_path):
    with Checkpoints(tmp_path) as c:
        for step, best in [(1, True), (2, True), (3, False), (4, False), (5, False)]:
            c.save(step, _tree(step), {"step": step}, best=best)
        c.wait()
        assert (c.best_step, c.latest_step, c.steps) == (2, 5, [2, 5])
    with Checkpoints(tmp_path) as c:  # and by another process
        assert (c.best_step, c.latest_step, c.steps) == (2, 5, [2, 5])
        c.save(6, _tree(6), {}, best=True)
        c.wait()
        assert c.steps == [6]


def test_what_comes_back_is_bit_for_bit_what_went_in(tmp_path):
    odd = {"wait": 3, "best": 0.1 + 0.2, "inf": float("inf"), "text": "é", "list": [1, [2.5]]}
    with Checkpoints(tmp_path) as c:
        c.save(7, _tree(7), odd, best=True)
    with Checkpoints(tmp_path) as c:
        tree, loop = c.load(7, _tree(0))
    assert loop == odd
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(_tree(7)), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_a_save_under_way_is_not_touched_by_donation(tmp_path):
    layout = make_layout("jit")
    step = jax.jit(lambda t: jax.tree.map(lambda x: x + 1, t), donate_argnums=0)
    state = layout.put_state({"w": jnp.zeros((1000, 1000))})
    with Checkpoints(tmp_path) as c:
        c.save(0, layout.get_state(state), {}, best=True)
        for _ in range(20):
            state = step(state)
        c.wait()
        saved, _ = c.load(0, state)
    assert float(jnp.abs(saved["w"]).max()) == 0.0
    assert float(state["w"][0, 0]) == 20.0


def test_which_checkpoint(tmp_path):
    with Checkpoints(tmp_path) as c:
        c.save(3, _tree(3), {}, best=True)
        c.save(8, _tree(8), {}, best=False)
        c.wait()
        assert [resolve_step(c, w) for w in ("best", "latest", "3", "8")] == [3, 8, 3, 8]
        for wrong in ("5", "newest", "-1"):
            with pytest.raises(UserError, match="3, 8"):
                resolve_step(c, wrong)


def _damage(kind, step_folder):
    state = step_folder / "state"
    data = max((p for p in state.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    if kind == "manifest gone":
        (state / "manifest.ocdbt").unlink()
    elif kind == "metadata gone":
        (state / "_METADATA").unlink()
    elif kind == "metadata halved":
        text = (state / "_METADATA").read_bytes()
        (state / "_METADATA").write_bytes(text[: len(text) // 2])
    elif kind == "data emptied":
        data.write_bytes(b"")
    elif kind == "data halved":
        data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    elif kind == "loop gone":
        (step_folder / "_CHECKPOINT_METADATA").unlink()


@pytest.mark.parametrize(
    "kind",
    ["manifest gone", "metadata gone", "metadata halved", "data emptied", "data halved"]
    + ["loop gone"],
)
def test_a_damaged_checkpoint_is_named(kind, tmp_path):
    rng = np.random.default_rng(0)
    tree = {"w": jnp.asarray(rng.normal(size=(300, 300)), jnp.float32)}
    tree = make_layout("jit").put_state(tree)
    with Checkpoints(tmp_path, writing=True) as c:
        c.save(3, tree, {"a": 1}, best=True)
    _damage(kind, tmp_path / "3")
    with pytest.raises(UserError, match=r"checkpoint.*damaged"), Checkpoints(tmp_path) as c:
        c.load(3, tree)


def test_another_model_s_checkpoint_is_refused(tmp_path):
    with Checkpoints(tmp_path, writing=True) as c:
        c.save(3, _tree(3), {}, best=True)
    other = make_layout("jit").put_state({**_tree(0), "more": jnp.zeros(2)})
    with pytest.raises(UserError, match="another model"), Checkpoints(tmp_path) as c:
        c.load(3, other)


def test_a_reader_leaves_a_save_under_way_alone(tmp_path):
    """Evaluating a run that is being trained must not clear away what it is writing."""
    tree = make_layout("jit").put_state({"w": jnp.arange(2e7)})
    with Checkpoints(tmp_path, writing=True) as c:
        c.save(1, tree, {}, best=True)
        while not list(tmp_path.glob("1*")):  # its temporary folder, or the finished one
            pass
        with Checkpoints(tmp_path):
            pass
        c.wait()
        saved, _ = c.load(1, tree)
    np.testing.assert_array_equal(saved["w"], tree["w"])
