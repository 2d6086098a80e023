"""The sweep: shared prefills change nothing, scores are what the answers say."""

import dataclasses

import pytest

import swaa_jax as swaa
from swaa_jax import infer
from swaa_jax.checkpoint._paths import SHIPPED
from swaa_jax.eval import sweep
from swaa_jax.eval.run import answering
from swaa_jax.eval.tasks.ruler import niah_multiquery
from swaa_jax.policy import AttentionPolicy
from tests.support.random_models import random_model

POLICIES = [
    AttentionPolicy(),
    AttentionPolicy(window=16),
    AttentionPolicy(window=16, decode="full"),
    AttentionPolicy(window=16, num_sink_tokens=3, full_attention_layers="1::2"),
    AttentionPolicy(window=16, decode=(0,)),
    AttentionPolicy(window=16, num_sink_tokens=3, full_attention_layers="1::2", decode="full"),
]


@pytest.fixture(scope="module")
def tok():
    return swaa.load_tokenizer(SHIPPED["tiny-retriever"])


@pytest.fixture(scope="module")
def model():
    return random_model(
        vocab_size=2304,
        num_hidden_layers=2,
        max_position_embeddings=512,
        initializer_range=0.3,
    )


def samples_of(tok, *, thinking, count=4):
    return niah_multiquery(
        tok,
        num_samples=count,
        target_length=300,
        seed=1,
        haystack="needle",
        enable_thinking=thinking,
    )


@pytest.mark.parametrize("thinking", [pytest.param(True, marks=pytest.mark.slow), False])
def test_shared_prefill_gives_the_tokens_of_separate_runs(tok, model, thinking):
    samples = samples_of(tok, thinking=thinking)
    fractions = []
    scores = sweep.score_policies(
        model,
        tok,
        samples,
        POLICIES,
        thinking=thinking,
        max_new_tokens=12,
        batch_size=2,  # two batches
        progress=lambda what, fraction: fractions.append(fraction),
    )
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    assert [score.policy for score in scores] == POLICIES
    texts = set()
    for score in scores:
        alone = infer.generate(
            model.with_policy(score.policy),
            tok,
            [list(sample.prompt_ids) for sample in samples],
            max_new_tokens=12,
            batch_size=2,
        )
        assert [answer.text for answer in score.answers] == list(alone.texts)
        assert [answer.num_tokens for answer in score.answers] == [len(t) for t in alone.tokens]
        assert [answer.finish_reason for answer in score.answers] == list(alone.finish_reasons)
        assert score.timings.cache_bytes_per_row == alone.timings.cache_bytes_per_row
        texts.update(alone.texts)
    assert len(texts) > len(samples), "the policies answer alike, so this shows nothing"


def test_policies_that_differ_in_decode_share_one_prefill(tok, model, monkeypatch):
    reads = []

    def counted(model, prompts, **options):
        reads.append(model.policy)
        return infer.prefill_prompts(model, prompts, **options)

    monkeypatch.setattr(answering, "prefill_prompts", counted)
    monkeypatch.setattr(answering, "compile_counts", dict)  # nothing is run a second time
    samples = samples_of(tok, thinking=True, count=1)
    scores = sweep.score_policies(model, tok, samples, POLICIES, thinking=True, max_new_tokens=3)
    assert [str(policy) for policy in reads] == [
        "full attention",
        "window 16, FA decode",
        "window 16 + 3 sinks, full layers 1::2, FA decode",
    ]
    by_policy = {score.policy: score.timings for score in scores}
    window, fa_decode, partly = (by_policy[POLICIES[i]] for i in (1, 2, 4))
    assert window.prefill_s == fa_decode.prefill_s == partly.prefill_s > 0
    full = by_policy[POLICIES[0]].cache_bytes_per_row
    assert window.cache_bytes_per_row < partly.cache_bytes_per_row < full
    assert fa_decode.cache_bytes_per_row == full
    for timings in by_policy.values():
        assert timings.decode_steps == 2
        assert timings.time_per_output_token_s > 0
        assert timings.prompt_tokens == samples[0].num_tokens


def test_even_batches_share_their_programs(tok, model):
    before = infer.compile_counts()
    sweep.score_policies(
        model,
        tok,
        samples_of(tok, thinking=True, count=4),
        [AttentionPolicy(window=24)],
        thinking=True,
        max_new_tokens=4,
        batch_size=3,  # 2 and 2 prompts, not 3 and 1
    )
    compiled = {name: count - before[name] for name, count in infer.compile_counts().items()}
    assert compiled["prefill"] == compiled["decode"] == 1


def generation(texts):
    timings = infer.Timings(
        num_rows=len(texts),
        prompt_tokens=100,
        new_tokens=10,
        prefill_s=0.5,
        first_token_s=0.0,
        decode_s=1.0,
        decode_steps=10,
        compile_s=0.0,
        cache_bytes=64,
        cache_bytes_per_row=32,
    )
    return infer.Generation(
        texts=tuple(texts),
        tokens=tuple((1, 2) for _ in texts),
        finish_reasons=("eos",) * len(texts),
        timings=timings,
    )


def test_scores_of_known_answers(tok):
    samples = samples_of(tok, thinking=False, count=4)
    right = [", ".join(sample.answers) + "." for sample in samples]
    half = " and ".join(samples[1].answers[:2])
    parts = [generation([right[0], half]), generation(["no idea", right[0]])]
    score = sweep._score(AttentionPolicy(), samples, parts, thinking=False)
    assert [answer.values_found for answer in score.answers] == [1.0, 0.5, 0.0, 0.0]
    assert score.values_found == 0.375
    assert score.all_or_nothing == 0.25
    assert score.unfinished == 0.0
    assert score.timings.prefill_tokens_per_second == 200
    assert score.timings.time_per_output_token_s == 0.1
    assert score.timings.cache_bytes_per_row == 32


def test_only_what_follows_the_thinking_counts(tok):
    samples = samples_of(tok, thinking=True, count=3)
    listed = [", ".join(sample.answers) for sample in samples]
    texts = [
        f"{listed[0]}</think>\n\nThey are {listed[0]}.",
        f"{listed[1]}</think>\n\nNo idea.",
        f"{listed[2]}, {listed[2]}, ",
    ]
    score = sweep._score(AttentionPolicy(), samples, [generation(texts)], thinking=True)
    assert [answer.values_found for answer in score.answers] == [1.0, 0.0, 0.0]
    assert [answer.finished for answer in score.answers] == [True, True, False]
    assert score.unfinished == pytest.approx(1 / 3)


def test_a_model_that_opens_its_thinking_itself_may_leave_it_out(tok):
    sample = samples_of(tok, thinking=False, count=1)[0]
    sample = dataclasses.replace(sample, prompt="no thinking was opened")
    text = ", ".join(sample.answers)
    score = sweep._score(AttentionPolicy(), [sample], [generation([text])], thinking=True)
    assert score.values_found == 1.0


def test_shipped_lists_resolve_on_the_shipped_model():
    demo = sweep.load_policies("demo")
    assert demo[0].is_full
    assert len({policy.resolve(8) for policy in demo}) == len(demo)
    assert set(sweep.load_policies("quick")) <= set(demo)
    changed = sweep.load_policies("demo", window=32, num_sink_tokens=7)
    assert {policy.window for policy in changed} == {None, 32}
    assert {policy.num_sink_tokens for policy in changed} == {0, 7}


@pytest.mark.parametrize(
    "text, message",
    [
        ("[1, 2]", "expected a mapping"),
        ("policies: []", "at least one policy"),
        ("policies: [3]", "policy 1: expected a mapping"),
        ("policies: [{window: null}, {windw: 3}]", "policy 2: .*window"),
        ("policies: [{window: 3}, {window: 4}]", "is twice"),
        ("policies: [{window: 3}", "YAML"),
    ],
)
def test_malformed_lists_are_named(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        sweep.load_policies(path, window=8)
    assert str(path) in str(error.value)


def test_wrong_sweeps_are_refused_before_any_work(tok, model):
    same = [AttentionPolicy(window=8, full_attention_layers=layers) for layers in ("1::2", (1,))]
    with pytest.raises(ValueError, match="are the same for a model of 2 layers"):
        sweep.run_sweep(model, tok, same, sweep.SweepSettings(length=300))
    with pytest.raises(ValueError, match="policies: expected at least one"):
        sweep.run_sweep(model, tok, [], sweep.SweepSettings(length=300))
    with pytest.raises(ValueError, match="context of 512 tokens; ask for at most 384"):
        sweep.run_sweep(model, tok, POLICIES, sweep.SweepSettings(length=500))
    with pytest.raises(ValueError, match="question and 4 needles alone take"):
        sweep.run_sweep(model, tok, POLICIES, sweep.SweepSettings(length=50))
    with pytest.raises(ValueError, match="batch_size"):
        sweep.SweepSettings(batch_size=0)
