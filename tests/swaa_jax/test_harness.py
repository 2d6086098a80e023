"""lm-evaluation-harness with our model, against its own Transformers model; and its command."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("torch")
pytest.importorskip("lm_eval", reason="needs lm_eval (requirements/torch.txt)")

import swaa_jax as swaa
from tests.support import byte_tokenizer, tiny_hf

CHOICE = """\
task: local_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: label
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
GENERATE = """\
task: local_generate
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 6}
metric_list: [{metric: exact_match}]
"""
READ = """\
task: local_read
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: byte_perplexity}]
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("harness") / "model"
    tok = byte_tokenizer.build()
    model = tiny_hf.build("qwen3", vocab_size=byte_tokenizer.VOCAB_SIZE)
    tiny_hf.save(model, directory)
    tok.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tasks")
    rows = [
        {
            "question": f"What is {n} and {n}?",
            "choices": [str(2 * n), "no", "seven"],
            "label": n % 3,
        }
        for n in range(5)
    ]
    file = directory / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in (("choice", CHOICE), ("generate", GENERATE), ("read", READ)):
        (directory / f"{name}.yaml").write_text(text.replace("FILE", str(file)))
    return directory


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))


def run(model, tasks, names, **options):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    return simple_evaluate(
        model=model,
        tasks=names,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
        **options,
    )


NAMES = ["local_choice", "local_generate", "local_read"]


@pytest.mark.filterwarnings("ignore")  # of the harness and of what it imports
def test_full_attention_scores_as_the_harness_own_model(checkpoint, tasks):
    import torch
    from lm_eval.models.huggingface import HFLM

    from swaa_jax.eval.harness import SwaaLM

    tok = swaa.load_tokenizer(str(checkpoint))
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    oracle = HFLM(pretrained=theirs, tokenizer=tok, device="cpu", batch_size=1)
    found = run(SwaaLM(str(checkpoint), policy="full", dtype="float32"), tasks, NAMES)
    expected = run(oracle, tasks, NAMES)
    for name in NAMES:
        for ours, wanted in zip(found["samples"][name], expected["samples"][name], strict=True):
            assert ours["doc_id"] == wanted["doc_id"]
            assert json.dumps(ours["arguments"]) == json.dumps(wanted["arguments"])
            for one, other in zip(ours["filtered_resps"], wanted["filtered_resps"], strict=True):
                assert_same(one, other)
        for metric in ("acc,none", "acc_norm,none", "exact_match,none"):
            assert found["results"][name].get(metric) == expected["results"][name].get(metric)
    # Log-likelihoods of some 15 bytes each, to what float32 sums of them differ by.
    assert found["results"]["local_read"]["byte_perplexity,none"] == pytest.approx(
        expected["results"]["local_read"]["byte_perplexity,none"], rel=1e-4
    )


def assert_same(one, other):
    if isinstance(one, str):
        assert one == other
    elif isinstance(one, float):
        assert one == pytest.approx(other, abs=1e-3)
    else:  # log-likelihood, is greedy
        assert float(one[0]) == pytest.approx(float(other[0]), abs=1e-3)
        assert str(one[1]) == str(other[1])


@pytest.mark.filterwarnings("ignore")
def test_a_policy_by_its_fields_changes_the_scores(checkpoint, tasks):
    from swaa_jax.eval.harness import SwaaLM

    fields = {"window": 4, "num_sink_tokens": 1, "full_attention_layers": "1+2", "decode": "full"}
    windowed = SwaaLM(str(checkpoint), dtype="float32", **fields)
    assert windowed.model.policy == swaa.AttentionPolicy(
        window=4, num_sink_tokens=1, full_attention_layers=[1, 2], decode="full"
    )
    full = SwaaLM(str(checkpoint), dtype="float32", policy="full")
    scores = [
        [
            one["filtered_resps"]
            for one in run(lm, tasks, ["local_choice"])["samples"]["local_choice"]
        ]
        for lm in (windowed, full)
    ]
    assert scores[0] != scores[1]
    with pytest.raises(
        ValueError, match="policy: expected a name or fields, got 'full' and window"
    ):
        SwaaLM(str(checkpoint), policy="full", window=4)


@pytest.mark.filterwarnings("ignore")
def test_long_contexts_lose_their_first_tokens(checkpoint, tasks, caplog):
    from swaa_jax.eval.harness import SwaaLM

    lm = SwaaLM(str(checkpoint), dtype="float32", policy="full", max_length=24)
    run(lm, tasks, ["local_choice", "local_read"])
    assert "first" in caplog.text and "are cut" in caplog.text
    with pytest.raises(ValueError, match=r"max_length: request 0 wants 30 tokens"):
        lm._fit([1], 30, 0)


def test_chat_templates_and_thinking(checkpoint):
    from swaa_jax.eval.harness import SwaaLM

    lm = SwaaLM(str(checkpoint), dtype="float32", policy="full", enable_thinking=False)
    chat = lm.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert chat.endswith("<think>\n\n</think>\n\n")
    assert lm.tok_encode(chat) == lm.tokenizer(chat, add_special_tokens=False)["input_ids"]


def lm_for(checkpoint, **options):
    from swaa_jax.eval.harness import SwaaLM

    return SwaaLM(str(checkpoint), **{"dtype": "float32", "policy": "full", **options})


def request(kind, *arguments):
    from lm_eval.api.instance import Instance

    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


@pytest.mark.filterwarnings("ignore")
def test_empty_contexts_begin_with_the_prefix_token(checkpoint):
    lm = lm_for(checkpoint)
    assert lm.tok_encode("") == []  # this tokenizer adds no BOS
    kwargs = {"until": [], "max_gen_toks": 4}
    empty, prefix = lm.generate_until(
        [
            request("generate_until", text, kwargs)
            for text in ("", lm.tokenizer.decode([lm.prefix_token_id]))
        ],
        disable_tqdm=True,
    )
    assert empty == prefix and empty
    pairs = [("", "  two"), ("  ", "two")]  # blanks go to the continuation
    one, other = lm.loglikelihood(
        [request("loglikelihood", *pair) for pair in pairs], disable_tqdm=True
    )
    assert one == pytest.approx(other)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "kwargs, temperature",
    [
        ({"do_sample": True}, 1.0),
        ({"do_sample": True, "temperature": None}, 1.0),
        ({"do_sample": True, "temperature": 0.5}, 0.5),
        ({"temperature": 0.5}, 0.5),
        ({"do_sample": False}, 0.0),
        ({}, 0.0),
    ],
)
def test_sampling_without_a_temperature_is_at_one(checkpoint, monkeypatch, kwargs, temperature):
    from types import SimpleNamespace

    from swaa_jax.eval import harness

    asked = {}

    def generate(model, tok, prompts, *, options, progress):
        asked["temperature"] = options.temperature
        return SimpleNamespace(texts=["x"] * len(prompts))

    lm = lm_for(checkpoint)
    monkeypatch.setattr(harness, "generate", generate)
    given = {"until": [], "max_gen_toks": 4, **kwargs}
    assert lm.generate_until([request("generate_until", "Hi", given)], True) == ["x"]
    assert asked["temperature"] == temperature


@pytest.mark.filterwarnings("ignore")
def test_ignored_generation_kwargs_are_named_once(checkpoint, caplog):
    lm = lm_for(checkpoint)
    given = {"until": ["a"], "max_tokens": 4, "typical_p": 0.1, "penalty_alpha": 1.2}
    for extra in ({}, {}, {"typical_p": 0.2, "num_beams": 2}, {"top_k": 3, "top_p": 0.5}):
        lm._options({**given, **extra})
    said = [one.getMessage() for one in caplog.records if "ignored" in one.getMessage()]
    assert len(said) == 2
    assert "penalty_alpha, typical_p are ignored; expected only until, max_gen_toks" in said[0]
    assert "num_beams is ignored" in said[1]


@pytest.mark.parametrize(
    "arguments, fields",
    [
        ("full_attention_heads=3:0+2", {"full_attention_heads": {3: [0, 2]}}),
        ("full_attention_heads=3:0+2/5:1", {"full_attention_heads": {3: [0, 2], 5: [1]}}),
        ("full_attention_heads=3:0+2;5:1", {"full_attention_heads": {3: [0, 2], 5: [1]}}),
        ("full_attention_heads=-1:1", {"full_attention_heads": {-1: [1]}}),
        ("full_attention_heads=none", {}),
        ("full_attention_layers=none,decode=none", {}),
        (
            "full_attention_layers=1::2,decode=1+3",
            {"full_attention_layers": "1::2", "decode": [1, 3]},
        ),
        ("full_attention_layers=-1,decode=0", {"full_attention_layers": [-1], "decode": [0]}),
        ("decode=full,full_attention_tail=2", {"decode": "full", "full_attention_tail": 2}),
    ],
)
def test_policy_fields_as_the_harness_splits_them(arguments, fields):
    from lm_eval._cli.utils import key_val_to_dict
    from lm_eval.utils import simple_parse_args_string

    from swaa_jax.eval.harness import _policy

    wanted = swaa.AttentionPolicy(window=4, **fields)
    for parse in (key_val_to_dict, simple_parse_args_string):  # the command's, and Python's
        assert _policy(None, parse(f"window=4,{arguments}")) == wanted


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("decode", "ful", "decode: expected window, full, none or layers .*, got 'ful'"),
        (
            "full_attention_layers",
            "all",
            "layers: expected layers .* none, got 'all'",
        ),
        (
            "full_attention_layers",
            "1;3",
            "layers: expected layers .* none, got '1;3'",
        ),
        ("full_attention_heads", "3", "full_attention_heads: expected LAYER.* got '3'"),
        ("full_attention_heads", "3:0+", r"as in 3:0\+2/5:1, got ''"),
    ],
)
def test_malformed_policy_fields_are_named(field, value, message):
    from swaa_jax.eval.harness import _policy

    with pytest.raises(ValueError, match=message):
        _policy(None, {"window": 4, field: value})


@pytest.mark.filterwarnings("ignore")
def test_limits_are_checked_at_once(checkpoint):
    for value in (1, 0, "two", 2.5):
        expected = rf"max_length: expected an integer of at least 2, got {value!r}"
        with pytest.raises(ValueError, match=expected):
            lm_for(checkpoint, max_length=value)
    for value in ("auto:x", 0, "many"):
        expected = rf"batch_size: expected auto, auto:N or an integer .* 1, got {value!r}"
        with pytest.raises(ValueError, match=expected):
            lm_for(checkpoint, batch_size=value)
    lm = lm_for(checkpoint, max_length=2, batch_size="auto:4")
    assert lm.batch_size == 8
    assert lm_for(checkpoint, batch_size="3").batch_size == 3
    (total,) = lm.loglikelihood_rolling([request("loglikelihood_rolling", "abc")], True)
    assert total < 0


def command(monkeypatch, cli_evaluate):
    import lm_eval.__main__

    from swaa_jax.cli.main import main

    monkeypatch.setattr(lm_eval.__main__, "cli_evaluate", cli_evaluate)
    monkeypatch.setattr(sys, "argv", ["swaa"])
    return main(["lm-eval", "run"])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "error, said",
    [
        (ValueError("Tasks not found: hellaswg"), "hellaswg; `swaa lm-eval ls tasks` lists them"),
        (ConnectionError("Couldn't reach 'x' on the Hub"), "where the Hugging Face hub can be"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
)
def test_the_harness_errors_are_one_paragraph(monkeypatch, capsys, error, said):
    def fails():
        raise error

    monkeypatch.delenv("SWAA_TRACEBACK", raising=False)
    assert command(monkeypatch, fails) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("swaa lm-eval: error: the harness says: ") and said in shown
    assert shown.count("\n") == 1
    monkeypatch.setenv("SWAA_TRACEBACK", "1")
    with pytest.raises(ValueError) as found:
        command(monkeypatch, fails)
    assert found.value.__cause__ is error


@pytest.mark.filterwarnings("ignore")
def test_the_models_own_errors_stay_as_they_are(monkeypatch, capsys):
    from swaa_jax.eval.harness import _policy

    assert command(monkeypatch, lambda: _policy("full", {"window": 4})) == 2
    assert capsys.readouterr().err.startswith("swaa lm-eval: error: policy: expected a name")

    def bug():
        raise ValueError("shapes do not broadcast")

    ours = {"__name__": "swaa_jax.models.some", "bug": bug}
    exec("def call(): bug()", ours)
    with pytest.raises(ValueError, match=r"^shapes do not broadcast"):
        command(monkeypatch, ours["call"])


@pytest.mark.filterwarnings("ignore")
def test_overrides_of_the_config_reach_the_model(checkpoint, monkeypatch, capsys):
    from lm_eval.__main__ import HarnessCLI

    from swaa_jax.cli.main import main

    word = "max_position_embeddings=77"
    assert lm_for(checkpoint, config_overrides=word).max_length == 77
    found = []
    parse = lambda: found.append(HarnessCLI().parse_args().model_args)  # noqa: E731
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", parse)
    monkeypatch.setattr(sys, "argv", ["swaa"])
    words = ["lm-eval", "run", "--model", "swaa", "--model_args", "pretrained=a,dtype=float32"]
    assert main([*words, "--tasks", "x", "--config-override", word]) == 0
    overrides = {"max_position_embeddings": 77}
    assert found == [{"pretrained": "a", "dtype": "float32", "config_overrides": overrides}]
    assert lm_for(checkpoint, config_overrides=overrides).max_length == 77
    with pytest.raises(ValueError, match=r"did you mean 'rope_theta'"):
        lm_for(checkpoint, config_overrides={"rope_thetta": 3})
    assert main(["lm-eval", "--config", "run.yaml", "--config-override", word]) == 2
    assert "--config-override: expected --model_args beside it" in capsys.readouterr().err
    assert main([*words, "--config-override", word, "--config-override", word]) == 2
    assert "--config-override: expected each key once" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_with_a_misspelt_task():
    arguments = ["lm-eval", "run", "--model", "swaa", "--tasks", "hellaswg"]
    arguments += ["--model_args", "pretrained=tiny-retriever"]
    done = subprocess.run(
        [sys.executable, "-m", "swaa_jax.cli.main", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "swaa lm-eval: error: the harness says: Tasks not found: hellaswg" in done.stderr


@pytest.mark.slow
def test_the_command(checkpoint, tasks, tmp_path):
    command = [sys.executable, "-m", "swaa_jax.cli.main", "lm-eval", "run", "--model", "swaa"]
    arguments = f"pretrained={checkpoint},window=8,decode=full,dtype=float32"
    command += ["--model_args", arguments, "--tasks", "local_choice", "--apply_chat_template"]
    command += ["--include_path", str(tasks), "--output_path", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "local_choice" in done.stdout and "acc_norm" in done.stdout
