from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdstream.uri import NbdUri, UriError, is_nbd_uri


@pytest.mark.parametrize(
    ("text", "uri"),
    [
        ("nbd://example.com/disk", NbdUri(host="example.com", export="disk")),
        ("nbd://example.com//disk", NbdUri(host="example.com", export="/disk")),
        ("nbd://example.com/hello%20world", NbdUri(host="example.com", export="hello world")),
        ("nbd://example.com/", NbdUri(host="example.com")),
        ("nbd://example.com", NbdUri(host="example.com")),
        ("NBD://Example.COM:1234/Disk", NbdUri(host="example.com", port=1234, export="Disk")),
        ("nbd://", NbdUri()),
        ("nbd:///disk", NbdUri(export="disk")),
        ("nbd://:10810/", NbdUri(port=10810)),
        ("nbd://127.0.0.1:10809", NbdUri(host="127.0.0.1")),
        ("nbd://[::1]:7/x", NbdUri(host="::1", port=7, export="x")),
        ("nbd://[FE80:0:0::1%25eth0]/", NbdUri(host="fe80::1%eth0")),
        ("nbd://h/a+b", NbdUri(host="h", export="a+b")),
        ("nbd://h/gr%C3%B6%C3%9Fe", NbdUri(host="h", export="größe")),
        ("nbd+unix:///?socket=/run/s", NbdUri(socket="/run/s")),
        ("nbd+unix:///disk?socket=nbd.sock", NbdUri(socket="nbd.sock", export="disk")),
        ("nbd+unix:///?socket=%00/abstract", NbdUri(socket="\0/abstract")),
        ("nbd+unix:///?socket=/a%26b%3Dc", NbdUri(socket="/a&b=c")),
        ("nbd+unix:///?socket=/%FF", NbdUri(socket=os.fsdecode(b"/\xff"))),
        ("nbds://h/x", NbdUri(tls=True, host="h", export="x")),
        ("nbds://alice@h/x", NbdUri(tls=True, host="h", export="x", username="alice")),
        ("nbds+unix://alice@/x?socket=s", NbdUri(tls=True, socket="s", export="x", username="alice")),
        (
            "nbds://h/?tls-type=x509&tls-hostname=other&tls-verify-peer=0&tls-certificates=/pki",
            NbdUri(
                tls=True,
                host="h",
                tls_type="x509",
                tls_hostname="other",
                tls_verify_peer=False,
                tls_certificates="/pki",
            ),
        ),
        (
            "nbds://h/?tls-type=psk&tls-psk-file=/k&tls-verify-peer=1",
            NbdUri(tls=True, host="h", tls_type="psk", tls_psk_file="/k"),
        ),
    ],
)
def test_uris_are_read_as_uri_md_says(text: str, uri: NbdUri) -> None:
    assert NbdUri.parse(text) == uri


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "must look like"),
        ("disk.img", "must look like"),
        ("nbd:unix:/run/s:exportname=x", "must look like"),
        ("http://h/x", "the scheme must be one of"),
        ("nbd+vsock://2/", "the scheme must be one of"),
        ("nbd+ssh://-oProxyCommand=touch%20x/", "the scheme must be one of"),
        ("nbd://h/a b", "percent-encoded"),
        ("nbd://h/a\nb", "percent-encoded"),
        ("nbd://h/a%2", "two hexadecimal digits"),
        ("nbd://h/a#b", "%23"),
        ("nbd://h/%00", "cannot hold a NUL"),
        ("nbd://h/%FF", "not UTF-8"),
        ("nbd://h/" + "x" * 4097, "longer than 4096 bytes"),
        ("nbd://h:0/", "between 1 and 65535"),
        ("nbd://h:65536/", "between 1 and 65535"),
        ("nbd://h:12345678901234567890/", "between 1 and 65535"),
        ("nbd://h:http/", "the host is not understood"),
        ("nbd://::1/", "the host is not understood"),
        ("nbd://[::1/", "the host is not understood"),
        ("nbd://[nothing]/", "not an IPv6 address"),
        ("nbd+unix:///x", "needs ?socket=PATH"),
        ("nbd+unix:///x?socket=", "path is empty"),
        ("nbd+unix:///x?socket=%00", "path is empty"),
        ("nbd+unix:///x?socket=/a%00b", "NUL"),
        ("nbd+unix://run/nbd.sock?socket=/x", "has no host"),
        ("nbd://h/?socket=/x", "needs the scheme nbd+unix"),
        ("nbd+unix:///?socket=/a&socket=/b", "given twice"),
        ("nbd://h/?timeout=3", "'timeout' is not known"),
        ("nbds://h/?tls-verify-peer=yes", "must be 0 or 1"),
        ("nbds://h/?tls-type=ssl", "must be anon or x509 or psk"),
        ("nbds://h/?tls-hostname=", "is empty"),
        ("nbds://h/?tls-psk-file=%00", "NUL"),
        ("nbd://h/?tls-type=psk", "need the scheme nbds"),
        ("nbd://alice@h/", "need the scheme nbds"),
    ],
)
def test_what_is_no_nbd_uri_is_refused_in_one_line(text: str, why: str) -> None:
    with pytest.raises(UriError) as caught:
        NbdUri.parse(text)
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_password_is_refused_and_not_repeated() -> None:
    with pytest.raises(UriError, match="no password") as caught:
        NbdUri.parse("nbds://alice:secret@h/")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "text"),
    [
        (NbdUri(), "nbd://localhost/"),
        (NbdUri(host="h", port=1, export="/a b"), "nbd://h:1//a%20b"),
        (NbdUri(host="fe80::1%eth0"), "nbd://[fe80::1%25eth0]/"),
        (NbdUri(socket="/run/a b", export="x"), "nbd+unix:///x?socket=/run/a%20b"),
        (NbdUri(socket="\0a"), "nbd+unix:///?socket=%00a"),
        (NbdUri(tls=True, host="h", username="a@b"), "nbds://a%40b@h/"),
    ],
)
def test_uris_are_written_in_their_shortest_form(uri: NbdUri, text: str) -> None:
    assert str(uri) == text


_NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=40)
_URIS = st.builds(
    NbdUri,
    tls=st.just(True),
    host=st.sampled_from(["localhost", "h.example", "10.0.0.1", "::1", "fe80::1%eth0"]),
    port=st.integers(1, 65535),
    export=_NAMES,
    username=st.none() | _NAMES.filter(lambda name: ":" not in name),
    tls_type=st.sampled_from([None, "anon", "x509", "psk"]),
    tls_verify_peer=st.booleans(),
    tls_psk_file=st.none() | _NAMES.filter(bool),
) | st.builds(NbdUri, socket=_NAMES.filter(bool), export=_NAMES)


@given(_URIS)
def test_what_is_written_reads_back_the_same(uri: NbdUri) -> None:
    assert NbdUri.parse(str(uri)) == uri


@given(st.text(max_size=60) | st.text("nbd+unixs:/?@[]%&=#0a", max_size=60).map(lambda text: "nbd" + text))
def test_any_text_is_a_uri_or_a_clear_error(text: str) -> None:
    try:
        uri = NbdUri.parse(text)
    except UriError:
        return
    assert NbdUri.parse(str(uri)) == uri


def test_the_canonical_form_holds_no_credentials() -> None:
    text = "nbds://alice@h/x?tls-type=psk&tls-psk-file=/keys&tls-verify-peer=0&tls-certificates=/pki&tls-hostname=real"
    assert str(NbdUri.parse(text).canonical()) == "nbds://h/x?tls-hostname=real"


def test_the_canonical_form_has_an_absolute_socket_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/usr")
    assert str(NbdUri.parse("nbd+unix:///?socket=../run/s").canonical()) == "nbd+unix:///?socket=/run/s"
    assert NbdUri.parse("nbd+unix:///?socket=%00s").canonical().socket == "\0s"


def test_what_may_be_shown_still_says_how_to_connect() -> None:
    text = "nbds://alice@h/x?tls-type=psk&tls-psk-file=/keys"
    assert str(NbdUri.parse(text).without_credentials()) == "nbds://h/x?tls-type=psk"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("nbd://Host/x", "nbd://host:10809/x"),
        ("nbd:///x", "nbd://localhost/x"),
        ("nbd://[::0:1]/", "nbd://[::1]"),
        ("nbd+unix:///?socket=/run//a/../s", "nbd+unix:///?socket=/run/s"),
        ("nbds://alice@h/", "nbds://h/?tls-verify-peer=0"),
        ("nbds://h/?tls-hostname=h", "nbds://h/"),
    ],
)
def test_one_source_has_many_spellings(one: str, other: str) -> None:
    assert NbdUri.parse(one).same_source(NbdUri.parse(other))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("nbd://h/x", "nbd://h/X"),
        ("nbd://h/x", "nbd://h//x"),
        ("nbd://h/x", "nbd://h:1/x"),
        ("nbd://h/x", "nbds://h/x"),
        ("nbd+unix:///?socket=/a", "nbd+unix:///?socket=/b"),
    ],
)
def test_other_exports_are_other_sources(one: str, other: str) -> None:
    assert not NbdUri.parse(one).same_source(NbdUri.parse(other))


def test_uris_are_told_from_paths() -> None:
    assert all(map(is_nbd_uri, ["nbd://h", "NBDS://h", "nbd+unix:///?socket=s", "nbd+vsock://2", "nbd:localhost:1"]))
    assert not any(map(is_nbd_uri, ["disk.img", "./nbd://h", "/nbd:", "nbd", "nbdkit.img", "http://h"]))
