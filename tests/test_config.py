"""Settings from dictionaries, YAML and dotted flags."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from dagman import config
from dagman.errors import DagmanError


@dataclass(frozen=True, kw_only=True)
class InnerConfig:
    kind: Literal["a", "b"] = "a"
    sizes: tuple[int, int, int] = (1, 2, 3)


@dataclass(frozen=True, kw_only=True)
class RoundConfig:
    kind: Literal["round"] = "round"
    radius: float = 1.0
    inner: InnerConfig = InnerConfig()


@dataclass(frozen=True, kw_only=True)
class SquareConfig:
    kind: Literal["square"] = "square"
    side: float = 1.0
    corners: int = 4
    inner: InnerConfig = InnerConfig()


@dataclass(frozen=True, kw_only=True)
class ShapeConfig:
    shape: RoundConfig | SquareConfig = SquareConfig(side=3.0)


@dataclass(frozen=True, kw_only=True)
class OuterConfig:
    rate: float = 0.1
    count: int | None = None
    on: bool = True
    inner: InnerConfig = InnerConfig()
    maybe: InnerConfig | None = InnerConfig()


def test_round_trip_through_yaml(tmp_path: Path) -> None:
    value = OuterConfig(rate=0.5, count=3, inner=InnerConfig(kind="b", sizes=(4, 5, 6)), maybe=None)
    path = tmp_path / "c.yaml"
    path.write_text(config.to_yaml(value))
    assert config.from_dict(OuterConfig, config.read_yaml(path)) == value


def test_dotted_flags_replace_one_field_each() -> None:
    flags = {"inner.kind": "b", "inner.sizes": "4,5,6", "rate": "1e-3", "count": "7", "on": "false", "maybe": "none"}
    assert config.override(OuterConfig(), flags) == OuterConfig(
        rate=1e-3, count=7, on=False, inner=InnerConfig(kind="b", sizes=(4, 5, 6)), maybe=None
    )


@pytest.mark.parametrize("given", [2**53 + 1, str(2**53 + 1), -(2**63), 10**400, "1e3", 1e3, "7"])
def test_whole_numbers_are_taken_digit_for_digit(given: object) -> None:
    assert config.override(OuterConfig(), {"count": given}).count == int(float(given) if "e" in str(given) else given)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"inner.kindd": "b"}, "did you mean inner.kind?"),
        ({"inner.kind": "c"}, "give one of a, b"),
        ({"rate": "fast"}, "cannot be 'fast'"),
        ({"count": "1.5"}, "cannot be '1.5'"),
        ({"count": "1e400"}, "cannot be '1e400'"),
        ({"rate": 10**400}, "cannot be 1000"),
        ({"on": "perhaps"}, "cannot be 'perhaps'"),
        ({"inner.sizes": "1,2"}, "cannot be '1,2'"),
        ({"rate": True}, "cannot be True"),
        ({"rate": "nan"}, "cannot be 'nan'; give a number"),
        ({"rate": "inf"}, "cannot be 'inf'"),
        ({"maybe": "none", "maybe.kind": "b"}, "has a field set too"),
    ],
)
def test_a_wrong_setting_is_named_with_the_way_out(flags: dict[str, object], message: str) -> None:
    with pytest.raises(DagmanError) as caught:
        config.override(OuterConfig(), flags)
    assert message in str(caught.value)


def test_one_of_several_configs_is_told_apart_by_its_kind(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    for value in (ShapeConfig(shape=RoundConfig(radius=2.0)), ShapeConfig(shape=SquareConfig(corners=3))):
        path.write_text(config.to_yaml(value))
        assert config.from_dict(ShapeConfig, config.read_yaml(path)) == value
    assert config.from_dict(ShapeConfig, {"shape": {"radius": 4}}) == ShapeConfig(shape=RoundConfig(radius=4.0))


@pytest.mark.parametrize(
    ("flags", "shape"),
    [
        ({"shape.corners": "5"}, SquareConfig(side=3.0, corners=5)),
        ({"shape.kind": "square", "shape.corners": "5"}, SquareConfig(side=3.0, corners=5)),
        (
            {"shape.radius": "2", "shape.kind": "round", "shape.inner.kind": "b"},
            RoundConfig(radius=2.0, inner=InnerConfig(kind="b")),
        ),
        (
            {"shape": {"kind": "round", "radius": 2, "inner": {"kind": "b"}}},
            RoundConfig(radius=2.0, inner=InnerConfig(kind="b")),
        ),
    ],
)
def test_another_kind_starts_from_its_defaults(flags: dict[str, object], shape: object) -> None:
    assert config.override(ShapeConfig(), flags).shape == shape


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"shape.kind": "oval"}, "E-CONFIG shape.kind: cannot be 'oval'; give one of round, square"),
        ({"shape": {"kind": ["round"]}}, "give one of round, square"),
        ({"shape.radius": "2"}, "E-CONFIG shape.radius: is not known"),
        ({"shape": "none"}, "E-CONFIG shape: cannot be 'none'"),
        ({"shape.kind": "round", "shape.side": "2"}, "E-CONFIG shape.side: is not known"),
    ],
)
def test_a_kind_that_does_not_exist_or_fit_is_named(flags: dict[str, object], message: str) -> None:
    with pytest.raises(DagmanError) as caught:
        config.override(ShapeConfig(), flags)
    assert message in str(caught.value)


def test_a_file_that_is_no_yaml_is_named_with_the_line(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("rate: 1\ninner: [1, 2\ncount: 3\n")
    with pytest.raises(DagmanError, match=r"^E-CONFIG .*c.yaml: cannot be read \(ParserError, line 3\)"):
        config.read_yaml(path)


def test_difference_lists_every_changed_field() -> None:
    old, new = config.to_dict(OuterConfig()), config.to_dict(OuterConfig(rate=0.2, inner=InnerConfig(kind="b")))
    assert config.difference(old, new) == ["rate: 0.1 -> 0.2", "inner.kind: a -> b"]
