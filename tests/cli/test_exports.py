"""What ``serve`` is to export, from the text of its arguments."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdstream.cli.arguments import UsageError
from nbdstream.cli.exports import ExportSpec, check_ambiguity, complete, split_commas

if TYPE_CHECKING:
    from pathlib import Path

TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
WORD = st.text("abc,.-_ =", min_size=1, max_size=8)
FORMATS = st.sampled_from(["raw", "qed"])
SPECS = st.builds(
    ExportSpec,
    path=TEXT.filter(bool),
    name=TEXT.filter(lambda name: "=" not in name and not name.startswith(("/", "./", "../"))),
    image_format=st.none() | FORMATS,
    writable=st.none() | st.booleans(),
    allow=st.none() | st.frozensets(WORD, min_size=1),
    backing_formats=st.none() | st.lists(FORMATS, min_size=1, max_size=3).map(tuple),
    description=st.none() | TEXT,
)


def spell(spec: ExportSpec) -> str:
    """Write a spec as an argument."""
    parts = [f"{spec.name}={spec.path}"]
    if spec.image_format is not None:
        parts.append(f"format={spec.image_format}")
    if spec.writable is not None:
        parts.append(f"writable={'on' if spec.writable else 'off'}")
    if spec.allow is not None:
        parts.append(f"allow={':'.join(spec.allow)}")
    if spec.backing_formats is not None:
        parts.append(f"backing-format={':'.join(spec.backing_formats)}")
    if spec.description is not None:
        parts.append(f"description={spec.description}")
    return ",".join(part.replace(",", ",,") for part in parts)


@given(SPECS)
def test_what_is_spelled_is_what_is_read(spec: ExportSpec) -> None:
    assert ExportSpec.parse(spell(spec)) == spec


# An empty part, or a comma at the beginning of one, reads otherwise; a part begins with a name or a key.
@given(st.lists(TEXT.filter(lambda part: part and not part.startswith(",")), min_size=1))
def test_doubled_commas_are_single_ones_within_a_part(parts: list[str]) -> None:
    assert split_commas(",".join(part.replace(",", ",,") for part in parts)) == parts


@given(TEXT)
def test_any_text_is_a_spec_or_a_usage_error(text: str) -> None:
    with contextlib.suppress(UsageError):
        assert ExportSpec.parse(text).path


@given(
    TEXT.filter(lambda text: "=" not in text and text), st.sampled_from(["", "/", "./", "../", "/a=b/", "./a=b,c=d/"])
)
def test_a_path_is_taken_as_it_stands(rest: str, begin: str) -> None:
    assert ExportSpec.parse(begin + rest) == ExportSpec(begin + rest)


def test_a_name_and_a_path() -> None:
    assert ExportSpec.parse("disk=/srv/a=b.img") == ExportSpec("/srv/a=b.img", "disk")
    assert ExportSpec.parse("=disk.img") == ExportSpec("disk.img", "")
    assert ExportSpec.parse("vm/disk0=disk,,1.img") == ExportSpec("disk,1.img", "vm/disk0")


def test_everything_that_can_be_said_of_an_export() -> None:
    text = "d=d.qed,format=qed,writable=on,allow=alice:bob,backing-format=qed:raw,description=one,, two=2"
    assert ExportSpec.parse(text) == ExportSpec(
        "d.qed", "d", "qed", True, frozenset({"alice", "bob"}), ("qed", "raw"), "one, two=2"
    )


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "the name of the image is empty"),
        ("a=", "the name of the image is empty"),
        ("disk.img,format=raw", "only NAME=IMAGE takes options: say NAME=disk.img,format=raw"),
        ("a=b,c", "'c' is none of format=, writable=, allow=, backing-format=, description="),
        ("a=b,colour=red", "'colour=red' is none of"),
        ("a=b,", "'' is none of"),
        ("a=b,format", "'format' is none of"),
        ("a=b,format=qcow2", "format=qcow2 is not a format: say raw or qed"),
        ("a=b,backing-format=raw:", "backing-format= is not a format"),
        ("a=b,writable=yes", "writable=yes: say on or off"),
        ("a=b,allow=", "allow= needs names"),
        ("a=b,allow=x::y", "allow= needs names"),
        ("a=b,writable=on,writable=on", "writable= is given twice"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(text: str, why: str) -> None:
    with pytest.raises(UsageError, match=r"^[^\n]+$") as raised:
        ExportSpec.parse(text)
    assert str(raised.value).startswith(f"{text!r}: {why}")


def all_of(
    *texts: str,
    name: str | None = None,
    image_format: str | None = None,
    writable: bool = False,
    backing_formats: tuple[str, ...] = (),
) -> list[ExportSpec]:
    return complete(
        [ExportSpec.parse(text) for text in texts],
        name=name,
        image_format=image_format,
        writable=writable,
        backing_formats=backing_formats,
    )


def test_a_single_image_has_the_empty_name_or_the_one_that_is_given() -> None:
    assert [spec.name for spec in all_of("/srv/disk.img")] == [""]
    assert [spec.name for spec in all_of("/srv/disk.img", name="x")] == ["x"]
    assert [spec.name for spec in all_of("y=/srv/disk.img")] == ["y"]


def test_several_images_have_the_names_of_their_files_or_their_own() -> None:
    assert [spec.name for spec in all_of("/srv/a.img", "y=/srv/b.img", "c.img")] == ["a.img", "y", "c.img"]


@pytest.mark.parametrize("texts", [["a", "b"], ["x=a"]])
def test_export_name_is_for_a_single_plain_image(texts: list[str]) -> None:
    with pytest.raises(UsageError, match="--export-name"):
        all_of(*texts, name="n")


def test_two_exports_of_one_name_are_refused() -> None:
    with pytest.raises(
        UsageError, match=r"^/a/disk and /b/disk would both be the export 'disk': say NAME=IMAGE for one$"
    ):
        all_of("/a/disk", "/b/disk")


def test_what_an_export_says_itself_prevails() -> None:
    first, second, third = all_of(
        "a=a,format=raw,writable=off", "b", "c=c,backing-format=raw", image_format="qed", writable=True,
        backing_formats=("qed", "raw"),
    )  # fmt: skip
    assert (first.image_format, first.writable, first.backing_formats) == ("raw", False, ())
    assert (second.image_format, second.writable, second.backing_formats) == ("qed", True, ("qed", "raw"))
    assert (third.image_format, third.writable, third.backing_formats) == ("qed", True, ("raw",))


def test_a_file_whose_name_reads_as_name_and_image_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b").touch()
    check_ambiguity(["./a=b", "b=a", str(tmp_path / "a=b")])
    with pytest.raises(UsageError, match=r"^a=b exists and would be read as NAME=IMAGE: say \./a=b for the file$"):
        check_ambiguity(["x", "a=b"])
