"""The series and the grid's arithmetic against numpy's own, which are slower."""

import numpy as np

from varscale.theory.integrals.hermite_series import DEGREE, POINTS, Z, on_one_thread, power_series, read_off

RNG = np.random.default_rng(0)


def test_series_are_sums_of_powers():
    coefficients, rho = RNG.standard_normal((3, 1, DEGREE)), RNG.uniform(-1, 1, (2, 3, 4))
    powers = rho[..., None] ** np.arange(DEGREE)
    np.testing.assert_allclose(power_series(coefficients, rho), (coefficients * powers).sum(-1), rtol=1e-9, atol=1e-12)


def test_products_in_blocks_are_products():
    for columns in (1, 40, 300):  # of one block, of several, and on threads
        x, matrix = RNG.standard_normal((7, 60, POINTS)), RNG.standard_normal((POINTS, columns))
        np.testing.assert_allclose(on_one_thread(x, matrix), x @ matrix, rtol=1e-9, atol=1e-9)


def test_functions_are_read_off_the_grid_and_constant_beyond_it():
    x = np.concatenate([4 * RNG.standard_normal(1000), Z[:2], Z[-2:], [0.0, -9.0, 9.0]])
    for line in (np.tanh(Z), np.maximum(Z, 0), Z**3):
        np.testing.assert_allclose(read_off(line, x), np.interp(x, Z, line), rtol=1e-12, atol=1e-12)
