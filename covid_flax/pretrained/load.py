"""Named arrays into a network's parameter trees, strictly.

Every array of the source is used and every array of the backbone filled, at equal shapes;
all that does not fit is named in one error. The head is the one part that may differ: it is
loaded whole, or ImageNet's is set aside whole and reported. Names and shapes cannot tell
apart the `_0_` and `_3_` layers of a stage's first block: the tests compare outputs with
Keras's for that.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from covid_flax.errors import UserError
from covid_flax.models import beginning_of, create_model
from covid_flax.models.preprocess import TORCH_MEAN, TORCH_STD
from covid_flax.models.resnet import RESNETS
from covid_flax.pretrained.names import TreePath, keras_name

Tree = dict[str, Any]
Shapes = Mapping[str, tuple[int, ...]]

# Of ResNets, whose weights may lack some.
_BACKBONE = ("conv1", "conv2", "conv3", "conv4", "conv5")
_HEAD_LAYERS = ("hidden", "predictions")
_SHOWN = 5  # names spelt out in an error


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What became of each array, by Keras's name.

    Attributes:
      loaded: taken from the source.
      initialised: of the model, left at their initial values.
      set_aside: of the source, a head that is not the model's, or layers it does not go on to.
    """

    loaded: tuple[str, ...]
    initialised: tuple[str, ...]
    set_aside: tuple[str, ...]

    def summary(self) -> str:
        """One line for people: how many were loaded, what was initialised, what left out."""
        parts = [f"loaded {len(self.loaded)} arrays"]
        for stage in (*_BACKBONE, "head"):
            mine = [n for n in self.initialised if stage_of(n) == stage]
            whole = not any(stage_of(n) == stage for n in self.loaded)
            if mine and whole:
                parts.append(f"initialised all of {stage} ({len(mine)})")
            elif mine:
                parts.append(f"initialised {len(mine)} of {stage} ({', '.join(mine)})")
        if self.set_aside:
            more = f" and {len(self.set_aside) - _SHOWN} more" * (len(self.set_aside) > _SHOWN)
            parts.append(f"set aside {', '.join(self.set_aside[:_SHOWN])}{more}")
        return "; ".join(parts)


def load_weights(
    arrays: Mapping[str, np.ndarray],
    params: Tree,
    batch_stats: Tree,
    *,
    source: str,
    may_miss: Sequence[str] = (),
    may_spare: Collection[str] = (),
    name_of: Callable[[TreePath], str] = keras_name,
) -> tuple[Tree, Tree, LoadReport]:
    """Fills a network's trees from named arrays.

    Args:
      arrays: by Keras's name, as `read_weights` returns them.
      params: nested dict of the initial parameters; only the shapes are read, and the leaves
        of what is not loaded are kept. Not changed.
      batch_stats: the same of the running statistics.
      source: what the errors call the arrays, e.g. the file.
      may_miss: stages (`conv1`..`conv5`) of which arrays may be absent; what is present is
        loaded, what is absent keeps its initial values.
      may_spare: arrays, by name, that the network has no place for and that are set aside.
      name_of: the name that the arrays give to what is at a path.

    Returns:
      New params, new batch_stats (float32 JAX arrays where loaded), and the report.

    Raises:
      UserError: a missing, spare or misshapen array, or an unknown stage in `may_miss`.
    """
    for stage in may_miss:
        if stage not in _BACKBONE:
            raise UserError(
                f"model.weights_may_miss: {stage!r} is no stage; one of {', '.join(_BACKBONE)}, or "
                "several as ('conv4','conv5') (the head needs no leave)"
            )
    flat = {("params", *p): v for p, v in _leaves(params)}
    flat |= {("batch_stats", *p): v for p, v in _leaves(batch_stats)}
    try:
        targets = {name_of(p[1:]): p for p in flat}
    except KeyError:
        raise UserError(
            f"{source}: files are loaded into networks of Keras's only: set model.weights to none, "
            "or to a run's folder"
        ) from None
    arrays = as_named_today(arrays, targets, source)
    want = {name: tuple(flat[p].shape) for name, p in targets.items()}
    have = {name: tuple(value.shape) for name, value in arrays.items()}

    set_aside: list[str] = []
    head = {n: s for n, s in have.items() if stage_of(n) == "head"}
    if head != {n: s for n, s in want.items() if stage_of(n) == "head"}:
        set_aside = list(head)
    set_aside += [n for n in have if n in may_spare and n not in want]
    have = {n: s for n, s in have.items() if n not in set_aside}

    absent = [n for n in want if n not in have]
    initialised = [n for n in absent if stage_of(n) in (*may_miss, "head")]
    missing = [n for n in absent if n not in initialised]
    spare = [n for n in have if n not in want]
    misshapen = [
        f"{n} {_dims(have[n])}, needed {_dims(want[n])}"
        for n in want
        if n in have and have[n] != want[n]
    ]
    if missing or spare or misshapen:
        problems = [_listed("missing", missing), _listed("spare", spare)]
        problems += [_listed("misshapen", misshapen), _hint(have, want, missing, spare, misshapen)]
        raise UserError(f"{source} does not fit the model: {'; '.join(filter(None, problems))}")

    for name in have:
        # A copy: the caller may donate what it gets to a compiled step.
        flat[targets[name]] = jnp.array(arrays[name], jnp.float32)
    trees = _nested(flat)
    report = LoadReport(tuple(have), tuple(initialised), tuple(set_aside))
    return trees.get("params", {}), trees.get("batch_stats", {}), report


# What EfficientNet's files say of its input: means, and roots taken twice (Keras divides by the
# root of this variance, and by it again).
_NORMALIZATION = {
    "normalization/mean": TORCH_MEAN,
    "normalization/variance": TORCH_STD,
}


_OLD_MOBILENET_V2 = re.compile(r"(?P<kind>mobl|bn)(?P<number>\d+)_conv_\d+_(?:bn_)?(?P<what>\w+)")


def as_named_today(
    arrays: Mapping[str, np.ndarray], wanted: Container[str], source: str
) -> dict[str, np.ndarray]:
    """Without what is preprocessing; depthwise kernels and MobileNets' layers as in Keras 3.

    MobileNetV3's `Conv_1/BatchNorm` of Keras 2, read as `Conv_1_BatchNorm`, is `conv_1_bn` now.
    MobileNetV2's published files are older still: `mobl3_conv_3_expand` is `block_3_expand`,
    `bn0_conv_0_bn_project` is `expanded_conv_project_BN`.
    """
    # The layer has no name of its own: Keras numbers those of a session's later networks.
    preprocessing = {n: re.sub(r"^normalization_\d+/", "normalization/", n) for n in arrays}
    preprocessing = {n: known for n, known in preprocessing.items() if known in _NORMALIZATION}
    for name, known in preprocessing.items():
        values, found = _NORMALIZATION[known], np.ravel(arrays[name])
        if found.shape != (3,) or not np.allclose(found, values, atol=1e-4):
            raise UserError(
                f"{source}: {name} is {found}, not ImageNet's {values}: these weights "
                "expect another preprocessing than this network's: export the others alone to an "
                ".npz with Keras's names, and set model.preprocessing to what they expect (unit, "
                "if these are 0 and 1)"
            )
    named: dict[str, np.ndarray] = {}
    for name, value in arrays.items():
        if name in preprocessing:
            continue
        layer, slash, array = name.rpartition("/")
        array = "kernel" if array == "depthwise_kernel" else array
        if old := _OLD_MOBILENET_V2.fullmatch(layer):
            block = "expanded_conv" if old["number"] == "0" else f"block_{old['number']}"
            layer = f"{block}_{old['what']}" + "_BN" * (old["kind"] == "bn")
        today = f"{layer.replace('BatchNorm', 'bn').lower()}/{array}"
        name = today if today in wanted else f"{layer}{slash}{array}"
        if name in named:
            raise UserError(f"{source} holds {name} twice: save one network's weights alone")
        named[name] = value
    return named


def array_paths(params: Tree, batch_stats: Tree) -> dict[str, TreePath]:
    """A network's arrays by their Keras names: the path of each, from the stage down."""
    return {keras_name(path): path for tree in (params, batch_stats) for path, _ in _leaves(tree)}


def name_in_runs(path: TreePath) -> str:
    """The array's name where both ends are ours: Keras's; of networks that have none, its path."""
    try:
        return keras_name(path)
    except KeyError:
        return "/".join(map(str, path))


def named_arrays(params: Tree, batch_stats: Tree) -> dict[str, Any]:
    """A network's arrays by `name_in_runs`, to be loaded into another."""
    return {name_in_runs(p): x for tree in (params, batch_stats) for p, x in _leaves(tree)}


def arrays_of_the_whole(config: Any) -> Collection[str]:
    """Names of the arrays of the network whose first layers the configuration's `model` is."""
    whole = beginning_of(config)
    return () if whole is None else array_paths(*shapes_of(whole, 2))


def shapes_of(config: Any, classes: int) -> tuple[Tree, Tree]:
    """Shapes of the parameters and running statistics of the configuration's `model`."""
    return jax.eval_shape(lambda: create_model(config, classes, 0)[1:])


def stage_of(name: str) -> str:
    """`conv2` of `conv2_block1_0_conv/kernel`, `head` of the head's layers."""
    layer = name.split("/")[0]
    return "head" if layer in _HEAD_LAYERS else layer.split("_")[0]


def _leaves(tree: Tree, path: TreePath = ()) -> Iterator[tuple[TreePath, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*path, key))
        else:
            yield (*path, key), value


def _nested(flat: Mapping[TreePath, Any]) -> Tree:
    tree: Tree = {}
    for (*groups, last), value in flat.items():
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[last] = value
    return tree


def _dims(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _listed(kind: str, names: Sequence[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)} {kind} ({', '.join(names[:_SHOWN])}{more})"


def _hint(
    have: Shapes,
    want: Shapes,
    missing: Sequence[str],
    spare: Sequence[str],
    misshapen: Sequence[str],
) -> str:
    """The likely mend."""
    given, needed = _looks_like(have), _looks_like(want)
    if given is not None and given != needed:
        return f"these look like {given} weights, for model.name={given}"
    stages = sorted({stage_of(n) for n in missing})
    of_resnet = needed is not None  # DenseNet121 too has stages of these names
    if of_resnet and missing and not (spare or misshapen) and set(stages) < set(_BACKBONE):
        return (
            "to initialise what is missing, name its stage in model.weights_may_miss "
            f"(converter: --may_miss): {', '.join(stages)}"
        )
    return "give the weights of this very network, under Keras's names"


def _looks_like(shapes: Shapes) -> str | None:
    """The model whose stem and numbers of blocks these are; a stage without arrays fits any."""
    for name, spec in RESNETS.items():
        stem = shapes.get("conv1_conv/kernel") == (7, 7, 3, spec.width)
        biased = ("conv1_conv/bias" in shapes) == spec.use_bias
        depths = [
            len({n.split("_")[1] for n in shapes if n.startswith(f"{stage}_block")})
            for stage in _BACKBONE[1:]
        ]
        blocks = all(d in (0, needed) for d, needed in zip(depths, spec.depths, strict=True))
        if stem and biased and blocks:
            return name
    return None
