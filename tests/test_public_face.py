"""What a newcomer meets: the names of the package, and the errors of names that are not there."""

import contextlib
import io
import pydoc

import pytest

import varscale as vs


def test_completion_and_help_show_the_public_names():
    shown = {name for name in dir(vs) if not name.startswith("__")}
    assert shown == set(vs.__all__)
    assert len(vs.__all__) == len(set(vs.__all__))
    assert {"predict", "he_normal", "for_activation", "Row", "Weight", "Report", "testing"} <= shown
    page = pydoc.render_doc(vs, renderer=pydoc.plaintext)
    for name in ("he_normal", "variance_scaling", "predict", "class Row", "class Weight"):
        assert name in page
    namespace = {}
    exec("from varscale import *", namespace)
    assert set(vs.__all__) <= set(namespace)


NEWCOMERS = (
    "predict", "mean_field", "variance_scaling", "for_activation", "gain", "he_normal", "he_uniform", "glorot_normal",
    "glorot_uniform", "lecun_normal", "normal", "truncated_normal", "orthogonal", "fused", "embedding", "Fans",
)  # fmt: skip


@pytest.mark.parametrize("name", NEWCOMERS)
def test_the_names_a_newcomer_sees_have_an_example(name):
    """The examples themselves are run as doctests of their modules."""
    with contextlib.redirect_stdout(io.StringIO()) as page:
        help(getattr(vs, name))
    assert ">>> " in page.getvalue()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("uniform", "symmetric_uniform(bound)"),
        ("zeros_init", "vs.zeros, which is an initializer already"),
        ("ones_init", "vs.ones"),
        ("glorot", "vs.glorot_normal() or vs.glorot_uniform()"),
        ("random_normal", "vs.normal(stddev)"),
        ("RandomUniform", "vs.symmetric_uniform"),
        ("HeNormal", "vs.he_normal()"),
        ("TruncatedNormal", "vs.truncated_normal()"),
        ("xavier_uniform_", "vs.xavier_uniform()"),
        ("trunc_normal_", "vs.cut_normal(stddev, 2.0)"),
        ("eye_", "vs.identity()"),
        ("calculate_gain", "vs.gain(jax.nn.tanh)"),
        ("UniformScaling", "'fan_in', 'uniform'"),
        ("random_normal_initializer", "vs.normal"),
        ("glorot_norml", "did you mean vs.glorot_normal"),
    ],
)
def test_a_name_of_another_library_is_answered_with_ours(name, words):
    for module in (vs, vs.initializers):
        with pytest.raises(AttributeError) as caught:
            getattr(module, name)
        assert f"has no attribute '{name}'" in str(caught.value)
        assert words in str(caught.value)


def test_other_names_are_missing_without_advice():
    for name in ("nonsense", "_repr_html_", "__wrapped__"):
        with pytest.raises(AttributeError) as caught:
            getattr(vs, name)
        assert str(caught.value).endswith(f"no attribute '{name}'")
