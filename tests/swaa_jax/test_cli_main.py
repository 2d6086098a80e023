"""`swaa` itself: quick to ask, registered commands, exit codes, what an error looks like."""

import argparse
import errno
import os
import pathlib
import re
import subprocess
import sys

import pytest

import swaa_jax
from swaa_jax.cli import errors
from swaa_jax.cli.main import build_parser, main
from swaa_jax.cli.policy_args import add_policy_arguments, policy_from_args
from swaa_jax.policy import AttentionPolicy, load_policy, split_policies

ROOT = pathlib.Path(swaa_jax.__file__).parents[1]


def swaa(*args, **kwargs):
    """Run the command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "swaa_jax.cli.main", *args],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        **kwargs,
    )


def test_help_and_version_import_nothing_heavy(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["--version"])
    assert exit_info.value.code == 0
    assert capsys.readouterr().out == f"swaa {swaa_jax.__version__}\n"
    code = (
        "import sys; from swaa_jax.cli.main import main\n"
        "try: main(['generate', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'jax', 'flax', 'transformers', 'numpy', 'torch', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "examples:" in done.stdout


def test_help_names_the_commands(capsys):
    assert main([]) == 0
    assert "generate" in capsys.readouterr().out
    assert "generate" in build_parser().format_help()


def test_an_unknown_command_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["fly"])
    assert exit_info.value.code == 2
    assert "got 'fly'" in capsys.readouterr().err


def test_exit_codes(capsys):
    def raising(error):
        def command():
            raise error

        return command

    assert errors.run_command(lambda: 0, name="swaa x") == 0
    assert errors.run_command(raising(KeyboardInterrupt()), name="swaa x") == 130
    assert errors.run_command(raising(BrokenPipeError()), name="swaa x") == 141
    err = capsys.readouterr().err
    assert err == "\nswaa x: interrupted\n"


def test_an_interrupt_in_jaxs_collector_callback_still_arrives():
    code = """
import gc, os, signal, sys, time
from swaa_jax.cli.errors import run_command

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it

def _xla_gc_callback(*args):  # the name of JAX's; what is raised here is dropped
    gc.callbacks.remove(_xla_gc_callback)
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(1000):
        pass

def command():
    gc.callbacks.append(_xla_gc_callback)
    gc.collect()
    time.sleep(20)
    return 0

sys.exit(run_command(command, name="swaa x"))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (130, "\nswaa x: interrupted\n")


def test_a_users_mistake_is_one_paragraph(capsys, monkeypatch, tmp_path):
    def ours():
        AttentionPolicy(window=-1)
        return 0

    def missing():
        (tmp_path / "nothing.txt").read_text()
        return 0

    for command in (ours, missing):
        assert errors.run_command(command, name="swaa x") == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("swaa x: error: ")
        assert captured.err.count("\n") == 1
    monkeypatch.setenv("SWAA_TRACEBACK", "1")
    with pytest.raises(ValueError):
        errors.run_command(ours, name="swaa x")


def test_bugs_keep_their_traceback():
    def not_ours():
        import numpy as np

        np.zeros(2) + np.zeros(3)
        return 0

    def broken():
        raise KeyError("layer")

    with pytest.raises(ValueError, match="broadcast"):
        errors.run_command(not_ours, name="swaa x")
    with pytest.raises(KeyError):
        errors.run_command(broken, name="swaa x")


def test_a_closed_pipe_is_quiet():
    read, write = os.pipe()
    os.close(read)
    code = (
        "import sys; from swaa_jax.cli.errors import run_command\n"
        "sys.exit(run_command(lambda: print('a line') or 0, name='swaa x'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_wrong_path_in_a_process(tmp_path):
    done = swaa("generate", str(tmp_path / "no-such-model"), "hi")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "no-such-model" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("window=64", AttentionPolicy(window=64)),
        (
            "window=64,sinks=4,full_layers=1::2,decode=full",
            AttentionPolicy(
                window=64, num_sink_tokens=4, full_attention_layers="1::2", decode="full"
            ),
        ),
        (
            "window=64, full-layers=1,3, decode=0,2, tail=5",
            AttentionPolicy(
                window=64, full_attention_layers=(1, 3), decode=(0, 2), full_attention_tail=5
            ),
        ),
        (
            "window=64,heads=3:0+2,-1:1,decode=full",
            AttentionPolicy(window=64, full_attention_heads={3: [0, 2], -1: [1]}, decode="full"),
        ),
        (
            "window=64+sinks=4+full_layers=1+3+decode=0+-1",
            AttentionPolicy(
                window=64, num_sink_tokens=4, full_attention_layers=(1, 3), decode=(0, -1)
            ),
        ),
        (
            "window=64,full_heads=3:0+2/-1:1,full_attention_tail=2",
            AttentionPolicy(
                window=64, full_attention_heads={3: [0, 2], -1: [1]}, full_attention_tail=2
            ),
        ),
        (
            "window=64,heads=3:0;5:1",
            AttentionPolicy(window=64, full_attention_heads={3: [0], 5: [1]}),
        ),
        ("window=64,full_layers=none,heads=none,decode=none", AttentionPolicy(window=64)),
        ("window=full", AttentionPolicy()),
        ("full", AttentionPolicy()),
    ],
)
def test_policies_in_one_line(text, policy):
    assert load_policy(text) == AttentionPolicy.parse(text) == policy


def test_policies_in_a_list():
    assert split_policies("full, window=8,sinks=2,window=8+heads=3:0+2;5:1,naive,a.yaml") == [
        *("full", "window=8,sinks=2", "window=8+heads=3:0+2;5:1", "naive", "a.yaml")
    ]
    assert split_policies("window=8,full_layers=1,-3,heads=3:0,5:1+2,window=9") == [
        *("window=8,full_layers=1,-3,heads=3:0,5:1+2", "window=9")
    ]
    assert split_policies(" , ") == []


def test_a_policy_file(tmp_path):
    path = tmp_path / "odd=name.yaml"
    path.write_text('window: 32\nfull_attention_layers: "1::2"\n')
    assert load_policy(str(path)) == AttentionPolicy(window=32, full_attention_layers="1::2")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("window=64,sink=4", "policy: expected keys among .*got 'sink'"),
        ("window=wide", "window: expected an integer, got 'wide'"),
        ("window=1,window=2", "each field once, got window twice"),
        ("window=8,heads=3", "heads: expected LAYER:HEAD.HEAD such as .* got '3'"),
        ("window=8,heads=3:0-2", "heads: expected LAYER:HEAD.HEAD .* got '0-2'"),
        ("window=8,heads=3:1+1", "each KV head once, got 1 more than once"),
        ("fast,window=1", "expected full or KEY=VALUE,KEY=VALUE"),
        ("no-such-policy", "no-such-policy"),
        ("window=-1", "window"),
        ("sinks=4", "window: expected a window beside num_sink_tokens=4"),
        ("window=8,heads=3:0,full_attention_heads=3:1", "once, got heads and full_attention_heads"),
    ],
)
def test_mistaken_policies(text, message):
    with pytest.raises(ValueError, match=message):
        load_policy(text)


def test_flags_alone_and_beside_a_policy():
    parser = argparse.ArgumentParser()
    add_policy_arguments(parser)

    def policy(*args):
        return policy_from_args(parser.parse_args(args))

    assert policy() is None
    assert policy("--window", "8", "--sinks", "2") == AttentionPolicy(window=8, num_sink_tokens=2)
    assert policy("--policy", "window=8,sinks=2", "--sinks", "0", "--decode", "full") == (
        AttentionPolicy(window=8, decode="full")
    )
    assert policy("--window", "8", "--full-layers", "0,2", "--full-attention-tail", "3") == (
        AttentionPolicy(window=8, full_attention_layers=(0, 2), full_attention_tail=3)
    )
    assert policy("--policy", "window=8,full_layers=1::2", "--full-layers", "none") == (
        AttentionPolicy(window=8)
    )
    assert policy("--window", "8", "--full-heads", "3:0+2,5:1") == (
        AttentionPolicy(window=8, full_attention_heads={3: [0, 2], 5: [1]})
    )
    assert policy("--policy", "window=8,heads=1:0", "--full-heads", "none") == (
        AttentionPolicy(window=8)
    )


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ("generate tiny-retriever hi --policy window=64,snks=4", "sinks"),
        ("generate tiny-retriever hi --policy naiv", "naive"),
        ("generate tiny-retriever hi --policy POLICY.yaml", "num_sink_tokens"),
        ("generate tiny-retreiver hi", "tiny-retriever"),
        ("generate tiny-retriever hi --backend xlaa", "xla"),
        ("generate tiny-retriever hi --mesh fdsp=2", "fsdp"),
        ("eval papr-table-1", "paper-table-1"),
        ("eval --model tiny-retriever --task rulr", "ruler"),
        ("train tinny", "tiny"),
        ("train tiny optimizer.lerning_rate=3", "learning_rate"),
        ("train tiny optimizer.lr=3", "learning_rate"),
        ("train tiny data.batchsize=3", "batch_size"),
        ("recipes naiv", "naive"),
    ],
)
def test_what_is_written_wrong_gets_the_nearest_name(words, meant, tmp_path, capsys):
    (tmp_path / "POLICY.yaml").write_text("window: 64\nsinks: 4\n")
    words = words.replace("POLICY.yaml", str(tmp_path / "POLICY.yaml"))
    assert main(words.split(" ")) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert meant in told.partition(", got ")[2]


def test_a_variable_that_nothing_reads_is_told(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("SWAA_BACKND", "xla")
    assert main(["generate", str(tmp_path / "nothing"), "hi"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "did you mean 'SWAA_BACKEND'?" in first and "nothing" in second


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("recipes --pref quality", "swaa recipes: .* got '--pref' .did you mean '--prefer'"),
        ("generate m p --windo=8", "swaa generate: .* got '--windo=8' .did you mean '--window'"),
        ("evla", "swaa: COMMAND: .* got 'evla' .did you mean 'eval'"),
        ("eval --polices full", "swaa eval: .* got '--polices' .did you mean '--policies'"),
        ("generate m p --dtype bf16", "swaa generate: --dtype: .* .did you mean 'bfloat16'"),
        ("train tiny --optimizer.lr=3", "swaa train: .* write 'optimizer.lr=3'"),
        ("evl", "swaa: COMMAND: .* got 'evl' .did you mean 'eval'"),
        (
            "generate m p --positions tex",
            "swaa generate: --positions: .*did you mean 'text'",
        ),
        ("eval --nope", "swaa eval: expected no further arguments, got '--nope'; see"),
        (
            "generate m p --top-k " + "x" * 5000,
            "swaa generate: --top-k: expected an integer, got .*x{40}.*; see",
        ),
        ("generate", "swaa generate: expected MODEL, PROMPT, got none; see"),
        ("generate m p --dtype fp32", "swaa generate: --dtype: .* .did you mean 'float32'"),
        ("generate m p --max-new 5", "swaa generate: .* got '--max-new' .did you mean '--max-new-"),
        (
            "generate m p --seed 1 --seed 2",
            "swaa generate: --seed: expected one, got 1 and 2; drop",
        ),
        ("generate m p --raw --chat", "swaa generate: --chat: expected no --raw with it, got both"),
        ("generate m p --window", "swaa generate: --window: expected a value behind it, got none"),
        (
            "select m d o --window 8",
            "swaa select: expected one of --num-full-layers --share, got n",
        ),
    ],
)
def test_a_mistake_in_flags_is_told_in_one_paragraph(words, told, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words.split(" "))
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(told, line), line
    assert line.endswith("--help")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            "help train",
            "COMMAND: expected a command, got 'help'; write swaa --help, or swaa COMMAND --help",
        ),
        ("version", "expected a command, got 'version'; write swaa --version"),
        ("train tiny --learning_rate 1e-4", "write 'learning_rate=1e-4'"),
        ("train tiny --optimizer.learning_rate=1", "write 'optimizer.learning_rate=1'"),
        ("serve m --max-model-len 9", "'--max-model-len' (--max-tokens here)"),
        ("serve m --tensor_parallel_size 2", "(--mesh tensor=N here)"),
        ("bench m --num-prompts 9", "(--requests here)"),
        ("convert a b --max-model-len 9", "got '--max-model-len', '9'; see"),  # has no such flag
        ("generate m hi --window abc", "error: --window: expected an integer, got 'abc'"),
        ("generate m hi --window 8 --sinks -1", "error: --sinks: expected an integer of at least"),
        ("generate m hi --sinks 4", "error: --window: expected a window beside"),
        ("generate m hi --policy window=8 --tail -1", "error: --tail: expected"),
        ("generate m hi --policy window=x --tail 1", "error: --policy: window: expected"),
        ("generate m hi --window 8 --full-heads 3", "error: --full-heads: expected LAYER:HEAD"),
        ("generate m hi --window 8 --decode ful", "got 'ful' (str) (did you mean 'full'?)"),
        ("train job.yml", "job.yml: expected a file that is there, got none; say job.yaml"),
        ("train job.jsonl", "got 'job.jsonl', which is a file of another ending"),
        ("train job.jsonl", "write data.files=job.jsonl"),
        ("train model", "write model=model"),
        ("train empty.yaml", "error: empty.yaml: expected settings, got an empty file"),
        ("recipes thinking", "error: NAME: expected the name of a shipped config"),
        ("recipes full --memory 16", "--memory: expected none with full, which is shown whole"),
        ("recipes --search --model m --no-training", "--no-training: expected none with --search"),
        ("recipes full --search --model m", "NAME: expected none with --search, got 'full'"),
        ("eval nope", "error: CONFIG: expected the name of a shipped config"),
        ("generate m hi --policy nope", "error: --policy: expected the name of a shipped config"),
        ("generate m hi --policy sinks=4", "error: --policy: window: expected a window beside"),
        ("generate m hi --max-new-tokens 0", "error: --max-new-tokens: expected an integer of at"),
        ("generate m hi --temperature -1", "error: --temperature: expected a number of at least 0"),
        ("generate m hi --raw --cot", "error: --cot: expected a chat, to whose message it adds"),
        ("generate m _", "error: PROMPT: expected some text, got an empty one"),
        ("train tiny max_steps=1 max_steps=2", "'max_steps': expected one value, got '1' and '2'"),
        ("train tiny lora.rank=0", "swaa train: error: lora.rank: expected an integer"),
        ("train tiny mesh=tenser=2", "error: mesh: expected 'auto', or sizes such as fsdp=4,tenso"),
        ("train tiny seed=x", "error: seed: expected an integer of at least 0, got 'x'"),
        ("train tiny loss.sft=0", "error: loss.sft: expected a factor above 0 among"),
        ("train tiny eval_tasks=qa", "task qa, files: expected a path or several"),
        ("train tiny trainer.steps=5", "got 'trainer', which is max_steps"),
        ("train tiny output_dir=job.jsonl", "error: output_dir: expected a directory that can be"),
        ("select m job.jsonl o --window 8 --share 2", "error: --share: expected a part of the la"),
        ("select m job.jsonl job.jsonl --window 8 --share 1/2", "error: OUT: expected a directory"),
        ("bench tiny-retriever --output job.jsonl", "error: --output: expected a directory that"),
        ("demo --samples 0", "error: --samples: expected an integer of at least 1"),
        ("demo --output job.jsonl", "error: --output: expected a directory that can be written"),
    ],
)
def test_what_is_typed_wrong_is_told_by_its_name(words, told, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("job.yaml", "job.jsonl", "empty.yaml"):
        (tmp_path / name).write_text("")
    (tmp_path / "model").mkdir()
    try:
        code = main(["" if word == "_" else word for word in words.split()])
    except SystemExit as stopped:
        code = stopped.code
    captured = capsys.readouterr()
    assert (code, captured.out) == (2, "")
    assert told in captured.err
    assert captured.err.count("\n") == 1
    assert len(list(tmp_path.iterdir())) == 4  # nothing was written


@pytest.mark.parametrize(
    ("number", "path", "told"),
    [
        (errno.ENOSPC, None, "swaa x: error: the output: expected a place to write or read, got"),
        (errno.EROFS, "/mnt/a", "swaa x: error: /mnt/a: expected a place to write or read, got"),
        (errno.ENAMETOOLONG, "a" * 5000, "give a shorter path"),
    ],
)
def test_a_disk_that_takes_nothing_is_one_paragraph(number, path, told, capsys):
    def command():
        raise OSError(number, os.strerror(number), path)

    assert errors.run_command(command, name="swaa x") == 2
    err = capsys.readouterr().err
    assert told in err
    assert err.count("\n") == 1
    assert len(err) < 600
    with pytest.raises(OSError, match="Bad file"):  # a bug of ours keeps its traceback
        errors.run_command(lambda: os.close(-1) or 0, name="swaa x")


def test_a_full_output_and_a_narrow_encoding():
    def done(text, **kwargs):
        code = (
            "import sys; from swaa_jax.cli.errors import run_command\n"
            f"sys.exit(run_command(lambda: print({text!a}) or 0, name='swaa x'))"
        )
        return subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, check=False, **kwargs
        )

    with open("/dev/full", "w") as full:
        found = done("a line", stdout=full)
    assert found.returncode == 2
    assert found.stderr.startswith(b"swaa x: error: the output: expected a place")
    assert found.stderr.count(b"\n") == 1
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    found = done("\xe9 \u2500 \U0001f642", stdout=subprocess.PIPE, env=environment)
    assert (found.returncode, found.stderr) == (0, b"")
    assert found.stdout == b"\xe9 \\u2500 \\ud83d\\ude42\n"  # as JSON writes them
