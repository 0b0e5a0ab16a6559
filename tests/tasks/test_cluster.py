"""How classes hold together, on points whose answer is known, against scikit-learn, and on data that has no answer."""

import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import silhouette_score
from sklearn.neighbors import KNeighborsClassifier

from dagman.errors import DagmanError, ExitCode
from dagman.nets.weights import load_encoder
from dagman.tasks import cluster, separation, structures
from dagman.tasks.table import Table

REQUIRE = cluster.require_umap
needs_umap = pytest.mark.skipif(importlib.util.find_spec("umap") is None, reason="umap-learn is not installed")
SQUARE = np.array([[0.0, 0.0], [0.0, 2.0], [10.0, 0.0], [10.0, 2.0]])
LABELS = np.array(["a", "a", "b", "b"])


@pytest.fixture(autouse=True)
def _plain_map(monkeypatch, request):
    """The first two columns in place of a UMAP, whose import takes seconds, where the map is not what is tested."""
    if "umap" not in request.keywords:
        monkeypatch.setattr(cluster, "require_umap", lambda: None)
        monkeypatch.setattr(cluster, "lay_out", lambda features, *, seed: features[:, :2])


def table(features, labels, patients):
    return Table(
        case_ids=tuple(f"c{number}" for number in range(len(labels))),
        patients=tuple(patients),
        labels=tuple(labels),
        features=np.asarray(features, np.float32),
    )


def blobs(classes=3, patients=6, width=5, spread=0.5, seed=0):
    draws = np.random.default_rng(seed)
    middles = draws.normal(0, 3, (classes, width))
    labels = np.tile(np.arange(classes), patients)
    features = middles[labels] + draws.normal(0, spread, (len(labels), width))
    return table(
        features, [f"organ{label}" for label in labels], np.repeat([f"p{n}" for n in range(patients)], classes)
    )


def test_distances_within_and_between_on_a_rectangle():
    values = separation.measured(separation.between(SQUARE), LABELS)
    assert values["intra"] == pytest.approx([2, 2, 2, 2])
    assert values["inter"] == pytest.approx([(10 + np.hypot(10, 2)) / 2] * 4)
    assert values["silhouette"] == pytest.approx(1 - 2 / values["inter"])


def test_two_crops_of_one_structure_are_no_pair():
    points = np.array([[0.0], [0.1], [2.0], [10.0], [10.1]])
    labels, structures = np.array(["a", "a", "a", "b", "b"]), np.array([1, 1, 2, 3, 3])
    values = separation.measured(separation.between(points), labels, structures)
    assert values["intra"] == pytest.approx([2, 1.9, 1.95, np.nan, np.nan], nan_ok=True)
    assert values["inter"][0] == pytest.approx(10.05)
    assert values["silhouette"] == pytest.approx(
        [1 - 2 / 10.05, 1 - 1.9 / 9.95, 1 - 1.95 / 8.05, *[np.nan] * 2], nan_ok=True
    )


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 5))
def test_silhouettes_are_those_of_scikit_learn(seed, classes):
    made = blobs(classes, 4, seed=seed, spread=3)
    labels = np.array(made.labels)
    values = separation.measured(separation.between(made.features.astype(float)), labels)
    assert values["silhouette"].mean() == pytest.approx(silhouette_score(made.features.astype(float), labels), abs=1e-9)


def test_votes_are_those_of_scikit_learn_on_the_other_patients():
    made = blobs(3, 8, spread=3)
    labels, groups = np.array(made.labels), np.array(made.patients)
    right = separation.votes(separation.between(made.features), labels, groups, 1)
    for crop in range(len(labels)):
        others = groups != groups[crop]
        model = KNeighborsClassifier(1).fit(made.features[others], labels[others])
        assert right[crop] == (model.predict(made.features[crop : crop + 1])[0] == labels[crop])


def test_a_neighbour_is_never_of_the_same_patient():
    """Each patient's crops lie on one point, far from everyone's: a leak would get all right, the rest all wrong."""
    middles = np.array([0.0, 1.0, 10.0, 11.0])
    labels = np.array(["a", "a", "b", "b", "a", "a", "b", "b"])
    groups = np.repeat(["p0", "p1", "p2", "p3"], 2)
    distances = separation.between(np.repeat(middles, 2)[:, None])
    assert separation.votes(distances, labels, groups, 1) == pytest.approx([0] * 8)
    assert separation.votes(distances, labels, np.arange(8), 1) == pytest.approx([1] * 8)


def test_a_tie_goes_to_the_nearest_and_a_class_of_one_patient_is_not_asked():
    points = np.array([[0.0], [1.2], [2.0], [9.0]])
    labels, groups = np.array(["a", "a", "b", "c"]), np.array(["p", "q", "r", "s"])
    right = separation.votes(separation.between(points), labels, groups, 2)
    assert right[:2] == pytest.approx([1, 0])
    assert np.isnan(right[2:]).all()


@given(st.floats(0.01, 100), st.integers(0, 100))
@settings(max_examples=10, deadline=None)
def test_neither_scale_nor_offset_of_a_feature_plays_a_part(scale, seed):
    made = blobs(seed=seed)
    moved = table(made.features * np.array([scale, 1, 1, 1, 1]) + 5, made.labels, made.patients)
    for one, other in zip(cluster.cluster(made).values.items(), cluster.cluster(moved).values.items(), strict=True):
        np.testing.assert_allclose(one[1], other[1], atol=2e-3, err_msg=one[0])


def test_blobs_have_figures_with_intervals_and_noise_has_none_of_their_order():
    good = cluster.cluster(blobs())
    noise = cluster.cluster(blobs(spread=1000.0))
    for one, (low, high) in ((good, (0.95, 1.0)), (noise, (0.0, 0.75))):
        assert low <= one.estimate("knn").value <= high
    assert good.estimate("silhouette").low > noise.estimate("silhouette").high
    assert noise.estimate("ratio").value == pytest.approx(1, abs=0.1)
    gained = good.estimate("silhouette", noise)
    assert gained.value == pytest.approx(good.estimate("silhouette").value - noise.estimate("silhouette").value)
    assert 0 < gained.low < gained.value < gained.high


def test_every_class_counts_alike():
    """Ten crops of `a` that find each other and two of `b` among them: right is one class of two, not ten of twelve."""
    points = [[float(number), 0.0] for number in range(10)] + [[2.5, 0.0], [6.5, 0.0]]
    one = cluster.cluster(table(points, ["a"] * 10 + ["b"] * 2, [f"p{number}" for number in range(12)]))
    assert one.values["knn"][:10] == pytest.approx([1] * 10)
    assert one.estimate("knn").value == 0.5


def test_any_two_crops_are_one_apart_on_average():
    one = cluster.cluster(blobs(2, 40, width=30, spread=1000.0))
    assert one.estimate("inter").value == pytest.approx(1, abs=0.03)


def test_one_patient_has_figures_without_interval_and_no_vote():
    made = blobs(3, 4)
    one = cluster.cluster(table(made.features, made.labels, ["p"] * 12))
    assert one.estimate("silhouette").value is not None
    assert one.estimate("silhouette").low is None
    assert one.estimate("silhouette").why == "1 patient, 2 needed"
    assert one.estimate("knn").value is None
    assert one.estimate("knn").why == "no class is there in two patients"


def test_a_class_with_one_crop_is_left_out_and_said():
    made = blobs()
    labels = ["lonely", *made.labels[1:]]
    one = cluster.cluster(table(made.features, labels, made.patients))
    assert one.left_out == {"lonely": 1}
    assert len(one.table.labels) == len(one.groups) == len(labels) - 1


@pytest.mark.parametrize(
    ("features", "why"),
    [
        (np.ones((18, 5)), "the features are the same for all crops"),
        (np.where(np.arange(18)[:, None] == 3, np.nan, 1.0), "features of 1 crops are not finite"),
        (np.where(np.arange(18)[:, None] < 2, np.inf, 1.0), "features of 2 crops are not finite"),
    ],
)
def test_features_that_hold_nothing_have_no_figures_but_the_reason(tmp_path, features, why):
    made = blobs()
    bad, good = cluster.cluster(table(features, made.labels, made.patients)), cluster.cluster(made)
    for name in cluster.VALUES:
        assert bad.estimate(name).value is None
        assert good.estimate(name, bad).value is None
        assert bad.estimate(name).why == why
    written = cluster.write({"good": good, "bad": bad}, tmp_path)
    assert all(path.stat().st_size for path in written)


@pytest.mark.parametrize(
    "labels", [["a"] * 4, ["a", "b", "c", "d"], ["a", "a", "a", "b"], ["a", "a", None, "b"], ["a", "a", "A", "A"]]
)
def test_fewer_than_two_classes_or_no_class_is_refused(labels):
    with pytest.raises(DagmanError, match="E-LABEL"):
        cluster.cluster(table(SQUARE, labels, "pqrs"))


def test_unknown_patients_are_refused_unless_others_are_named():
    made = table(SQUARE, LABELS, ["p", None, "q", "r"])
    with pytest.raises(DagmanError, match="E-PATIENT") as caught:
        cluster.cluster(made)
    assert caught.value.exit_code == ExitCode.REFUSED
    assert cluster.cluster(made, groups=["x", "y", "x", "y"]).estimate("knn").value == 1


@needs_umap
@pytest.mark.umap
def test_the_map_is_the_same_for_the_same_seed_and_keeps_far_things_apart():
    made, threads = blobs(2, 10, spread=0.1), torch.get_num_threads()
    first, again, other = (cluster.cluster(made, seed=seed) for seed in (0, 0, 1))
    assert torch.get_num_threads() == threads
    np.testing.assert_array_equal(first.map, again.map)
    assert (first.map != other.map).any()
    assert first.estimate("map_ratio").value < 0.5
    for count in (4, 5):
        assert np.isfinite(cluster.lay_out(made.features[:count].astype(float), seed=0)).all()


@needs_umap
@pytest.mark.umap
def test_what_numba_compiled_for_a_map_serves_the_next_process():
    code = (
        "import numpy as np\n"
        "from dagman.tasks.layout import lay_out\n"
        "drawn = lay_out(np.eye(20), seed=0)\n"
        "from umap import umap_\n"
        "print(sum(umap_.smooth_knn_dist.stats.cache_hits.values()), drawn.tobytes().hex())"
    )
    drawn = cluster.lay_out(np.eye(20), seed=0)
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.split() == ["1", drawn.tobytes().hex()]


@needs_umap
@pytest.mark.umap
def test_where_numba_finds_no_folder_to_write_to_it_is_given_one_that_goes(tmp_path):
    """As where Python's packages and the home are read-only: numba then looks in neither."""
    (tmp_path / "umap.py").write_text("import numba\n@numba.njit(cache=True)\ndef kept(): pass\n")
    code = "import os\nfrom dagman.tasks import layout\nlayout._imported()\nprint(os.listdir(os.environ['TMPDIR']))"
    (tmp_path / "temporary").mkdir()
    environment = {name: os.environ[name] for name in os.environ.keys() - {"XDG_CACHE_HOME", "NUMBA_CACHE_DIR"}} | {
        "NUMBA_CACHE_LOCATOR_CLASSES": "UserProvidedCacheLocator,UserWideCacheLocator",
        "HOME": "/dev/null",
        "TMPDIR": str(tmp_path / "temporary"),
        "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]),
    }
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert ended.stdout.startswith("['dagman-numba-"), ended.stderr
    assert not list((tmp_path / "temporary").iterdir())


def test_encoders_stand_beside_the_untrained_one_and_voxels(organ_store, two_runs, tmp_path):
    found = structures.structures(organ_store, crops_each=2)
    encoders = {run.name: load_encoder(run) for run in two_runs}
    runs = cluster.compare(encoders, organ_store, found.places)
    assert list(runs) == ["first", "second", "untrained", "raw voxels"]
    result = cluster.summary(runs, group_by="patient")
    assert (result["crops"], result["patients"], result["asked_by_knn"]) == (30, 4, 30)
    assert result["rows"][3]["knn"]["value"] > 0.6, "the organs are plain to see"
    assert "first_minus_this_knn" in result["rows"][1]
    assert "first_minus_this_knn" not in result["rows"][0]
    with pytest.raises(DagmanError, match="E-USAGE encoder untrained: bears the name of a baseline"):
        cluster.compare({"untrained": encoders["first"]}, organ_store, found.places)
    whole = cluster.compare(encoders, organ_store, group_by="case")
    assert sorted(set(whole["first"].table.labels)) == ["even", "odd"]
    assert len(set(whole["first"].groups)) == 5


def test_without_umap_the_way_to_it_is_named(monkeypatch):
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DagmanError, match="run pip install umap-learn"):
        REQUIRE()
