"""Training samples: the same for any number of workers, and after a resume."""

import hashlib
import itertools
import time

import numpy as np
import pytest
import torch
from test_store import make_store
from torch.utils.data import DataLoader

from dagman.ct.crops import two_views, window
from dagman.ct.datasets import DataConfig, SampleOrder, SharedCollate, ViewsDataset, collate, mean_intensity, show
from dagman.errors import DagmanError
from dagman.randomness import generator
from dagman.types import Views


def body(shape, seed) -> np.ndarray:
    return np.random.default_rng(seed).normal(20, 60, shape).astype(np.int16)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    shapes = [(64, 48, 40), (40, 40, 40), (30, 70, 33), (32, 32, 32), (20, 20, 60)]
    return make_store(tmp_path_factory.mktemp("store"), {f"case{i}": body(s, i) for i, s in enumerate(shapes)})


CROP = DataConfig(crop=(32, 32, 32))


def batches(dataset, start, end, workers, batch=2, collate=collate, **options) -> list[str]:
    loader = DataLoader(
        dataset, batch_size=batch, sampler=SampleOrder(start, end), num_workers=workers, collate_fn=collate, **options
    )
    return [content(views) for views in loader]


def content(batch) -> str:
    return hashlib.sha256(b"".join(part.numpy().tobytes() for part in batch)).hexdigest()


def test_a_batch_is_views_in_0_to_1(store):
    dataset = ViewsDataset(store, CROP, seed=0)
    views = show(collate([dataset[i] for i in range(5)]), CROP)
    assert isinstance(views, Views)
    assert views.u.shape == views.v.shape == (5, 1, 32, 32, 32)
    assert views.u.dtype == torch.float32
    assert views.u.min() >= 0
    assert views.u.max() <= 1
    assert sorted(views.rows.tolist()) == [0, 1, 2, 3, 4]
    padding = dict(zip(views.rows.tolist(), views.padding.tolist(), strict=True))
    assert padding[0] == padding[1] == padding[3] == 0
    assert padding[2] == pytest.approx(2 / 32)
    assert padding[4] == pytest.approx(1 - (20 / 32) ** 2)


# Four workers on fewer cores make torch warn; that is the point here.
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_20_batches_are_the_same_for_0_1_and_4_workers_and_any_prefetch(store):
    dataset = ViewsDataset(store, DataConfig(crop=(32, 32, 32), flip_ratio=0.5, jitter_ratio=0.1), seed=3)
    alone = batches(dataset, 0, 40, 0)
    assert len(set(alone)) == 20
    assert batches(dataset, 0, 40, 1, prefetch_factor=4) == alone
    assert batches(dataset, 0, 40, 4) == alone
    assert batches(dataset, 0, 41, 4, collate=SharedCollate(2))[:20] == alone


@pytest.mark.parametrize(("workers", "ahead"), [(1, 1), (1, 2), (2, 2)])
def test_a_batch_in_shared_memory_is_whole_until_the_next_is_taken(store, workers, ahead):
    dataset, options = ViewsDataset(store, CROP, seed=3), {"num_workers": workers, "prefetch_factor": ahead}
    order = SampleOrder(0, 24)
    loader = DataLoader(dataset, batch_size=2, sampler=order, collate_fn=SharedCollate(ahead), **options)
    found = []
    for views in loader:
        time.sleep(0.05)  # the processes run as far ahead as they may
        found.append(content(views))
    assert found == batches(dataset, 0, 24, 0)


def test_reader_processes_use_the_memory_of_their_batches_again(store):
    dataset, order = ViewsDataset(store, CROP, seed=3), SampleOrder(0, 24)
    loader = DataLoader(dataset, batch_size=2, sampler=order, collate_fn=SharedCollate(2), num_workers=1)
    assert len({views.u.data_ptr() for views in list(loader)}) == 3


def test_a_resumed_order_is_the_rest_of_the_whole_one(store):
    dataset = ViewsDataset(store, CROP, seed=3)
    whole = batches(dataset, 0, 24, 0)
    for done in (1, 5, 11):
        assert batches(ViewsDataset(store, CROP, seed=3), 2 * done, 24, 0) == whole[done:]


def test_the_seed_and_nothing_global_decides(store):
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    first = batches(ViewsDataset(store, CROP, seed=3), 0, 10, 0)
    torch.manual_seed(2)
    np.random.seed(2)  # noqa: NPY002
    assert batches(ViewsDataset(store, CROP, seed=3), 0, 10, 0) == first
    assert batches(ViewsDataset(store, CROP, seed=4), 0, 10, 0) != first


def test_every_epoch_is_another_permutation_of_the_rows(store):
    dataset = ViewsDataset(store, CROP, seed=0, rows=[0, 2, 3, 4])
    epochs = [[dataset.row(4 * epoch + i) for i in range(4)] for epoch in range(12)]
    assert all(sorted(epoch) == [0, 2, 3, 4] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 4
    # Asking backwards or across epochs changes nothing.
    assert [dataset.row(i) for i in reversed(range(48))] == [row for epoch in epochs for row in epoch][::-1]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_are_disjoint_and_cover_the_samples(world):
    parts = [list(SampleOrder(7, 40, rank, world)) for rank in range(world)]
    assert sorted(itertools.chain(*parts)) == list(range(7, 40))
    assert [len(SampleOrder(7, 40, rank, world)) for rank in range(world)] == [len(part) for part in parts]


def test_readers_hand_over_hounsfield_units_and_the_device_makes_of_them_what_is_shown(store):
    dataset = ViewsDataset(store, CROP, seed=4)
    pairs = collate([dataset[i] for i in range(5)])
    assert pairs.u.dtype == pairs.v.dtype == torch.int16
    views = show(pairs, CROP)
    for sample in range(5):
        draws = generator(4, "crops", sample)
        cut = two_views(store, int(views.rows[sample]), CROP.crop, overlap_ratio=0.5, body_ratio=0.25, generator=draws)
        assert np.array_equal(views.u[sample, 0].numpy(), window(cut.u, CROP.window_hu))
        assert np.array_equal(views.v[sample, 0].numpy(), window(cut.v, CROP.window_hu))


def test_augmentation_is_off_by_default_and_only_flips_and_jitters(store):
    def shown(**augmentation):
        config = DataConfig(crop=(32, 32, 32), **augmentation)
        dataset = ViewsDataset(store, config, seed=0)
        return show(collate([dataset[i] for i in range(5)]), config)

    plain, flipped, jittered = shown(), shown(flip_ratio=1.0), shown(jitter_ratio=0.1)
    some = shown(flip_ratio=0.5)
    for view in ("u", "v"):
        image = getattr(plain, view)
        assert torch.equal(getattr(flipped, view), image.flip(2, 3, 4))
        change = (getattr(jittered, view) - image).abs().amax(dim=(1, 2, 3, 4))
        assert bool((change > 0).all())
        assert bool((change <= 0.2).all())
        ways = [axes for count in range(4) for axes in itertools.combinations((1, 2, 3), count)]
        found = [
            [axes for axes in ways if torch.equal(mirrored, crop.flip(axes))]
            for mirrored, crop in zip(getattr(some, view), image, strict=True)
        ]
        assert all(len(axes) == 1 for axes in found), "each crop is mirrored along axes of its own"
        assert len({axes[0] for axes in found}) > 1
    for other in (flipped, jittered):
        assert torch.equal(other.rows, plain.rows)
        assert torch.equal(other.padding, plain.padding)


def test_mean_intensity_is_that_of_the_training_crops(store):
    dataset = ViewsDataset(store, CROP, seed=5)
    views = show(collate([dataset[i] for i in range(8)]), CROP)
    expected = torch.cat([views.u, views.v]).mean().item()
    assert mean_intensity(store, CROP, seed=5, num_crops=16) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"crop": (0, 32, 32)}, "data.crop: cannot be (0, 32, 32); give the three sides in voxels"),
        ({"window_hu": (250.0, -175.0)}, "data.window_hu"),
        ({"overlap_ratio": 1.5}, "data.overlap_ratio"),
        ({"body_ratio": -0.1}, "data.body_ratio"),
        ({"flip_ratio": 2.0}, "data.flip_ratio"),
        ({"jitter_ratio": 1.0}, "data.jitter_ratio"),
    ],
)
def test_impossible_settings_are_refused(values, said):
    with pytest.raises(DagmanError) as caught:
        DataConfig(**values)
    assert said in str(caught.value)


def test_a_store_without_volumes_is_refused(store):
    with pytest.raises(DagmanError, match="E-NODATA"):
        ViewsDataset(store, CROP, seed=0, rows=[])


def test_pairs_of_one_volume_follow_each_other_at_places_of_their_own(store):
    plain, several = (
        ViewsDataset(store, DataConfig(crop=(32, 32, 32), pairs_per_volume=pairs), seed=3) for pairs in (1, 4)
    )
    assert [several.row(sample) for sample in range(40)] == [plain.row(sample // 4) for sample in range(40)]
    large = next(sample for sample in range(0, 20, 4) if several.row(sample) == 0)
    assert not np.array_equal(several[large][0], several[large + 1][0])
