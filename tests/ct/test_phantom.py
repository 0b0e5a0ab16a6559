import csv

import nibabel
import numpy as np
import pytest
from scipy import ndimage
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from dagman.ct import phantom, phantom_nodules
from dagman.ct.phantom_canvas import LABELS, Canvas
from dagman.errors import DagmanError
from dagman.figures.phantom import draw_sheet
from dagman.randomness import generator
from dagman.types import Volume

CASES = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def cohort():
    return {case: phantom.make(0, case) for case in CASES}


def centroid_mm(made, name):
    index = np.argwhere(made.organs == LABELS[name]).mean(axis=0)
    return made.volume.affine[:3, :3] @ index + made.volume.affine[:3, 3]


def core(made, name):
    """Voxels of an organ away from its edge."""
    return ndimage.binary_erosion(made.organs == LABELS[name], iterations=2)


@pytest.mark.parametrize("case", CASES)
def test_sides_are_the_patients(cohort, case):
    made = cohort[case]
    assert nibabel.aff2axcodes(made.volume.affine) == ("R", "A", "S")
    x = {name: centroid_mm(made, name)[0] for name in LABELS if (made.organs == LABELS[name]).any()}
    middle = x["bone"]
    assert x["liver"] > middle + 30
    assert x["lung_right"] > middle + 30 > middle - 30 > x["lung_left"]
    assert x["kidney_right"] > middle + 30 > middle - 30 > x["kidney_left"]
    assert max(x["heart"], x["spleen"], x["stomach"]) < middle - 8
    assert x["spleen"] < x["stomach"] < x["heart"]
    assert centroid_mm(made, "heart")[1] > centroid_mm(made, "bone")[1]
    assert centroid_mm(made, "lung_left")[2] > centroid_mm(made, "spleen")[2] + 60


@pytest.mark.parametrize("case", CASES)
def test_hounsfield_units_are_those_of_tissue(cohort, case):
    made = cohort[case]
    hu = made.volume.hu

    def median(name):
        return float(np.median(hu[core(made, name)]))

    assert hu.dtype == np.int16
    assert hu.min() >= -1024
    assert hu.max() <= 3071
    air = hu[made.organs == 0]
    assert abs(np.median(air) + 1000) < 30
    assert -920 < median("lung_left") < -760
    assert -920 < median("lung_right") < -760
    assert 40 < median("liver") < 125
    assert 40 < median("spleen") < 150
    assert 30 < median("aorta") < 270
    assert 30 < median("heart") < 210
    assert median("trachea") < -850
    assert np.percentile(hu[made.organs == LABELS["bone"]], 90) > 300
    fat = hu[core(made, "body") & (hu < -40) & (hu > -200)]
    assert -120 < np.median(fat) < -85


@pytest.mark.parametrize("case", CASES)
def test_organs_have_human_volumes(cohort, case):
    made = cohort[case]
    litre = np.prod(made.volume.spacing_mm) / 1e6
    volumes = {name: (made.organs == label).sum() * litre for name, label in LABELS.items()}
    assert all(volumes.values())
    for name, low, high in (
        ("lung_left", 0.7, 2.6),
        ("lung_right", 0.9, 3.2),
        ("heart", 0.25, 0.9),
        ("liver", 0.6, 2.0),  # its tip lies below the scan
        ("spleen", 0.06, 0.4),
        ("kidney_left", 0.05, 0.3),
    ):
        assert low < volumes[name] < high, name
    assert volumes["lung_right"] > volumes["lung_left"]


def test_lungs_grow_denser_towards_the_back(cohort):
    made = cohort[0]
    lung = core(made, "lung_right") & (made.volume.hu < -700)
    y = np.nonzero(lung)[1]
    slope = np.polyfit(y * made.volume.spacing_mm[1], made.volume.hu[lung], 1)[0]
    assert -1.0 < slope < -0.2


def test_nodules_lie_in_lungs_and_agree_with_the_labels(cohort):
    for made in cohort.values():
        assert 1 <= len(made.nodules) <= 3
        np.testing.assert_array_equal(made.nodule_mask > 0, made.organs == LABELS["nodule"])
        main = made.nodules[0]
        index = np.argwhere(made.nodule_mask == 1)
        centre = index.mean(axis=0) * made.volume.spacing_mm + made.volume.affine[:3, 3]
        assert np.linalg.norm(centre - main.centre_mm) < 0.4 * main.radius_mm
        radius = np.cbrt(3 / (4 * np.pi) * len(index) * np.prod(made.volume.spacing_mm))
        assert 0.85 < radius / main.radius_mm < 1.15
        ring = ndimage.binary_dilation(made.nodule_mask == 1, iterations=2) & (made.nodule_mask == 0)
        assert np.isin(made.organs[ring], [LABELS["lung_left"], LABELS["lung_right"], LABELS["vessel"]]).mean() > 0.9


def test_a_table_lies_under_the_patient(cohort):
    for made in cohort.values():
        back = np.nonzero((made.organs > 0).any(axis=(0, 2)))[0][0]
        apart = ~ndimage.binary_dilation(made.organs > 0, iterations=3)
        solid = np.nonzero(apart & (made.volume.hu > -700))
        assert len(solid[1]) > 2000
        assert solid[1].max() < back + 30
        assert len(np.unique(solid[2])) == made.organs.shape[2]


def test_noise_is_correlated_and_stronger_within(cohort):
    made = cohort[0]
    hu = made.volume.hu.astype(np.float32)
    noise = hu - ndimage.gaussian_filter(hu, (3, 3, 0))
    liver = ndimage.binary_erosion(made.organs == LABELS["liver"], iterations=4)
    right = liver[:-1] & liver[1:]
    neighbours = np.corrcoef(noise[:-1][right], noise[1:][right])[0, 1]
    slices = liver[:, :, :-1] & liver[:, :, 1:]
    apart = np.corrcoef(noise[:, :, :-1][slices], noise[:, :, 1:][slices])[0, 1]
    assert neighbours > 0.3
    assert neighbours > apart + 0.1
    air = np.zeros_like(liver)
    air[20:-20, -8:] = (made.organs == 0)[20:-20, -8:]
    assert air.sum() > 1000
    assert noise[liver].std() > 1.5 * noise[air].std() > 1


def test_second_scan_of_a_patient_has_the_same_nodules(cohort):
    first, second = cohort[2], cohort[3]
    assert first.patient == second.patient == phantom.patient_of(2)
    assert [nodule.malignant for nodule in first.nodules] == [nodule.malignant for nodule in second.nodules]
    assert [nodule.radius_mm for nodule in first.nodules] == [nodule.radius_mm for nodule in second.nodules]
    moved = np.subtract(first.nodules[0].centre_mm, second.nodules[0].centre_mm)
    assert 0 < np.linalg.norm(moved) < 25
    assert (first.volume.hu != second.volume.hu).mean() > 0.5


def test_patients_and_labels_of_a_cohort():
    assert [phantom.patient_of(case) for case in range(9)] == [0, 1, 2, 2, 3, 4, 5, 5, 6]
    for seed in range(5):
        labels = [phantom.is_malignant(seed, patient) for patient in range(40)]
        assert sum(labels) == 20
        assert len({tuple(labels[i : i + 2]) for i in range(0, 40, 2)}) == 2


def test_malignant_can_be_asked_for_and_another_grid():
    made = phantom.make(0, 1, malignant=True, spacing_mm=(3.0, 3.0, 4.0), shape=(118, 98, 66))
    assert made.nodules[0].malignant
    assert made.volume.spacing_mm == (3.0, 3.0, 4.0)
    assert made.volume.hu.shape == made.organs.shape == made.nodule_mask.shape == (118, 98, 66)


def test_a_field_that_cuts_the_patient_is_refused():
    with pytest.raises(DagmanError, match=r"E-PHANTOM 5: a field of 141 x 141 x 128 mm cuts the patient; cover 280"):
        phantom.make(0, 5, shape=(64, 64, 51))


def nodule_features(case):
    """Radius, mean HU, roughness of the surface and unevenness of the rim of a nodule in an empty noisy lung."""
    rng = generator(11, "nodule test", case)
    canvas = Canvas((38, 38, 34), (2.2, 2.2, 2.5), 0.0)
    canvas.hu[:] = -850
    canvas.labels[:] = LABELS["lung_right"]
    centre = rng.uniform(-1, 1, 3)
    nodule = phantom_nodules.Nodule(
        centre_mm=tuple(centre.tolist()), radius_mm=float(rng.uniform(5, 14)), malignant=bool(case % 2)
    )
    box, solid = phantom_nodules.paint(canvas, nodule, rng)
    mask = np.zeros(canvas.hu.shape, bool)
    mask[box] = solid
    hu = ndimage.gaussian_filter(canvas.hu, 0.5) + ndimage.gaussian_filter(rng.standard_normal(mask.shape), 0.6) * 30
    away = np.linalg.norm(np.stack(np.meshgrid(*canvas.axes, indexing="ij"), axis=-1) - centre, axis=-1)
    radius = np.cbrt(3 / (4 * np.pi) * mask.sum() * np.prod(canvas.spacing_mm))
    surface = mask & ~ndimage.binary_erosion(mask)
    rim = (away > radius) & (away < 1.6 * radius + 2) & ~ndimage.binary_dilation(mask)
    return radius, hu[mask].mean(), away[surface].std() / radius, hu[rim].std(), nodule.radius_mm


def test_the_rim_tells_malignant_from_benign_and_size_and_density_do_not():
    features = np.array([nodule_features(case) for case in range(160)])
    malignant = np.arange(160) % 2 == 1
    reader = make_pipeline(StandardScaler(), LogisticRegression())
    scores = cross_val_predict(reader, features[:, :2], malignant, cv=5, method="predict_proba")[:, 1]
    assert roc_auc_score(malignant, scores) < 0.75
    assert max(roc_auc_score(malignant, features[:, i]) for i in (0, 1)) < 0.7
    assert min(roc_auc_score(malignant, features[:, i]) for i in (0, 1)) > 0.3
    assert roc_auc_score(malignant, features[:, 2]) > 0.9
    assert roc_auc_score(malignant, features[:, 3]) > 0.85
    assert np.abs(features[:, 0] / features[:, 4] - 1).max() < 0.12  # the radius asked for is the radius drawn


def test_written_cohort_is_the_same_every_time_and_reads_back(tmp_path, cohort):
    table = phantom.write(tmp_path, 2)
    with table.open() as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == ["case_id", "image", "label", "mask", "patient"]
    assert [row["patient"] for row in rows] == ["patient_000", "patient_001"]
    assert sorted(row["label"] for row in rows) == ["benign", "malignant"]
    for case, row in enumerate(rows):
        image, mask = (nibabel.load(table.parent / row[key]) for key in ("image", "mask"))
        np.testing.assert_array_equal(np.asanyarray(image.dataobj), cohort[case].volume.hu)
        np.testing.assert_allclose(image.affine, cohort[case].volume.affine, atol=1e-4)
        np.testing.assert_array_equal(np.asanyarray(mask.dataobj), cohort[case].nodule_mask == 1)
        np.testing.assert_array_equal(image.affine, mask.affine)
        assert image.header.get_xyzt_units()[0] == "mm"
        assert row["label"] == ("malignant" if cohort[case].nodules[0].malignant else "benign")
    assert (table.parent / rows[0]["image"]).read_bytes()[4:8] == bytes(4)  # no clock in the gzip header


def test_the_sheet_follows_the_radiological_convention():
    hu = np.full((20, 16, 12), -1000, np.int16)
    hu[14:] = 100  # the patient's right
    mask = np.zeros(hu.shape, np.uint8)
    mask[3:6, 5:9, 4:8] = 1
    figure = draw_sheet([("a", Volume(hu=hu, affine=np.diag([2.0, 2.0, 3.0, 1.0])), mask)])
    axial, _, coronal, sagittal = figure.axes
    shown = axial.images[0].get_array()
    assert shown.shape == (16, 20)
    assert shown[0, 19] == 100
    assert axial.get_xlim()[0] > axial.get_xlim()[1]  # right on the viewer's left
    assert coronal.images[0].get_array().shape == (12, 20)
    assert sagittal.images[0].get_array().shape == (12, 16)
    assert all(panel.collections for panel in figure.axes)
