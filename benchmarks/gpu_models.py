"""Whole models on one GPU: how fast a prompt is read, and what a new token takes.

Shapes of public models with random weights in bfloat16, ours and Transformers' beside it. The least
that a decode step could take is the time to read its bytes once: weights, of experts those that its
tokens choose, and what the caches hold of the rows.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Mapping
from typing import Any

import gpu_turns
import numpy as np
from model_shapes import MODELS, TINY


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Rows of so many prompt tokens, and new ones, under a policy."""

    policy: str
    rows: int = 1
    prompt: int
    new: int = 64


def config_of(name: str, *, layers: int | None, smoke: bool, positions: int) -> dict[str, Any]:
    """A model's config, with room for so many positions."""
    config = {**MODELS[name], "max_position_embeddings": positions}
    if layers:
        config["num_hidden_layers"] = layers
    if smoke:
        config |= TINY
        if "num_experts" in config:
            config |= {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    return config


def prompts_of(rows: int, tokens: int, vocab: int) -> Any:
    """Random tokens, `[rows, tokens]`."""
    return np.random.default_rng(0).integers(10, vocab, (rows, tokens))


def step_bytes(model: Any, *, rows: int, tokens: int) -> float:
    """Bytes that a decode step of so many rows reads, each with so many tokens behind it.

    A row's experts are taken to be drawn evenly, as random weights choose them: rows choose the
    same one at times.
    """
    from swaa_jax.costs import active_parameters, cache_bytes

    config = model.config
    share = config.expert_share
    experts = 0.0
    if share < 1:
        count, inner = config.num_experts, config.moe_intermediate_size
        experts = float(config.num_layers * count * 3 * config.hidden_size * inner)
    dense = active_parameters(model) - share * experts
    chosen = (1 - (1 - share) ** rows) * experts
    head = config.vocab_size * config.hidden_size
    cache = cache_bytes(
        model.layer_attention,
        tokens=tokens,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
    )
    return 2 * (dense + chosen + head) + rows * cache


def ours(
    config: dict[str, Any], policy: str, *, rows: int, prompt: int, new: int, mesh: Any = None
) -> dict[str, Any]:
    """Figures of `generate`, its programs compiled and run once before; `mesh`: None is one GPU."""
    import jax

    import swaa_jax as swaa
    from swaa_jax.models import model_from_config

    model = model_from_config(config, dtype="bfloat16", policy=policy, mesh=mesh)
    timings = swaa.generate(
        model,
        None,
        prompts_of(rows, prompt, config["vocab_size"]).tolist(),
        max_new_tokens=new,
        batch_size=rows,
        ignore_eos=True,
        warmup=True,
    ).timings
    stats = jax.local_devices()[0].memory_stats() or {}
    per_token = timings.time_per_output_token_s
    return {
        "prefill_tokens_per_s": timings.prefill_tokens_per_second,
        "ms_per_token": None if per_token is None else 1e3 * per_token,
        "step_bytes": step_bytes(model, rows=rows, tokens=prompt + new // 2),
        "compile_s": timings.compile_s,
        "peak_gib": stats.get("peak_bytes_in_use", 0) / 2**30,
    }


def transformers(
    config: dict[str, Any], policy: str, *, rows: int, prompt: int, new: int
) -> dict[str, Any]:
    """Figures of Transformers with torch's SDPA, full attention alone."""
    if policy != "full":
        raise NotImplementedError("Transformers has no sinks beside a window")
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    fields = {name: value for name, value in config.items() if name != "model_type"}
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(config["model_type"], **fields),
            dtype=torch.bfloat16,
            attn_implementation="sdpa",
        )
    model.eval()
    prompts = torch.as_tensor(prompts_of(rows, prompt, config["vocab_size"]), device=device)

    def timed(tokens: Any, cache: Any) -> tuple[float, Any]:
        begun = time.perf_counter()
        out = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        following = out.logits[:, -1:].argmax(-1)
        following.cpu()  # waits
        return time.perf_counter() - begun, (following, out.past_key_values)

    with torch.inference_mode():
        timed(prompts[:, : min(prompt, 512)], None)
        read_s, (tokens, cache) = timed(prompts, None)
        steps = []
        for _ in range(new):
            seconds, (tokens, cache) = timed(tokens, cache)
            steps.append(seconds)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
    return {
        "prefill_tokens_per_s": rows * prompt / read_s,
        "ms_per_token": 1e3 * statistics.median(steps),
        "peak_gib": peak,
    }


SIDES = {"swaa_jax": ours, "transformers": transformers}


def measure(arguments: argparse.Namespace, model: str, case: Case, side: str) -> dict[str, Any]:
    """A side's figures. It compiles when its turn has come: a model takes most of the memory."""
    gpu_turns.take_turn()
    config = config_of(
        model,
        layers=arguments.layers,
        smoke=arguments.smoke,
        positions=case.prompt + case.new,
    )
    found = SIDES[side](config, case.policy, rows=case.rows, prompt=case.prompt, new=case.new)
    return {"layers": config["num_hidden_layers"], **dataclasses.asdict(case), **found}


def add_floor(row: dict[str, Any], bandwidth: float | None) -> None:
    """Of a row with a step's time and bytes: the least time, at so many bytes a second."""
    if bandwidth and row.get("ms_per_token") and "step_bytes" in row:
        row["floor_ms"] = 1e3 * row["step_bytes"] / bandwidth
        row["share_of_floor"] = row["floor_ms"] / row["ms_per_token"]


def speeds(row: Mapping[str, Any]) -> str:
    """A model's speeds in words."""
    per_token = row["ms_per_token"]
    told = "no new token was timed" if per_token is None else f"{per_token:.2f} ms a token"
    if "floor_ms" in row:
        told += f", floor {row['floor_ms']:.2f} ({row['share_of_floor']:.0%})"
    return f"{told}; prefill {row['prefill_tokens_per_s']:,.0f} tokens/s"
