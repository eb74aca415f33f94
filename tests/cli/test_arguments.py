"""Arguments: what is accepted, and one clear line for what is not."""

from __future__ import annotations

import argparse

import pytest

from nbdstream.cli import _parser, arguments


@pytest.mark.parametrize(
    ("text", "bytes_"), [("0", 0), ("512", 512), ("64k", 65536), ("1M", 1 << 20), ("2G", 2 << 30), ("1T", 1 << 40)]
)
def test_sizes_are_bytes_or_have_a_unit(text: str, bytes_: int) -> None:
    assert arguments.size(text) == bytes_


@pytest.mark.parametrize("text", ["", "k", "-1", "1X", "one", "0x10"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        arguments.size(text)


def test_numbers_must_be_in_their_range() -> None:
    parse = arguments.count(1, 64)
    assert [parse("1"), parse("64")] == [1, 64]
    for text in ("0", "65", "-1", "x", "", "1.5", "٣"):
        with pytest.raises(argparse.ArgumentTypeError, match="from 1 to 64"):
            parse(text)


def test_formats_are_a_list() -> None:
    assert arguments.formats("qed,qed,raw") == ["qed", "qed", "raw"]
    for text in ("", "qcow2", "qed,", "qed, raw"):
        with pytest.raises(argparse.ArgumentTypeError, match="raw or qed"):
            arguments.formats(text)


def test_a_file_mode_is_octal() -> None:
    assert arguments.file_mode("0660") == 0o660
    assert arguments.file_mode("600") == 0o600
    for text in ("", "0888", "-1", "1777", "rw"):
        with pytest.raises(argparse.ArgumentTypeError, match="file mode"):
            arguments.file_mode(text)


@pytest.mark.parametrize(
    "line",
    [
        "serve disk.raw",
        "serve disk.raw -f raw -x name -b 0.0.0.0 -p 10810 -r --shared 5",
        "serve disk.qed -f qed --backing-format qed,raw -U sock --writable --socket-mode 0660 --socket-group kvm",
        "serve disk.raw -k sock",
        "serve disk.raw --socket sock",
        "stream nbd://host o.qed",
        "stream nbd://host o.qed -U sock -c 2 --rate 10M -p",
        "stream nbd://host o.qed --progress json",
        "create o.qed --size 1G --cluster-size 64k --table-size 4",
        "create o.qed --backing nbd://host",
        "info o.qed --json",
        "info disk -f raw",
        "map nbd://host --json",
        "map o.qed -f qed --backing-format raw",
        "check o.qed --json",
        "--debug check o.qed",
    ],
)
def test_a_command_line_is_understood(line: str) -> None:
    options = _parser().parse_args(line.split())
    assert callable(options.run)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "nothing",
        "serve",
        "serve a -r --writable",
        "serve a -p 65536",
        "serve a -f qcow2",
        "stream nbd://host",
        "stream nbd://host o -c 0",
        "stream nbd://host o -p --progress json",
        "stream nbd://host o --progress xml",
        "stream nbd://host o --rat 5",
        "create o",
        "create o --size 1G --backing nbd://host",
        "create o --size lots",
        "check",
        "check a b",
    ],
)
def test_a_wrong_command_line_is_a_usage_error(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        _parser().parse_args(line.split())
    assert ended.value.code == 2
    assert "--help')" in capsys.readouterr().err
