"""Cases of `serving.py` that need no server: the engine, and Transformers' continuous batching."""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from model_shapes import MODELS, TINY

WINDOW = "window=2048,sinks=10"


def case_of(case: str, *, smoke: bool) -> tuple[list[int], int, str]:
    """Lengths of the prompts, new tokens of each, and the policy."""
    if case == "mixed":
        shortest, longest = (16, 256) if smoke else (512, 8192)
        lengths = np.geomspace(shortest, longest, 32).round().astype(int)
        return np.random.default_rng(0).permutation(lengths).tolist(), 4 if smoke else 128, "full"
    policy = "window=64,sinks=10" if smoke else WINDOW
    if case == "million":
        return [5_000 if smoke else 1_000_000], 4 if smoke else 32, policy
    return [600 if smoke else 131_072] * (2 if smoke else 16), 4 if smoke else 512, policy


def config_of(*, smoke: bool) -> dict[str, Any]:
    """The model's config."""
    config = {**MODELS["Qwen3-4B"], "max_position_embeddings": 1 << 21}
    if smoke:
        config |= TINY
    return config


def prompts_of(lengths: Sequence[int], vocab: int) -> list[list[int]]:
    """Random tokens."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, vocab, length).tolist() for length in lengths]


def run_swaa_jax(arguments: argparse.Namespace, case: str) -> dict[str, Any]:
    """Our engine's figures."""
    import jax

    from swaa_jax.models import model_from_config
    from swaa_jax.policy import AttentionPolicy
    from swaa_jax.serve import Engine, EngineOptions, Request

    lengths, new, policy = case_of(case, smoke=arguments.smoke)
    config = config_of(smoke=arguments.smoke)
    model = model_from_config(config, dtype="bfloat16", policy=AttentionPolicy.parse(policy))
    options = EngineOptions(
        num_slots=min(arguments.slots, len(lengths)),
        max_tokens=max(lengths) + new,
        chunk_size=arguments.chunk_size,
        chunks_per_round=arguments.chunks_per_round,
        steps_per_call=arguments.steps_per_call,
        reuse=False,
    )
    engine = Engine(model, options)
    prompts = prompts_of(lengths, config["vocab_size"])

    def answer(prompts: Sequence[Sequence[int]], new: int) -> tuple[float, float]:
        start = time.perf_counter()
        first = 0.0
        for prompt in prompts:
            engine.submit(Request(tokens=prompt, max_new_tokens=new))
        left = len(prompts) * new
        for update in engine.run():
            first = first or time.perf_counter() - start
            left -= len(update.tokens)
        assert left == 0, f"{left} tokens are missing"
        return time.perf_counter() - start, first

    answer([prompt[:100] for prompt in prompts], 4)  # compiles
    repeats = arguments.repeats if case == "mixed" else 1
    before = dataclasses.replace(engine.clock)
    seconds, first = min(answer(prompts, new) for _ in range(repeats))
    stats = jax.local_devices()[0].memory_stats() or {}
    clock = engine.clock
    return {
        **rates(case, lengths, new, seconds),
        "first_token_s": first,
        "compile_s": clock.compile_s,
        "read_tokens_per_s": (clock.read_tokens - before.read_tokens)
        / (clock.read_s - before.read_s),
        "decode_ms_per_step": 1e3
        * (clock.decode_s - before.decode_s)
        / (clock.decode_steps - before.decode_steps),
        "cache_gib": engine.cache_bytes / 2**30,
        "peak_gib": stats.get("peak_bytes_in_use", 0) / 2**30,
        "chunk_size": options.chunk_size,
        "page_size": options.page_size,
        "slots": options.num_slots,
        "device": jax.devices()[0].device_kind,
    }


def run_transformers(arguments: argparse.Namespace, case: str) -> dict[str, Any]:
    """Figures of Transformers' continuous batching."""
    import torch
    import transformers

    lengths, new, _ = case_of(case, smoke=arguments.smoke)
    config = transformers.Qwen3Config(**config_of(smoke=arguments.smoke))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    model.eval()
    settings = transformers.GenerationConfig(
        max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    prompts = prompts_of(lengths, config.vocab_size)

    def answer(prompts: Sequence[Sequence[int]]) -> float:
        start = time.perf_counter()
        found = model.generate_batch(inputs=prompts, generation_config=settings, progress_bar=False)
        counts = [len(one.generated_tokens) for one in found.values()]
        assert len(counts) == len(prompts), f"expected {len(prompts)} answers, got {len(counts)}"
        assert statistics.mean(counts) == new, f"expected {new} tokens an answer, got {counts}"
        return time.perf_counter() - start

    answer([prompt[:100] for prompt in prompts[:2]])
    seconds = min(answer(prompts) for _ in range(arguments.repeats))
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return {**rates(case, lengths, new, seconds), "peak_gib": peak, "device": name}


def rates(case: str, lengths: Sequence[int], new: int, seconds: float) -> dict[str, Any]:
    """Seconds, and the rate that counts in this case."""
    prompt_tokens, new_tokens = sum(lengths), new * len(lengths)
    counted = {"mixed": new_tokens, "million": prompt_tokens, "batch": prompt_tokens + new_tokens}
    return {
        "requests": len(lengths),
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "seconds": seconds,
        "tokens_per_s": counted[case] / seconds,
    }
