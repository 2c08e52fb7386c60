"""Windows over places that are copies, or averages, of the same numbers: drawn, within their bounds of what is exact."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import varscale as vs
from varscale.theory.domain.axes import Axis
from varscale.theory.graph.nodes import Graph, leaf
from varscale.theory.graph.normal_form import broadcast
from varscale.theory.graph.reshapes import merge
from varscale.theory.propagation.near_places import copies, repeats


def blurred_after(enlarge):
    def pools(x):
        return nn.avg_pool(enlarge(x), (3, 3), (1, 1))

    return pools


PROGRAMS = {
    "blur, then down": lambda x: nn.avg_pool(nn.avg_pool(x, (3, 3), (1, 1)), (2, 2), (2, 2)),
    "up, then blur": blurred_after(lambda x: jax.image.resize(x, (x.shape[0], 16, 16, x.shape[3]), "nearest")),
    "smoothly up, then blur": blurred_after(lambda x: jax.image.resize(x, (x.shape[0], 16, 16, x.shape[3]), "bilinear")),
}


@pytest.mark.parametrize("name", PROGRAMS)
@jax.numpy_dtype_promotion("standard")  # flax divides by an integer
def test_gradients_of_windows_over_copies_are_those_of_the_jacobian(name):
    """g_x = Jᵀ g with g of mean square 1: its mean square is |J|² over the places of x."""

    def net(p, x):
        with jax.named_scope("h"):
            h = x * p
        return PROGRAMS[name](h)

    row = vs.predict(net, jax.ShapeDtypeStruct((2, 8, 8, 4), "float32"), params=jnp.ones((1, 1, 1, 4)) * 1.5)["h"]
    jacobian = jax.jacobian(lambda x: PROGRAMS[name](x[None, ..., None]))(jnp.zeros((8, 8)))
    exact = float(np.sum(np.square(jacobian)) / 64)
    assert abs(row.gradient / exact - 1) < row.gradient_error_bound < 0.25


@jax.numpy_dtype_promotion("standard")
def test_pixels_shuffled_out_of_repeated_kernels_are_equal():
    """ICNR: each block of four is one number, so that its mean is that number."""

    def repeated(key, shape, dtype=jnp.float32):
        return jnp.repeat(nn.initializers.lecun_normal()(key, (*shape[:-1], shape[-1] // 4), dtype), 4, -1)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.Conv(128, (1, 1), kernel_init=repeated)(x)
            b, n, m, c = h.shape
            h = h.reshape(b, n, m, c // 4, 2, 2).transpose(0, 1, 4, 2, 5, 3).reshape(b, 2 * n, 2 * m, c // 4)
            return nn.avg_pool(h, (2, 2), (2, 2))

    row = vs.predict(Net(), jax.ShapeDtypeStruct((2, 4, 4, 32), "float32"), backward=False).output
    assert abs(row.second_moment - 1) < row.error_bound < 0.25


def test_gradients_of_a_norm_over_a_smooth_picture_are_in_doubt():
    """v = w'Σw of a channel has few terms that count, and E[1/v] is some times 1/E[v]: its bound says so, and only there."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(use_running_average=False)(nn.Conv(16, (3, 3), use_bias=False)(x))

    waves = np.cos(np.linspace(0, 3, 16))
    picture = (waves[:, None] * waves)[None, :, :, None] * np.random.default_rng(0).normal(size=(4, 1, 1, 3))
    row = vs.predict(Net(), picture.astype(np.float32))["Conv_0"]  # 100 draws: 20.4 ± .5 in place of 8.5
    assert row.gradient_error_bound > 1.4
    assert vs.predict(Net(), jax.ShapeDtypeStruct((4, 16, 16, 3), "float32"))["Conv_0"].gradient_error_bound < 0.25


def test_copies_are_counted():
    graph = Graph()
    x = leaf(graph, ("input", 0), [Axis(5), Axis(3)], 0.0, 1.0, odd=True)
    repeated = merge(broadcast(x, (*x.axes, Axis(4))), 1, 2)
    assert copies(repeated) == 4
    assert repeats(repeated)
    assert copies(merge(x, 0, 2)) == 1
    assert not repeats(merge(x, 0, 2))
