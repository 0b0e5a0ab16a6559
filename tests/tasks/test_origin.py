from pathlib import Path

import pytest

from dagman.errors import DagmanError, ExitCode
from dagman.tasks.leakage import Seen
from dagman.tasks.origin import Origin, read_origin, refuse_foreign, write_origin


def test_an_origin_is_read_back_until_its_features_change(tmp_path: Path) -> None:
    features = tmp_path / "features.csv"
    assert read_origin(features) is None
    features.write_text("case_id,f0\na,1\n")
    seen = Seen(True, {"a": "voxels"}, {"a": ["classification"]})
    weights = tmp_path / "model.safetensors"
    origin = Origin(weights, "pooled", "0123", seen, [["a", "b"]], 1, "45", [{"case_id": "a"}], {"crop": [32]}, [64.0])
    write_origin(origin, features)
    assert read_origin(features) == origin
    features.write_text("case_id,f0\na,2\n")
    assert read_origin(features) is None
    write_origin(origin, features)
    features.with_suffix(".json").write_text("{")
    assert read_origin(features) is None


def test_features_are_written_over_features_alone(tmp_path: Path) -> None:
    features = tmp_path / "features.csv"
    refuse_foreign(features)
    features.write_text("case_id,patient,label,f0\na,,,1\n")
    write_origin(Origin(None, "pooled", "0123", Seen(True, {}, {}), [], 0, None, []), features)
    refuse_foreign(features)
    features.write_text("case_id,image\na,a.nii\n")
    (tmp_path / "dataset.json").write_text('{"name": "mine"}')
    for given, said in (
        (features, "features.csv: is no table of features"),
        (tmp_path / "dataset.csv", "dataset.json: does not say where features come from"),
        (tmp_path / "dataset.json", "dataset.json: cannot end in .json"),
    ):
        with pytest.raises(DagmanError, match=said) as caught:
            refuse_foreign(given)
        assert caught.value.exit_code == ExitCode.REFUSED
