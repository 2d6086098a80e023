"""Set up before JAX is imported: fake devices, shape checking, reproducible Hypothesis."""

import gc
import os

from tests.support import programs
from tests.support.processes import ON_GPUS, QUICK_COMPILES, has_gpus

# Eight CPU devices stand in for a mesh. Flags are read once, when JAX's backend starts. GPUs are
# there or not, and programs for them are optimised or refused.
_FLAGS = {"--xla_force_host_platform_device_count": "8"}
if has_gpus():
    os.environ.update(ON_GPUS)
else:
    _FLAGS |= QUICK_COMPILES
for _flag, _value in _FLAGS.items():
    if _flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flag}={_value}".strip()

programs.keep_for_this_run()

import jaxtyping  # noqa: E402
import pytest  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

import tests.support.typecheck  # noqa: E402, F401  (the hook finds it by name)
from tests.support.judge_server import judge_server  # noqa: E402, F401  (a fixture)

# Every annotated function of the two packages checks its shapes and types at each call.
jaxtyping.install_import_hook(["swaa_jax", "kernels_pallas"], "tests.support.typecheck.check")

# The same examples on every machine, and no time limit: the first call of each shape compiles.
settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    max_examples=30,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("repeatable")


@pytest.fixture
def no_type_checks(monkeypatch):
    """Calls as users make them, without the import hook: wrong types reach our own messages."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def pytest_collection_finish():
    """What imports made stays: later searches for garbage, fewer of them, leave it out."""
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def pytest_runtest_teardown(item, nextitem):
    """Between files, a process that has grown lets its compiled programs go."""
    if nextitem is not None and nextitem.path != item.path and programs.resident_gib() > 5:
        import jax

        jax.clear_caches()
        gc.collect()
