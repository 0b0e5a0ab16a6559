"""Numbers that the original authors' code gave for inputs drawn from seeds, reproduced with ours.

Each was made by running the function or class that the test names, in float64 on a CPU, on the same inputs; exchange
between processes and moves to a GPU were left out. Tensors of a batch hold the rows of view u, then those of view v.

iBOT: bytedance/ibot, commit da316d82636a7a7356835ef224b13d5f3ace0489
DINO: facebookresearch/dino, commit 7c446df5b9f45747937fb0d72314eb9f7b66930a
AttMask: gkakogeorgiou/attmask, commit 9f62061fb3afd42c09dd4b7cc6b8fa38013df018
SMIT: The-Veeraraghavan-Lab/SMIT, commit 5d81399010dcf8c03a944544dc42b62603075b13
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dagman.nets.heads import ProjectionHead
from dagman.pretext import codistill, hiding, losses

DRAWS = 2000
"""Views that iBOT's code was asked to draw blocks for."""


def keyed(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=keyed(seed), dtype=torch.float64) * scale


def uniform(seed: int, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=keyed(seed), dtype=torch.float64)


def across(student: Tensor, teacher: Tensor, center: Tensor, temperature: float) -> float:
    """Mean cross-entropy of each view against the other."""
    targets = losses.sharpen(codistill._swap_views(teacher), center, temperature)
    return losses.cross_entropy(student, targets, temperature=0.1).mean().item()


def on_hidden(student: Tensor, teacher: Tensor, hidden: Tensor, center: Tensor, temperature: float) -> float:
    """Cross-entropy of each view's hidden cells against the same cells."""
    targets = losses.sharpen(teacher, center, temperature)
    return losses.mean_over_hidden(losses.cross_entropy(student, targets, temperature=0.1), hidden).item()


def some_hidden(seed: int) -> Tensor:
    """Different numbers of 8 cells of 6 views, and none of the first."""
    hidden = uniform(seed, 6, 8) < 0.4
    hidden[0] = False
    return hidden


def test_losses_and_centers_are_those_of_ibot() -> None:
    """`iBOTLoss` of main_ibot.py: its two terms and its centers over three calls, at three pairs of temperatures."""
    golden = [  # tau [CLS], tau patch, [CLS] term, patch term, first values of both centers after the call
        (0.04, 0.04, 17.684799222022654, 16.928952560646092, -0.00014769674290978453, -0.005829891931965171),
        (0.055, 0.04, 11.19499979292201, 6.632114504467069, -0.009307555557600966, -0.0025823191887705027),
        (0.07, 0.055, 9.97314446861707, 11.336860834510412, -0.0074011326607140195, -0.00359354828547694),
    ]
    cls_center, patch_center = torch.zeros(2, 6, dtype=torch.float64)
    for step, (cls_tau, patch_tau, cls_term, patch_term, cls_first, patch_first) in enumerate(golden):
        seed = 10 * step
        student_cls, student_cells = drawn(seed, 6, 6), drawn(seed + 1, 6, 8, 6)
        teacher_cls, teacher_cells = drawn(seed + 2, 6, 6, scale=0.2), drawn(seed + 3, 6, 8, 6, scale=0.2)
        hidden = some_hidden(seed + 4)
        found = across(student_cls, teacher_cls, cls_center, cls_tau)
        assert found == pytest.approx(cls_term, abs=1e-6)
        found = on_hidden(student_cells, teacher_cells, hidden, patch_center, patch_tau)
        assert found == pytest.approx(patch_term, abs=1e-6)
        cls_center = losses.moved_center(cls_center, teacher_cls.mean(dim=0), 0.9)
        patch_center = losses.moved_center(patch_center, teacher_cells.flatten(0, 1).mean(dim=0), 0.9)
        assert (cls_center[0].item(), patch_center[0].item()) == pytest.approx((cls_first, patch_first), abs=1e-6)


def test_losses_are_those_of_smit() -> None:
    """`Cls_Patch_Loss` of train_self_supervised.py: the term on pooled tokens and that on cells, both with weight 0.1.

    SMIT pools the third stage, as `smit-swin` does here, DAGMaN the fourth; what is compared is the
    loss on what was pooled.
    """
    golden = [
        (0.04, 0.04, 1.7629916384506523, 1.0931775458961694),
        (0.055, 0.04, 1.6443711939423566, 0.962088411042906),
    ]
    pooled_center, patch_center = torch.zeros(2, 6, dtype=torch.float64)
    for step, (pooled_tau, patch_tau, pooled_term, patch_term) in enumerate(golden):
        seed = 100 + 10 * step
        student_pooled, student_cells = drawn(seed, 6, 6), drawn(seed + 1, 6, 8, 6)
        teacher_pooled, teacher_cells = drawn(seed + 2, 6, 6, scale=0.2), drawn(seed + 3, 6, 8, 6, scale=0.2)
        pooled = across(student_pooled, teacher_pooled, pooled_center, pooled_tau)
        patch = on_hidden(student_cells, teacher_cells, some_hidden(seed + 4), patch_center, patch_tau)
        assert (0.1 * pooled, 0.1 * patch) == pytest.approx((pooled_term, patch_term), abs=1e-6)
        pooled_center = losses.moved_center(pooled_center, teacher_pooled.mean(dim=0), 0.9)
        patch_center = losses.moved_center(patch_center, teacher_cells.flatten(0, 1).mean(dim=0), 0.9)


def test_image_term_is_that_of_smit() -> None:
    """The statements of main() in train_self_supervised.py that make `loss_recon`, on 8 cells a view of 4^3 voxels.

    SMIT divides by the hidden voxels of both views together; we average over the views, which is the same where as
    much is hidden of each, as in DAGMaN and SMIT.
    """
    images, prediction, order = uniform(200, 4, 1, 8, 8, 8), drawn(201, 4, 1, 8, 8, 8), uniform(202, 4, 8)
    predicted, truth = hiding.cut(prediction, 4), hiding.cut(images, 4)
    uneven = (order < 0.5).view(4, 2, 2, 2)
    assert losses.masked_l1(predicted[uneven], truth[uneven]).item() == pytest.approx(0.9190249027726828, abs=1e-6)
    five_each = (order.argsort(dim=1).argsort(dim=1) < 5).view(4, 2, 2, 2)
    picked = predicted[five_each], truth[five_each]
    assert losses.masked_l1(*picked).item() == pytest.approx(0.915734519473488, abs=1e-6)
    assert codistill._mean_of_views(*picked, five_each).item() == pytest.approx(0.915734519473488, abs=1e-6)


def test_random_hiding_counts_as_smit() -> None:
    """`MaskGenerator` of train_self_supervised.py: cells hidden of grids of 2^3 to 8^3 at ratios 0.7 and 0.6."""
    golden = {0.7: [6, 19, 45, 88, 152, 241, 359], 0.6: [5, 17, 39, 75, 130, 206, 308]}
    for ratio, counts in golden.items():
        assert [hiding.ceil_count(ratio, side**3) for side in range(2, 9)] == counts


def test_head_is_that_of_dino_and_ibot() -> None:
    """`DINOHead` of DINO's vision_transformer.py and of iBOT's models/head.py, which gave equal logits.

    Defaults but for sizes: no batch norm, the gain of the last layer fixed at 1; the last weights are not unit vectors.
    """
    head = ProjectionHead(12, num_prototypes=16, hidden_width=20, bottleneck_width=8).double()
    with torch.no_grad():
        for seed, parameter in enumerate(head.layers.parameters()):
            parameter.copy_(drawn(seed, *parameter.shape, scale=0.3))
        head.prototypes.copy_(drawn(6, 16, 8))
    logits = head(drawn(7, 3, 12))
    assert logits[0, :3].tolist() == pytest.approx(
        [0.05286167313993376, 0.32138964149236965, -0.11490830830880697], abs=1e-6
    )
    assert logits[:, 0].tolist() == pytest.approx(
        [0.05286167313993376, -0.20380785685293434, -0.022663954746402204], abs=1e-6
    )
    assert logits.sum().item() == pytest.approx(-3.067300165205465, abs=1e-6)
    assert logits.square().sum().item() == pytest.approx(4.575338259690843, abs=1e-6)


def marks(*numbers: int) -> Tensor:
    """One view of 64 cells for each number: cell i is marked where bit i is 1."""
    return torch.tensor([[bool(number >> cell & 1) for cell in range(64)] for number in numbers])


@pytest.mark.parametrize(
    ("ratio", "hint_ratio", "high", "low", "with_hints"),
    [
        (
            0.5,
            0.2,
            marks(0x704F8693C9CD22B7, 0x897B051A7C53986F),
            marks(0x8FB0796C3632DD48, 0x7684FAE583AC6790),
            marks(0x700D8213C9CD20B6, 0x881B051A7C53902E),
        ),
        (
            0.45,
            0.15,
            marks(0x604F0693C8C922B7, 0x897B05087853986B),
            marks(0x8E90396C3632DD40, 0x7684FAC5832C2590),
            marks(0x604D0613C8C920B6, 0x883B05087853906A),
        ),
    ],
)
def test_cells_hidden_by_attention_are_those_of_attmask(
    ratio: float, hint_ratio: float, high: Tensor, low: Tensor, with_hints: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`AttMask` of attmask.py in its modes high, low and hint, torch.manual_seed(0), every view hidden.

    `torch.multinomial` draws the cells to reveal as it does there, from our top cells and as many as we ask for, after
    the two draws of which views to hide. Two things differ by choice: AttMask's training draws another r for the number
    to reveal, and it rounds 0.7 * 360 = 251.99... down to 251 where we take 252.
    """
    attention = uniform(300, 2, 64)
    assert torch.equal(hiding.attended(attention, ratio=ratio, hint_ratio=hint_ratio, hints="none"), high)
    assert torch.equal(hiding.unattended(attention, ratio=ratio), low)

    def their_draw(batch: int, cells: int, *, count: int, generator: torch.Generator | None) -> Tensor:
        seeded = keyed(0)
        for _ in range(2):
            torch.rand(batch, generator=seeded)
        top = hiding.attended(attention, ratio=hint_ratio, hint_ratio=0.0, hints="none")
        picked = torch.multinomial(top.float(), count, generator=seeded)
        revealed = torch.zeros(batch, 64, dtype=torch.bool).scatter_(1, picked, value=True)
        return revealed.gather(1, attention.argsort(dim=1, descending=True)[:, :cells])

    monkeypatch.setattr(hiding, "random", their_draw)
    found = hiding.attended(attention, ratio=ratio, hint_ratio=hint_ratio, hints="attmask")
    assert torch.equal(found, with_hints)


# The goldens of the next five tests are of `ImageFolderMask.__getitem__` of iBOT's loader.py: 14 x 14 cells, aspect 0.3
# to 1 / 0.3, random.seed(0), then 2,000 views at each setting. Ours are boxes in three dimensions, and on a flat grid
# none meets the bound on its aspect: so we compare with grids of as many cells, or with as much room for blocks.


def sampling_error(deviation: float) -> float:
    """Four standard errors of the difference between their mean and ours, each of as many draws."""
    return 4 * deviation * math.sqrt(2 / DRAWS)


@pytest.mark.parametrize(("ratio", "mean"), [(0.2, 38.168), (0.3, 57.2405), (0.4, 77.4525), (0.5, 97.5195)])
def test_blocks_hide_what_ibots_hide_at_most(ratio: float, mean: float) -> None:
    """Both keep the budget; iBOT falls short of it by less than a cell on average, we meet it with single cells."""
    counts = {int(hiding.blocks((7, 7, 4), ratio=ratio, generator=keyed(seed)).sum()) for seed in range(20)}
    assert counts == {math.floor(mean) + 1} == {math.floor(ratio * 196)}


def boxes_of(grid: tuple[int, int, int], ratio: float, seed: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many cells each box adds of which `blocks` makes up a view, in turn; single cells are left out."""
    drawn_boxes = []
    draw_box = hiding._draw_box

    def noted(*given: Any) -> Any:
        drawn_boxes.append(draw_box(*given))
        return drawn_boxes[-1]

    with monkeypatch.context() as patched:
        patched.setattr(hiding, "_draw_box", noted)
        patched.setattr(torch, "randperm", lambda number, *, generator: torch.empty(0, dtype=torch.long))
        hidden = hiding.blocks(grid, ratio=ratio, generator=keyed(seed))
    made, added = torch.zeros(grid, dtype=torch.bool), []
    for box in drawn_boxes:
        more = made.clone()
        more[box] = True
        if made.sum() < more.sum() <= ratio * made.numel():
            added.append(int(more.sum() - made.sum()))
            made = more
    assert torch.equal(hidden, made.flatten()), "boxes and nothing else"
    return added


@pytest.mark.parametrize(
    ("ratio", "of_one", "mean", "deviation", "first", "first_deviation"),
    [
        (0.2, 0.7200, 1.2835, 0.4585, None, None),  # A budget of 1.5 smallest boxes: sides in whole cells decide.
        (0.3, 0.3585, 1.8165, 0.7239, 0.6275, 0.2021),
        (0.4, 0.2310, None, None, 0.5867, 0.2220),  # Theirs are 2.31: in a plane more of a new box is hidden already.
    ],
)
def test_boxes_are_as_many_and_as_large_as_ibots(
    ratio: float,
    of_one: float,
    mean: float | None,
    deviation: float | None,
    first: float | None,
    first_deviation: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With as much room for boxes (budget over smallest box): views of one box, boxes, the first's share of the budget.

    Theirs are counted while a smallest box of 16 cells is left, where ours end.
    """
    grid, smallest, views = (18, 18, 18), 6**3, 400
    budget = smallest * ratio * 196 / 16
    boxes = [boxes_of(grid, budget / math.prod(grid), seed, monkeypatch) for seed in range(views)]
    error = 4 * math.sqrt(1 / DRAWS + 1 / views)
    numbers = torch.tensor([len(view) for view in boxes]).double()
    firsts = torch.tensor([view[0] for view in boxes if view]).double() / budget
    assert numbers.eq(1).double().mean().item() == pytest.approx(of_one, abs=error * math.sqrt(of_one * (1 - of_one)))
    if mean is not None and deviation is not None:
        assert numbers.mean().item() == pytest.approx(mean, abs=error * deviation)
        assert numbers.std().item() == pytest.approx(deviation, abs=error * deviation / math.sqrt(2))
    if first is not None and first_deviation is not None:
        assert firsts.mean().item() == pytest.approx(first, abs=error * first_deviation)
        assert firsts.std().item() == pytest.approx(first_deviation, abs=error * first_deviation / math.sqrt(2))


def test_numbers_hidden_by_blocks_are_spread_as_ibots() -> None:
    """Each view's ratio is 0 or from 0.1 to 0.5, even chance (pred_ratio 0 0.3, pred_ratio_var 0 0.2)."""
    mean, deviation = 28.4585, 33.1754
    generator = keyed(0)
    chance, ratios = uniform(1, DRAWS) < 0.5, 0.1 + 0.4 * uniform(2, DRAWS)
    counts = torch.tensor(
        [hiding.blocks((7, 7, 4), ratio=r, generator=generator).sum() for r in (ratios * chance).tolist()]
    ).double()
    assert counts.mean().item() == pytest.approx(mean, abs=sampling_error(deviation))
    assert counts.std().item() == pytest.approx(deviation, abs=sampling_error(deviation) / math.sqrt(2))


def test_sizes_of_the_first_block_are_spread_as_ibots() -> None:
    """Volume of a view's first block over the budget, where the smallest block is 16 / 58.8 of it (ratio 0.3).

    The grid is fine, so that rounding sides to cells counts little. The aspect of a pair of axes is spread less than
    iBOT's: three pairs keep the bound at once, and a uniform point of that hexagon has sqrt(5 / 18) of its half-width.
    """
    mean, deviation, aspect_deviation = 0.6275, 0.2020, 0.6973
    grid, smallest = (18, 18, 18), 6**3
    budget, generator = int(smallest * 58.8 / 16), keyed(0)
    boxes: list[list[int]] = []
    while len(boxes) < DRAWS:
        box = hiding._draw_box(grid, smallest, budget, generator)
        sides = [axis.stop - (axis.start or 0) for axis in box]
        if 0 < math.prod(sides) <= budget:
            boxes.append(sides)
    lengths = torch.tensor(boxes).double()
    shares = lengths.prod(dim=1) / budget
    assert shares.mean().item() == pytest.approx(mean, abs=sampling_error(deviation))
    assert shares.std().item() == pytest.approx(deviation, abs=sampling_error(deviation) / math.sqrt(2))
    aspects = (lengths / lengths.roll(1, dims=1)).log()
    assert aspects.abs().max().item() <= math.log(1 / 0.3)
    assert aspects.std(dim=0).tolist() == pytest.approx([math.sqrt(5 / 18) * math.log(3.3)] * 3, abs=0.04)
    assert aspects.std(dim=0).max().item() < aspect_deviation


def test_share_of_the_budget_that_blocks_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden cells over the budget before single cells fill it up, at ratio 0.3.

    With the room iBOT has for blocks, ours reach less: they end where less than a smallest block is left, while iBOT
    goes on with smaller ones. On the paper's grid, where the smallest block is small, they reach as much.
    """
    theirs = 0.9735

    def no_cells(number: int, *, generator: torch.Generator) -> Tensor:
        return torch.empty(0, dtype=torch.long)

    monkeypatch.setattr(torch, "randperm", no_cells)

    def reached(grid: tuple[int, int, int], ratio: float) -> float:
        views = [hiding.blocks(grid, ratio=ratio, generator=keyed(seed)) for seed in range(500)]
        return torch.stack(views).double().mean().item() / ratio

    same_room = 16 / 58.8
    assert 1 - same_room < reached((12, 12, 12), 4**3 / same_room / 12**3) < theirs
    assert reached((8, 8, 8), 0.3) == pytest.approx(theirs, abs=0.01)
