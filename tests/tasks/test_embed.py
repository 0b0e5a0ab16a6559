"""Vectors of cases from the real chain: files, prepared store, encoder."""

import dataclasses

import jaxtyping
import nibabel
import numpy as np
import pytest
import torch

import small_study
from dagman import cli
from dagman.ct import crops
from dagman.ct.prepare import PrepareConfig, prepare
from dagman.ct.store import PreparedStore
from dagman.errors import DagmanError, ExitCode
from dagman.nets.swin import AttentionConfig, SwinConfig, SwinEncoder
from dagman.nets.weights import save_encoder
from dagman.tasks import embed
from dagman.tasks.table import read_csv
from dagman.types import Preparation

CROP = (32, 32, 64)
NETWORK = SwinConfig(embed_dim=12, depths=(2, 2, 2, 2), num_heads=(2, 2, 4, 4), attention=AttentionConfig(num_heads=4))


def ellipsoid(shape, seed):
    """A body of soft tissue with some noise, in air."""
    axes = np.meshgrid(*(np.linspace(-1.1, 1.1, side) for side in shape), indexing="ij")
    inside = sum(axis**2 for axis in axes) < 1
    rng = np.random.default_rng(seed)
    return np.where(inside, 40 + 60 * rng.normal(size=shape), -1000 + 8 * rng.normal(size=shape)).astype(np.int16)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Four cases of three patients, two with masks; one smaller than the crop, one larger."""
    folder = tmp_path_factory.mktemp("embed")
    lines = ["case_id,image,label,mask,patient"]
    for number, shape in enumerate([(40, 36, 30), (50, 40, 80), (36, 36, 70), (28, 30, 26)]):
        hu, affine = ellipsoid(shape, number), np.diag([2.0, 2.0, 2.0, 1.0])
        nibabel.save(nibabel.Nifti1Image(hu, affine), folder / f"image{number}.nii.gz")
        mask = np.zeros(shape, np.uint8)
        mask[20:24, 12:16, 18:23] = 1
        nibabel.save(nibabel.Nifti1Image(mask, affine), folder / f"mask{number}.nii.gz")
        name = f"mask{number}.nii.gz" if number < 2 else ""
        lines.append(f"c{number},image{number}.nii.gz,{number % 2},{name},p{number // 2}")
    (folder / "cases.csv").write_text("\n".join(lines) + "\n")
    prepare([folder / "cases.csv"], folder / "prepared", PrepareConfig(storage="npy"), workers=1)
    return PreparedStore(folder / "prepared")


@pytest.fixture(scope="module")
def encoder():
    made = SwinEncoder(NETWORK)
    made.preparation = Preparation(crop=CROP)
    return embed.untrained(made, seed=3)


@pytest.fixture(scope="module")
def table(encoder, store):
    return embed.embed(encoder, store, batch_size=1)


def test_one_row_per_case_with_its_patient_and_label(table, store):
    assert table.case_ids == ("c0", "c1", "c2", "c3")
    assert table.patients == ("p0", "p0", "p1", "p1")
    assert table.labels == ("0", "1", "0", "1")
    assert table.features.shape == (4, NETWORK.final_width)
    assert (table.features.std(axis=0) > 1e-4).mean() > 0.9


def image_tensor(hu, encoder):
    return torch.from_numpy(crops.window(hu, encoder.preparation.window_hu))[None, None]


def test_a_case_with_a_mask_is_the_crop_around_it(table, encoder, store):
    images = image_tensor(crops.centred(store, 0, CROP, "mask"), encoder)
    with torch.inference_mode():
        wanted = encoder(images).pooled[0].numpy()
    np.testing.assert_allclose(table.features[0], wanted, atol=1e-5)


def test_a_case_without_one_is_the_mean_of_the_crops_that_cover_it(table, encoder, store):
    corners = crops.sliding(store.shape(2), CROP)
    assert len(corners) > 1
    with torch.inference_mode():
        each = [encoder(image_tensor(store.hu(2, corner, CROP), encoder)).pooled[0].numpy() for corner in corners]
    np.testing.assert_allclose(table.features[2], np.mean(each, axis=0), atol=1e-5)


@pytest.mark.parametrize("batch_size", [3, 8])
def test_batches_may_span_cases_and_change_nothing(table, encoder, store, batch_size):
    again = embed.embed(encoder, store, batch_size=batch_size)
    np.testing.assert_allclose(again.features, table.features, atol=1e-5)


def test_twice_is_bit_equal_and_the_weights_decide(table, encoder, store):
    np.testing.assert_array_equal(embed.embed(encoder, store, batch_size=1).features, table.features)
    same, other = (embed.embed(embed.untrained(encoder, seed), store, batch_size=1).features for seed in (3, 4))
    np.testing.assert_array_equal(same, table.features)
    assert np.abs(other - table.features).max() > 1e-2


def test_pooled_cells_cls_or_all(table, encoder, store):
    cells, cls, all_of_them = (
        embed.embed(encoder, store, which=which, batch_size=1).features for which in ("cells", "cls", "all")
    )
    assert cells.shape == cls.shape == (4, NETWORK.cell_width)
    np.testing.assert_array_equal(all_of_them, np.hstack([table.features, cells, cls]))
    crop = crops.window(crops.centred(store, 1, CROP, "mask"), encoder.preparation.window_hu)
    with torch.inference_mode():
        tokens = encoder(torch.from_numpy(crop)[None, None]).tokens
    np.testing.assert_allclose(cells[1], tokens[0].mean(dim=0), rtol=1e-5, atol=1e-6)


def test_bf16_stays_near_float32(table, encoder, store):
    found = embed.embed(encoder, store, precision="bf16").features
    cosine = (found * table.features).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(table.features, axis=1)
    assert cosine.min() > 0.99


def test_progress_counts_cases(encoder, store):
    heard = []
    embed.voxels(store, encoder.preparation, progress=lambda done, total: heard.append((done, total)))
    assert heard == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_raw_voxels_are_block_means_of_the_same_crops(encoder, store):
    found = embed.voxels(store, encoder.preparation, side=4).features
    crop = crops.window(crops.centred(store, 1, CROP, "mask"), encoder.preparation.window_hu)
    blocks = crop.reshape(4, 8, 4, 8, 4, 16).mean(axis=(1, 3, 5))
    np.testing.assert_allclose(found[1], blocks.ravel(), atol=1e-6)


def test_an_encoder_in_training_mode_is_refused(encoder, store):
    training = embed.untrained(encoder).train()
    with pytest.raises(ValueError, match="eval mode"):
        embed.embed(training, store)


def test_another_spacing_is_refused(encoder, store):
    other = embed.untrained(encoder)
    other.preparation = dataclasses.replace(encoder.preparation, spacing_mm=1.5)
    with pytest.raises(DagmanError, match=r"E-GRID.*2 mm.*1\.5 mm") as caught:
        embed.embed(other, store)
    assert caught.value.exit_code == ExitCode.REFUSED


def test_cls_of_a_plain_swin_is_refused(encoder, store):
    plain = SwinEncoder(dataclasses.replace(NETWORK, attention=None)).eval()
    plain.preparation = encoder.preparation
    assert embed.embed(plain, store).features.shape == (4, NETWORK.final_width)
    with pytest.raises(DagmanError, match="E-NOCLS"):
        embed.embed(plain, store, which="all")


def test_a_case_with_an_empty_mask_is_named_and_the_rest_goes_on(encoder, tmp_path, capsys):
    cases = {f"c{number}": small_study.case(number) for number in range(4)}
    cases["c2"] = (cases["c2"][0], np.zeros_like(cases["c2"][1]))
    drawn = small_study.store(tmp_path, cases)
    for call in (lambda: embed.embed(encoder, drawn), lambda: embed.voxels(drawn, encoder.preparation)):
        with pytest.raises(
            DagmanError, match=r"^E-NOMASK .*: holds 1 case with an empty mask \(c2\); draw it, or name"
        ):
            call()
    assert embed.embed(encoder, drawn, rows=[0, 1, 3]).case_ids == ("c0", "c1", "c3")
    save_encoder(encoder, tmp_path / "weights.safetensors", {})
    command = ["embed", "--weights", str(tmp_path / "weights.safetensors"), "-i", str(drawn.folder)]
    assert cli.run([*command, "-o", str(tmp_path / "features.csv")]) == ExitCode.REJECTED
    assert "E-NOMASK c2: its mask is empty; draw it" in capsys.readouterr().err
    assert read_csv(tmp_path / "features.csv").case_ids == ("c0", "c1", "c3")


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"precision": "fp16"}, "E-USAGE precision: cannot be fp16; give one of bf16, float32"),
        ({"rows": [50]}, "E-USAGE rows: 50 is no row of 4; count from 0"),
        ({"rows": [-1]}, "E-USAGE rows: -1 is no row of 4; count from 0"),
        ({"device": "cuda"}, "E-DEVICE device cuda: no such CUDA device is here; leave the device out"),
    ],
)
def test_what_is_not_there_is_refused(encoder, store, monkeypatch, asked, told):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DagmanError) as caught:
        embed.embed(encoder, store, **asked)
    assert str(caught.value) == told
