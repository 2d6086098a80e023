"""Wrong-typed, swapped and misspelt arguments of the Python API: one line, what was expected and
what to do, from our own code and not from deep inside.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import swaa_jax as swaa
from swaa_jax.engine import Engine, EngineOptions, Request, SamplingParams
from swaa_jax.infer.likelihoods import Continuation, score_continuations, score_policies
from swaa_jax.models import convert_checkpoint, model_from_config
from swaa_jax.sharding import resolve_mesh
from tests.support import byte_tokenizer
from tests.support.random_models import random_model

pytestmark = pytest.mark.usefixtures("no_type_checks")


class FromTorch:
    """As far as it matters here, a model of Transformers."""

    config = None

    def state_dict(self): ...

    def save_pretrained(self): ...


@pytest.fixture(scope="module")
def model():
    return random_model(vocab_size=byte_tokenizer.VOCAB_SIZE, num_hidden_layers=1)


@pytest.fixture(scope="module")
def tok():
    return byte_tokenizer.build()


def told(call, *words, kind=(ValueError, TypeError)):
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 450
    for word in words:
        assert word in message, message
    assert "swaa_jax" in str(caught.traceback[-1].path), caught.traceback[-1]


def test_generate(model, tok):
    chat = [{"role": "user", "content": "x"}]
    for args, options, words in (
        (("tiny-retriever", tok, "hi"), {}, ["model: ", "load_model('tiny-retriever')"]),
        ((tok, model, "hi"), {}, ["the model comes first"]),
        ((FromTorch(), tok, "hi"), {}, ["a FromTorch", "save_pretrained(directory)"]),
        ((None, tok, "hi"), {}, ["model: expected a model, got None"]),
        ((model, "tiny-retriever", "hi"), {}, ["tok: ", "load_tokenizer('tiny-retriever')"]),
        ((model, "prompt"), {}, ["expected prompts, got none", "generate(model, tok, prompts"]),
        ((model, tok, "hi", 64), {}, ["positional", "64"]),
        ((model, tok, None), {}, ["prompts: ", "None"]),
        ((model, tok, 3.5), {}, ["prompts: ", "3.5"]),
        ((model, tok, b"hi"), {}, ["decode it"]),
        ((model, tok, (one for one in ["hi"])), {}, ["list(prompts)"]),
        ((model, tok, {"role": "user", "content": "hi"}), {}, ["put it in a list"]),
        ((model, tok, ["hi", None]), {}, ["prompt 1", "None"]),
        ((model, tok, "hi"), {"options": {"max_new_tokens": 3}}, ["GenerateOptions"]),
        ((model, tok, "hi"), {"max_tokens": 3}, ["did you mean 'max_new_tokens'?"]),
        ((model, tok, "hi"), {"policy": "naive"}, ["with_policy"]),
        ((model, tok, "hi"), {"progress": "yes"}, ["progress: ", "'yes'"]),
        ((model, tok, chat), {"chat_template_kwargs": "abc"}, ["chat_template_kwargs"]),
        ((model, tok, chat), {"cot": 3}, ["cot: "]),
    ):  # fmt: skip
        told(lambda args=args, options=options: swaa.generate(*args, **options), *words)
    told(lambda: swaa.stream(model, "a"), "expected prompt", "stream(model, tok, prompt")
    told(lambda: swaa.GenerateOptions(max_tokens=3), "did you mean 'max_new_tokens'?")


def test_loading_and_saving(model, tok, tmp_path):
    shipped, at = "tiny-retriever", tmp_path / "model"
    for call, words in (
        (lambda: swaa.load_model(model), ["path: ", "a CausalLM", "it is loaded already"]),
        (lambda: swaa.load_model(None), ["path: ", "None"]),
        (lambda: swaa.load_model(), ["expected path, got none"]),
        (lambda: swaa.load_model(shipped, 64), ["policy: ", 'write "window=64"']),
        (lambda: swaa.load_model(shipped, polices="naive"), ["did you mean 'policy'?"]),
        (lambda: swaa.load_model(shipped, policy={"window": 4, "sink": 4}), ["num_sink_tokens"]),
        (lambda: swaa.load_model(shipped, dtype=np.int8), ["dtype: ", "int8"]),
        (lambda: swaa.load_model(shipped, dtype="bf16"), ["did you mean 'bfloat16'?"]),
        (lambda: swaa.load_model(shipped, dtype=16), ["dtype: ", "16"]),
        (lambda: swaa.load_model(shipped, mesh=8), ["mesh: ", "8"]),
        (lambda: swaa.load_model(shipped, config_overrides="a=1"), ["config_overrides: "]),
        (lambda: swaa.load_model(shipped, backend=3), ["backend: ", "3"]),
        (lambda: swaa.load_tokenizer(model), ["path_or_hub_id: ", "a CausalLM"]),
        (lambda: swaa.load_tokenizer(shipped, padding_side="left"), ["'padding_side'"]),
        (lambda: swaa.save_model(at, model), ["model: expected a model"]),
        (lambda: swaa.save_model(model, None), ["directory: "]),
        (lambda: swaa.save_model(model, at, tok), ["positional"]),
        (lambda: swaa.save_model(model, at, max_shard_size="5GB"), ["max_shard_size: "]),
        (lambda: swaa.save_model(model, at, tokenizer=shipped), ["tokenizer: ", "load_tokenizer"]),
        (lambda: convert_checkpoint(model, at), ["source: ", "save_model(model, directory)"]),
        (lambda: convert_checkpoint(shipped, None), ["destination: "]),
        (lambda: model_from_config("qwen3"), ["hf_config: "]),
    ):
        told(call, *words)
    assert not at.exists()


def test_adapters(model, tmp_path):
    lora = swaa.LoraConfig(rank=2)
    for call, words in (
        (lambda: swaa.add_lora(model, "q_proj"), ["LoraConfig(target_modules=['q_proj'])"]),
        (lambda: swaa.add_lora(lora, model), ["model: "]),
        (lambda: swaa.add_lora(model, model), ["config: ", "the model comes first"]),
        (lambda: swaa.add_lora("tiny-retriever", lora), ["load_model('tiny-retriever')"]),
        (lambda: swaa.add_lora(model, lora, rngs="x"), ["rngs: "]),
        (lambda: swaa.LoraConfig(r=4), ["did you mean 'rank'?"]),
        (lambda: swaa.LoraConfig(4), ["positional"]),
        (lambda: swaa.load_adapter("adapter", model), ["model: "]),
        (lambda: swaa.load_adapter(model, lora), ["directory: "]),
        (lambda: swaa.load_adapter(model, "x", policy="naive"), ["did you mean 'with_policy'?"]),
        (lambda: swaa.save_adapter(tmp_path, model), ["model: "]),
        (lambda: swaa.merge_lora("tiny-retriever"), ["model: "]),
    ):
        told(call, *words)
    drawn = [
        swaa.add_lora(model, config, rngs=3).layers[0].self_attn.q_proj.adapter.lora_A[...]
        for config in ({"rank": 2}, lora)
    ]
    np.testing.assert_array_equal(*drawn)


def test_policies_engines_and_the_rest(model):
    one = Continuation(context=[1], tokens=[2])
    for call, words in (
        (lambda: model.with_policy(64), ['write "window=64"']),
        (lambda: model.with_policy(window=64), ["'window'"]),
        (lambda: swaa.AttentionPolicy(sinks=4), ["did you mean 'num_sink_tokens'?"]),
        (lambda: swaa.AttentionPolicy(window_size=4), ["did you mean 'window'?"]),
        (lambda: swaa.AttentionPolicy(64), ["positional"]),
        (lambda: dataclasses.replace(swaa.AttentionPolicy(), sinks=4), ["num_sink_tokens"]),
        (lambda: swaa.AttentionPolicy.parse(64), ["policy: "]),
        (lambda: Engine([model]), ["models: "]),
        (lambda: Engine(model, {"num_slots": 3}), ["EngineOptions(...)"]),
        (lambda: Engine(model, num_slots=3), ["'num_slots'"]),
        (lambda: EngineOptions(max_token=3), ["did you mean 'max_tokens'?"]),
        (lambda: Request(tokens=(1,), max_tokens=3), ["did you mean 'max_new_tokens'?"]),
        (lambda: SamplingParams(temprature=1), ["did you mean 'temperature'?"]),
        (lambda: score_continuations(model, ["a"]), ["continuation 0: "]),
        (lambda: score_continuations("x", []), ["model: "]),
        (lambda: score_policies(model, [one], "naive"), ["a list of policies"]),
        (lambda: Continuation(context="a", tokens="b"), ["token ids"]),
        (lambda: model("hi"), ["tokens: ", "generate takes text"]),
        (lambda: model([1, 2, 3]), ["tokens: "]),
        (lambda: model(jnp.array([1, 2, 3])), ["tokens[None, :]"]),
        (lambda: model.prefill(jnp.ones((1, 3))), ["float32"]),
    ):
        told(call, *words)


def test_policies_and_meshes_as_people_write_them(tmp_path):
    (tmp_path / "p.txt").write_text("window=64")
    load, number = swaa.load_policy, swaa.AttentionPolicy
    every_second = {"window": 4, "full_attention_layers": slice(1, None, 2)}
    for call, words in (
        (lambda: load("FULL"), ["did you mean 'full'?"]),
        (lambda: load("Window=4"), ["did you mean 'window'?"]),
        (lambda: load("window: 64"), ["as window=64,sinks=4"]),
        (lambda: load("window=64 sinks=4"), ["put commas between fields"]),
        (lambda: load(np.int64(64)), ['write "window=64"']),
        (lambda: load(tmp_path), ["is a directory"]),
        (lambda: load(tmp_path / "p.txt"), ["files end in .yaml or .json"]),
        (lambda: load(tmp_path / "p.yaml"), ["p.yaml: expected a file that is there"]),
        (lambda: load(every_second), ['write "1::2"']),
        (lambda: number(window="64"), ["'64' (str); write 64, without quotes"]),
        (lambda: number(window=64.0), ["64.0 (float); write 64"]),
        (lambda: number(window=0), ["None, or null, means full attention"]),
        (lambda: swaa.GenerateOptions(temperature="0.7"), ["write 0.7, without quotes"]),
        (lambda: resolve_mesh({"fspd": 1}), ["did you mean 'fsdp'?"]),
        (lambda: resolve_mesh({"fsdp": 1.5}), ["mesh.fsdp: expected an integer"]),
        (lambda: resolve_mesh("fsdp"), ["sizes such as fsdp=4,tensor=2"]),
        (lambda: resolve_mesh("fsdp=1"), ["the number of devices, 8, got {'fsdp': 1}"]),
    ):
        told(call, *words, kind=(ValueError, FileNotFoundError))
    assert resolve_mesh({"fsdp": 8}) == resolve_mesh("auto")


def test_functions_that_take_any_option_name_what_is_missing(model):
    for call, words in (
        (lambda: swaa.select_layers(model), ["expected policy, got none"]),
        (lambda: swaa.distill(), ["expected model, got none"]),
        (lambda: swaa.bench(model, "full", 512), ["512 (int); name it: one of prompt_tokens"]),
        (lambda: swaa.train({}, model), ["name it: one of model"]),
        (
            lambda: swaa.train(
                model="tiny-retriever", data=[{"prompt": "a", "answer": "b"}], evaluate=3
            ),
            ["evaluate: expected a function of the model"],
        ),
    ):
        told(call, *words)
