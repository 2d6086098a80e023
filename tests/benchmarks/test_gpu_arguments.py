"""The command lines of the GPU benchmarks: nothing given is dropped, and mistakes are named."""

import pytest


@pytest.mark.parametrize(
    "name", ("attention_gpu", "decode_gpu", "moe_gpu", "serving", "train_step")
)
def test_help_teaches(load, name, capsys):
    with pytest.raises(SystemExit) as ended:
        load(name).parse_arguments(["--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    assert f"python benchmarks/{name}.py --smoke" in shown and "examples:" in shown


@pytest.mark.parametrize(
    "name, given, told",
    [
        (
            "attention_gpu",
            "--lengths 1000 --output a.json",
            "--lengths: expected multiples of 1024, got 1000",
        ),
        ("attention_gpu", "--lengths -1024", "--lengths: expected a whole number of at least 1"),
        ("attention_gpu", "--smoke --lengths 100", "--lengths: expected multiples of 32, got 100"),
        ("attention_gpu", "--jobs 0", "--jobs: expected a whole number of at least 1, got '0'"),
        ("decode_gpu", "--layers 0", "--layers: expected a whole number of at least 1, got '0'"),
        ("decode_gpu", "--limit nan", "--limit: expected seconds, a number above 0, got 'nan'"),
        ("moe_gpu", "--tokens 1 0", "--tokens: expected a whole number of at least 1, got '0'"),
        ("moe_gpu", "--output a.png", "--output: expected a file that ends in .json, got 'a.png'"),
        (
            "moe_gpu",
            "--tokens 1 --output /dev/null/a.json",
            "--output: expected a file that can be",
        ),
        ("moe_gpu", "--redraw --output no.json", "--redraw: expected results in --output, got no"),
        ("serving", "--redraw --smoke", "--redraw: expected results in --output, got None"),
        ("serving", "--repeats 0", "--repeats: expected a whole number of at least 1, got '0'"),
        (
            "serving",
            "--sides transformers --cases mixed batch --output a.json",
            "--sides: expected swaa_jax for batch, got transformers alone",
        ),
        (
            "serving",
            "--sides swaa_jax transformers --cases batch reuse --output a.json",
            "--sides: expected swaa_jax alone for batch reuse, got transformers, too",
        ),
        (
            "serving",
            "--sides transformers --cases mixed --slots 8",
            "--slots: expected --sides with swaa_jax, got transformers; it is not used there",
        ),
        ("serving", "--cases reuse --requests 9", "--requests: expected --cases with clients, got"),
        ("serving", "--cases clients --slots 9", "--slots: expected --cases with mixed or million"),
        ("serving", "--redraw --cases mixed", "--redraw: expected --output alone beside it, got"),
        ("decode_gpu", "--cases rings --layers 8", "--layers: expected --cases with model_full_"),
        ("decode_gpu", "--cases rings new_8 --sides swaa_jax", "got rings new_8; it is not used"),
        (
            "decode_gpu",
            "--cases model_full_128k --backends xla",
            "--backends: expected --cases with full_128k or new_8 or rings",
        ),
        (
            "moe_gpu",
            "--cases products --layers 8",
            "--layers: expected --cases with model_32k, got",
        ),
        (
            "moe_gpu",
            "--cases products --sides swaa_jax",
            "--sides: expected --cases with model_32k",
        ),
        (
            "moe_gpu",
            "--cases model_32k --tokens 1",
            "--tokens: expected --cases with products, got",
        ),
        ("moe_gpu", "--cases model_32k --kernels xla", "--kernels: expected --cases with products"),
        ("moe_gpu", "--smoke --cases model_32k --products down", "--products: expected --cases"),
        ("attention_gpu", "--passes forward", "--output: expected a file for a run with --passes"),
        (
            "decode_gpu",
            "--cases rings --backends xla",
            "for a run with --backends --cases, got none",
        ),
        ("moe_gpu", "--layers 6", "--output: expected a file for a run with --layers, got none"),
        ("train_step", "--rows one", "--output: expected a file for a run with --rows, got none"),
        (
            "serving",
            "--chunk-size 64",
            "--output: expected a file for a run with --chunk-size, got",
        ),
        ("train_step", "--steps 0", "--steps: expected a whole number of at least 1, got '0'"),
        ("train_step", "--sinks -1", "--sinks: expected a whole number of at least 0, got '-1'"),
        (
            "train_step",
            "--tokens 100 --output a.json",
            "--tokens: expected a multiple of 32, got 100",
        ),
    ],
)
def test_wrong_arguments_are_named(load, capsys, name, given, told):
    with pytest.raises(SystemExit) as ended:
        load(name).parse_arguments(given.split())
    assert ended.value.code == 2 and told in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, given, kept",
    [
        ("attention_gpu", "--lengths 1024 --sides xla", {"lengths": [1024], "sides": ["xla"]}),
        ("moe_gpu", "--tokens 9", {"tokens": [9]}),
        ("serving", "--slots 32 --requests 5", {"slots": 32, "requests": 5}),
        ("train_step", "--tokens 64 --sides torch_flex", {"tokens": 64, "sides": ["torch_flex"]}),
    ],
)
def test_a_smoke_run_takes_what_is_given(load, name, given, kept):
    """And is tiny in all else; it keeps nothing."""
    found = vars(load(name).parse_arguments(["--smoke", *given.split()]))
    plain = vars(load(name).parse_arguments(["--smoke"]))
    assert found == plain | kept != plain and found["output"] is None


@pytest.mark.parametrize(
    "name, given",
    [
        ("attention_gpu", "--sides xla pallas_gpu pallas_triton cudnn flex mgpu --limit 9"),
        ("decode_gpu", "--sides swaa_jax transformers --jobs 2"),
        ("moe_gpu", "--tokens 1 8 16 32 64 32768"),
        ("train_step", "--limit 99"),
        ("serving", "--slots 32"),
    ],
)
def test_the_kept_file_is_a_whole_runs(load, name, given, tmp_path, monkeypatch):
    """Also one of more than the default."""
    monkeypatch.setattr(load("gpu_arguments"), "RESULTS", tmp_path)
    assert load(name).parse_arguments(given.split()).output == tmp_path / f"{name}.json"


def test_a_runs_own_process_takes_its_arguments(load):
    part = ["--tokens=64", "--window=8", "--sinks=1", "--steps=3", "--side=swaa_jax", "--rows=one"]
    assert load("train_step").parse_arguments(part).tokens == 64
    some = ["--cases", "mixed", "batch", "--repeats", "3", "--one", "batch", "swaa_jax"]
    assert load("serving").parse_arguments(some).one == ["batch", "swaa_jax"]
