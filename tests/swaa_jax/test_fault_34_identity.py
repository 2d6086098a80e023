"""Kind 34: results are filed under what runs: arrays, adapters, config, dtype, backend.

A model that was changed in memory never finds the answers of the one in its files.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import swaa_jax as swaa
from swaa_jax.distill import DistillConfig, Question, distill
from swaa_jax.eval.evaluation import evaluate
from swaa_jax.eval.judging import make_judge
from swaa_jax.eval.run import EvalConfig, TaskEntry
from swaa_jax.selection import select_from_samples
from tests.support import byte_tokenizer
from tests.support.evaluations import CountingTask
from tests.support.random_models import save_random_model
from tests.support.retrieval_model import retrieval_model, retrieval_samples


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_random_model(tmp_path_factory.mktemp("model") / "random", num_hidden_layers=2)


@pytest.fixture(scope="module")
def adapter(checkpoint, tmp_path_factory):
    """Adapters that change what the model says."""
    path = tmp_path_factory.mktemp("adapter") / "adapter"
    swaa.save_adapter(adapted(load(checkpoint)), path, base_model_name_or_path=checkpoint)
    return str(path)


def load(checkpoint, **options):
    return swaa.load_model(
        checkpoint, policy=swaa.AttentionPolicy(), **{"dtype": "float32", **options}
    )


def zeroed(model):
    """The same model with every array set to zero, in place."""
    state = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(jnp.zeros_like, state))
    return model


def adapted(model, *, size=0.3):
    config = swaa.LoraConfig(rank=2, alpha=4, target_modules=("q_proj", "v_proj"))
    model = swaa.add_lora(model, config, rngs=nnx.Rngs(1))
    for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if "lora_B" in path:
            param.set_value(jnp.full_like(param.get_value(), size))
    return model


def config_of(checkpoint, directory, **fields):
    return EvalConfig.from_dict(
        {
            "models": [checkpoint],
            "policies": ["full"],
            "tasks": [TaskEntry(name="counting", task=CountingTask(num_samples=2))],
            "output_dir": str(directory),
            "batch_size": 2,
            "dtype": "float32",
            **fields,
        }
    )


@pytest.fixture(scope="module")
def filed(checkpoint, tmp_path_factory):
    """A directory with the answers of the model in the files."""
    directory = tmp_path_factory.mktemp("eval") / "out"
    return directory, evaluate(config_of(checkpoint, directory))


def said(done):
    return [row["response"] for row in done.cells[0].answers]


def asked_with(checkpoint, directory, model, **fields):
    given = lambda entry: (model, swaa.load_tokenizer(checkpoint))  # noqa: E731
    return evaluate(config_of(checkpoint, directory, **fields), load=given)


def test_fault_34_a_model_that_is_as_its_files_finds_its_answers(checkpoint, filed):
    directory, done = filed
    again = asked_with(checkpoint, directory, load(checkpoint))
    assert (again.answered, said(again)) == (0, said(done))
    policy = swaa.AttentionPolicy(window=4)  # its own policy is not what it is asked under
    again = asked_with(checkpoint, directory, load(checkpoint).with_policy(policy))
    assert again.answered == 0


def test_fault_34_a_zeroed_model_is_asked_anew(checkpoint, filed):
    directory, done = filed
    zero = asked_with(checkpoint, directory, zeroed(load(checkpoint)))
    assert zero.answered == 2
    alone = swaa.generate(
        zeroed(load(checkpoint)),
        swaa.load_tokenizer(checkpoint),
        [[1, 2, 3]],
        max_new_tokens=5,
    )
    assert set(said(zero)) == set(alone.texts) != set(said(done))  # zeros say one thing only
    assert zero.models["random"]["changed"], "the report says that it is not the files' model"
    assert asked_with(checkpoint, directory, zeroed(load(checkpoint))).answered == 0
    assert said(evaluate(config_of(checkpoint, directory))) == said(done)


@pytest.mark.parametrize(
    "change",
    [
        lambda path: zeroed_one(load(path)),
        lambda path: adapted(load(path)),
        lambda path: swaa.lora.merge_lora(adapted(load(path))),
        lambda path: load(path, dtype="bfloat16"),
        lambda path: load(path, backend="reference"),
        lambda path: load(path, config_overrides={"rope_theta": 77.0}),
        lambda path: with_config(load(path), rms_norm_eps=0.5),
    ],
    ids=["an array", "adapters", "merged", "dtype", "backend", "overrides", "config"],
)
def test_fault_34_whatever_else_runs_is_asked_anew(checkpoint, filed, change):
    directory, _ = filed
    assert asked_with(checkpoint, directory, change(checkpoint)).answered == 2
    assert asked_with(checkpoint, directory, change(checkpoint)).answered == 0


def test_config_override_of_the_eval_command_is_filed_apart(checkpoint, tmp_path, capsys):
    """Per model in the file, of every model by the flag, which wins: all are told apart."""
    data = tmp_path / "mine.jsonl"
    data.write_text(json.dumps({"prompt": "Say yes.", "answer": "yes"}) + "\n")
    fields = {
        "models": [{"path": checkpoint, "config_overrides": {"rope_theta": 5.0}}],
        "policies": ["full"],
        "tasks": [{"task": "qa", "files": str(data), "max_new_tokens": 3}],
        "output_dir": str(tmp_path / "out"),
        "dtype": "float32",
    }
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(fields))
    from swaa_jax.cli.main import main

    flags = [["rope_theta=77.0"], ["rope_theta=77.0", "rms_norm_eps=0.5"], []]
    told = [{"rope_theta": 77.0}, {"rope_theta": 77.0, "rms_norm_eps": 0.5}, {"rope_theta": 5.0}]
    for number, (given, overrides) in enumerate(zip(flags, told, strict=True), start=1):
        words = [word for one in given for word in ("--config-override", one)]
        for answered in (1, 0):
            assert main(["eval", str(file), *words, "--no-compilation-cache"]) == 0
            assert f"{answered} answers made in this run" in capsys.readouterr().out
        (model,) = json.loads((tmp_path / "out/run.json").read_text())["models"].values()
        assert model["config_overrides"] == overrides
        assert len(list((tmp_path / "out/work").iterdir())) == number
    assert main(["eval", str(file), "--config-override", "rope_thetta=3"]) == 2
    assert "did you mean 'rope_theta'" in capsys.readouterr().err


def test_config_override_of_a_search_reaches_its_models(checkpoint, tmp_path, monkeypatch):
    from swaa_jax.cli.main import main
    from swaa_jax.eval.search import find

    class Asked(Exception):
        pass

    def searched(model, *args, **kwargs):
        raise Asked(model.config_overrides)

    monkeypatch.setattr(find, "search_policies", searched)
    data = tmp_path / "mine.jsonl"
    data.write_text(json.dumps({"prompt": "Say yes.", "answer": "yes"}) + "\n")
    words = ["--model", checkpoint, "--data", str(data), "--windows", "8"]
    with pytest.raises(Asked, match=r"{'rope_theta': 77\.0}"):
        main(["recipes", "--search", *words, "--config-override", "rope_theta=77.0"])


def zeroed_one(model):
    kernel = model.layers[1].mlp.down_proj.kernel
    kernel.set_value(jnp.zeros_like(kernel.get_value()))
    return model


def with_config(model, **changes):
    model.config = dataclasses.replace(model.config, **changes)
    return model


def test_fault_34_adapters_of_other_values_and_scales_differ(checkpoint, filed):
    directory, _ = filed
    for size, answered in ((0.1, 2), (0.2, 2), (0.2, 0)):
        model = adapted(load(checkpoint), size=size)
        assert asked_with(checkpoint, directory, model).answered == answered


def test_fault_34_merged_by_the_config_or_by_hand_is_the_same_files(checkpoint, adapter, tmp_path):
    """Adapters that the config names are known by their files, which nothing has to hash twice."""
    models = [{"path": checkpoint, "adapter": adapter}]
    done = evaluate(config_of(checkpoint, tmp_path, models=models))
    assert done.answered == 2
    again = evaluate(config_of(checkpoint, tmp_path, models=models))
    assert (again.answered, said(again)) == (0, said(done))
    assert "changed" not in again.models["random + adapter"]
    # The entry names adapters; what is loaded has none.
    without = asked_with(checkpoint, tmp_path, load(checkpoint), models=models)
    assert without.answered == 2


def test_fault_34_files_that_changed_after_loading(tmp_path):
    place = save_random_model(tmp_path / "model", num_hidden_layers=2)
    old = load(place)
    first = evaluate(config_of(place, tmp_path / "out"))
    save_random_model(tmp_path / "other", num_hidden_layers=2, initializer_range=0.5)
    (tmp_path / "other/model.safetensors").replace(tmp_path / "model/model.safetensors")
    new = evaluate(config_of(place, tmp_path / "out"))
    assert new.answered == 2
    late = asked_with(place, tmp_path / "out", old)  # the arrays are the old ones
    assert said(late) == said(first) != said(new)


def test_fault_34_unchanged_arrays_are_not_hashed(checkpoint, monkeypatch):
    """An 8B model that is as it was loaded costs a look at its files."""
    from swaa_jax.models import source

    monkeypatch.setattr(source, "to_host", lambda array: pytest.fail("it was copied"))
    assert source.since_loading(load(checkpoint)) == {}
    assert source.since_loading(load(checkpoint).with_policy(swaa.AttentionPolicy(window=3))) == {}


def test_fault_34_only_changed_arrays_are_hashed(checkpoint, monkeypatch):
    from swaa_jax.models import source

    copied = []
    monkeypatch.setattr(source, "to_host", lambda array: copied.append(1) or jax.device_get(array))
    assert source.since_loading(zeroed_one(load(checkpoint)))
    assert len(copied) == 1


def test_fault_34_selection(tmp_path):
    model, samples = retrieval_model("halves"), retrieval_samples("halves", count=2)
    options = {
        "method": "periodic",
        "num_full_layers": 2,
        "policy": swaa.AttentionPolicy(window=16, num_sink_tokens=1, decode="full"),
        "directory": tmp_path / "out",
    }
    select_from_samples(model, samples, **options)
    assert select_from_samples(model, samples, **options).num_new == 0
    with pytest.raises(ValueError, match=r"the scores of another run .*arrays was"):
        select_from_samples(zeroed(model), samples, **options)
    other = retrieval_model("halves")
    with pytest.raises(ValueError, match=r"the scores of another run .*config was"):
        select_from_samples(with_hf_value(other, "rms_norm_eps", 0.5), samples, **options)


def with_hf_value(model, name, value):
    """A model as `load_model` gives it under a config override."""
    fields = {**json.loads(model.config.hf_json), name: value}
    return with_config(model, hf_json=json.dumps(fields))


def test_fault_34_distillation(checkpoint, tmp_path):
    tok, judge = byte_tokenizer.build(), make_judge("exact")
    questions = [Question(id="a", prompt="One?", references=("1",))]
    config = DistillConfig(attempts=1, max_new_tokens=3)

    def run(model):
        return distill(model, tok, questions, judge, tmp_path / "out", config=config)

    run(load(checkpoint))
    run(load(checkpoint))
    for other in (
        zeroed(load(checkpoint)),
        load(checkpoint, dtype="bfloat16"),
        load(checkpoint).with_policy(swaa.AttentionPolicy(window=3)),
        load(checkpoint, backend="reference"),
        load(checkpoint, config_overrides={"rope_theta": 77.0}),
        adapted(load(checkpoint)),
    ):
        with pytest.raises(ValueError, match="the answers of another run"):
            run(other)


def test_fault_34_distillation_of_other_files(checkpoint, tmp_path):
    """The same path, other weights."""
    place = save_random_model(tmp_path / "model", num_hidden_layers=2)
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps({"prompt": "One?", "answer": "1"}) + "\n")
    from swaa_jax.cli.main import main

    command = ["distill", place, str(questions), str(tmp_path / "out"), "--quiet"]
    command += ["--attempts", "1", "--max-new-tokens", "3", "--dtype", "float32"]
    assert main(command) == 0
    save_random_model(tmp_path / "other", num_hidden_layers=2, initializer_range=0.5)
    (tmp_path / "other/model.safetensors").replace(tmp_path / "model/model.safetensors")
    assert main(command) == 2
