"""Chat templates are untrusted: they render as they are written, and one that raises, loops or grows is an error."""

from __future__ import annotations

import pytest

from kedge_protocol.errors import BundleError, InputError
from kedge_targets.decoder import chat_template
from kedge_targets.decoder.chat_template import ChatTemplate

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
HELLO = [{"role": "user", "content": "Hello"}]


def test_a_template_of_the_field_renders() -> None:
    rendered = ChatTemplate(CHATML, {"bos_token": "<s>"}).render([{"role": "system", "content": "Be brief."}, *HELLO])
    assert rendered == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )


def test_variables_tools_and_helpers_are_there() -> None:
    source = (
        "{{ bos_token }}{{ tools | tojson }}{{ strftime_now('%Y') | length }}"
        "{% for m in messages %}{% continue %}{% endfor %}"
    )
    assert ChatTemplate(source, {"bos_token": "<s>"}).render(HELLO, tools=[{"name": "é"}]) == '<s>[{"name": "é"}]4'


@pytest.mark.parametrize("source", ["{{ messages[0].content }}", "{% set tools = none %}{{ messages[0].content }}"])
def test_tools_are_refused_where_a_template_would_leave_them_out(source: str) -> None:
    with pytest.raises(InputError, match="takes no tools"):
        ChatTemplate(source, {}).render(HELLO, tools=[{"name": "clock"}])
    asks = "{% if not tools is defined %}{% set tools = none %}{% endif %}{{ tools | tojson }}"
    assert ChatTemplate(asks, {}).render(HELLO, tools=[{"name": "clock"}]) == '[{"name": "clock"}]'


def test_what_templates_of_the_field_rely_on_is_there() -> None:
    source = (
        "{% if tools is not none %}tools{% endif %}{% if documents is not none %}documents{% endif %}"
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
        "{{ {'b': 'é', 'a': 1} | tojson(sort_keys=true, ensure_ascii=true, separators=(',', ':')) }}"
    )
    assert ChatTemplate(source, {}).render(HELLO) == 'Hello{"a":1,"b":"\\u00e9"}'


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[7].content.x }}", "refuses"),
        ("{{ ''.__class__.__mro__ }}{{ messages.__init__.__globals__ }}", "refuses"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "does not end"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "refuses|does not end"),
        ("{{ 'a' * 999999999 }}", "does not end"),
        ("{{ 10 ** 99999999 }}", "does not end"),
        (
            "{% set n = namespace(t='aaaaaaaa') %}"
            "{% for a in range(60) %}{% set n.t = n.t ~ n.t %}{% endfor %}{{ n.t }}",
            "does not end",
        ),
        (
            "{% set n = namespace(t='aaaaaaaa') %}"
            "{% for a in range(60) %}{% set n.t = n.t + n.t %}{% endfor %}{{ n.t }}",
            "does not end",
        ),
    ],
)
def test_a_template_that_raises_loops_or_grows_is_an_error(source: str, reason: str) -> None:
    template = ChatTemplate(source, {})
    for _ in range(2):
        with pytest.raises(InputError, match=reason):
            template.render(HELLO)


def test_what_is_no_template_is_refused_when_it_is_loaded() -> None:
    with pytest.raises(BundleError, match="no Jinja"):
        ChatTemplate("{% for %}", {})
    with pytest.raises(BundleError, match="larger"):
        ChatTemplate("a" * (chat_template.MAX_TEMPLATE_BYTES + 1), {})


@pytest.mark.parametrize("messages", ["hello", [], [{"content": "x"}], ["x"], None, [{"role": 3}]])
def test_what_is_no_list_of_messages_is_an_error(messages: object) -> None:
    with pytest.raises(InputError, match="messages"):
        ChatTemplate(CHATML, {}).render(messages)  # type: ignore[arg-type]


def test_a_developer_is_the_system_to_a_template_that_does_not_know_one() -> None:
    messages = [{"role": "developer", "content": "Be brief."}, *HELLO]
    system = [{"role": "system", "content": "Be brief."}, *HELLO]
    assert ChatTemplate(CHATML, {}).render(messages) == ChatTemplate(CHATML, {}).render(system)
    knows = ChatTemplate("{% for m in messages %}{{ 'D' if m.role == 'developer' else m.role }};{% endfor %}", {})
    assert knows.render(messages) == "D;user;"
