"""What the experts' products of a compiled program come to, over what the active ones need."""

import math
from collections.abc import Mapping
from typing import Any

from aot_programs import Program
from hlo_flops import count_products

COUNTED = ("prefill", "decode-full", "decode-ring")
"""Programs whose experts' products are counted."""


def moe_flops_ratio(text: str, program: Program, config: Mapping[str, Any]) -> float:
    """What the experts' products of the program come to, over what a token's k experts need.

    Products of attention kernels are left out; of the others those of projections, router and head
    are known, and the rest is the experts'.
    """
    lines = [line for line in text.splitlines() if "swa_prefill" not in line]
    expert, tensor = program.mesh.get("expert", 1), program.mesh.get("tensor", 1)
    products = count_products("\n".join(lines), rows_share=1 / expert, unknown_trips=1)
    counted = sum(product.flops for product in products)
    tokens = program.batch * program.context
    if program.kind != "prefill":
        tokens = program.batch
    width, layers = config["hidden_size"], config["num_hidden_layers"]
    heads = 2 * (config["num_attention_heads"] + config["num_key_value_heads"]) * config["head_dim"]
    # What `expert` does not split, every device of an expert group does; the router, all of them.
    projections = 2 * width * heads * expert
    router = 2 * width * config["num_experts"] * expert * tensor
    dense = layers * tokens * (projections + router)
    dense += 2 * program.batch * width * config["vocab_size"] * expert
    experts = config["num_experts_per_tok"] * 3 * 2 * width * config["moe_intermediate_size"]
    needed = layers * tokens * experts
    return (counted * math.prod(program.mesh.values()) - dense) / needed
