"""What a mixture-of-experts layer multiplies on a TPU, counted from the compiled program.

No TPU is needed: libtpu, the real compiler, compiles for a topology that is not attached. Each row
is a program and its products, over those that it cannot do without: a token's k experts, its router
(and for the whole model its projections, head and attention as compiled). A token's k experts are k
of E: 1.0 is perfect, E / k is every token through every expert. Kernels over groups of rows are
counted at their worst, with a partial tile at both ends of every group.
"""

import argparse
import functools
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Before JAX is imported: no metadata server is asked, other processes may load libtpu too.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
from flax import nnx
from hlo_flops import Product, count_products
from jax.experimental import topologies
from machine import version

from kernels_pallas import Target, grouped_matmul
from swaa_jax import sharding
from swaa_jax.models.blocks import Initial, Rows
from swaa_jax.models.families.qwen3_moe import Qwen3MoeConfig, Qwen3MoeForCausalLM
from swaa_jax.models.moe import SparseMLP
from swaa_jax.policy import AttentionPolicy

ROOT = Path(__file__).resolve().parents[1]
EPILOG = """
examples:
  # Qwen3-30B-A3B's layer on v5e and v6e; writes benchmarks/results/moe_flops.json (ten minutes)
  pip install -r requirements/libtpu.txt && python benchmarks/moe_flops.py

  # One chip kind, short rows, no file
  python benchmarks/moe_flops.py --chips v5e --tokens 4096 --output -
"""
WIDTH, INNER, EXPERTS, PER_TOKEN = 2048, 768, 128, 8
MESH = {"fsdp": 2, "tensor": 2, "expert": 2}
DTYPE = jnp.bfloat16


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chips", nargs="+", default=["v5e", "v6e"], help="TPU generations")
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[4096, 8192, 32768], help="tokens a batch"
    )
    parser.add_argument("--no-model", action="store_true", help="leave out the three-layer model")
    parser.add_argument("--no-training", action="store_true", help="leave out gradients")
    parser.add_argument(
        "--output", default=None, help="JSON file; '-' for none (default: benchmarks/results)"
    )
    return parser.parse_args()


def main() -> None:
    """Count and print."""
    arguments = parse_arguments()
    rows = []
    print(f"libtpu {version('libtpu')}, jax {jax.__version__}")
    print(f"{'chip':5} {'program':34} {'tokens':>7} {'TFLOP':>9} {'needed':>9} {'ratio':>8}")
    for chip in arguments.chips:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=f"{chip}:2x4").devices
        for name, tokens, measure in programs(arguments):
            counted, needed = measure(devices, tokens)
            row = {
                "chip": chip,
                "program": name,
                "tokens": tokens,
                "flops": counted,
                "needed": needed,
                "ratio": counted / needed,
            }
            rows.append(row)
            print(
                f"{chip:5} {name:34} {tokens:7} {counted / 1e12:9.4f} {needed / 1e12:9.4f} "
                f"{counted / needed:8.3f}",
                flush=True,
            )
    versions = {name: version(name) for name in ("jax", "libtpu")}
    result = {"versions": versions, "rows": rows}
    if arguments.output != "-":
        path = Path(arguments.output or ROOT / "benchmarks" / "results" / "moe_flops.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"wrote {path}")


Measure = Callable[[Sequence[Any], int], tuple[int, int]]


def programs(arguments: argparse.Namespace) -> list[tuple[str, int, Measure]]:
    """Name, tokens and counter of each row of the table."""
    first = arguments.tokens[0]
    found: list[tuple[str, int, Measure]] = [
        ("plain product (proves the counter)", first, plain_product),
        ("experts' product, ragged_dot", first, functools.partial(one_product, "ragged_dot")),
    ]
    for tokens in arguments.tokens:
        found.append(("experts' product", tokens, functools.partial(one_product, "auto")))
        found.append(("layer", tokens, functools.partial(block, {})))
        found.append(("layer, fsdp=2 tensor=2 expert=2", tokens, functools.partial(block, MESH)))
    if not arguments.no_training:
        train = functools.partial(block, gradient=True)
        found.append(("layer with gradients", first, functools.partial(train, {})))
        found.append(("layer with gradients, 8 chips", first, functools.partial(train, MESH)))
    if not arguments.no_model:
        found.append(("3 layers", first, functools.partial(model, {})))
        found.append(("3 layers, fsdp=2 tensor=2 expert=2", first, functools.partial(model, MESH)))
    return found


def plain_product(devices: Sequence[Any], tokens: int) -> tuple[int, int]:
    """One matrix product, which the counter must get right."""
    on = jax.sharding.SingleDeviceSharding(devices[0])
    x = jax.ShapeDtypeStruct((tokens, WIDTH), DTYPE, sharding=on)
    w = jax.ShapeDtypeStruct((WIDTH, INNER), DTYPE, sharding=on)
    return total(compile_text(jnp.dot, x, w)), 2 * tokens * WIDTH * INNER


def one_product(backend: str, devices: Sequence[Any], tokens: int) -> tuple[int, int]:
    """Tokens' rows, k each, times their experts' matrices."""
    on = jax.sharding.SingleDeviceSharding(devices[0])
    x = jax.ShapeDtypeStruct((tokens * PER_TOKEN, WIDTH), DTYPE, sharding=on)
    w = jax.ShapeDtypeStruct((EXPERTS, WIDTH, INNER), DTYPE, sharding=on)
    sizes = jax.ShapeDtypeStruct((EXPERTS,), jnp.int32, sharding=on)
    run = functools.partial(grouped_matmul, backend=backend, target=Target.of(devices[0]))
    return total(compile_text(run, x, w, sizes)), 2 * tokens * PER_TOKEN * WIDTH * INNER


def block(
    sizes: dict[str, int], devices: Sequence[Any], tokens: int, *, gradient: bool = False
) -> tuple[int, int]:
    """Router and experts of one layer, on one chip or over a mesh; per chip."""
    mesh = mesh_of(devices, sizes)
    made = SparseMLP(
        num_experts=EXPERTS,
        num_per_token=PER_TOKEN,
        normalise=True,
        width=WIDTH,
        inner=INNER,
        hidden_act="silu",
        initial=Initial(dtype=jnp.dtype(DTYPE)),
    )
    graph, params, rest = abstract(made, mesh)

    def forward(params: Any, x: Any) -> Any:
        return nnx.merge(graph, params, rest)(x, Rows(rotations={}, mesh=mesh)).out

    def gradients(params: Any, x: Any) -> Any:
        def loss(params: Any, x: Any) -> Any:
            return jnp.sum(forward(params, x).astype(jnp.float32) ** 2)

        return jax.grad(loss, (0, 1))(params, x)

    x = jax.ShapeDtypeStruct((8, tokens // 8, WIDTH), DTYPE, sharding=rows_over(mesh))
    text = compile_text(gradients if gradient else forward, params, x)
    needed = tokens * (experts_flops() + router_flops(mesh)) // mesh.size
    return total(text, rows_share=1 / mesh.shape["expert"]), needed * (3 if gradient else 1)


def model(sizes: dict[str, int], devices: Sequence[Any], tokens: int) -> tuple[int, int]:
    """A whole model of three such layers; per chip.

    Attention, a kernel or loops, is no part of the question, and left out on both sides.
    """
    mesh = mesh_of(devices, sizes)
    config = Qwen3MoeConfig.from_hf(
        {
            "vocab_size": 8192,
            "num_hidden_layers": 3,
            "hidden_size": WIDTH,
            "intermediate_size": 6144,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "max_position_embeddings": 40960,
            "rms_norm_eps": 1e-6,
            "hidden_act": "silu",
            "rope_theta": 1e6,
            "num_experts": EXPERTS,
            "num_experts_per_tok": PER_TOKEN,
            "moe_intermediate_size": INNER,
            "norm_topk_prob": True,
        }
    )
    policy = AttentionPolicy(window=512)
    graph, params, rest = abstract(
        nnx.eval_shape(
            lambda: Qwen3MoeForCausalLM(
                config, policy=policy, dtype=DTYPE, mesh=mesh, rngs=nnx.Rngs(0)
            )
        ),
        mesh,
    )

    def forward(params: Any, tokens: Any) -> Any:
        return nnx.merge(graph, params, rest)(tokens)

    ids = jax.ShapeDtypeStruct((8, tokens // 8), jnp.int32, sharding=rows_over(mesh))
    share = 1 / mesh.shape["expert"]
    text = compile_text(forward, params, ids)
    counted = sum(
        product.flops
        for product in count_products(text, rows_share=share, unknown_trips=1)
        if not (product.in_loop or product.name.startswith("swa_prefill"))
    )
    heads = config.num_heads * config.head_dim + 2 * config.num_kv_heads * config.head_dim
    layer = 2 * WIDTH * (heads + config.num_heads * config.head_dim)
    # What `expert` does not split, every device of an expert group does.
    dense = (3 * layer + 2 * WIDTH * config.vocab_size) * mesh.shape["expert"]
    sparse = 3 * (experts_flops() + router_flops(mesh))
    return counted, tokens * (dense + sparse) // mesh.size


def experts_flops() -> int:
    """Of one token's k experts: gate, up and down."""
    return PER_TOKEN * 3 * 2 * WIDTH * INNER


def router_flops(mesh: jax.sharding.Mesh) -> int:
    """Of one token's scores, which every device of an (expert, tensor) group computes."""
    return 2 * WIDTH * EXPERTS * mesh.shape["expert"] * mesh.shape["tensor"]


def mesh_of(devices: Sequence[Any], sizes: dict[str, int]) -> jax.sharding.Mesh:
    """A mesh of these sizes on the first devices."""
    count = 1
    for size in sizes.values():
        count *= size
    return sharding.make_mesh(list(devices[:count]), **sizes)


def rows_over(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
    """Batch rows split over data and fsdp."""
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("data", "fsdp")))


def abstract(module: Any, mesh: jax.sharding.Mesh) -> tuple[Any, Any, Any]:
    """Graph, parameters as shapes laid out on the mesh, and the rest."""
    graph, params, rest = nnx.split(module, nnx.Param, ...)

    def lay_out(param: Any) -> Any:
        shape = jax.ShapeDtypeStruct(
            param.shape, param.dtype, sharding=sharding.sharding_for(param, mesh)
        )
        return param.replace(shape)

    params = jax.tree.map(lay_out, params, is_leaf=lambda leaf: isinstance(leaf, nnx.Param))
    return graph, params, rest


def compile_text(function: Callable[..., Any], *shapes: Any) -> str:
    """The optimised program."""
    return jax.jit(function).lower(*shapes).compile().as_text()


def total(text: str, *, rows_share: float = 1.0) -> int:
    """FLOPs of all products."""
    products: list[Product] = count_products(text, rows_share=rows_share)
    return sum(product.flops for product in products)


if __name__ == "__main__":
    if version("libtpu") is None:
        sys.exit("libtpu is not installed: pip install -r requirements/libtpu.txt")
    main()
