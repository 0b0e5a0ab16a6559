from pathlib import Path

from dagman.tasks.leakage import Seen
from dagman.tasks.origin import Origin, read_origin, write_origin


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
