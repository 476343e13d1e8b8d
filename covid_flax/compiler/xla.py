"""What the XLA compiler is told for this machine, as `compiler_options` of `jax.jit`."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

# Loops over activations in full AVX-512 registers; XLA's default is half of them. Where the
# processor has none, LLVM splits the vectors again.
_CPU = {"xla_cpu_prefer_vector_width": "512"}


@functools.cache
def _known(options: tuple[tuple[str, str], ...]) -> bool:
    """Whether this jaxlib takes the options; an unknown one is an error when compiling."""
    one = jax.ShapeDtypeStruct((), jnp.float32)
    try:
        jax.jit(jnp.negative, compiler_options=dict(options)).lower(one).compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


def compiler_options() -> dict[str, str]:
    """XLA's options for the default backend, for `jax.jit(..., compiler_options=...)`.

    Returns:
      A new dictionary, empty off-CPU and where the installed jaxlib does not know them. Options
      change rounding: a run resumes bit for bit only under the same.
    """
    if jax.default_backend() != "cpu" or not _known(tuple(_CPU.items())):
        return {}
    return dict(_CPU)
