"""Compiler options: taken by this jaxlib, left out by one that does not know them."""

import jax
import jax.numpy as jnp
import numpy as np

from covid_flax.compiler import xla


def test_a_program_compiled_with_the_options_computes_the_same():
    options = xla.compiler_options()
    assert options == {"xla_cpu_prefer_vector_width": "512"}
    x = np.arange(1, 1000, dtype=np.float32)
    got = jax.jit(lambda x: jnp.sqrt(x) + 1, compiler_options=options)(x)
    np.testing.assert_allclose(got, np.sqrt(x.astype(np.float64)) + 1, rtol=1e-6)


def test_each_call_gives_a_dictionary_of_its_own():
    xla.compiler_options().clear()
    assert xla.compiler_options()


def test_options_that_the_compiler_does_not_know_are_left_out(monkeypatch):
    monkeypatch.setattr(xla, "_CPU", {"xla_cpu_no_such_option": "1"})
    assert xla.compiler_options() == {}


def test_accelerators_get_none(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert xla.compiler_options() == {}
