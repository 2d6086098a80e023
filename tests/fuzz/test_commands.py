"""Every command over the corpus: exit code 2 and one paragraph, within 10 s and 1 GB.

A command runs in a process of its own (`tests/support/forks.py`), so that its memory, with that of
the processes that it starts, is measured. Each bad file goes to one command in the quick suite, and
to all that read it in the slow one.
"""

import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from tests.fuzz import corpus
from tests.support import processes
from tests.support.forks import Forks, Ran
from tests.support.random_models import save_random_model

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is measured with /proc")

SECONDS, BYTES, CHARACTERS = 10, 1 << 30, 4000
Words = Sequence[object]

TASK = """\
task: local_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: label
metric_list: [{metric: acc}]
"""


@pytest.fixture(scope="module")
def forks():
    server = Forks()
    yield server
    server.close()


@pytest.fixture(scope="module")
def harness_forks():
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("needs lm_eval (requirements/torch.txt)")
    server = Forks("lm_eval.__main__", "swaa_jax.eval.harness")
    yield server
    server.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_random_model(tmp_path_factory.mktemp("fuzz") / "model", num_hidden_layers=2)


def refused(ran: Ran) -> None:
    """The command says what is wrong in one paragraph, and soon."""
    survived(ran)
    assert ran.code == 2, ran


def survived(ran: Ran) -> None:
    """The command ends, well or with a word, and soon: not every command reads every file."""
    assert ran.code in (0, 1, 2) and "Traceback" not in ran.err, ran.err[-CHARACTERS:]
    assert ran.length < CHARACTERS, ran
    assert ran.seconds < SECONDS or ran.code != 2, ran  # what is not refused compiles and runs
    assert ran.waited < 10 * SECONDS, ran
    assert ran.memory < BYTES, ran


def over(table: Mapping[str, object], *commands: str, first: int = 1, slow: Sequence[str] = ()):
    """Names of a corpus and commands; all but the first commands, and slow names, are slow."""
    return pytest.mark.parametrize(
        ("name", "command"),
        [
            pytest.param(
                name, command, marks=[pytest.mark.slow] if name in slow or at >= first else []
            )
            for name in table
            for at, command in enumerate(commands)
        ],
    )


def sound_data(directory: pathlib.Path) -> pathlib.Path:
    path = directory / "sound.jsonl"
    record = {"prompt": f"One? {PROMPT}", "answer": "1", "response": "1"}
    path.write_text(f"{json.dumps(record)}\n" * 4)
    return path


def written(path: pathlib.Path, content: object) -> pathlib.Path:
    path.write_text(json.dumps(content, default=os.fspath))
    return path


def training(model: object, data: object, out: object, /, **changed: object) -> dict[str, object]:
    fields = {"files": str(data), "seq_len": 256, "batch_size": 1, "num_epochs": 1}
    given = {"model": model, "data": fields, "output_dir": str(out), "max_steps": 1}
    return {**given, "dtype": "float32", **changed}


def evaluation(model: object, data: object, out: object, /, **changed: object) -> dict[str, object]:
    task = {"task": "qa", "files": str(data), "max_new_tokens": 2}
    given = {"models": [model], "policies": ["full"], "tasks": [task], "output_dir": str(out)}
    return {**given, "dtype": "float32", **changed}


PROMPT = "hi " + "a" * 60 + "!"  # for patterns that backtrack
CALM = ("--no-compilation-cache",)
QUIET = (*CALM, "--quiet")


def of_model(command: str, model: object, tmp_path: pathlib.Path) -> Words:
    """A command that reads a model."""
    data, out = sound_data(tmp_path), tmp_path / "out"
    match command:
        case "generate":
            return ["generate", model, PROMPT, "--max-new-tokens", 2, *CALM]
        case "sampling":
            sampled = ("--sampling", "checkpoint")
            return ["generate", model, PROMPT, "--max-new-tokens", 2, *sampled, *CALM]
        case "convert":
            return ["convert", model, out]
        case "recipes":
            return ["recipes", "--model", model, "--context", 128]
        case "search":
            return of_data(command, data, model, out)
        case "lm-eval":
            return harness(tmp_path, pretrained=model)
    return of_data(command, data, model, out)


def of_data(command: str, data: object, model: object, out: pathlib.Path) -> Words:
    """A command that reads data."""
    match command:
        case "eval":
            asked = ("--data", data, "--policies", "full", "--max-new-tokens", 2)
            return ["eval", "--model", model, *asked, "--output", out, *QUIET]
        case "distill":
            return ["distill", model, data, out, "--max-new-tokens", 2, *QUIET]
        case "select":
            ways = ("--window", 8, "--method", "greedy", "--full-layers-count", 1)
            return ["select", model, data, out, *ways, *QUIET]
        case "search":
            search = ("--search", "--windows", 8, "--full-layers", "none", "--output", out)
            return ["recipes", *search, "--model", model, "--data", data, "--max-new-tokens", 2]
        case "train":
            path = written(out.parent / "train.yaml", training(model, data, out))
            return ["train", path, *CALM]
    raise ValueError(command)


def of_policy(command: str, path: object, model: object, tmp_path: pathlib.Path) -> Words:
    """A command that reads a policy."""
    if command == "train":
        config = training(model, sound_data(tmp_path), tmp_path / "out", policy=str(path))
        return ["train", written(tmp_path / "train.yaml", config), *CALM]
    if command == "eval":
        config = evaluation(model, sound_data(tmp_path), tmp_path / "out", policies=[str(path)])
        return ["eval", written(tmp_path / "eval.yaml", config), *QUIET]
    if command == "lm-eval":
        return harness(tmp_path, pretrained=model, policy=path)
    if command == "select":
        raise ValueError(command)
    return [*of_model(command, model, tmp_path), "--policy", path]


def harness(tmp_path: pathlib.Path, **arguments: object) -> Words:
    """lm-eval on a task of our own, which needs no network."""
    (tmp_path / "tasks").mkdir()
    rows = tmp_path / "rows.json"
    rows.write_text('{"question": "One?", "choices": ["1", "2"], "label": 0}\n')
    (tmp_path / "tasks" / "task.yaml").write_text(TASK.replace("FILE", str(rows)))
    given = ",".join(f"{name}={value}" for name, value in arguments.items())
    return [
        *("lm-eval", "run", "--model", "swaa", "--model_args", given, "--tasks", "local_choice"),
        *("--include_path", tmp_path / "tasks", "--batch_size", 1),
    ]


COMMANDS = ("generate", "sampling", "search", "eval", "distill")


@over({"": None}, "recipes", "convert", "train", *COMMANDS, "select", first=3)
def test_sound_files_are_taken(forks, name, command, model, tmp_path):
    """So what is refused below is refused for the fault that it has."""
    if command == "sampling":
        model = copied(model, tmp_path)
        written(model / "generation_config.json", {"do_sample": True, "temperature": 0.5})
    ran = forks.run(of_model(command, model, tmp_path))
    # A random model keeps none of no score, which a search tells by 1.
    assert ran.code == 0 or (command, ran.code, ran.err) == ("search", 1, ""), ran


@over(corpus.DOCUMENTS, "train", "eval")
def test_configs(forks, name, command, model, tmp_path):
    path = tmp_path / "config.yaml"
    corpus.DOCUMENTS[name](path)
    out = () if command == "train" else (f"output_dir={tmp_path / 'out'}",)
    refused(forks.run([command, path, *out, *CALM]))


@over(corpus.DOCUMENTS, "generate", "convert", "eval", "train", "distill")
@pytest.mark.parametrize("ending", ["yaml", pytest.param("json", marks=pytest.mark.slow)])
def test_policies(forks, name, command, ending, model, tmp_path):
    path = tmp_path / f"policy.{ending}"
    corpus.DOCUMENTS[name](path)
    refused(forks.run(of_policy(command, path, model, tmp_path)))


@over(corpus.RECORDS, "eval", "train", "distill", "select", "search")
def test_data(forks, name, command, model, tmp_path):
    path = tmp_path / "data.jsonl"
    corpus.RECORDS[name](path)
    refused(forks.run(of_data(command, path, model, tmp_path / "out")))


@over(corpus.LISTS, "train", "eval", "distill", "select", "search")
def test_lists(forks, name, command, model, tmp_path):
    path = tmp_path / "data.json"
    corpus.LISTS[name](path)
    refused(forks.run(of_data(command, path, model, tmp_path / "out")))


@over(
    corpus.TABLES,
    *("train", "eval", "distill", "select", "search"),
    slow=["a repeated text", "a long name", "columns"],
)
def test_tables(forks, name, command, model, tmp_path):
    path = tmp_path / "data.parquet"
    corpus.TABLES[name](path)
    refused(forks.run(of_data(command, path, model, tmp_path / "out")))


MODEL_COMMANDS = ("generate", "convert", "recipes", "search", "eval", "train", "distill", "select")


def copied(model: str, tmp_path: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(model, tmp_path / "model"))


@over(corpus.WEIGHTS, *MODEL_COMMANDS)
def test_weights(forks, name, command, model, tmp_path):
    path = copied(model, tmp_path)
    (path / "model.safetensors").write_bytes(corpus.WEIGHTS[name])
    ran = forks.run(of_model(command, path, tmp_path))
    survived(ran) if command == "recipes" else refused(ran)  # that reads no weights


@over(corpus.CONFIGS, *MODEL_COMMANDS)
def test_model_configs(forks, name, command, model, tmp_path):
    path, change = copied(model, tmp_path), corpus.CONFIGS[name]
    config = json.loads((path / "config.json").read_text())
    written(
        path / "config.json",
        {**config, **change} if isinstance(change, dict) and change else change,
    )
    refused(forks.run(of_model(command, path, tmp_path)))


FILES = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "attention_policy.json", "model.safetensors.index.json"),
)
HARMLESS = ("repeated key", "long key", "wrong keys")  # in some files


@pytest.mark.slow
@pytest.mark.parametrize("command", ["generate", *MODEL_COMMANDS[1:]])
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("name", corpus.DOCUMENTS)
def test_json_files_of_models(forks, name, file, command, model, tmp_path):
    path = copied(model, tmp_path)
    corpus.DOCUMENTS[name](path / file)
    if file == "model.safetensors.index.json":
        (path / "model.safetensors").rename(path / "model-00001-of-00001.safetensors")
    ran = forks.run(of_model(command, path, tmp_path))
    refused(ran) if command == "generate" and name not in HARMLESS else survived(ran)


@over(corpus.GENERATION, "sampling", "generate", "convert", "eval", "distill")
def test_generation_configs(forks, name, command, model, tmp_path):
    path = copied(model, tmp_path)
    written(path / "generation_config.json", corpus.GENERATION[name])
    ran = forks.run(of_model(command, path, tmp_path))
    refused(ran) if command == "sampling" else survived(ran)


TOKENIZING = ("generate", "train", "eval", "distill", "select", "search", "convert")


@over(corpus.TEMPLATES, *TOKENIZING, slow=["loops", "a long template", "a long text", "a power"])
def test_templates(forks, name, command, model, tmp_path):
    path = copied(model, tmp_path)
    corpus.TEMPLATES[name](path / "chat_template.jinja")
    ran = forks.run(of_model(command, path, tmp_path))
    survived(ran) if command == "convert" else refused(ran)


@over(corpus.TOKENIZERS, *TOKENIZING, slow=["many added tokens"])
def test_tokenizers(forks, name, command, model, tmp_path):
    path = copied(model, tmp_path)
    content = json.loads((path / "tokenizer.json").read_text())
    written(path / "tokenizer.json", corpus.TOKENIZERS[name](content))
    survived(forks.run(of_model(command, path, tmp_path)))


@over(corpus.TOKENIZER_CONFIGS, *TOKENIZING)
def test_tokenizer_configs(forks, name, command, model, tmp_path):
    path = copied(model, tmp_path)
    file = path / "tokenizer_config.json"
    written(file, {**json.loads(file.read_text()), **corpus.TOKENIZER_CONFIGS[name]})
    survived(forks.run(of_model(command, path, tmp_path)))


@over(corpus.ADAPTERS, "eval")
def test_adapters(forks, name, command, model, tmp_path):
    path = tmp_path / "adapter"
    path.mkdir()
    written(path / "adapter_config.json", corpus.ADAPTERS[name])
    (path / "adapter_model.safetensors").write_bytes(corpus.WEIGHTS["no JSON"])
    models = [{"path": model, "adapter": str(path)}]
    config = evaluation(model, sound_data(tmp_path), tmp_path / "out", models=models)
    refused(forks.run([command, written(tmp_path / "config.yaml", config), *QUIET]))


@over(corpus.JUDGES, "eval", "distill", "search")
def test_judges(forks, name, command, model, tmp_path):
    judge = corpus.JUDGES[name]
    words = of_model(command, model, tmp_path)
    if command == "distill":
        kind, _, settings = judge.partition(",")
        parts = [f"--judge-set={part}" for part in settings.split(",") if part]
        refused(forks.run([*words, "--judge", kind, *parts]))
    else:
        refused(forks.run([*words, "--judge", judge]))


@over(corpus.EVALUATIONS, "eval")
def test_evaluations(forks, name, command, model, tmp_path):
    config = evaluation(model, sound_data(tmp_path), tmp_path / "out", **corpus.EVALUATIONS[name])
    refused(forks.run([command, written(tmp_path / "config.yaml", config), *QUIET]))


@over(corpus.TRAININGS, "train")
def test_trainings(forks, name, command, model, tmp_path):
    config = training(model, sound_data(tmp_path), tmp_path / "out", **corpus.TRAININGS[name])
    refused(forks.run([command, written(tmp_path / "config.yaml", config), *CALM]))


@over(corpus.SETTINGS, "select")
def test_settings(forks, name, command, model, tmp_path):
    refused(forks.run([*of_model(command, model, tmp_path), *corpus.SETTINGS[name]]))


def _of_harness(table: str, name: str, model: str, tmp_path: pathlib.Path) -> Words:
    path = copied(model, tmp_path)
    entry: Any = getattr(corpus, table)[name]
    if table == "DOCUMENTS":
        entry(tmp_path / "policy.yaml")
        return harness(tmp_path, pretrained=model, policy=tmp_path / "policy.yaml")
    if table == "WEIGHTS":
        (path / "model.safetensors").write_bytes(entry)
    elif table == "CONFIGS":
        config = json.loads((path / "config.json").read_text())
        changed = {**config, **entry} if isinstance(entry, dict) and entry else entry
        written(path / "config.json", changed)
    elif table == "ADAPTERS":
        adapter = tmp_path / "adapter"
        adapter.mkdir()
        written(adapter / "adapter_config.json", entry)
        (adapter / "adapter_model.safetensors").write_bytes(corpus.WEIGHTS["no JSON"])
        return harness(tmp_path, pretrained=model, adapter=adapter)
    return harness(tmp_path, pretrained=path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("table", "name"),
    [
        (table, name)
        for table in ("DOCUMENTS", "WEIGHTS", "CONFIGS", "ADAPTERS")
        for name in getattr(corpus, table)
    ],
)
def test_harness(harness_forks, table, name, model, tmp_path):
    refused(harness_forks.run(_of_harness(table, name, model, tmp_path)))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*corpus.DOCUMENTS])
def test_configs_in_a_new_process(name, model, tmp_path):
    """With the start of Python and JAX, and its end."""
    path = tmp_path / "config.yaml"
    corpus.DOCUMENTS[name](path)
    for command in (["train", path], ["eval", path, f"output_dir={tmp_path / 'out'}"]):
        done = subprocess.run(
            [sys.executable, "-m", "swaa_jax.cli.main", *map(str, command), *CALM],
            env=processes.environment(),
            cwd=processes.ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-CHARACTERS:]
