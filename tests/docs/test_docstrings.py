"""What the docstrings of public names say: an example, shapes, what is raised, the source."""

import doctest

import pytest

from docs_site import reference
from tests.support import public_docs

ROOMS = ["swaa_jax", *reference.rooms()]

SOURCES: dict[str, dict[str, str]] = {
    "swaa_jax": {
        "AttentionPolicy": "arXiv 2512.10411",
        "DistillConfig": "arXiv 2512.10411",
        "LoraConfig": "PEFT",
        "Stage": "arXiv 2512.10411",
        "bench": "arXiv 2512.10411",
        "distill": "arXiv 2512.10411",
        "generate": "arXiv 2512.10411",
        "load_adapter": "PEFT",
        "load_model": "Hugging Face",
        "load_tokenizer": "Transformers",
        "merge_lora": "PEFT",
        "recipes": "arXiv 2512.10411",
        "save_adapter": "PEFT",
        "save_model": "Transformers",
        "select_layers": "arXiv 2512.10411",
        "train": "arXiv 2512.10411",
    },
    "swaa_jax.policy": {"LayerAttention": "arXiv 2512.10411", "HfExpressible": "config.json"},
    "swaa_jax.models": {
        "Blueprint": "config.json",
        "CausalLM": "Transformers",
        "convert_checkpoint": "config.json",
        "model_from_config": "config.json",
    },
    "swaa_jax.checkpoint": {
        "WeightReader": "safetensors",
        "read_config": "config.json",
        "read_generation_config": "generation_config.json",
        "write_safetensors": "Hugging Face",
        "write_tensors": "safetensors",
    },
    "swaa_jax.lora": {"LoraParam": "arXiv 2106.09685", "DropoutKey": "PEFT"},
    "swaa_jax.attention": {
        "RingCache": "arXiv 2512.10411",
        "StreamCache": "arXiv 2309.17453",
        "attend": "arXiv 2512.10411",
        "attend_stream": "arXiv 2309.17453",
    },
    "swaa_jax.infer": {"COT_INSTRUCTION": "arXiv 2512.10411"},
    "swaa_jax.chats": {"normal_tools": "Transformers", "render_chat": "Transformers"},
    "swaa_jax.engine": {"SamplingParams": "Transformers"},
    "swaa_jax.losses": {"LossConfig": "arXiv 2512.10411"},
    "swaa_jax.train": {
        "OptimizerConfig": "Transformers",
        "learning_rate": "Transformers",
        "make_optimizer": "optax",
    },
    "swaa_jax.eval.tasks": {
        "LongBenchV2Task": "arXiv 2412.15204",
        "LongMemEvalTask": "arXiv 2410.10813",
        "RulerTask": "arXiv 2404.06654",
    },
    "swaa_jax.eval.judging": {"string_match_all": "RULER", "LlmJudge": "OpenAI"},
    "swaa_jax.eval.search": {"search_policies": "halving"},
    "swaa_jax.selection": {
        "lazy_ratios": "arXiv 2512.10411",
        "periodic_layers": "arXiv 2512.10411",
    },
    "swaa_jax.bench": {"Measurement": "arXiv 2512.10411"},
}
"""What implements the paper, another library's interface or a format, and the name that says so."""


@pytest.mark.parametrize("room", ROOMS)
def test_public_names_say_what_they_do_and_raise(room):
    for name, value, told in public_docs.documented(room):
        assert told.strip() and not told.startswith(f"{name}("), f"{name}: no docstring"
        assert public_docs.says_what_it_raises(value, told), f"{name}: it raises, and is silent"


@pytest.mark.parametrize("room", ROOMS)
def test_public_names_have_examples_shapes_and_sources(room):
    lacks: dict[str, set[str]] = {"example": set(), "shapes": set(), "source": set()}
    sources = dict(SOURCES.get(room, {}))
    for name, value, told in public_docs.documented(room):
        if not public_docs.has_example(told):
            lacks["example"].add(name)
        if not public_docs.says_all_shapes(value, told):
            lacks["shapes"].add(name)
        if sources.pop(name, "") not in " ".join(told.split()):
            lacks["source"].add(name)
    assert not sources, f"{room}: no such names: {sources}"
    assert not any(lacks.values()), lacks


@pytest.mark.parametrize("room", ROOMS)
def test_examples_of_constants_run(room):
    for example in public_docs.examples_of_constants(room):
        flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
        runner = doctest.DocTestRunner(optionflags=flags)
        assert runner.run(example).failed == 0, example.name
