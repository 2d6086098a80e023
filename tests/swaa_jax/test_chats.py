"""Kinds 4, 5, 11 and 26: a chat's messages are all rendered, once, safely and alike every day.

The oracle is `apply_chat_template` of Transformers, on chats in the form that it knows.
"""

import datetime
import functools
import json
import time

import pytest

from swaa_jax.chats import (
    ChatError,
    normal_messages,
    process,
    render_chat,
    rendering,
    unused_variables,
)
from swaa_jax.infer.prompts import encode_prompts
from tests.support import byte_tokenizer, chat_templates

USER, REPLY = {"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "Yo"}
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
TOLD = {"name": "get_weather", "arguments": {"city": "Köln", "days": 2}}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "id": "abcdefghi", "function": TOLD}],
}
RESULT = {"role": "tool", "content": "20 C", "tool_call_id": "abcdefghi"}


def build(name):
    return byte_tokenizer.build(template=chat_templates.FAMILIES.get(name, name))


def transformers_text(tok, messages, tools=None, **variables):
    return tok.apply_chat_template(
        messages, tools=tools, tokenize=False, add_generation_prompt=True, **variables
    )


@pytest.mark.parametrize("name", [*chat_templates.FAMILIES, byte_tokenizer.TEMPLATE])
@pytest.mark.parametrize("messages", [[USER], [USER, REPLY, USER], [USER, CALL, RESULT]])
def test_fault_04_rendering_is_that_of_transformers(name, messages):
    tok = build(name)
    knows_tools = name in ("qwen2.5", "llama3", "mistral")
    if messages[-1] is RESULT and not knows_tools:
        with pytest.raises(ChatError, match=r"message|tools|got an error"):
            render_chat(tok, messages, tools=[TOOL])
        return
    tools = [TOOL] if messages[-1] is RESULT else None
    date = {"date_string": "26 Jul 2024"} if name == "llama3" else {}
    expected = transformers_text(tok, messages, tools, **date)
    assert render_chat(tok, messages, tools=tools).text == expected
    assert render_chat(tok, [USER, REPLY], continued=True).text == tok.apply_chat_template(
        [USER, REPLY], tokenize=False, continue_final_message=True, **date
    )


@pytest.mark.parametrize("name", chat_templates.FAMILIES)
def test_fault_04_parts_of_text_are_joined(name):
    tok = build(name)
    parts = [{"type": "text", "text": "Hi "}, {"type": "text", "text": "there", "image": None}]
    (ids,) = encode_prompts(tok, [{"role": "user", "content": parts}])
    assert ids == encode_prompts(tok, [USER])[0]
    with pytest.raises(ValueError, match=r"prompt 0, message 0, content: expected text, or parts"):
        encode_prompts(tok, [{"role": "user", "content": [{"type": "image", "url": "x"}]}])


@pytest.mark.parametrize(
    ("given", "normal"),
    [
        ([{"role": "User", "content": "Hi there"}], [USER]),
        ([{"from": "human", "value": "Hi there"}, {"from": "gpt", "value": "Yo"}], [USER, REPLY]),
        ([{"role": "Model ", "content": "Yo"}], [REPLY]),
        ([{"role": "assistant", "content": None, "function_call": TOLD}], [CALL]),
        ([{"from": "function_call", "value": '{"name": "f", "arguments": {}}'}], None),
        ([{"from": "observation", "value": "20 C"}], [{"role": "tool", "content": "20 C"}]),
        ([{"role": "tool", "content": {"t": 20}}], [{"role": "tool", "content": '{"t": 20}'}]),
    ],
)
def test_fault_04_other_forms_of_messages(given, normal):
    found = normal_messages(given)
    if normal is None:
        call = {"type": "function", "function": {"name": "f", "arguments": {}}}
        assert found == ({"role": "assistant", "content": "", "tool_calls": [call]},)
        return
    without_ids = [dict(one) for one in normal]
    for one in without_ids:
        if "tool_calls" in one:
            one["tool_calls"] = [{"type": "function", "function": TOLD}]
    assert list(found) == without_ids
    assert normal_messages(found) == found


def test_fault_04_arguments_that_a_template_drops_are_told():
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name }}(%s){% endfor %}\n{% endfor %}"
    )
    kept = "{% for key, value in c.function.arguments.items() %}{{ key }}={{ value }} {% endfor %}"
    chat = [USER, CALL, {"role": "tool", "content": "20 C"}, USER]
    assert "days=2" in render_chat(build(template.replace("%s", kept)), chat).text
    for lossy in ("", "{{ c.function.arguments.city }}"):
        with pytest.raises(ChatError, match=r"message 1, tool_calls\[0\], .*the call's argument"):
            render_chat(build(template.replace("%s", lossy)), chat)


def test_fault_04_a_message_that_says_nothing_is_refused():
    for message in ({"role": "user", "text": "Hi"}, {"from": "human", "text": "Hi"}):
        with pytest.raises(ChatError, match="message 0: expected content, tool_calls or reason"):
            normal_messages([message])


@pytest.mark.parametrize(
    "more",
    [{"value": "Ho"}, {"reasoning_content": "a", "thinking": "b"}],
    ids=str,
)
def test_fault_04_what_is_said_twice_is_refused(more):
    with pytest.raises(ChatError, match=r"message 0: expected one of \w+ and \w+, got"):
        normal_messages([{"role": "assistant", "content": "Hi", **more}])


def test_fault_04_thinking_is_asked_for_once():
    given = {"enable_thinking": True, "chat_template_kwargs": {"enable_thinking": False}}
    with pytest.raises(ValueError, match="enable_thinking: expected what chat_template_kwargs"):
        encode_prompts(build("qwen3"), [USER], **given)


def test_fault_04_a_developer_is_the_system_where_the_template_knows_none():
    told = [{"role": "developer", "content": "Be brief."}, USER]
    for name in ("phi3", "llama3", "qwen3"):
        tok = build(name)
        assert encode_prompts(tok, [told]) == encode_prompts(
            tok, [[{"role": "system", "content": "Be brief."}, USER]]
        )
    knows = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.role == 'developer' %}!"
    text = render_chat(build(knows + "{% endif %}{% endfor %}"), told).text
    assert text == "developer: Be brief.!user: Hi there"


@pytest.mark.parametrize(
    ("name", "messages", "tools", "message"),
    [
        ("phi3", [USER, REPLY, {"role": "critic", "content": "Hm"}, USER], None, "message 2: "),
        ("phi3", [USER, CALL, RESULT], None, r"message 1, tool_calls\[0\]: .*the call"),
        ("phi3", [USER], [TOOL], r"tools\[0\]: .*a tool"),
        ("qwen2.5", [USER, {"role": "critic", "content": "Hi there"}], None, "message 1: "),
        ("deepseek", [{"role": "system", "content": "A"}] * 2 + [USER], None, "message 0: "),
        (
            "mistral",
            [{"role": "system", "content": "S"}, USER, REPLY, USER, CALL, RESULT],
            None,
            "message 0: ",
        ),
        ("llama3", [USER, {**REPLY, "reasoning_content": "Hm"}, USER], None, "message 1, reason"),
    ],
)
def test_fault_04_what_a_template_leaves_out_is_refused(name, messages, tools, message):
    with pytest.raises(ValueError, match=f"prompt [01][:,] {message}"):
        encode_prompts(build(name), [messages if tools else [USER], messages], tools=tools)


def test_fault_04_old_thoughts_may_be_left_out_by_templates_that_know_them():
    tok = build("qwen3-thinking")
    thought = {**REPLY, "reasoning_content": "Hm"}
    assert render_chat(tok, [USER, thought, USER]).text == transformers_text(
        tok, [USER, REPLY, USER]
    )
    last = render_chat(tok, [USER, thought], generation_prompt=False).text
    assert "<think>\nHm\n</think>\n\nYo" in last
    in_text = {**REPLY, "content": "<think>\nHm\n</think>\n\nYo"}
    assert render_chat(tok, [USER, in_text], generation_prompt=False).text == last
    with pytest.raises(ChatError, match=r"message 1: .*the answer's thought"):
        render_chat(build("deepseek"), [USER, in_text], generation_prompt=False)


@pytest.mark.parametrize("name", ["qwen2.5", "llama3", "mistral", "deepseek"])
def test_fault_05_arguments_as_text_are_encoded_once(name):
    tok = build(name)
    as_text = {"name": "get_weather", "arguments": '{"city": "Köln", "days": 2}'}
    call = {**CALL, "tool_calls": [{**CALL["tool_calls"][0], "function": as_text}]}
    text = render_chat(tok, [USER, call, RESULT]).text
    assert '{"city": "Köln", "days": 2}' in text and '\\"' not in text
    assert text == render_chat(tok, [USER, CALL, RESULT]).text
    form = call if name == "deepseek" else CALL
    date = {"date_string": "26 Jul 2024"} if name == "llama3" else {}
    assert text == transformers_text(tok, [USER, form, RESULT], **date)
    broken = {"name": "get_weather", "arguments": '{"city": '}
    with pytest.raises(ValueError, match=r"tool_calls\[0\], arguments: expected a JSON object"):
        encode_prompts(tok, [USER, {**CALL, "tool_calls": [{"function": broken}]}, RESULT])


@pytest.mark.parametrize("name", ["qwen2.5", "llama3", "mistral", "deepseek"])
def test_fault_05_parameters_are_arguments_and_nothing_of_a_call_is_dropped(name):
    tok = build(name)
    expected = render_chat(tok, [USER, CALL, RESULT]).text
    as_llama = {"name": "get_weather", "parameters": TOLD["arguments"]}
    for call in (as_llama, {"function": as_llama}):
        call = {**CALL, "tool_calls": [{"id": "abcdefghi", **call}]}
        assert render_chat(tok, [USER, call, RESULT]).text == expected
    for more in ({"args": {"city": "Köln"}}, {"parameters": {}}, {"extra_content": "signed"}):
        for call in ({**TOLD, **more}, {"function": {**TOLD, **more}}):
            with pytest.raises(ChatError, match=r"message 1, tool_calls\[0\]: expected a call of"):
                render_chat(tok, [USER, {**CALL, "tool_calls": [call]}, RESULT])


@pytest.mark.parametrize("result", [{"temp": 20}, [{"a": 1}, {"b": 2}], 20, {"Ort": "Köln"}])
def test_fault_05_results_that_are_no_text_are_encoded_once(result):
    messages = [USER, CALL, {**RESULT, "content": result}, REPLY]
    tok = build("llama3")  # whose template writes JSON itself
    expected = transformers_text(tok, messages, date_string="26 Jul 2024")
    assert render_chat(tok, messages).text == render_chat(tok, normal_messages(messages)).text
    assert render_chat(tok, messages).text == expected
    as_text = [*messages[:2], {**RESULT, "content": json.dumps(result, ensure_ascii=False)}, REPLY]
    for name in ("qwen2.5", "mistral", "deepseek"):
        tok = build(name)
        assert render_chat(tok, messages).text == render_chat(tok, as_text).text


@pytest.mark.parametrize(
    ("key", "message"), [("think", REPLY), ("tools", {"role": "system", "content": "Be brief."})]
)
def test_fault_04_keys_are_more_than_letters_of_the_template(caplog, key, message):
    tok = build(chat_templates.QWEN25 + "{# <think> #}")
    render_chat(tok, [{**message, key: [TOOL]}, USER])
    (said,) = [one.getMessage() for one in caplog.records]
    assert f"the chat template knows no '{key}'" in said
    reads = "{% for m in messages %}{{ m.content }}{{ m['think'] }}{{ m.tools }}{% endfor %}"
    caplog.clear()
    render_chat(build(reads), [{**message, key: [TOOL]}, USER])
    assert not caplog.records


def test_fault_04_variables_are_more_than_letters_of_the_template():
    tok = build("qwen3")
    assert unused_variables(tok, {"thinking": False, "enable_thinking": False}) == ["thinking"]


def test_fault_11_the_date_is_pinned():
    tok = build("llama3")
    (ids,) = encode_prompts(tok, [USER])
    assert "Today Date: 26 Jul 2024" in tok.decode(ids)
    for date in ("2026-11-27", datetime.date(2026, 11, 27)):
        (ids,) = encode_prompts(tok, [USER], chat_template_kwargs={"strftime_now": date})
        assert "Today Date: 27 Nov 2026" in tok.decode(ids)
    with pytest.raises(ValueError, match="strftime_now: expected a date"):
        encode_prompts(tok, [USER], chat_template_kwargs={"strftime_now": "today"})


_RUN = "{% for m in messages %}{{ m.content }}{% endfor %}"
BOMBS = {
    "range": "{% for i in range(10**9) %}x{% endfor %}",
    "ranges": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "times": "{{ 'x' * 10**9 }}",
    "times of a variable": "{{ messages[0].content * 10**10 }}",
    "list": "{{ ([1] * 10**10) | length }}",
    "center": "{{ 'x' | center(10**10) }}",
    "format": "{{ '%10000000000d' % 1 }}",
    "doubling": "{% set ns = namespace(s='xx') %}{% for i in range(60) %}"
    "{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "output": "{{ 'x' * 10**8 }}",
    "recursion": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "branches": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(60) }}",
    "include": "{% include 'x' %}",
    "import": "{% import 'x' as x %}",
    "extends": "{% extends 'x' %}",
    "internals": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "division": "{{ 1 // 0 }}",
    "nesting": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "syntax": "{% for %}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_fault_26_hostile_templates_end_in_one_paragraph(name, monkeypatch):
    monkeypatch.setattr("swaa_jax.chats.process.TEMPLATE_SECONDS", 1.0)
    tok = byte_tokenizer.build(template=BOMBS[name] + _RUN)
    start = time.monotonic()
    with pytest.raises(
        ValueError, match=r"prompt 0: .*chat template takes, got an error \("
    ) as raised:
        encode_prompts(tok, [USER])
    assert len(str(raised.value)) <= 500 and "\n" not in str(raised.value)
    assert time.monotonic() - start < 20  # seconds; without the limit it takes for ever
    assert render_chat(build("qwen3"), [USER]).text  # the next one is served


def test_fault_26_long_chats_are_rendered():
    messages = [{"role": "user", "content": "long " * 400_000}] * 3
    assert len(render_chat(build("phi3"), messages).text) > 6_000_000


def test_fault_04_keys_that_the_template_does_not_know_are_named_once(caplog):
    marked = {**USER, "annotator_of_this_test": "me"}
    for _ in range(2):
        render_chat(build("phi3"), [marked])
    (said,) = [one.getMessage() for one in caplog.records]
    assert "the chat template knows no 'annotator_of_this_test'" in said


def test_fault_04_a_name_that_the_template_leaves_out_is_told(caplog):
    rendering._warn_of_key.cache_clear()
    render_chat(build("phi3"), [{**USER, "name": "Ann"}])
    (said,) = [one.getMessage() for one in caplog.records]
    assert "the chat template knows no 'name'" in said
    reads = "{% for m in messages %}{{ m.name }}{{ m.content }}{% endfor %}"
    assert render_chat(build(reads), [{**USER, "name": "Ann"}]).unread == ()


def test_fault_26_the_check_is_linear_in_the_messages():
    messages = [USER, REPLY] * 3_000
    start = time.monotonic()
    assert render_chat(build("phi3"), messages).text.count("Yo") == 3_000
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    ("role", "near"), [("usr", "user"), ("asistant", "assistant"), ("Sytem", "system")]
)
def test_fault_04_a_role_that_is_nearly_one_is_refused(role, near):
    with pytest.raises(ChatError, match=rf"message 1, role: expected .*did you mean '{near}'"):
        normal_messages([USER, {"role": role, "content": "x"}])
    for own in ("critic", "ipython", "moderator"):  # a template may have roles of its own
        assert normal_messages([{"role": own, "content": "x"}])[0]["role"] == own


def test_fault_26_many_chats_of_a_template_that_hangs_fail_together(monkeypatch):
    asked = []
    monkeypatch.setattr(process, "_SLOW", {})
    monkeypatch.setattr(process._WORKER, "ask", lambda *_, **__: asked.append(1))
    render = functools.partial(process.render_apart, "loops", variables={}, date="2024-07-26")
    for text in ("abc", "abc", "a longer one", "a"):
        (reply,) = render([{"text": text}])
        assert "it takes more than 2 seconds" in reply["error"]
    assert len(asked) == 2  # the first, and the shorter one
    monkeypatch.setattr(process, "_REMEMBERED", -1.0)
    render([{"text": "abc"}])
    assert len(asked) == 3
