"""`generate` and `stream` over an exact stand-in: whatever differs is a bug."""

import importlib
import json

import numpy as np
import pytest

from swaa_jax.infer import (
    Answerer,
    GenerateOptions,
    Timings,
    compile_counts,
    generate,
    generation_of,
    stream,
)
from swaa_jax.infer.answerer import eos_token_ids
from swaa_jax.models.function import split_model
from tests.support import byte_tokenizer
from tests.support.compiles import counted
from tests.support.standin import StandIn

pytest.importorskip("transformers")

RNG = np.random.default_rng(5)
PROMPTS = [RNG.integers(0, 64, size=n).tolist() for n in (5, 9, 30, 47, 1)]


@pytest.fixture(scope="module")
def model():
    return StandIn()


@pytest.fixture(scope="module")
def tok():
    return byte_tokenizer.build()


@pytest.fixture(scope="module")
def talker():
    """A stand-in whose vocabulary is the tokenizer's."""
    return StandIn(byte_tokenizer.VOCAB_SIZE, seed=1)


def counts_during(call):
    before = compile_counts()
    call()
    after = compile_counts()
    return {
        name: after[name] - before.get(name, 0)
        for name in after
        if after[name] != before.get(name, 0)
    }


def test_greedy_is_a_plain_loop(model):
    out = generate(model, None, PROMPTS, max_new_tokens=40)
    assert [list(tokens) for tokens in out.tokens] == [model.answer(p, 40) for p in PROMPTS]
    assert out.finish_reasons == ("length",) * len(PROMPTS)
    assert out.texts == ("",) * len(PROMPTS)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_neither_batch_nor_order_nor_chunks_change_an_answer(model, temperature):
    options = {"max_new_tokens": 21, "temperature": temperature, "top_p": 0.9, "seed": 3}
    want = generate(model, None, PROMPTS, **options).tokens
    for batch_size in (1, 2):
        assert generate(model, None, PROMPTS, batch_size=batch_size, **options).tokens == want
    for chunk_size in (1, 5):
        assert generate(model, None, PROMPTS, chunk_size=chunk_size, **options).tokens == want


def test_seed_and_row_change_a_draw(model):
    options = {"max_new_tokens": 8, "temperature": 1.5}
    same = generate(model, None, [PROMPTS[0]] * 3, **options).tokens
    assert len(set(same)) == 3, "rows with the same prompt drew the same tokens"
    assert generate(model, None, [PROMPTS[0]] * 3, seed=1, **options).tokens != same


def test_one_room_compiles_once():
    model = StandIn(67)  # a vocabulary of its own: nothing was compiled for it before
    counts = counts_during(
        lambda: [generate(model, None, [[1] * n], max_new_tokens=20) for n in (5, 9, 30, 108)]
    )
    assert counts == {"read": 1, "decode": 1}
    assert not counts_during(lambda: generate(model, None, [[2] * 32], max_new_tokens=31, seed=5))
    assert not counts_during(lambda: list(stream(model, None, [3] * 7, max_new_tokens=9)))
    # Another model of the same shape is other weights in the same program.
    assert not counts_during(lambda: generate(StandIn(67), None, [[4]], max_new_tokens=20))
    # A longer row takes more room; three rows and four are alike.
    assert counts_during(lambda: generate(model, None, [[1] * 109], max_new_tokens=20)) == {
        "read": 1,
        "decode": 1,
    }
    generate(model, None, [[1]] * 4, max_new_tokens=20)
    assert not counts_during(lambda: generate(model, None, [[1]] * 3, max_new_tokens=20))


def test_at_most_four_programs_whatever_is_asked(tok):
    """Prompt lengths, sampling settings, stop strings, streams; one more allocates the caches."""
    model = StandIn(byte_tokenizer.VOCAB_SIZE, seed=8)
    calls = [
        {"max_new_tokens": 20},
        {"max_new_tokens": 3, "temperature": 0.7, "top_k": 5, "top_p": 0.8, "seed": 3},
        {"max_new_tokens": 19, "temperature": 1.5, "min_p": 0.1, "stop": ["a", "bcd"]},
        {"max_new_tokens": 9, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"max_new_tokens": 1, "frequency_penalty": 1.0, "suppress_tokens": [4, 5, 6]},
        {"max_new_tokens": 12, "stop_token_ids": [7, 8, 9], "logprobs": True},
    ]
    with counted() as compiles:
        for length in (1, 2, 31, 32, 33, 64, 77, 100):
            for options in calls:
                generate(model, tok, [[9] * length, [8] * length], **options)
        generate(model, tok, [[9] * 70 + [3], [9] * 70 + [4]], max_new_tokens=2, batch_size=2)
    assert compiles.count <= 4 + 1


def test_temperature_and_top_p_do_not_recompile(model):
    options = {"max_new_tokens": 4, "top_k": 10}
    generate(model, None, [[1]], temperature=0.5, **options)
    assert not counts_during(
        lambda: generate(model, None, [[1]], temperature=2.0, top_p=0.4, **options)
    )


def test_xla_compiles_before_the_timed_calls_only():
    """The timed call finds the program that was compiled ahead: no second compilation."""
    model = StandIn(71)
    lane = importlib.import_module("swaa_jax.engine.lane")
    structure = split_model(model).structure
    programs = (lane._read, lane._decode)
    timings = generate(model, None, [[1, 2]], max_new_tokens=20).timings
    assert timings.compile_s > 10 * (timings.prefill_s + timings.decode_s)
    assert [program.num_compiled(structure) for program in programs] == [1, 1]
    again = generate(model, None, [[1, 2]], max_new_tokens=20).timings
    assert again.compile_s < timings.compile_s / 10


def test_eos_ends_a_row_and_the_others_go_on(model):
    answers = [model.answer(p, 30) for p in PROMPTS]
    eos = answers[0][6]
    out = generate(model, None, PROMPTS, max_new_tokens=30, stop_token_ids=[eos])
    for tokens, reason, answer in zip(out.tokens, out.finish_reasons, answers, strict=True):
        end = answer.index(eos) + 1 if eos in answer else 30
        assert list(tokens) == answer[:end]
        assert reason == ("stop" if eos in answer else "length")
    assert len(out.tokens[0]) <= 7
    assert "length" in out.finish_reasons


def test_a_call_ends_when_all_rows_have(model):
    answer = model.answer(PROMPTS[0], 30)
    out = generate(model, None, [PROMPTS[0]], max_new_tokens=400, stop_token_ids=[answer[6]])
    assert out.timings.decode_steps == answer.index(answer[6]) + 1


def test_a_first_token_that_ends_the_answer(model):
    first = model.answer(PROMPTS[2], 1)
    out = generate(model, None, PROMPTS[2], max_new_tokens=50, stop_token_ids=first)
    assert (list(out.tokens[0]), out.finish_reasons) == (first, ("stop",))
    assert out.timings.decode_steps == 1


def with_generation_config(model, directory, config):
    """The model as if it had been loaded from a directory with this generation config."""
    (directory / "generation_config.json").write_text(json.dumps(config))
    model.source = str(directory)
    return model


def test_where_eos_comes_from(tok, tmp_path):
    model = StandIn(byte_tokenizer.VOCAB_SIZE, eos_token_id=11)
    assert eos_token_ids(model, None) == (11,)
    assert eos_token_ids(model, tok) == (2, 11)
    with_generation_config(model, tmp_path, {"eos_token_id": [7, 9]})
    assert eos_token_ids(model, None) == (7, 9)
    with_generation_config(model, tmp_path, {"eos_token_id": 9})
    assert eos_token_ids(model, tok) == (2, 9)
    with_generation_config(model, tmp_path, {"do_sample": True})
    assert eos_token_ids(model, None) == (11,)
    model.source = None
    assert eos_token_ids(StandIn(), None) == ()


def test_eos_ends_an_answer_unless_ignored(tmp_path):
    answer = StandIn().answer([1], 30)
    model = with_generation_config(StandIn(), tmp_path, {"eos_token_id": [answer[7]]})
    out = generate(model, None, [1], max_new_tokens=30)
    assert list(out.tokens[0]) == answer[: answer.index(answer[7]) + 1]
    assert out.finish_reasons == ("eos",)
    out = generate(model, None, [1], max_new_tokens=30, ignore_eos=True)
    assert (list(out.tokens[0]), out.finish_reasons) == (answer, ("length",))


def test_sampling_from_the_checkpoint(model, tmp_path):
    config = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}
    own = with_generation_config(StandIn(), tmp_path, config)
    options = {"max_new_tokens": 9, "seed": 2}
    got = generate(own, None, PROMPTS[:3], sampling="checkpoint", **options)
    want = generate(model, None, PROMPTS[:3], temperature=0.6, top_k=20, top_p=0.95, **options)
    assert got.tokens == want.tokens
    with pytest.raises(ValueError, match="leave sampling out"):
        generate(own, None, [[1]], sampling="checkpoint", temperature=0.5)
    with pytest.raises(ValueError, match="expected a model with a generation_config"):
        generate(model, None, [[1]], sampling="checkpoint")


def test_stop_strings_cut_texts_but_not_their_neighbours(talker, tok):
    prompts = ["ask", "tell me", "a"]
    whole = generate(talker, tok, prompts, max_new_tokens=60, ignore_eos=True)
    stop = whole.texts[1][10:13]
    out = generate(talker, tok, prompts, max_new_tokens=60, ignore_eos=True, stop=stop)
    for cut, text in zip(out.texts, whole.texts, strict=True):
        assert cut == text.split(stop)[0]
    assert out.finish_reasons[1] == "stop"
    assert out.tokens[1] == whole.tokens[1][: len(out.tokens[1])]


@pytest.mark.parametrize("chunk_size", [1, 4, 32])
def test_a_stream_is_generate_in_pieces(talker, tok, chunk_size):
    for prompt, options in [
        ("ask", {}),
        ("ask", {"temperature": 1.0, "seed": 4}),
        ([{"role": "user", "content": "hi"}], {"enable_thinking": False}),
    ]:
        options = {"max_new_tokens": 50, "chunk_size": chunk_size, **options}
        whole = generate(talker, tok, prompt, **options)
        pieces = stream(talker, tok, prompt, **options)
        assert pieces.generation is None
        assert "".join(pieces) == whole.texts[0]
        assert pieces.generation.tokens == whole.tokens
        assert pieces.generation.texts == whole.texts
        assert pieces.generation.finish_reasons == whole.finish_reasons
        assert pieces.generation.timings.new_tokens == len(whole.tokens[0])


def test_a_stream_comes_in_pieces(talker, tok):
    assert len(list(stream(talker, tok, "ask", max_new_tokens=50, ignore_eos=True))) > 5
    with pytest.raises(ValueError, match="one prompt to stream, got 2"):
        stream(talker, tok, ["a", "b"])


def test_more_prompts_than_slots_keep_their_order_and_their_answers(model):
    prompts = [RNG.integers(0, 64, size=1 + n % 40).tolist() for n in range(30)]
    out = generate(model, None, prompts, max_new_tokens=11, batch_size=4, stop_token_ids=[7])
    for prompt, tokens in zip(prompts, out.tokens, strict=True):
        answer = model.answer(prompt, 11)
        assert list(tokens) == answer[: answer.index(7) + 1 if 7 in answer else 11]


def test_an_answerer_answers_again_and_is_free_for_it(model):
    options = GenerateOptions(max_new_tokens=9, temperature=1.0, batch_size=2)
    answerer = Answerer(model, None, options, lengths=[50])
    whole = generate(model, None, PROMPTS, options=options).tokens
    for prompts in (PROMPTS, PROMPTS[:2]):
        answering = answerer.start(prompts)
        assert list(answering)[-1] == len(prompts) * 9
        assert generation_of(answering).tokens == whole[: len(prompts)]
    left = iter(answerer.start(PROMPTS))
    next(left)
    left.close()  # by somebody who has seen enough
    answering = answerer.start(PROMPTS[3:], numbers=[3, 4])
    assert sum(1 for _ in answering)
    assert generation_of(answering).tokens == whole[3:]


def test_rows_end_at_the_context():
    model = StandIn(max_position_embeddings=100)
    out = generate(model, None, [[1] * 60], max_new_tokens=40)
    assert list(out.tokens[0]) == model.answer([1] * 60, 40)


def test_timings(model):
    out = generate(model, None, PROMPTS, max_new_tokens=20, batch_size=4, warmup=True)
    t = out.timings
    assert (t.num_batches, t.num_rows, t.prompt_tokens) == (5, 5, sum(map(len, PROMPTS)))
    assert t.new_tokens == 100 and 2 * 20 <= t.decode_steps <= 5 * 20
    assert t.prefill_tokens_per_second == t.prompt_tokens / t.prefill_s
    assert t.time_per_output_token_s == t.decode_s / t.decode_steps
    assert t.time_to_first_token_s == t.prefill_s / 5
    assert t.cache_bytes == 4 * 128 * 4  # rows, slots, bytes of the stand-in's int32
    assert t.cache_bytes_per_row == t.cache_bytes // 4
    assert t.to_dict()["time_per_output_token_s"] == t.time_per_output_token_s
    assert "KV cache" in str(t)
    with pytest.raises(ValueError, match="at least one batch"):
        Timings.total([])


def test_progress_goes_to_stderr(model, capsys):
    generate(model, None, PROMPTS, max_new_tokens=4, batch_size=2, progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens: expected an integer of at least 1, got 0"),
        ([[1]], {"seed": -1}, "seed: expected"),
        ([[1]], {"chunk_size": 0}, "chunk_size"),
        ([[1]], {"batch_size": 0}, "batch_size"),
        ([[1]], {"top_p": 2.0}, "top_p"),
        ([[64]], {}, "prompt 0: expected token ids from 0 to 63"),
        ([[1], [2] * 500], {}, r"prompt 1: .* context of 512 .*500 prompt tokens"),
        ([[1], []], {}, "prompt 1: expected at least one token, got an empty prompt"),
        (["text"], {}, "expected a tokenizer for text"),
        ([[1]], {"max_tokens": 5}, "'max_tokens' .*did you mean 'max_new_tokens'"),
    ],
)
def test_mistakes_are_named_before_any_work(model, prompts, options, message):
    before = compile_counts()
    with pytest.raises(ValueError, match=message):
        generate(model, None, prompts, **options)
    assert compile_counts() == before


def test_keywords_are_fields_of_the_options_and_replace_them(model):
    options = GenerateOptions(max_new_tokens=5, temperature=1.5, seed=3)
    drawn = generate(model, None, PROMPTS, options=options)
    by_keywords = generate(model, None, PROMPTS, max_new_tokens=5, temperature=1.5, seed=3)
    assert drawn.tokens == by_keywords.tokens
    replaced = generate(model, None, PROMPTS, options=options, seed=4, max_new_tokens=3)
    assert replaced.tokens == (
        generate(model, None, PROMPTS, max_new_tokens=3, temperature=1.5, seed=4).tokens
    )
    assert [tokens[:3] for tokens in drawn.tokens] != list(replaced.tokens)
    pieces = stream(model, None, PROMPTS[0], options=options)
    list(pieces)
    assert pieces.generation is not None and pieces.generation.tokens[0] == drawn.tokens[0]


def test_numpy_prompts_and_a_single_prompt(model):
    want = generate(model, None, [[1, 2, 3]], max_new_tokens=5).tokens
    assert generate(model, None, [1, 2, 3], max_new_tokens=5).tokens == want
    assert generate(model, None, np.array([1, 2, 3]), max_new_tokens=5).tokens == want
