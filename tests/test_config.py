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


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"inner.kindd": "b"}, "did you mean inner.kind?"),
        ({"inner.kind": "c"}, "give one of a, b"),
        ({"rate": "fast"}, "cannot be 'fast'"),
        ({"count": "1.5"}, "cannot be '1.5'"),
        ({"on": "perhaps"}, "cannot be 'perhaps'"),
        ({"inner.sizes": "1,2"}, "cannot be '1,2'"),
        ({"rate": True}, "cannot be True"),
        ({"maybe": "none", "maybe.kind": "b"}, "has a field set too"),
    ],
)
def test_a_wrong_setting_is_named_with_the_way_out(flags: dict[str, object], message: str) -> None:
    with pytest.raises(DagmanError) as caught:
        config.override(OuterConfig(), flags)
    assert message in str(caught.value)


def test_difference_lists_every_changed_field() -> None:
    old, new = config.to_dict(OuterConfig()), config.to_dict(OuterConfig(rate=0.2, inner=InnerConfig(kind="b")))
    assert config.difference(old, new) == ["rate: 0.1 -> 0.2", "inner.kind: a -> b"]
