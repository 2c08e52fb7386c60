"""Parameters drawn by the same equations are interpreted once: which those are, and that they stay independent."""

import jax
import jax.numpy as jnp
import numpy as np

import varscale as vs
from varscale.theory.interpreter.repeats import first_alike, output_recipes


def alike(f):
    return first_alike(output_recipes(jax.make_jaxpr(f)(jax.random.key(0)).jaxpr))


def test_draws_from_keys_of_their_own_are_alike():
    def init(key):
        a, b, c = (jax.random.fold_in(key, i) for i in range(3))
        draw = lambda k, gain=1.0: gain * jax.random.normal(k, (4, 3))  # noqa: E731
        return draw(a), draw(b), draw(c, 2.0), jnp.zeros(3), jnp.zeros(3), jnp.ones(3)

    assert alike(init) == [0, 0, 2, 3, 3, 5]


def test_draws_that_share_a_key_are_not_alike():
    """The second and third are one array under two names; the fourth is a function of the first's key."""

    def init(key):
        a, b, c = (jax.random.fold_in(key, i) for i in range(3))
        draw = lambda k: jax.random.normal(k, (4, 3))  # noqa: E731
        return draw(a), draw(b), draw(b), jnp.tanh(draw(a)), draw(c)

    assert alike(init) == [0, 1, 2, 3, 4]


def test_the_order_of_two_keys_matters():
    def init(key):
        k = [jax.random.fold_in(key, i) for i in range(6)]
        mixed = lambda x, y: jax.random.normal(x, (4,)) + 2 * jax.random.normal(y, (4,))  # noqa: E731
        twice = lambda x: mixed(x, x)  # noqa: E731
        return mixed(k[0], k[1]), mixed(k[2], k[3]), twice(k[4]), twice(k[5])

    assert alike(init) == [0, 0, 2, 2]


def test_parameters_drawn_alike_are_independent():
    """E[(x A + x B)²] = 2 E[(x A)²] for independent A and B, 4 E[(x A)²] where B is A."""

    def params(key, shared):
        a, b = jax.random.fold_in(key, 0), jax.random.fold_in(key, 0 if shared else 1)
        return {"a": jax.random.normal(a, (64, 32)), "b": jax.random.normal(b, (64, 32))}

    def model(p, x):
        return x @ p["a"] + x @ p["b"]

    x = jax.ShapeDtypeStruct((8, 64), jnp.float32)
    for shared, factor in ((False, 2), (True, 4)):
        report = vs.predict(model, x, params=lambda key, shared=shared: params(key, shared), backward=False)
        np.testing.assert_allclose(report.rows[-1].second_moment, factor * 64, rtol=1e-3)
