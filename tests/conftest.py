"""A strict session: no silent dtype or rank promotion, eight CPU devices, one deterministic Hypothesis profile."""

import gc
import importlib.metadata
import os

# Most of the time goes to compiling what runs once: LLVM does less of it, and fusions skip MLIR. Whoever sets XLA_FLAGS tests
# what XLA makes with them. XLA refuses flags that it does not know, and a jaxlib after 0.10 may not know the last one.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 " + (
    os.environ.get("XLA_FLAGS")
    or "--xla_backend_optimization_level=1"
    + " --xla_cpu_use_fusion_emitters=false" * importlib.metadata.version("jaxlib").startswith("0.10.")
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "agg")

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, max_examples=25, print_blob=True)
hypothesis.settings.register_profile("night", deadline=None, max_examples=1000, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# What `-m quick` runs: cheap files and single tests from every room, and the README's own code. Under 90 s on 2 cores.
QUICK = frozenset({
    "README.md", "test_readme.py", "test_conftest.py", "test_public_face.py", "test_floors.py", "test_house.py",
    "test_gaussian.py", "test_initializers_fans.py", "test_initializers_gains.py", "test_initializers_structured.py",
    "test_programs.py", "test_programs_patterns.py", "test_probe_statistics.py", "test_report.py", "test_reporting.py",
    "test_mean_field.py", "test_usage.py", "test_testing_tails.py", "test_initialization_values.py::test_an_nnx_factory",
    "test_transfer_files.py", "test_transfer_graft.py", "test_transfer_rearrange.py", "test_transfer_resize.py",
})  # fmt: skip


# Files of many programs that run once, and whose assertions do not depend on how XLA compiles: it optimizes nothing there.
UNOPTIMIZED = frozenset({
    "test_auditing.py", "test_auditing_defects.py", "test_initializers_contract.py", "test_initializers_structured.py",
    "test_measuring_monitor.py", "test_measuring_monitor_nnx.py", "test_probe_numbers.py", "test_probe_rows.py",
    "test_auditing_result.py", "test_replays.py", "test_schemes_optimizers.py", "test_schemes_unit_variance.py",
    "test_transfer_fine_tune.py", "test_transfer_graft.py", "test_transfer_lora.py", "test_usage.py",
})  # fmt: skip


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    fast = "--xla_backend_optimization_level=1" in os.environ["XLA_FLAGS"]
    jax.config.update("jax_disable_most_optimizations", fast and item.path.name in UNOPTIMIZED)


def pytest_collection_finish():
    # A tenth of the time went to collections of garbage that found none: what is imported stays, traces hold many objects.
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def pytest_collection_modifyitems(items):
    for item in items:
        file, function = item.path.name, item.name.partition("[")[0]
        if {file, f"{file}::{function}"} & QUICK:
            item.add_marker("quick")


@pytest.fixture
def key():
    return jax.random.key(0)
