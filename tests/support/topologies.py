"""TPUs that are not attached, for scripts that compile for them. Import it before JAX."""

import os

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
os.environ["JAX_PLATFORMS"] = "cpu"

from jax.experimental import topologies

TOPOLOGIES = {
    "v4": ("v4:2x2x1", {"chip_config_name": "megacore"}),
    "v5e": ("v5e:2x2", {}),
    "v5p": ("v5p:2x2x1", {}),
    "v6e": ("v6e:2x2", {}),
    "tpu7x": ("tpu7x:2x2x1", {}),
}


def devices_of(chip):
    """Devices of a generation's smallest topology, or of one by name, such as v5e:2x4."""
    name, options = TOPOLOGIES.get(chip, (chip, {}))
    return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
