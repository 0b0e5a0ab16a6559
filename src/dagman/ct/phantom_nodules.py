"""Lung nodules of the phantom: benign and malignant differ in their rim, not in their size or mean HU."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from dagman.ct.phantom_canvas import LABELS, Canvas, Slices

RADIUS_MM = (5.0, 14.0)


@dataclass(frozen=True, kw_only=True)
class Nodule:
    """Where a nodule lies, how large it is, and what it is."""

    centre_mm: tuple[float, float, float]
    """RAS+ world coordinates."""
    radius_mm: float
    """Radius of the ball of the same volume."""
    malignant: bool


def draw_directions(rng: np.random.Generator, number: int) -> Float[np.ndarray, "number 3"]:
    """Random unit vectors."""
    vectors = rng.standard_normal((number, 3))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)  # type: ignore[no-any-return]


def place(
    canvas: Canvas, depth: Float[np.ndarray, "x y z"], radius_mm: float, rng: np.random.Generator
) -> tuple[float, float, float]:
    """A random place in a lung at which a nodule fits; the deepest place where none does.

    Args:
        canvas: The scan so far.
        depth: Distance to the surface of the lungs in mm, negative inside.
        radius_mm: The nodule's.
        rng: Draws the place.
    """
    lungs = np.isin(canvas.labels, (LABELS["lung_left"], LABELS["lung_right"]))
    edge = int(np.ceil(1.6 * radius_mm / min(canvas.spacing_mm)))
    lungs = np.pad(lungs[edge:-edge, edge:-edge, edge:-edge], edge)
    for point in canvas.to_scanner(rng.uniform((-125, -90, -60), (125, 90, 175), (1000, 3))):
        index = np.rint((point - canvas.origin_mm) / canvas.spacing_mm).astype(int)
        inside = bool((index >= 0).all() and (index < lungs.shape).all())
        if inside and lungs[tuple(index)] and depth[tuple(index)] < -1.15 * radius_mm - 2:
            return float(point[0]), float(point[1]), float(point[2])
    deepest = np.unravel_index(int(np.argmin(np.where(lungs, depth, 0))), lungs.shape)
    x, y, z = np.array(deepest) * canvas.spacing_mm + canvas.origin_mm
    return float(x), float(y), float(z)


def paint(canvas: Canvas, nodule: Nodule, rng: np.random.Generator) -> tuple[Slices, Bool[np.ndarray, "x y z"]]:
    """Paint a nodule into a lung.

    Returns:
        The box that holds it and, in that box, the voxels of its solid part.
    """
    reach = 2.2 * nodule.radius_mm + 4
    centre = np.array(nodule.centre_mm)
    box = canvas.between(centre - reach, centre + reach)
    offsets = np.stack(
        np.meshgrid(
            *(axis[part] - middle for axis, part, middle in zip(canvas.axes, box, centre, strict=True)), indexing="ij"
        ),
        axis=-1,
    )
    away = np.linalg.norm(offsets, axis=-1)
    direction = offsets / np.maximum(away, 1e-3)[..., None]
    draw = _malignant if nodule.malignant else _benign
    surface, spicules, halo_mm, hu = draw(nodule.radius_mm, offsets, away, direction, rng)
    distance = away - surface
    lung = np.isin(canvas.labels[box], (LABELS["lung_left"], LABELS["lung_right"], LABELS["vessel"]))
    away_from_lung = np.where(lung, -99.0, 99.0)
    if halo_mm:
        ground_glass = 230 * np.exp(-((np.clip(distance, 0, None) / halo_mm) ** 2)) * (distance < 2.5 * halo_mm)
        canvas.hu[box] += np.where(lung & (canvas.hu[box] < -450), ground_glass, 0)
    solid = np.minimum(distance, spicules)
    before = canvas.labels[box].copy()
    canvas.paint(box, np.maximum(solid, away_from_lung), hu, "nodule")
    kept = distance < 0  # spicules are painted, but no reader outlines them
    canvas.labels[box] = np.where((canvas.labels[box] == LABELS["nodule"]) & ~kept, before, canvas.labels[box])
    return box, canvas.labels[box] == LABELS["nodule"]


Parts = tuple[np.ndarray, np.ndarray, float, np.ndarray]


def _benign(
    radius_mm: float, offsets: np.ndarray, away: np.ndarray, direction: np.ndarray, rng: np.random.Generator
) -> Parts:
    """Smooth, nearly round, sharply bounded; a third calcified, a fifth lies in a faint halo of infection."""
    ratio = np.exp(rng.uniform(-0.12, 0.12, 3))
    ratio /= np.cbrt(ratio.prod())
    surface = radius_mm / np.linalg.norm(direction / ratio, axis=-1)
    hu = np.full(away.shape, rng.uniform(0, 80))
    if rng.random() < 0.3:
        grain = rng.uniform(0.25, 0.6) * radius_mm
        spot = np.linalg.norm(offsets - rng.uniform(-0.2, 0.2, 3) * radius_mm, axis=-1)
        hu += rng.uniform(120, 420) / (1 + np.exp((spot - grain) / 0.8))
    halo_mm = float(rng.uniform(1.0, 2.5)) if rng.random() < 0.2 else 0.0
    return surface, np.full(away.shape, 99.0), halo_mm, hu


def _malignant(
    radius_mm: float, offsets: np.ndarray, away: np.ndarray, direction: np.ndarray, rng: np.random.Generator
) -> Parts:
    """Lobulated and spiculated, uneven inside, often in a ground-glass halo, sometimes hollow."""
    lobes = draw_directions(rng, int(rng.integers(7, 11)))
    heights = rng.uniform(0.3, 1) * rng.uniform(0.3, 0.6, len(lobes)) * rng.choice([1.0, 1.0, -0.6], len(lobes))
    bumps = np.exp(9 * (direction @ lobes.T - 1)) @ heights
    probe = draw_directions(rng, 600)
    volume = np.mean((1 + np.exp(9 * (probe @ lobes.T - 1)) @ heights) ** 3)
    surface = radius_mm * (1 + bumps) / np.cbrt(volume)
    spicules = np.full(away.shape, 99.0)
    for axis in draw_directions(rng, int(rng.integers(3, 12))):
        length = radius_mm * rng.uniform(1.35, 1.9)
        along = offsets @ axis
        aside = np.sqrt(np.maximum(away**2 - along**2, 0))
        width = 1.7 * np.clip(1 - along / length, 0, 1) + 0.35
        spicules = np.minimum(spicules, np.where((along > 0) & (along < length), aside - width, 99.0))
    hu = np.full(away.shape, rng.uniform(-5, 85))
    for spot in draw_directions(rng, 5) * radius_mm * rng.uniform(0.2, 0.9, (5, 1)):
        hu += rng.uniform(-55, 40) * np.exp(-np.sum((offsets - spot) ** 2, -1) / (0.35 * radius_mm) ** 2)
    kind = rng.random()
    if kind < 0.35:
        core = away - rng.uniform(0.3, 0.5) * radius_mm
        hu = np.where(core < 0, -700.0 if kind < 0.08 else 5.0, hu)
    halo_mm = float(rng.uniform(1.5, 4.0)) if rng.random() < 0.5 else 0.0
    return surface, spicules, halo_mm, hu
