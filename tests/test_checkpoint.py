"""What is kept, and that what comes back is what went in."""

import errno
import gc
import os
import resource
import shutil
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from covid_flax.checkpoint import Checkpoints, DamagedError, resolve_step
from covid_flax.errors import UserError
from covid_flax.mesh import make_layout


def _tree(value):
    tree = {
        "params": {"conv1": {"kernel": jnp.full((3, 2), value, jnp.float32)}},
        "opt": (jnp.float32(value), {"count": jnp.int32(value)}),
        "rng": jax.random.key_data(jax.random.key(int(value))),
    }
    return make_layout("jit").put_state(tree)


def test_best_latest_and_the_one_before_are_kept_while_validation_worsens(tmp_path):
    with Checkpoints(tmp_path) as c:
        for step, best in [(1, True), (2, True), (3, False), (4, False), (5, False)]:
            c.save(step, _tree(step), {"step": step}, best=best)
        c.wait()
        assert (c.best_step, c.latest_step, c.steps) == (2, 5, [2, 4, 5])
    with Checkpoints(tmp_path) as c:  # and by another process
        assert (c.best_step, c.latest_step, c.steps) == (2, 5, [2, 4, 5])
        c.save(6, _tree(6), {}, best=True)
        c.wait()
        assert c.steps == [2, 5, 6]  # 5 tells of 2
        c.save(7, _tree(7), {}, best=False)
        c.wait()
        assert c.steps == [6, 7]


def test_power_that_fails_while_the_best_is_the_latest_loses_one_save(tmp_path):
    """The JSON of a checkpoint may be empty then, for nobody has it written out."""
    with Checkpoints(tmp_path, writing=True) as c:
        for step in (1, 2, 3):
            c.save(step, _tree(step), {"step": step}, best=True)
    (tmp_path / "3" / "_CHECKPOINT_METADATA").write_bytes(b"")
    with Checkpoints(tmp_path, writing=True) as c:
        step, state, loop, lost = c.resume(_tree(0))
    assert (step, loop, lost) == (2, {"step": 2}, False)
    assert float(state["opt"][0]) == 2


def test_the_best_of_which_the_one_before_tells_is_kept_too(tmp_path):
    with Checkpoints(tmp_path, writing=True) as c:
        for step, best in ((1, True), (2, False), (3, True)):
            c.save(step, _tree(step), {"step": step}, best=best)
        c.wait()
        assert c.steps == [1, 2, 3]
    (tmp_path / "3" / "_CHECKPOINT_METADATA").write_bytes(b"")
    with Checkpoints(tmp_path, writing=True) as c:
        step, _, _, lost = c.resume(_tree(0))
        assert (step, lost, c.best_step) == (2, False, 1)
        c.save(4, _tree(4), {}, best=False)
        c.wait()
        assert (c.steps, c.best_step) == ([1, 2, 4], 1)


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
    kept = layout.get_state(state)["w"]
    assert kept.unsafe_buffer_pointer() != state["w"].unsafe_buffer_pointer()
    with Checkpoints(tmp_path) as c:
        c.save(0, layout.get_state(state), {}, best=True)
        for _ in range(20):
            state = step(state)
        c.wait()
        saved, _ = c.load(0, state)
    assert float(jnp.abs(saved["w"]).max()) == 0.0
    assert float(state["w"][0, 0]) == 20.0


def test_asking_for_the_best_leaves_nothing_behind(tmp_path):
    """What TensorStore tells of an array is never freed; its names and shapes are not asked for."""
    with Checkpoints(tmp_path) as c:
        c.save(3, _tree(3), {}, best=True)

    def ask():
        for _ in range(5):
            with Checkpoints(tmp_path) as c:
                assert c.best_step == 3
        gc.collect()
        return sum(type(x) in (dict, list) for x in gc.get_objects())

    ask()
    before = ask()
    assert ask() - before < 5  # it was 700


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
    elif kind == "loop halved":
        text = (step_folder / "_CHECKPOINT_METADATA").read_bytes()
        (step_folder / "_CHECKPOINT_METADATA").write_bytes(text[: len(text) // 2])


@pytest.mark.parametrize(
    "kind",
    ["manifest gone", "metadata gone", "metadata halved", "data emptied", "data halved"]
    + ["loop gone", "loop halved"],
)
def test_a_damaged_checkpoint_is_named(kind, tmp_path):
    rng = np.random.default_rng(0)
    tree = {"w": jnp.asarray(rng.normal(size=(300, 300)), jnp.float32)}
    tree = make_layout("jit").put_state(tree)
    with Checkpoints(tmp_path, writing=True) as c:
        c.save(3, tree, {"a": 1}, best=True)
    _damage(kind, tmp_path / "3")
    with (
        pytest.raises(UserError, match=r"checkpoint.*damaged") as refused,
        Checkpoints(tmp_path) as c,
    ):
        c.load(3, tree)
    assert "another model" not in str(refused.value)


@pytest.mark.parametrize(
    "other",
    [{"more": jnp.zeros(2)}, {"params": {"conv1": {"kernel": jnp.zeros((3, 4))}}}],
)
def test_another_model_s_checkpoint_is_refused(other, tmp_path):
    with Checkpoints(tmp_path, writing=True) as c:
        c.save(3, _tree(3), {}, best=True)
    other = make_layout("jit").put_state({**_tree(0), **other})
    difference = r"of another model \((more|params/conv1/kernel): it has "
    with Checkpoints(tmp_path) as c:
        with pytest.raises(UserError, match=difference) as e:
            c.load(3, other)
        assert not isinstance(e.value, DamagedError)
        with pytest.raises(UserError, match=difference):  # no reason to take an older one
            c.resume(other)


def _flip_a_bit_of_the_arrays(step_folder, seed):
    files = [p for p in step_folder.rglob("d/*") if p.is_file()]
    data = max(files, key=lambda p: p.stat().st_size)
    content = bytearray(data.read_bytes())
    rng = np.random.default_rng(seed)
    content[rng.integers(len(content) // 4, len(content))] ^= 1 << rng.integers(8)
    data.write_bytes(bytes(content))


def _two(tmp_path, best):
    rng = np.random.default_rng(0)
    trees = {s: {"w": jnp.asarray(rng.normal(size=(64, 64)), jnp.float32)} for s in (3, 8)}
    trees = {s: make_layout("jit").put_state(tree) for s, tree in trees.items()}
    with Checkpoints(tmp_path / "c", writing=True) as c:
        for step, tree in trees.items():
            c.save(step, tree, {"a": step}, best=step in best)
    return trees


@pytest.mark.parametrize("seed", range(4))
def test_a_flipped_bit_is_found_and_the_best_taken_instead(seed, tmp_path, capsys):
    trees = _two(tmp_path, best=[3])
    _flip_a_bit_of_the_arrays(tmp_path / "c/8", seed)
    with Checkpoints(tmp_path / "c") as c, pytest.raises(DamagedError, match="there are: 3"):
        c.load(8, trees[8])
    assert (tmp_path / "c/8").exists()  # who reads moves nothing
    with Checkpoints(tmp_path / "c", writing=True) as c:
        step, tree, loop, lost = c.resume(trees[8])
        assert (step, loop, lost, c.steps) == (3, {"a": 3}, False, [3])
        np.testing.assert_array_equal(tree["w"], trees[3]["w"])
        c.save(8, trees[8], {"a": 8}, best=False)  # as the run that goes on will
    assert "8 is damaged" in capsys.readouterr().out
    assert (tmp_path / "checkpoints_damaged/8").is_dir()
    with Checkpoints(tmp_path / "c") as c:
        assert (c.best_step, c.steps) == (3, [3, 8])


@pytest.mark.parametrize("name", ["2", "2/state", "_CHECKPOINT_METADATA"])
def test_what_may_not_be_read_is_not_damaged(name, tmp_path, monkeypatch):
    """Orbax and TensorStore tell of it as of files that are missing."""
    with Checkpoints(tmp_path, writing=True) as c:
        for step in (1, 2):
            c.save(step, _tree(step), {"step": step}, best=True)
    locked = next(p for p in tmp_path.rglob("*") if str(p).endswith(name) and "2" in p.parts)
    # As another user finds it: whoever runs the tests may be allowed everything.
    monkeypatch.setattr(os, "access", lambda path, mode: path != locked)
    (tmp_path / "2" / "_CHECKPOINT_METADATA").rename(tmp_path / "hidden")
    (tmp_path / "2" / "_CHECKPOINT_METADATA").touch()
    with pytest.raises(UserError, match=f"no permission to read {locked}: let") as e:
        with Checkpoints(tmp_path, writing=True) as c:
            c.resume(_tree(0))
    assert not isinstance(e.value, DamagedError) and (tmp_path / "2").is_dir()
    with Checkpoints(tmp_path) as c:  # it is no reason to refuse another
        assert c.load(1, _tree(0))[1] == {"step": 1}
        with pytest.raises(UserError, match="no permission"):
            resolve_step(c, "best")


@pytest.mark.parametrize(
    "fault",
    [
        OSError(errno.EMFILE, "Too many open files"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        MemoryError(),
        RuntimeError("RESOURCE_EXHAUSTED: out of memory"),
        RuntimeError("DEADLINE_EXCEEDED: Barrier timed out."),
    ],
    ids=lambda fault: str(fault)[:12],
)
def test_what_the_machine_lacks_is_not_damage(fault, tmp_path, monkeypatch):
    """A sound checkpoint must not be moved away because files or memory ran out."""
    trees = _two(tmp_path, [3])
    with Checkpoints(tmp_path / "c", writing=True) as c:

        def load(step, abstract):
            raise ValueError("Orbax wraps what it meets") from fault

        monkeypatch.setattr(c._orbax, "load", load)
        with pytest.raises(type(fault)) as met:
            c.resume(trees[8])
    assert met.value is fault and not (tmp_path / "checkpoints_damaged").exists()
    assert (tmp_path / "c/8").is_dir()


@pytest.mark.parametrize("met_by", ["the end", "the next save"])
def test_a_save_that_fails_in_its_thread_is_told(tmp_path, met_by):
    """The system's limit on a file's size stands for the full disk."""
    state = make_layout("jit").put_state(
        {"x": jnp.asarray(np.random.default_rng(0).random(500_000))}
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(Exception, match="File too large"), Checkpoints(tmp_path) as c:
            c.save(1, state, {}, best=True)
            if met_by == "the next save":
                with pytest.raises(Exception, match="File too large"):
                    c.save(2, state, {}, best=True)
                raise OSError("File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_damaged_best_is_never_replaced_in_silence(tmp_path, capsys):
    trees = _two(tmp_path, best=[3])
    _flip_a_bit_of_the_arrays(tmp_path / "c/3", 0)
    with Checkpoints(tmp_path / "c") as c:
        assert c.best_step == 3
        with pytest.raises(DamagedError, match="checkpoint .*3 is damaged"):
            c.load(3, trees[3])
    with Checkpoints(tmp_path / "c", writing=True) as c:
        step, _, _, lost = c.resume(trees[8])
        assert (step, lost, c.steps) == (8, True, [8])
    assert "3 is damaged" in capsys.readouterr().out
    with Checkpoints(tmp_path / "c") as c, pytest.raises(DamagedError, match="the best so far"):
        resolve_step(c, "best")
    with Checkpoints(tmp_path / "c", writing=True) as c:  # killed before it saved, and again
        assert c.resume(trees[8])[3]
        c.save(9, trees[3], {"a": 9}, best=True)
        c.wait()
        assert (c.best_step, c.steps) == (9, [8, 9])


@pytest.mark.parametrize("gone", ["folder", "_CHECKPOINT_METADATA"])
def test_a_best_that_is_gone_is_missed(gone, tmp_path):
    trees = _two(tmp_path, best=[3])
    if gone == "folder":
        shutil.rmtree(tmp_path / "c/3")
    else:
        (tmp_path / "c/3" / gone).unlink()
    with Checkpoints(tmp_path / "c") as c, pytest.raises(DamagedError, match="3 is damaged"):
        c.load(resolve_step(c, "best"), trees[3])


def test_nothing_is_moved_where_nothing_is_sound(tmp_path):
    trees = _two(tmp_path, best=[3])
    for step in (3, 8):
        _flip_a_bit_of_the_arrays(tmp_path / f"c/{step}", 1)
    with (
        Checkpoints(tmp_path / "c", writing=True) as c,
        pytest.raises(UserError, match=r"every checkpoint is damaged \(8, 3\)"),
    ):
        c.resume(trees[3])
    assert {p.name for p in (tmp_path / "c").iterdir()} == {"3", "8"}


def test_a_checkpoint_without_its_record_is_damaged(tmp_path):
    """Else whoever strips the digests from it would be believed."""
    trees = _two(tmp_path, best=[])
    with Checkpoints(tmp_path / "bare", writing=True) as c:
        c._orbax.save(3, trees[3], custom_metadata={"loop": {"a": 3}})
    with Checkpoints(tmp_path / "bare") as c, pytest.raises(DamagedError, match="3 is damaged"):
        c.load(3, trees[3])


def test_a_reader_leaves_a_save_under_way_alone(tmp_path):
    """Evaluating a run that is being trained must not clear away what it is writing."""
    tree = make_layout("jit").put_state({"w": jnp.arange(2e7)})
    with Checkpoints(tmp_path, writing=True) as c:
        c.save(1, tree, {}, best=True)
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("1*")):  # its temporary folder, or the finished one
            assert time.monotonic() < deadline
        with Checkpoints(tmp_path):
            pass
        c.wait()
        saved, _ = c.load(1, tree)
    np.testing.assert_array_equal(saved["w"], tree["w"])


def test_a_reader_sees_what_is_saved_after_it_began(tmp_path):
    with Checkpoints(tmp_path, writing=True) as c:
        c.save(1, _tree(1), {}, best=True)
        c.wait()
        with Checkpoints(tmp_path) as reader:
            c.save(3, _tree(3), {}, best=True)
            c.wait()
            assert reader.latest_step == reader.best_step == 3
            tree, _ = reader.load(3, _tree(0))
            np.testing.assert_array_equal(jax.tree.leaves(tree)[0], jax.tree.leaves(_tree(3))[0])
            for step in (4, 5):
                c.save(step, _tree(step), {}, best=True)
            c.wait()  # 3 is neither the best nor one of the latest any more
            assert not (tmp_path / "3").exists()
            with pytest.raises(UserError, match="3 is gone.*give the command again"):
                reader.load(3, _tree(0))
            assert reader.best_step == 5


def test_saves_leave_no_thread_and_no_open_file_behind(tmp_path):
    def held():
        return threading.active_count(), len(os.listdir("/proc/self/fd"))

    with Checkpoints(tmp_path, writing=True) as c:
        for step in range(12):
            c.save(step, _tree(step), {}, best=False)
            if step == 3:
                c.wait()
                threads, files = held()
        c.wait()
        assert held()[0] <= threads + 1
        assert held()[1] <= files + 1


@pytest.mark.parametrize(("bound", "said"), [(30.0, False), (0.2, True)])
def test_a_slow_disk_is_spoken_of(bound, said, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("covid_flax.checkpoint.SLOW_WRITE_S", bound)
    with Checkpoints(tmp_path) as c:
        c.save(1, _tree(1), {}, best=True)
        c.wait()
        slow = threading.Event()
        monkeypatch.setattr(c, "_saving", _Slow(slow, 0.3))
        c.save(2, _tree(2), {}, best=True)
        assert slow.is_set()
        assert c.latest_step == 2
    note = "for the disk to save step 2"
    assert (note in capsys.readouterr().out) == said


class _Slow:
    """A save under way that takes so long."""

    def __init__(self, done, seconds):
        self.done, self.seconds = done, seconds

    def result(self):
        time.sleep(self.seconds)
        self.done.set()
