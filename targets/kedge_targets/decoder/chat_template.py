"""Renders messages to a prompt with the model's own chat template, which is untrusted: it runs in jinja2's sandbox,
with limits on its output and its running time. Variables, filters and tags are those that templates of the field are
written for (transformers, ``chat_template_utils.py``)."""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kedge_protocol.errors import BundleError, InputError, MissingDependencyError
from kedge_protocol.packages import AGENT, pip_install

Message = Mapping[str, Any]

MAX_TEMPLATE_BYTES = 1 << 18
_MAX_STEPS = 200_000
_MAX_CHARACTERS = 8 << 20
_SECONDS = 5.0
_REMEDY = "Correct the template beside the model and compile it again"


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: the template's Jinja source.
        special: the template's variables for special tokens (``bos_token``, …).

    Raises:
        MissingDependencyError: the ``text`` extra is not installed.
        BundleError: the template is too large or not Jinja.
    """

    def __init__(self, source: str, special: Mapping[str, str]) -> None:
        try:
            from jinja2 import TemplateError
        except ImportError as error:
            raise MissingDependencyError(
                f"jinja2 cannot be loaded: {error}", remedy=f"Install it with {pip_install('text', of=AGENT)}"
            ) from error
        if len(source.encode()) > MAX_TEMPLATE_BYTES:
            raise BundleError(f"the chat template is larger than {MAX_TEMPLATE_BYTES} bytes", remedy=_REMEDY)
        self._bound = _Bound()
        try:
            self._template = _environment(self._bound).from_string(source)
        except TemplateError as error:
            raise BundleError(f"the chat template is no Jinja: {error}", remedy=_REMEDY) from error
        self._special = dict(special)
        self._takes_tools = "tools" in _variables(source)
        # OpenAI's newer name for it; few templates know it, and others would write it down as it is.
        self._roles = {} if "developer" in source else {"developer": "system"}

    def render(
        self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] | None = None, prompt: bool = True
    ) -> str:
        """Render messages to the prompt for the next message.

        Args:
            messages: mappings with ``role`` and ``content``, a text or parts with a ``text`` each. ``developer`` is
                ``system`` to a template that does not know it.
            tools: descriptions of functions in the template's form.
            prompt: whether the next message is the model's; False renders the messages alone.

        Raises:
            InputError: a message has no role, the template refuses it or takes no tools, or it exceeds its limits.
        """
        check(messages)
        if tools and not self._takes_tools:
            raise InputError("the model's chat template takes no tools", where="tools", remedy="Leave them out")
        variables = {
            **self._special,
            "messages": [
                {**one, "role": self._roles.get(one["role"], one["role"]), "content": _content(one.get("content"), at)}
                for at, one in enumerate(messages)
            ],
            "tools": list(tools) if tools else None,
            "documents": None,
            "add_generation_prompt": prompt,
        }
        self._bound.begin()
        written: list[str] = []
        size = 0
        try:
            for piece in self._template.generate(**variables):
                size += len(piece)
                self._bound.check(size)
                written.append(piece)
        except InputError:
            raise
        except Exception as error:  # a template may raise whatever its expressions do
            reason = str(error) or type(error).__name__
            raise InputError(f"the chat template refuses these messages: {reason[:300]}", where="messages") from error
        return "".join(written)


class _Bound:
    """The limits of a running template: steps, characters and time."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        self._steps = 0
        self._until = time.monotonic() + _SECONDS

    def check(self, size: int = 0) -> None:
        self._steps += 1
        if self._steps > _MAX_STEPS or size > _MAX_CHARACTERS or time.monotonic() > self._until:
            raise InputError("the chat template does not end", where="messages", remedy=_REMEDY)

    def check_operands(self, operator: str, left: Any, right: Any) -> None:
        sizes = [len(one) for one in (left, right) if isinstance(one, (str, list, tuple))]
        numbers = [abs(one) for one in (left, right) if isinstance(one, (int, float))]
        if operator == "+":
            self.check(sum(sizes))
        elif sizes and numbers:
            self.check(int(min(max(sizes) * max(numbers), 1 << 62)))
        elif operator == "**" and len(numbers) == 2:
            self.check(int(min(max(numbers), 1 << 62)) << 10)

    def joined(self, parts: list[Any]) -> str:
        texts = [str(part) for part in parts]
        self.check(sum(map(len, texts)))
        return "".join(texts)

    def counted(self, items: Any) -> Iterator[Any]:
        for item in items:
            self.check()
            yield item


def check(messages: Any) -> None:
    """Raise :class:`InputError` if the value is not a list of messages."""
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)) or not messages:
        raise InputError("there is no message", where="messages", remedy="Give [{'role': 'user', 'content': '…'}]")
    for at, one in enumerate(messages):
        if not isinstance(one, Mapping) or not isinstance(one.get("role"), str):
            raise InputError("has no role", where=f"messages[{at}]", remedy="Give 'role' and 'content'")


def _content(value: Any, at: int) -> str:
    """Return a message's text: a template would write a list of parts down as Python does."""
    if value is None or isinstance(value, str):
        return value or ""
    texts = [part.get("text") for part in value if isinstance(part, Mapping)] if isinstance(value, list) else [None]
    if any(not isinstance(text, str) for text in texts) or len(texts) != len(value):
        raise InputError("is neither a text nor parts of text", where=f"messages[{at}].content")
    return "".join(str(text) for text in texts)


def _environment(bound: _Bound) -> Any:
    from jinja2 import nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.visitor import NodeTransformer

    class Bounded(NodeTransformer):
        """Adds checks of the limits to every loop and every concatenation of texts."""

        def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 -- jinja2 finds it by this name
            self.generic_visit(node)
            node.iter = nodes.Filter(node.iter, "_counted", [], [], None, None, lineno=node.lineno)
            return node

        def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
            self.generic_visit(node)
            parts = nodes.List(node.nodes, lineno=node.lineno)
            return nodes.Filter(parts, "_joined", [], [], None, None, lineno=node.lineno)

    class Environment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"*", "**", "+"})

        def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
            tree: nodes.Template = Bounded().visit(super()._parse(source, name, filename))
            return tree

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            bound.check_operands(operator, left, right)
            return super().call_binop(context, operator, left, right)

        def call(self, context: Any, function: Any, *arguments: Any, **named: Any) -> Any:
            bound.check()
            return super().call(context, function, *arguments, **named)

    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _generation_tag()])

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def as_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment.filters |= {"tojson": as_json, "_counted": bound.counted, "_joined": bound.joined}
    environment.globals |= {"raise_exception": refuse, "strftime_now": _strftime_now}
    return environment


def _variables(source: str) -> set[str]:
    """Return the variables that a template is given, without running it."""
    from jinja2 import meta

    found: set[str] = meta.find_undeclared_variables(_environment(_Bound()).parse(source))
    return found


def _generation_tag() -> Any:
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        """``{% generation %}`` marks what the model wrote, for training; here it changes nothing."""

        tags = {"generation"}  # noqa: RUF012 -- as jinja2 declares it

        def parse(self, parser: Any) -> list[nodes.Node]:
            next(parser.stream)
            body: list[nodes.Node] = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return body

    return Generation


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().astimezone().strftime(form)
