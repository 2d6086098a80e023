"""Kind 8: prompts that end within a thought; what follows is no answer until the thought ends."""

import logging

import jax
import jax.numpy as jnp
import pytest

from swaa_jax.chats import THOUGHT_MARKERS, ChatError, render_chat
from swaa_jax.checkpoint.tokenizer import opens_thinking
from swaa_jax.data import DataConfig, prepare_samples
from swaa_jax.distill import DistillConfig, distill
from swaa_jax.eval.judging import Judged, make_judge, strip_thinking
from swaa_jax.eval.judging.language_model import read_verdict
from swaa_jax.eval.run.asking import LocalAsking
from swaa_jax.eval.run.config import EvalConfig
from swaa_jax.eval.tasks import Sample, encode_sample, make_task
from swaa_jax.infer import generate, stream
from tests.support import byte_tokenizer
from tests.support.random_models import random_model
from tests.support.standin import StandIn

pytest.importorskip("transformers")

_TURNS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\nGENERATION{% endif %}"
)
LONG_START = "<think>\nOkay, let me think about this one step at a time, and with care."
ALWAYS = _TURNS.replace("GENERATION", LONG_START)
"""As always-thinking models' templates: `enable_thinking` is not there."""
NEVER = _TURNS.replace("GENERATION", "")

CHAT = ({"role": "user", "content": "Q"},)
SAMPLE = Sample(
    id="1",
    messages=({"role": "user", "content": "What does <think> mean?"},),
    references=("here",),
    question="What?",
    answer_prefix=" It is",
)


@pytest.mark.parametrize(("template", "opens"), [(ALWAYS, True), (NEVER, False)])
def test_fault_08_the_whole_generation_prompt_is_looked_at(template, opens):
    tok = byte_tokenizer.build(template=template)
    text = tok.apply_chat_template(
        [dict(m) for m in SAMPLE.messages], tokenize=False, add_generation_prompt=True
    )
    ids = tok(text, add_special_tokens=False)["input_ids"]
    assert opens_thinking(tok, ids) == opens
    assert opens_thinking(tok, text) == opens


def test_fault_08_an_answers_prefix_does_not_land_in_a_thought():
    always, never = (byte_tokenizer.build(template=one) for one in (ALWAYS, NEVER))
    assert always.decode(encode_sample(SAMPLE, always, thinking=False)).endswith(LONG_START)
    assert never.decode(encode_sample(SAMPLE, never, thinking=False)).endswith("\n It is")


@pytest.mark.parametrize("variant", ["niah_single_1", "vt", "cwe"])
def test_fault_08_rulers_prefix_does_not_land_in_a_thought(variant):
    task = make_task("ruler", variant=variant, length=3000, num_samples=1)
    for template, ends in ((ALWAYS, True), (NEVER, False)):
        tok = byte_tokenizer.build(template=template)
        (sample,) = task.samples(tok, thinking=False)
        ids = encode_sample(sample, tok, thinking=False)
        assert tok.decode(ids).endswith(LONG_START) == ends
        assert bool(sample.answer_prefix) != ends
        assert 2970 <= len(ids) <= 3000


def asking_with(template, *, thinking):
    config = EvalConfig.from_dict(
        {
            "models": ["somewhere"],
            "policies": ["full"],
            "tasks": [{"task": "ruler", "variant": "vt", "length": 1500, "num_samples": 2}],
            "output_dir": "nowhere",
        }
    )
    return LocalAsking(
        config=config,
        entry=config.settings[0].models[0],
        model=StandIn(byte_tokenizer.VOCAB_SIZE, max_position_embeddings=6000),
        tokenizer=byte_tokenizer.build(template=template),
        identity={},
        task=config.tasks[0],
        thinking=thinking,
    )


@pytest.mark.parametrize("template", [ALWAYS, NEVER], ids=["always", "never"])
def test_fault_08_non_thinking_use_of_a_model_that_always_thinks(template, caplog):
    """It is warned of, and what stands in the thought is no answer."""
    with caplog.at_level(logging.WARNING):
        asking = asking_with(template, thinking=False)
    always = template is ALWAYS
    assert asking._opened == [always] * 2
    assert ("opens a thought" in caplog.text) == always


SWITCHED = _TURNS.replace("GENERATION", "{% if enable_thinking %}Think.{% endif %}")


@pytest.mark.parametrize(
    ("template", "told"),
    [(ALWAYS, ""), (SWITCHED, ""), (NEVER, "got one without it"), (None, "without a template")],
)
def test_fault_08_thinking_that_nothing_asks_for_is_told(template, told, caplog):
    asking_with(template, thinking=True)
    assert bool(caplog.records) == bool(told)
    if told:
        assert "thinking: expected a chat template with the variable" in caplog.text
        assert told in caplog.text


def test_fault_08_thinking_that_no_template_asks_for_is_told_elsewhere(
    harness, tmp_path, caplog, monkeypatch
):
    told = "enable_thinking: expected a chat template with the variable"
    harness(NEVER, enable_thinking=False)  # the checkpoint's own template has it
    assert told not in caplog.text
    never = byte_tokenizer.build(template=NEVER)
    monkeypatch.setattr("swaa_jax.eval.harness.load_tokenizer", lambda *_, **__: never)
    harness(NEVER, enable_thinking=False)
    assert told in caplog.text
    caplog.clear()
    tok = byte_tokenizer.build(template=None)
    config = DistillConfig(enable_thinking=True, attempts=1, max_new_tokens=2)
    model = random_model(num_hidden_layers=1, vocab_size=byte_tokenizer.VOCAB_SIZE)
    question = [{"prompt": "a", "answer": "b"}]
    distill(model, tok, question, make_judge("exact"), tmp_path / "out", config=config)
    assert told in caplog.text


class Scripted(StandIn):
    """Answers with given tokens, whatever it is asked."""

    def __init__(self, prompt_length, script, *, vocab_size=byte_tokenizer.VOCAB_SIZE):
        super().__init__(vocab_size)
        self.prompt_length, self.script = prompt_length, tuple(script)

    def _logits(self, tokens_BS, end_B):
        script = jnp.asarray(self.script)
        at = jnp.clip(end_B - self.prompt_length, 0, len(self.script) - 1)
        return jax.nn.one_hot(script[at], self.config.vocab_size)


THOUGHT = "a\n\nb</think>\n\nIt is c.\n\nAnd more."


def scripted(tok, prompt, answer):
    ids = tok(answer, add_special_tokens=False)["input_ids"]
    return Scripted(len(prompt), [*ids, byte_tokenizer.EOS_ID])


@pytest.mark.parametrize(
    ("opened", "answer", "stop", "want"),
    [
        (True, THOUGHT, "\n\n", "a\n\nb</think>\n\nIt is c."),
        (True, THOUGHT, ".", "a\n\nb</think>\n\nIt is c"),
        (False, "<think>" + THOUGHT, "c", "<think>a\n\nb</think>\n\nIt is "),
        (False, "one c<think>c</think>", "c", "one "),
        (False, "x<think>c</think>yc", "c", "x<think>c</think>y"),
        (True, "c</think", "c", "c</think"),
    ],
)
def test_fault_08_stops_apply_to_the_answer(opened, answer, stop, want):
    tok = byte_tokenizer.build(template=ALWAYS if opened else NEVER)
    chat = [{"role": "user", "content": "Q"}]
    prompt = tok.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    model = scripted(tok, prompt, answer)
    options = {"stop": stop, "max_new_tokens": 90}
    assert generate(model, tok, [chat], stop_in_thought=False, **options).texts == (want,)
    plain = generate(model, tok, [chat], **options).texts[0]  # as before, wherever it stands
    assert plain == answer.partition(stop)[0]


def magistral():
    """As Magistral's: the markers are special tokens, and the prompt opens a thought."""
    from tokenizers import AddedToken

    tok = byte_tokenizer.build(template=_TURNS.replace("GENERATION", "[THINK]"))
    markers = [AddedToken(name, special=True) for name in ("[THINK]", "[/THINK]")]
    tok.add_tokens(markers, special_tokens=True)
    return tok


@pytest.mark.parametrize("markers", THOUGHT_MARKERS, ids=str)
def test_every_marker_is_read_alike(markers):
    opening, closing = markers
    tok = byte_tokenizer.build(template=_TURNS.replace("GENERATION", f"{opening}\n"))
    assert encode_sample(SAMPLE, tok, thinking=False) == encode_sample(SAMPLE, tok, thinking=True)
    ids = tok(f"Q{opening}a{closing}", add_special_tokens=False)["input_ids"]
    assert opens_thinking(tok, ids[:-1]) and not opens_thinking(tok, ids)
    assert strip_thinking(f"a{closing}\n\nb", thinking=True).text == "b"
    assert strip_thinking(f"{opening}a{closing}b").text == "b"
    assert not strip_thinking(f"{opening}ab").finished
    assert make_judge("exact")(judged(f"{opening}no{closing}yes")).accepted
    assert not make_judge("includes")(judged(f"{opening}yes{closing}no")).accepted
    assert read_verdict(f"{opening}INCORRECT?{closing}CORRECT") is True


def judged(response):
    return Judged(question="Q", references=("yes",), response=response)


@pytest.mark.parametrize("stop", ["c", "[/THINK]"])
def test_markers_that_are_special_tokens_stay_in_the_text(stop):
    tok, chat = magistral(), list(CHAT)
    prompt = tok.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert opens_thinking(tok, prompt)
    answer = "c a[/THINK]\n\nIt is c."
    script = tok(answer + "<|eos|>", add_special_tokens=False)["input_ids"]
    model = Scripted(len(prompt), script, vocab_size=len(tok))
    options = {"max_new_tokens": 60}
    whole = generate(model, tok, [chat], **options)
    assert whole.texts == (answer,)
    assert "".join(stream(model, tok, chat, **options)) == answer
    assert strip_thinking(whole.texts[0], thinking=True).text == "It is c."
    cut = generate(model, tok, [chat], stop=stop, stop_in_thought=False, **options).texts[0]
    assert cut == ("c a[/THINK]\n\nIt is " if stop == "c" else answer)
    assert generate(model, tok, [chat], stop=stop, **options).texts[0] == answer.partition(stop)[0]


@pytest.mark.parametrize(
    "content", ["[THINK]Hm[/THINK]Yo", "\n[THINK] Hm[/THINK]Yo", "Hm[/THINK]Yo"]
)
def test_verbatim_answers_open_no_thought_twice(content):
    tok = magistral()
    record = {"messages": [*CHAT, {"role": "assistant", "content": content}]}
    config = DataConfig(seq_len=64, batch_size=1, answers="verbatim")
    (sample,) = prepare_samples(config, tok, records=[record])
    assert tok.decode(sample.tokens).count("[THINK]") == 1
    trained = tok.decode(sample.tokens[sample.is_target])
    assert trained.lstrip() == "Hm[/THINK]Yo<|im_end|>"


def test_a_thought_that_the_template_leaves_out_is_told():
    """In the content of an answer, `[THINK]` is found as `<think>` is."""
    left_out = _TURNS.replace("{{ m.content }}", "{{ m.content.split('[/THINK]')[-1] }}")
    tok = byte_tokenizer.build(template=left_out)
    answer = {"role": "assistant", "content": "[THINK]Hm[/THINK]Yo"}
    with pytest.raises(ChatError, match=r"message 1: .*the answer's thought, '\[THINK\]Hm'"):
        render_chat(tok, [*CHAT, answer], generation_prompt=False)


@pytest.fixture
def harness(tmp_path):
    pytest.importorskip("lm_eval")
    from swaa_jax.eval.harness import SwaaLM
    from tests.support import random_models

    path = random_models.save_random_model(tmp_path / "model", num_hidden_layers=1)

    def build(template, **options):
        lm = SwaaLM(path, dtype="float32", policy="full", **options)
        lm.tokenizer = byte_tokenizer.build(template=template)
        return lm

    return build


def request(kind, *arguments):
    from lm_eval.api.instance import Instance

    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


@pytest.mark.filterwarnings("ignore")
def test_fault_08_the_harness_stops_and_answers_behind_the_thought(harness, caplog):
    lm = harness(ALWAYS)
    chat = lm.apply_chat_template([{"role": "user", "content": "Q"}])
    asked = request("generate_until", chat, {"until": ["\n\n", "."], "max_gen_toks": 80})
    prompt = lm.tok_encode(chat)
    lm.model = scripted(lm.tokenizer, prompt, "a.\n\nb</think>\n\nIt is c.\n\nAnd more.")
    assert lm.generate_until([asked], True) == ["It is c"]
    lm.model = scripted(lm.tokenizer, prompt, "a.\n\nb")
    with caplog.at_level(logging.WARNING):
        assert lm.generate_until([asked], True) == [""]
    assert "1 of 1" in caplog.text and "a thought that ends within" in caplog.text
    hybrid = harness(NEVER)  # the model itself begins the thought
    chat = hybrid.apply_chat_template([{"role": "user", "content": "Q"}])
    asked = request("generate_until", chat, {"until": ["\n\n", "."], "max_gen_toks": 80})
    hybrid.model = scripted(
        hybrid.tokenizer, hybrid.tok_encode(chat), "<think>\n\na.</think>\n\nIt is c.\n\nAnd more."
    )
    assert hybrid.generate_until([asked], True) == ["It is c"]


@pytest.mark.filterwarnings("ignore")
def test_fault_08_the_harness_scores_nothing_within_a_thought(harness):
    chat = [{"role": "user", "content": "Q"}]
    lm = harness(ALWAYS)
    with pytest.raises(ValueError, match=r"request 1: expected a context that .* enable_thinking"):
        lm.loglikelihood(
            [
                request("loglikelihood", one, " A")
                for one in ("Is <think> a word?</think>", lm.apply_chat_template(chat))
            ],
            disable_tqdm=True,
        )
    other = harness(NEVER)
    found = other.loglikelihood(
        [request("loglikelihood", other.apply_chat_template(chat), " A")], disable_tqdm=True
    )
    assert len(found) == 1
