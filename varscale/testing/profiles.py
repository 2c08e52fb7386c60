"""How much a test sees and what it costs: error rates and detectable sizes, under a name."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from varscale.testing.power import check_detectable, check_error_rates


@dataclass(frozen=True)
class Profile:
    """Error rates and detectable sizes of a test.

    Attributes:
        name: of the profile.
        detectable_ratio: the variance ratio that is detected, above 1; its inverse is detected too.
        detectable_mean: the common mean of the weights that is detected, in standard deviations.
        alpha: the false-alarm rate of the whole claim.
        beta: the rate of misses at the detectable sizes.
        entries: how many weights the tests of independence and of the distribution function read at most.
        blind: what the test cannot see beside these sizes, in words; "" for nothing worth saying.
    """

    name: str
    detectable_ratio: float
    detectable_mean: float
    alpha: float
    beta: float
    entries: int
    blind: str = ""

    def __post_init__(self):
        check_error_rates(self.alpha, self.beta)
        check_detectable("detectable_ratio", self.detectable_ratio, 1)
        check_detectable("detectable_mean", self.detectable_mean, 0)

    def but(self, **sizes: float | None) -> Profile:
        """The profile with those of `sizes` that are not None.

        Raises:
            ValueError: a size or a rate is outside its range.
        """
        return dataclasses.replace(self, **{name: value for name, value in sizes.items() if value is not None})


FULL = Profile("full", 1.1, 0.012, 1e-9, 1e-6, 2**19)
QUICK = Profile(
    "quick", 1.2, 0.1, 1e-6, 1e-3, 2**13,
    blind="a variance off by less than 20 %, a mean below .1 std (sampling in bfloat16 leaves .018), correlations and wrong "
    "laws that 8192 weights do not show",
)  # fmt: skip

_BY_NAME = {profile.name: profile for profile in (FULL, QUICK)}


def profile_of(profile: Profile | str) -> Profile:
    """The profile itself, or that of a name: "full" (the default of every test) or "quick".

    Raises:
        ValueError: there is no profile of this name.

    >>> profile_of("quick").detectable_ratio
    1.2
    """
    if isinstance(profile, Profile):
        return profile
    if profile not in _BY_NAME:
        raise ValueError(f"profile must be one of {', '.join(map(repr, _BY_NAME))} or a Profile, not {profile!r}")
    return _BY_NAME[profile]
