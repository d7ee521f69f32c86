"""Names with parameters: splitting, reading, setting fields, writing back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbench.errors import UserError
from kvbench.registry import canonical_spec, configured, parse_spec, split_specs


@dataclass(frozen=True)
class Method:
    recent: int = 128
    clip: float | None = 0.8
    axis: Literal["token", "channel"] = "token"
    zero: bool = True
    layers: tuple[int, ...] = ()
    bits: tuple[int, int] = (2, 4)
    note: str = ""
    table: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.recent < 0:
            raise UserError("recent must not be negative")


def test_split_leaves_commas_in_brackets() -> None:
    assert split_specs("a, b[x=1,y=(2,3)] ,c") == ["a", "b[x=1,y=(2,3)]", "c"]


@pytest.mark.parametrize("text", ["", "a,,b", "a,", "a[x=1", "a]x=1[", "a[x=(1]"])
def test_split_refuses(text: str) -> None:
    with pytest.raises(UserError):
        split_specs(text)


def test_parse() -> None:
    assert parse_spec("kivi") == ("kivi", {})
    assert parse_spec("akvq_vl[recent=64, clip=0.7, layers=(0,1)]") == (
        "akvq_vl",
        {"recent": "64", "clip": "0.7", "layers": "(0,1)"},
    )


@pytest.mark.parametrize(
    "text", ["", "[x=1]", "a[x]", "a[x=]", "a[=1]", "a[x=1", "a]", "a[x=1]b", "a[x=1,x=2]"]
)
def test_parse_refuses(text: str) -> None:
    with pytest.raises(UserError):
        parse_spec(text)


def test_fields_are_converted() -> None:
    texts = {
        "recent": "64",
        "clip": "0.7",
        "axis": "channel",
        "zero": "no",
        "layers": "(0,1)",
        "bits": "(4,8)",
        "note": "a b",
    }
    assert configured(Method(), texts) == Method(64, 0.7, "channel", False, (0, 1), (4, 8), "a b")
    assert configured(Method(), {"clip": "none"}).clip is None
    assert configured(Method(layers=(1,)), {"layers": "()"}).layers == ()


@pytest.mark.parametrize(
    ("key", "text", "part"),
    [
        ("recnt", "1", "did you mean recent?"),
        ("rec", "1", "did you mean recent?"),
        ("zzz", "1", "recent, clip, axis"),
        ("recent", "1.5", "a whole number, not '1.5'"),
        ("clip", "nan", "a finite number or none"),
        ("clip", "inf", "a finite number or none"),
        ("axis", "rows", "one of token, channel"),
        ("zero", "maybe", "true or false"),
        ("layers", "(1,x)", "each a whole number"),
        ("bits", "(1,2,3)", "2 values"),
        ("table", "{}", "unknown parameter 'table'"),
        ("recent", "-1", "recent must not be negative"),
    ],
)
def test_bad_parameters(key: str, text: str, part: str) -> None:
    with pytest.raises(UserError) as caught:
        configured(Method(), {key: text})
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_value_refused_by_any_exception_is_one_sentence() -> None:
    @dataclass(frozen=True)
    class Plain:
        bits: int = 2

        def __post_init__(self) -> None:
            if self.bits > 8:
                raise ValueError("too many bits")

    with pytest.raises(UserError, match=r"Plain can't be had with bits=9: ValueError: too many"):
        configured(Plain(), {"bits": "9"})


def test_annotations_that_name_nothing_are_refused() -> None:
    @dataclass(frozen=True)
    class Lost:
        bits: "Elsewhere" = 2  # type: ignore[name-defined]  # noqa: F821, UP037

    with pytest.raises(UserError, match=r"annotations of .*Lost can't be read \(NameError: .*Else"):
        configured(Lost(), {"bits": "9"})


def test_canonical_text_names_changes_only() -> None:
    changed = Method(recent=64, clip=None, zero=False, layers=(0, 1))
    assert (
        canonical_spec("m", Method(), changed) == "m[clip=none,layers=(0,1),recent=64,zero=false]"
    )
    assert canonical_spec("m", Method(), Method()) == "m"


@given(
    st.builds(
        Method,
        recent=st.integers(0, 10**6),
        clip=st.none() | st.floats(allow_nan=False, allow_infinity=False),
        axis=st.sampled_from(["token", "channel"]),
        zero=st.booleans(),
        layers=st.lists(st.integers(-5, 99)).map(tuple),
    )
)
def test_canonical_text_reads_back(method: Method) -> None:
    _, parameters = parse_spec(canonical_spec("m", Method(), method))
    assert configured(Method(), parameters) == method
