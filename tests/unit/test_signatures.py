"""Signed documents, and the keys that a device trusts."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from kedge_protocol import codec, signatures
from kedge_protocol.errors import ConfigError, MessageError
from kedge_protocol.signatures import Envelope, parse_key, public_of, sign
from kedge_protocol.trust import (
    RELEASE_TYPE,
    ROTATION_TYPE,
    ReleaseStatement,
    Role,
    Rotation,
    SignedBundle,
    Trust,
    release_problem,
)

pytestmark = pytest.mark.device
RELEASE, CONTROLLER, OTHER, NEW = (Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32) for n in (1, 2, 3, 4))
ONE, TWO = "sha256:" + "1" * 64, "sha256:" + "2" * 64
TRUST = Trust(release=(str(public_of(RELEASE)),), controller=(str(public_of(CONTROLLER)),))


def statement(key: Ed25519PrivateKey = RELEASE, kind: str = RELEASE_TYPE, **changed: Any) -> Envelope:
    bundles = (SignedBundle(target="rpi4", digest=ONE), SignedBundle(target="rpi5", digest=TWO))
    content = replace(ReleaseStatement(name="digits", version="1.0", bundles=bundles), **changed)
    return sign(kind, codec.encode(content), key)


def rotation(number: int, role: Role, *keys: Ed25519PrivateKey, by: Ed25519PrivateKey = RELEASE) -> Envelope:
    content = Rotation(number=number, role=role, keys=tuple(str(public_of(key)) for key in keys))
    return sign(ROTATION_TYPE, codec.encode(content), by)


def test_the_encoding_that_is_signed_is_that_of_the_specification() -> None:
    # The example of DSSE's protocol.md.
    assert signatures.pre_authentication_encoding("http://example.com/HelloWorld", b"hello world") == (
        b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    )


@given(st.binary(max_size=200), st.text(max_size=30))
def test_an_envelope_holds_the_bytes_and_only_its_signer_is_found(content: bytes, kind: str) -> None:
    raw = codec.encode(sign(kind.encode("utf-8", "replace").decode(), content, RELEASE))
    envelope = signatures.parse_envelope(raw, where="test")
    assert envelope.content(where="test") == content
    keys = [public_of(OTHER), public_of(RELEASE)]
    assert envelope.signers(keys, where="test") == (public_of(RELEASE),)


@given(st.data())
def test_a_changed_byte_of_payload_type_or_signature_is_never_accepted(data: st.DataObject) -> None:
    document = json.loads(codec.encode(sign("kind", b"what is signed", RELEASE)))
    part = data.draw(st.sampled_from(["payload", "payloadType", "sig"]))
    text = document["signatures"][0]["sig"] if part == "sig" else document[part]
    at = data.draw(st.integers(0, len(text) - 1))
    text = text[:at] + data.draw(st.sampled_from("AZaz09+/=-")) + text[at + 1 :]
    before = document["signatures"][0]["sig"] if part == "sig" else document[part]
    if part == "sig":
        document["signatures"][0]["sig"] = text
    else:
        document[part] = text
    envelope = codec.structure(document, Envelope, where="test")
    try:
        found = envelope.signers([public_of(RELEASE)], where="test")
        same = text == before or (part != "payloadType" and _bits(text) == _bits(before))
        assert bool(found) == same
    except MessageError:
        assert text != before


def _bits(text: str) -> bytes:
    import base64

    return base64.b64decode(text)


def test_a_signature_under_anothers_key_id_does_not_count() -> None:
    envelope = sign("kind", b"x", OTHER)
    forged = replace(envelope, signatures=(replace(envelope.signatures[0], keyid=public_of(RELEASE).id),))
    assert forged.signers([public_of(RELEASE), public_of(OTHER)], where="test") == ()


@pytest.mark.parametrize("text", ["", "ed25519:", "ed25519:AAAA", "rsa:" + "A" * 44, str(public_of(NEW))[:-2]])
def test_what_is_no_key_is_refused_with_a_remedy(text: str) -> None:
    with pytest.raises(ConfigError, match="kedge keys show"):
        parse_key(text, where="trust.json")
    assert str(parse_key(str(public_of(NEW)), where="test")) == str(public_of(NEW))


@pytest.mark.parametrize(
    ("envelopes", "said"),
    [
        ([statement()], None),
        ([statement(OTHER), statement()], None),
        ([], "not signed"),
        ([statement(OTHER)], "no key that this device trusts"),
        ([statement(CONTROLLER)], "no key that this device trusts"),
        ([statement(kind=ROTATION_TYPE)], "not signed"),
        ([statement(name="faces")], "a bundle of faces"),
        ([statement(bundles=(SignedBundle(target="rpi5", digest=ONE),))], "a bundle for rpi5, this device is rpi4"),
        ([statement(bundles=(SignedBundle(target="rpi4", digest=TWO),))], "not signed"),
    ],
)
def test_a_bundle_needs_a_signed_release_of_its_model_and_target(envelopes: list[Envelope], said: str | None) -> None:
    found = release_problem("digits", ONE, "rpi4", envelopes, TRUST)
    assert found is None if said is None else found is not None and said in found


def test_rotations_are_followed_in_their_order_and_once() -> None:
    chain = [
        rotation(1, Role.CONTROLLER, NEW),
        rotation(2, Role.RELEASE, OTHER),
        rotation(3, Role.CONTROLLER, CONTROLLER, NEW, by=OTHER),
    ]
    after = TRUST.followed(chain[:2])
    assert (after.controller, after.release, after.rotation) == (
        (str(public_of(NEW)),),
        (str(public_of(OTHER)),),
        2,
    )
    assert after.followed(chain) == TRUST.followed(chain)
    assert after.followed(chain).rotation == 3


@pytest.mark.parametrize(
    ("envelope", "said"),
    [
        (rotation(1, Role.CONTROLLER, NEW, by=CONTROLLER), "not signed by a trusted release key"),
        (rotation(1, Role.RELEASE, NEW, by=NEW), "not signed by a trusted release key"),
        (rotation(2, Role.CONTROLLER, NEW), "rotation 1 is missing"),
        (rotation(1, Role.CONTROLLER), "no controller key is trusted"),
        (statement(), "key rotation"),
    ],
)
def test_a_rotation_that_is_not_the_next_by_a_release_key_is_refused(envelope: Envelope, said: str) -> None:
    with pytest.raises(MessageError, match=said):
        TRUST.followed([envelope])


def test_a_key_that_was_rotated_out_signs_nothing_any_more() -> None:
    after = TRUST.followed([rotation(1, Role.RELEASE, NEW)])
    assert release_problem("digits", ONE, "rpi4", [statement()], after) is not None
    with pytest.raises(MessageError, match="not signed"):
        after.followed([rotation(2, Role.RELEASE, RELEASE)])
