"""Lets nodes that change the case of texts name a locale that every device has."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kedge_targets.graph import nodes

if TYPE_CHECKING:
    import onnx

EVERYWHERE = "C.UTF-8"
"""Part of glibc (Debian, Ubuntu, Fedora) without a language pack; letters have the case that Unicode gives them, as
in English."""
_ENGLISH = ("", "en_US", "en_US.UTF-8", "en_US.utf8", "en_GB.UTF-8", "C.utf8")


def name_one_that_is_everywhere(model: onnx.ModelProto) -> None:
    """Name :data:`EVERYWHERE` in place of an English locale, in place: ONNX Runtime refuses a file whose locale is not
    installed, and ``en_US.UTF-8``, which is the operator's default, is not on a small system. Other languages stay, as
    case differs in some (Turkish)."""
    for graph in nodes.graphs(model.graph):
        for node in graph.node:
            if node.op_type != "StringNormalizer":
                continue
            named = next((one for one in node.attribute if one.name == "locale"), None)
            if named is None:
                named = node.attribute.add(name="locale", type=_STRING)
            if named.s.decode("utf-8", "replace") in _ENGLISH:
                named.s = EVERYWHERE.encode()


_STRING = 3
"""``AttributeProto.STRING``."""
