"""Fans against counting: a layer of ones tells how many terms each output, and each gradient, sums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import varscale as vs
from varscale import Fans


def counted(apply, x):
    """Mean number of terms an output and an input gradient sum, of a layer whose weights are all one."""
    y, pullback = jax.vjp(apply, x)
    (g,) = pullback(jnp.ones_like(y))
    return float(y.mean()), float(g.mean())


@pytest.mark.parametrize(
    ("shape", "roles", "expected"),
    [
        ((128, 64), {}, Fans(128, 64)),
        ((3, 3, 16, 32), {}, Fans(144, 288)),
        ((16, 32, 3, 3), {"in_axis": 1, "out_axis": 0}, Fans(288, 144)),
        ((8, 4, 5), {"in_axis": 1, "out_axis": 2, "batch_axis": 0}, Fans(4, 5)),
        ((64, 8, 16), {"in_axis": 0, "out_axis": (1, 2)}, Fans(64, 128)),
        ((8, 16, 64), {"in_axis": (0, 1), "out_axis": -1}, Fans(128, 64)),
        ((7,), {"in_axis": 0, "out_axis": ()}, Fans(7, 1)),
        ((50, 8), {"in_axis": -2, "out_axis": 0}, Fans(8, 8)),
        ((0, 8), {}, Fans(0, 0)),
    ],
)
def test_from_shape_and_axes(shape, roles, expected):
    assert vs.compute_fans(shape, **roles) == expected


@pytest.mark.parametrize(
    ("spec", "shapes", "operand"),
    [
        ("abc,cde->abde", ((2, 3, 4), (4, 5, 6)), 1),
        ("...i,io->...o", ((2, 3, 4), (4, 5)), 1),
        ("bhi,hio->bho", ((2, 3, 4), (3, 4, 5)), 1),
        ("io,bi->bo", ((4, 5), (2, 4)), 0),
        ("ij,jk", ((2, 4), (4, 5)), 1),
        ("bi,iok->bo", ((2, 4), (4, 5, 3)), 1),
        ("b...i,...io->b...o", ((2, 3, 4), (3, 4, 5)), 1),
        ("bqhd,hdo->bqo", ((2, 3, 4, 5), (4, 5, 6)), 1),
    ],
)
def test_from_einsum(spec, shapes, operand):
    x = jnp.ones(shapes[1 - operand])
    kernel = jnp.ones(shapes[operand])
    fans = vs.einsum_fans(spec, shapes[operand], operand)

    def apply(x):
        return jnp.einsum(spec, *((kernel, x) if operand == 0 else (x, kernel)))

    assert counted(apply, x) == pytest.approx((fans.fan_in, fans.fan_out))


@st.composite
def convolutions(draw):
    groups = draw(st.sampled_from([1, 2]))
    return {
        "kernel": (draw(st.integers(1, 4)), draw(st.integers(1, 3)), 2, 2 * groups),
        "groups": groups,
        "strides": (draw(st.integers(1, 3)), draw(st.integers(1, 2))),
        "dilation": (draw(st.integers(1, 2)), 1),
        "padding": draw(st.sampled_from(["VALID", "SAME", "SAME_LOWER", ((1, 2), (0, 1))])),
        "input_size": (draw(st.integers(7, 9)), 8),
    }


@given(convolutions())
@settings(max_examples=15)
def test_of_a_convolution(case):
    kernel = case.pop("kernel")
    x = jnp.ones((1, *case["input_size"], 2 * case["groups"]))

    def apply(x):
        return jax.lax.conv_general_dilated(
            x,
            jnp.ones(kernel),
            case["strides"],
            case["padding"],
            rhs_dilation=case["dilation"],
            feature_group_count=case["groups"],
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    fans = vs.conv_fans(kernel, **case)
    assert counted(apply, x) == pytest.approx((fans.fan_in, fans.fan_out), rel=1e-6)


@given(st.integers(1, 4), st.integers(1, 3), st.sampled_from(["VALID", "SAME", ((1, 2),)]), st.integers(1, 2))
@settings(max_examples=15)
def test_of_a_transposed_convolution(window, stride, padding, dilation):
    x = jnp.ones((1, 6, 2))

    def apply(x):
        return jax.lax.conv_transpose(
            x, jnp.ones((window, 2, 3)), (stride,), padding, rhs_dilation=(dilation,), dimension_numbers=("NHC", "HIO", "NHC")
        )

    settings = {"strides": stride, "padding": padding, "dilation": dilation, "input_size": 6, "transposed": True}
    expected = counted(apply, x)
    fans = vs.conv_fans((window, 2, 3), **settings)
    assert expected == pytest.approx((fans.fan_in, fans.fan_out), rel=1e-6)
    assert vs.conv_fans((window, 3, 2), transpose_kernel=True, **settings) == fans


def test_a_batch_axis_is_for_one_array_and_not_for_the_inside_of_a_vmap():
    """Eight layers as one array have fan_in 16; inside vmap each layer's shape is (16, 32), and the error says so."""
    keys, x = jax.random.split(jax.random.key(0), 8), jnp.ones((1, 16))
    stack = vs.he_normal(batch_axis=0)(keys[0], (8, 16, 32))
    assert float((stack**2).mean()) == pytest.approx(2 / 16, rel=0.1)

    def nnx_layers(init):
        return nnx.vmap(lambda rngs: nnx.Linear(16, 32, kernel_init=init, rngs=rngs))(nnx.Rngs(0).split(8))

    def linen_layers(init):
        stacked = linen.vmap(linen.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, axis_size=8, in_axes=None)
        return stacked(32, kernel_init=init).init(keys[0], x)

    for layers in (nnx_layers, linen_layers, lambda init: jax.vmap(lambda key: init(key, (16, 32)))(keys)):
        with pytest.raises(ValueError, match=r"inside nnx.vmap.* leave batch_axis out"):
            layers(vs.he_normal(batch_axis=0))
    for kernel in (nnx_layers(vs.he_normal()).kernel[...], linen_layers(vs.he_normal())["params"]["kernel"]):
        assert kernel.shape == (8, 16, 32)
        assert float((kernel**2).mean()) == pytest.approx(2 / 16, rel=0.1)


def test_stacked_sirens_have_the_bound_of_one():
    for init, bound in ((vs.siren_first(batch_axis=0), 1 / 2), (vs.siren(30.0, batch_axis=0), (6 / 2) ** 0.5 / 30)):
        weights = init(jax.random.key(0), (8, 2, 256))
        assert float(jnp.abs(weights).max()) == pytest.approx(bound, rel=1e-2)


def test_without_an_input_size():
    assert vs.conv_fans((3, 3, 4, 8)) == Fans(36, 72)
    assert vs.conv_fans((3, 3, 4, 8), strides=2, groups=2) == Fans(36, 9)
    assert vs.conv_fans((4, 4, 16, 32), strides=2, transposed=True) == Fans(64, 512)


@pytest.mark.parametrize(("window", "size", "share"), [(3, 32, 0.9588), (7, 32, 0.8957), (7, 8, 0.6173)])
def test_coverage_of_same_padding(window, size, share):
    fans = vs.conv_fans((window, window, 1, 1), padding="SAME", input_size=size)
    assert fans.fan_in / window**2 == pytest.approx(share, abs=5e-5)


def test_padding_of_flax_by_name():
    for padding, expected in (("CIRCULAR", 3.0), ("REFLECT", 3.0), ("CAUSAL", (1 + 2 + 3 * 6) / 8)):
        assert vs.conv_fans((3, 1, 1), padding=padding, input_size=8).fan_in == pytest.approx(expected)


def test_modes():
    fans = Fans(4, 9)
    assert [fans.of(mode) for mode in ("fan_in", "fan_out", "fan_avg", "fan_geo_avg")] == [4, 9, 6.5, 6]


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: vs.compute_fans((3,)), ValueError, "in_axis"),
        (lambda: vs.compute_fans(()), ValueError, "in_axis"),
        (lambda: vs.compute_fans((3,), 0), ValueError, "out_axis"),
        (lambda: vs.compute_fans((3, 4), 2), ValueError, "in_axis"),
        (lambda: vs.compute_fans((3, 4), (0, 0)), ValueError, "repeat"),
        (lambda: vs.compute_fans((3, 4), (0, -2)), ValueError, "repeat"),
        (lambda: vs.compute_fans((3, 4, 5), batch_axis=2), ValueError, "batch_axis"),
        (lambda: vs.compute_fans((-3, 4)), ValueError, "shape"),
        (lambda: vs.compute_fans((3.5, 4)), TypeError, "shape"),
        (lambda: vs.compute_fans((3, 4), "in"), TypeError, "in_axis"),
        (lambda: Fans(-1, 2), ValueError, "fan_in"),
        (lambda: Fans(1, np.nan), ValueError, "fan_out"),
        (lambda: Fans(1, 2).of("fan"), ValueError, "mode"),
        (lambda: vs.einsum_fans("ab,bc->ac", (3, 4, 5)), ValueError, "kernel_shape"),
        (lambda: vs.einsum_fans("ab,bb->a", (3, 3)), ValueError, "diagonal"),
        (lambda: vs.einsum_fans("ab,bc->ad", (3, 4)), ValueError, "output"),
        (lambda: vs.einsum_fans("ab,b1->a1", (3, 4)), ValueError, "letters"),
        (lambda: vs.einsum_fans("ab,bc->ac", (3, 4), 2), ValueError, "operand"),
        (lambda: vs.einsum_fans(3, (3, 4)), TypeError, "spec"),
        (lambda: vs.conv_fans((3, 4)), ValueError, "kernel_shape"),
        (lambda: vs.conv_fans((3, 4, 9), groups=2), ValueError, "groups"),
        (lambda: vs.conv_fans((3, 4, 8), strides=0), ValueError, "strides"),
        (lambda: vs.conv_fans((3, 4, 8), padding="FULL"), ValueError, "padding"),
        (lambda: vs.conv_fans((3, 4, 8), input_size=2), ValueError, "input_size"),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()
