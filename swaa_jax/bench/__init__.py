"""Speed of models under attention policies, and of servers, under one workload; see README.md."""

from swaa_jax.bench.measure import Measurement
from swaa_jax.bench.result import BenchResult
from swaa_jax.bench.run import bench
from swaa_jax.bench.workload import Lengths, Workload
from swaa_jax.callable_package import make_callable

__all__ = ["BenchResult", "Lengths", "Measurement", "Workload", "bench"]

make_callable(__name__, bench)
