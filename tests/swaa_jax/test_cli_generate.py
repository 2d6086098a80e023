"""`swaa generate` on a tiny checkpoint: what it prints, and each mistake in one paragraph."""

import io
import json
import shutil
import subprocess
import sys

import pytest

import swaa_jax as swaa
from swaa_jax import infer, runtime
from swaa_jax.cli import sampling_args
from swaa_jax.cli.main import main
from tests.support import byte_tokenizer

tiny_hf = pytest.importorskip("tests.support.tiny_hf")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A tiny Qwen3 with the byte tokenizer, a context of 256 and a generation config."""
    path = tmp_path_factory.mktemp("tiny-qwen3")
    model = tiny_hf.build(
        "qwen3",
        vocab_size=byte_tokenizer.VOCAB_SIZE,
        max_position_embeddings=256,
        num_hidden_layers=2,
    )
    tiny_hf.save(model, path)
    byte_tokenizer.build().save_pretrained(path)
    (path / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "temperature": 0.6, "top_k": 5, "eos_token_id": [2, 4]})
    )
    return path


@pytest.fixture(autouse=True)
def _in_process(monkeypatch):
    """The commands run here: leave the process's logging and compilation cache alone."""
    monkeypatch.setattr(runtime, "enable_compilation_cache", lambda: None)
    monkeypatch.setattr(runtime, "setup_logging", lambda level: None)


@pytest.fixture
def run(capsys):
    def run(*args):
        code = main(["generate", *map(str, args)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def fails(run):
    """Runs what must fail as the user's mistake: code 2, one paragraph, nothing on stdout."""

    def fails(*args):
        code, out, err = run(*args)
        assert (code, out) == (2, "")
        assert err.startswith("swaa generate: error: ")
        assert err.endswith("\n")
        assert err.count("\n") == 1
        assert "Traceback" not in err
        return err

    return fails


@pytest.fixture(scope="module")
def api(directory):
    """What the library answers."""
    model, tok = swaa.load_model(directory, dtype="float32"), swaa.load_tokenizer(directory)

    def api(prompts, policy=None, **options):
        under = model if policy is None else model.with_policy(policy)
        return swaa.generate(under, tok, prompts, max_new_tokens=20, **options)

    return api


def user(text):
    return [{"role": "user", "content": text}]


COMMON = ("--max-new-tokens", 20, "--dtype", "float32")


def test_one_prompt_is_streamed_through_the_template(run, api, directory):
    code, out, err = run(directory, "hello", *COMMON)
    assert (code, err) == (0, "")
    assert out == api(user("hello")).texts[0] + "\n"
    assert out != api("hello").texts[0] + "\n"


def test_prompts_behind_flags(run, directory):
    """Wherever a flag stands, the prompts are the same."""
    lines = [
        [json.loads(line) for line in run(directory, *words, *COMMON)[1].splitlines()]
        for words in (
            ("hello", "there", "--raw", "--json"),
            ("--raw", "hello", "--json", "there"),
        )
    ]
    told = [[(line["prompt"], line["tokens"]) for line in every] for every in lines]
    assert told[0] == told[1] and [prompt for prompt, _ in told[0]] == ["hello", "there"]


def test_raw_policy_and_stats(run, api, directory):
    policy = swaa.AttentionPolicy(window=4, num_sink_tokens=2, decode="full")
    code, out, err = run(
        directory, "hello there", "--raw", "--policy", "window=4", "--sinks", 2,
        "--decode", "full", "--stats", *COMMON,
    )  # fmt: skip
    assert code == 0
    assert out == api("hello there", policy).texts[0] + "\n"
    assert "policy: window=4,sinks=2,decode=full" in err
    assert "KV cache" in err


def test_a_backend_by_name(run, api, fails, directory):
    _, out, _ = run(directory, "hi", "--backend", "swa_prefill=reference,swa_decode=xla", *COMMON)
    assert out == api(user("hi")).texts[0] + "\n"
    assert "backend: expected one of" in fails(directory, "hi", "--backend", "cuda", *COMMON)
    err = fails(directory, "hi", "--backend", "pallas_tpu", *COMMON)
    assert "expects platform 'tpu', got 'cpu'" in err


def test_sampling_stop_thinking_and_cot(run, api, directory):
    _, out, _ = run(
        directory, "hi", "--temperature", 1.5, "--top-k", 9, "--top-p", 0.8, "--seed", 3,
        "--no-thinking", "--cot", *COMMON,
    )  # fmt: skip
    options = {"temperature": 1.5, "top_k": 9, "top_p": 0.8, "seed": 3}
    text = api(user("hi"), **options, enable_thinking=False, cot=True).texts[0]
    assert out == text + "\n"
    _, out, _ = run(directory, "hi", "--sampling", "checkpoint", *COMMON)
    assert out == api(user("hi"), temperature=0.6, top_k=5).texts[0] + "\n"
    stop = api(user("hi")).texts[0][5:7]
    _, out, _ = run(directory, "hi", "--stop", "never met", "--stop", stop, *COMMON)
    assert out == api(user("hi")).texts[0].split(stop)[0] + "\n"


def test_several_prompts_and_json(run, api, directory, tmp_path):
    (tmp_path / "prompt.txt").write_text("from a file\n")
    args = (directory, "one", "two", "--file", tmp_path / "prompt.txt", *COMMON)
    want = api([user("one"), user("two"), user("from a file")])
    code, out, _ = run(*args, "--json")
    records = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [record["prompt"] for record in records] == ["one", "two", "from a file"]
    assert [record["text"] for record in records] == list(want.texts)
    assert [tuple(record["tokens"]) for record in records] == list(want.tokens)
    assert {record["finish_reason"] for record in records} <= {"eos", "length"}
    assert list(records[0]) == ["prompt", "text", "tokens", "finish_reason"]
    _, out, _ = run(*args)
    assert out.startswith(f"==> prompt 1 <==\n{want.texts[0]}\n")


def test_every_sampling_setting_has_a_flag(run, api, fails, directory, capsys):
    words = ("--temperature", 1.5, "--min-p", 0.01, "--frequency-penalty", 0.25, "--seed", 3)
    given = {"temperature": 1.5, "min_p": 0.01, "frequency_penalty": 0.25, "seed": 3}
    likely = api(user("hi"), **given).tokens[0][0]
    words += ("--suppress-tokens", f"7,{likely}", "--no-repeat-ngram-size", 2)
    want = api(user("hi"), **given, suppress_tokens=(7, likely), no_repeat_ngram_size=2)
    _, out, _ = run(directory, "hi", *words, *COMMON)
    assert out == want.texts[0] + "\n"
    assert likely not in want.tokens[0]
    assert set(sampling_args._FLAGS) == set(infer.SAMPLING)
    assert "suppress_tokens" in fails(directory, "hi", "--suppress-tokens", "99999", *COMMON)
    with pytest.raises(SystemExit):
        run(directory, "hi", "--suppress-tokens", "the")
    assert "expected token ids such as 5,6, got 'the'" in capsys.readouterr().err


def test_logprobs_and_penalties(run, api, directory):
    args = (directory, "one", *COMMON, "--repetition-penalty", "1.4", "--presence-penalty", "0.5")
    want = api(user("one"), repetition_penalty=1.4, presence_penalty=0.5, logprobs=True)
    _, out, _ = run(*args, "--json", "--logprobs")
    record = json.loads(out)
    assert (tuple(record["tokens"]),) == want.tokens
    assert (tuple(record["logprobs"]),) == want.logprobs
    code, _, err = run(*args, "--logprobs")
    assert code == 2 and "--logprobs: expected --json" in err


def test_standard_input(run, api, directory, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    _, out, _ = run(directory, *COMMON)
    assert out == api(user("hello")).texts[0] + "\n"


def test_a_wrong_path(fails, tmp_path):
    assert "does not exist" in fails(tmp_path / "nowhere", "hi")


def test_a_truncated_shard(fails, directory, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(directory, broken)
    shard = broken / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1000])
    assert "model.safetensors" in fails(broken, "hi", *COMMON)


def test_a_policy_layer_out_of_range(fails, directory):
    err = fails(directory, "hi", "--window", 8, "--full-layers", "0,7", *COMMON)
    assert "7" in err
    assert "layers" in err


def test_an_empty_prompt(fails, directory, monkeypatch, tmp_path):
    assert "PROMPT: expected some text, got an empty one" in fails(directory, "", *COMMON)
    assert "PROMPT: expected some text" in fails(directory, " \n", "--raw", *COMMON)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert "got an empty one in standard input" in fails(directory, *COMMON)
    (tmp_path / "empty.txt").write_text("\n")
    assert "empty.txt" in fails(directory, "--file", tmp_path / "empty.txt")


def test_a_prompt_beyond_the_context(fails, directory):
    err = fails(directory, "x" * 250, "--raw", *COMMON)
    assert "got at least 270: 250 prompt tokens and max_new_tokens=20" in err
    assert "context of 256" in err


def test_other_mistakes(fails, directory, tmp_path):
    assert "temperature" in fails(directory, "hi", "--temperature", -1, *COMMON)
    assert "--max-new-tokens" in fails(directory, "hi", "--max-new-tokens", 0)
    assert "no-such-policy" in fails(directory, "hi", "--policy", "no-such-policy")
    assert "No such file" in fails(directory, "--file", tmp_path / "none.txt")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xff")
    assert "UTF-8" in fails(directory, "--file", tmp_path / "binary")
    assert "cot" in fails(directory, "hi", "--raw", "--cot", *COMMON)
    assert "--thinking: expected a chat" in fails(directory, "hi", "--raw", "--thinking", *COMMON)


def test_a_truncated_shard_in_a_process(directory, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(directory, broken)
    shard = broken / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1000])
    done = subprocess.run(
        [sys.executable, "-m", "swaa_jax.cli.main", "generate", str(broken), "hi"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    assert "model.safetensors" in done.stderr
