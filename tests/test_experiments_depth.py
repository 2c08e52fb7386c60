"""Nets of the experiments on depth: each form of the block is what its scheme says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import varscale as vs
from experiments import depth_schemes, mended_by_audit
from experiments.nets.residual_towers import ResidualTower, drawn

X = jax.random.normal(jax.random.key(0), (8, 16))


@pytest.mark.parametrize("name", list(depth_schemes.SCHEMES))
def test_the_plan_of_each_scheme_draws_its_net(name):
    scheme = depth_schemes.SCHEMES[name]
    model = ResidualTower(scheme.form, 16, 4)
    plan = scheme.laws()(model, jax.ShapeDtypeStruct(X.shape, X.dtype))
    assert not [requirement for requirement in plan.requirements if requirement.status == "missing"]
    params = drawn(plan, jax.random.key(1))
    logits, squares, stream = model.apply({"params": params}, X)
    assert logits.shape == (8, 10)
    assert np.isfinite(np.asarray(squares)).all()
    assert float(jnp.mean(jnp.square(stream))) == pytest.approx(float(squares[-1]), rel=1e-5)
    if name == "Fixup":
        assert float(squares[-1]) == pytest.approx(float(squares[0]), rel=1e-5)  # each block starts as the identity
    if name == "DeepNorm":
        assert float(squares[-1]) == pytest.approx(1, abs=1e-3)


def test_the_line_of_the_audit_is_an_initializer_and_mends():
    sizes = mended_by_audit.Sizes(depth=12, width=32)
    before = mended_by_audit.audited(mended_by_audit.BEFORE, sizes)
    line, init = mended_by_audit.mended(before)
    assert line.startswith("kernel_init=vs.for_activation(jax.nn.relu)")
    assert init == vs.for_activation(jax.nn.relu)
    assert [finding.level for finding in before.findings].count("error") > 0
    assert [finding.level for finding in mended_by_audit.audited(init, sizes).findings].count("error") == 0
