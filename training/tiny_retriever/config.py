"""What tiny-retriever is and how it is trained: the model, the optimizer, the curriculum."""

import dataclasses
import pathlib

from swaa_jax.train import OptimizerConfig
from training.tiny_retriever.data import Stage

ASSETS = pathlib.Path(__file__).resolve().parents[2] / "swaa_jax" / "assets" / "tiny-retriever"
"""Where the shipped model lives."""

MODEL = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 2304,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "rope_scaling": None,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "sliding_window": None,
    "initializer_range": 0.02,
    "use_cache": True,
    "bos_token_id": None,
    "eos_token_id": 2,  # <|im_end|>
    "pad_token_id": 0,  # <|endoftext|>
}
"""`config.json`: 6.9M parameters, 13.8 MB in bfloat16."""

STAGES = (
    # Random tokens only. A model that meets needles before it has learned this learns to guess
    # among them and stays there: every value has the same " is: " before it.
    Stage(
        width=256,
        batch_tokens=32_768,
        lengths=((128, 0.5), (256, 0.5)),
        repeat=0.35,
        recall=0.65,
        dense=0.0,
        four_by_four=0.0,
        min_steps=400,
        max_steps=6000,
        judged=("recall", "repeat"),
        advance_at=0.95,
    ),
    Stage(
        width=256,
        batch_tokens=32_768,
        lengths=((128, 0.4), (256, 0.6)),
        repeat=0.05,
        recall=0.2,
        dense=0.5,
        four_by_four=0.3,
        min_steps=800,
        max_steps=12_000,
        judged=("list/", "scratchpad/", "answer/", "dense"),
        advance_at=0.95,
    ),
    Stage(
        width=512,
        batch_tokens=32_768,
        lengths=((128, 0.1), (256, 0.2), (512, 0.7)),
        repeat=0.03,
        recall=0.07,
        dense=0.35,
        four_by_four=0.4,
        min_steps=600,
        max_steps=4000,
    ),
    Stage(
        width=1024,
        lengths=((256, 0.15), (512, 0.15), (1024, 0.7)),
        repeat=0.02,
        recall=0.03,
        dense=0.25,
        four_by_four=0.5,
        min_steps=1500,
        max_steps=6000,
        advance_at=0.98,
    ),
    Stage(
        width=2048,
        lengths=((512, 0.15), (1024, 0.25), (2048, 0.6)),
        repeat=0.02,
        recall=0.02,
        dense=0.2,
        four_by_four=0.5,
        min_steps=1000,
        max_steps=4000,
        advance_at=0.97,
    ),
    Stage(
        width=4096,
        lengths=((256, 0.05), (512, 0.1), (1024, 0.25), (2048, 0.2), (4096, 0.4)),
        repeat=0.02,
        recall=0.02,
        dense=0.2,
        four_by_four=0.5,
        min_steps=10**9,
        max_steps=10**9,
    ),
)
"""Recall of anything first, then needles, short and dense; then twice as long, again and again,
with shorter documents kept in the mix."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How weights begin and are trained; steps over float32 parameters."""

    optimizer: OptimizerConfig = dataclasses.field(
        default_factory=lambda: OptimizerConfig(
            learning_rate=2e-3,
            schedule="warmup_stable_decay",
            total_steps=16_600,
            warmup_steps=300,
            decay_steps=3500,
            b2=0.98,
            eps=1e-9,
            weight_decay=0.05,
        )
    )
    dtype: str = "bfloat16"  # of the computation
    qk_norm_gain: float = 1.5  # attention can be sharp from the start
    input_std: float = 0.04  # of matrices that read the residual stream
    output_std: float = 0.005  # of matrices that write to it: 0.02 / sqrt(2 * layers)
    judge_every: int = 50  # steps
    judge_over: int = 200  # steps that exact match is taken over


SMOKE_MODEL = MODEL | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}
SMOKE_STAGES = (
    dataclasses.replace(STAGES[0], batch_tokens=2048, min_steps=10, max_steps=10),
    dataclasses.replace(STAGES[2], batch_tokens=2048, min_steps=10**9, max_steps=10**9),
)
SMOKE_CONFIG = RunConfig(
    optimizer=dataclasses.replace(
        RunConfig().optimizer, total_steps=20, warmup_steps=5, decay_steps=5
    ),
    dtype="float32",
    judge_every=5,
    judge_over=5,
)
