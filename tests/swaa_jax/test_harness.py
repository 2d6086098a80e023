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


@pytest.mark.slow
def test_the_command(checkpoint, tasks, tmp_path):
    command = [sys.executable, "-m", "swaa_jax.cli.main", "lm-eval", "run", "--model", "swaa"]
    arguments = f"pretrained={checkpoint},window=8,decode=full,dtype=float32"
    command += ["--model_args", arguments, "--tasks", "local_choice", "--apply_chat_template"]
    command += ["--include_path", str(tasks), "--output_path", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "local_choice" in done.stdout and "acc_norm" in done.stdout
