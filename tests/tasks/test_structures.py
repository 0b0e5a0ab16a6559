"""Labelled crops: where they are cut, what is left out, and that it is said."""

import json

import numpy as np
import pytest

from dagman.ct import crops
from dagman.errors import DagmanError
from dagman.nets.weights import load_encoder
from dagman.tasks import embed, structures

ORGANS = ("1", "2", "3")


def test_every_structure_gets_its_crops_and_the_speck_is_left_out_and_counted(organ_store):
    found = structures.structures(organ_store, crops_each=3)
    assert found.structures == 15
    assert len(found.places) == 45
    assert {place.label for place in found.places} == set(ORGANS)
    assert found.too_small == {"4": 5}
    assert str(found) == "45 crops of 15 structures of 3 classes in 5 cases; 5 structures too small (4 5)"
    assert len({place.name for place in found.places}) == 45


def test_places_lie_in_their_structure_the_first_in_its_middle(organ_store):
    for place in structures.structures(organ_store, crops_each=3).places:
        labels = organ_store.mask(place.row)
        assert labels[place.voxel] == int(place.label)
        if place.name.endswith(".0"):
            middle = np.argwhere(labels == int(place.label)).mean(axis=0)
            assert np.abs(place.voxel - middle).max() <= 0.5 + 1e-6


def test_draws_are_keyed_by_the_seed(organ_store):
    first, again, other = (structures.structures(organ_store, seed=seed).places for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert first[0] == other[0], "the middle is not drawn"


def test_names_choose_and_join_classes(organ_store):
    found = structures.structures(organ_store, {1: "soft", 2: "soft"}, crops_each=1)
    assert {place.label for place in found.places} == {"soft"}
    assert found.structures == 10
    assert found.unnamed == ("3", "4")


def test_two_parts_that_touch_at_a_corner_are_one_structure_and_two_apart_are_two():
    labels = np.zeros((20, 20, 20), np.int16)
    labels[0:5, 0:5, 0:5] = labels[5:9, 5:9, 5:9] = 1
    labels[15:, 15:, 15:] = 1
    labels[0, 19, 0] = 7
    assert [(label, len(voxels)) for label, voxels in structures._connected(labels)] == [(1, 189), (1, 125), (7, 1)]


def test_a_store_without_structures_is_refused_with_the_way_out(organ_store):
    with pytest.raises(DagmanError, match="cluster whole cases with --of cases"):
        structures.structures(organ_store, smallest_mm3=1e8)
    with pytest.raises(DagmanError, match="E-CONFIG"):
        structures.structures(organ_store, crops_each=0)


def test_a_vector_of_a_place_is_that_of_the_crop_around_it(organ_store, two_runs):
    encoder = load_encoder(two_runs[0])
    places = structures.structures(organ_store, crops_each=2).places[:3]
    table = structures.embed_places(encoder, organ_store, places)
    assert table.labels == tuple(place.label for place in places)
    assert table.patients == ("p0", "p0", "p0")
    corner = tuple(middle - 16 for middle in places[1].voxel)
    image = crops.window(organ_store.hu(0, corner, (32, 32, 32)), encoder.preparation.window_hu)
    features = embed.encode(encoder, embed.torch.from_numpy(image)[None, None], device="cpu", precision="float32")
    np.testing.assert_allclose(table.features[1], features.pooled[0], atol=1e-5)
    voxels = structures.voxels_of_places(organ_store, places, encoder.preparation, side=4)
    np.testing.assert_allclose(
        voxels.features[1], image.reshape(4, 8, 4, 8, 4, 8).mean(axis=(1, 3, 5)).ravel(), atol=1e-5
    )


def test_names_are_read_from_csv_and_json(tmp_path):
    wanted = {1: "spleen", 5: "liver"}
    (tmp_path / "a.csv").write_text("label,name\n1,spleen\n5,liver\n")
    (tmp_path / "b.json").write_text(json.dumps({"1": "spleen", "5": "liver"}))
    (tmp_path / "c.json").write_text(json.dumps({"spleen": 1, "liver": 5}))
    for name in ("a.csv", "b.json", "c.json"):
        assert structures.read_names(tmp_path / name) == wanted


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "label,word\n1,spleen\n"),
        ("b.csv", "label,name\nx,spleen\n"),
        ("c.csv", "label,name\n1,spleen\n1,liver\n"),
        ("d.csv", "label,name\n1,\n"),
        ("e.json", "[1, 2]"),
        ("f.json", "{"),
        ("g.json", "{}"),
    ],
)
def test_a_file_that_names_nothing_is_refused(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(DagmanError, match="E-TABLE"):
        structures.read_names(tmp_path / name)
    with pytest.raises(DagmanError, match="E-GONE"):
        structures.read_names(tmp_path / "absent.csv")
