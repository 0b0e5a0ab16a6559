"""What the phantom is painted on: HU, labels, and where in an average patient each voxel lies."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from threadpoolctl import threadpool_limits

NAMES = {
    1: "body",
    2: "lung_left",
    3: "lung_right",
    4: "heart",
    5: "aorta",
    6: "liver",
    7: "spleen",
    8: "stomach",
    9: "kidney_left",
    10: "kidney_right",
    11: "bone",
    12: "trachea",
    13: "vessel",
    14: "nodule",
}
LABELS = {name: label for label, name in NAMES.items()}
Slices = tuple[slice, slice, slice]
Field = Float[np.ndarray, "x y z"]
Number = int | float
Point = tuple[Number, Number, Number]


class Canvas:
    """A CT being painted: HU, labels, and where in the average patient each voxel lies."""

    def __init__(self, shape: tuple[int, int, int], spacing_mm: Point, height_mm: float) -> None:
        self.spacing_mm = spacing_mm
        self.hu = np.full(shape, -1000.0, np.float32)
        self.labels = np.zeros(shape, np.uint8)
        half = [(size - 1) / 2 * step for size, step in zip(shape, spacing_mm, strict=True)]
        offset = (0.0, 0.0, height_mm)
        self.origin_mm = np.array([middle - reach for middle, reach in zip(offset, half, strict=True)])
        self.axes = [
            (start + step * np.arange(size)).astype(np.float32)
            for start, step, size in zip(self.origin_mm, spacing_mm, shape, strict=True)
        ]
        grid = np.meshgrid(*self.axes, indexing="ij")
        self.patient = [np.ascontiguousarray(axis) for axis in grid]
        self.world = np.eye(2)
        self.shift = np.zeros(2)
        self.stretch = np.ones(3)

    def place(self, rng: np.random.Generator, scan: np.random.Generator, stretch: Point) -> None:
        """Lay the patient down: stretched and warped (`rng`), turned about the long axis and shifted (`scan`)."""
        angle = np.radians(scan.uniform(-6, 6))
        self.world = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        self.shift = np.array([scan.uniform(-6, 6), scan.uniform(6, 14)])
        self.stretch = np.asarray(stretch)
        x, y = self.axes[0][:, None, None] - self.shift[0], self.axes[1][None, :, None] - self.shift[1]
        cos, sin = float(np.cos(angle)), float(np.sin(angle))
        straight = (cos * x + sin * y, cos * y - sin * x, self.axes[2][None, None, :])
        for axis, (line, size) in enumerate(zip(straight, stretch, strict=True)):
            self.patient[axis] = (line / size + 2.2 * self.smooth(rng, 55.0)).astype(np.float32)

    def smooth(self, rng: np.random.Generator, length_mm: float) -> Field:
        """A random field of unit spread that varies over `length_mm`."""
        weights = []
        for axis in self.axes:
            knots = np.arange(axis[0] - 2 * length_mm, axis[-1] + 2 * length_mm, length_mm)
            basis = np.exp(-0.5 * ((axis[:, None] - knots) / (0.7 * length_mm)) ** 2)
            basis[basis < 1e-30] = 0  # too little to move a bit, and slow to multiply where it is denormal
            weights.append((basis / np.linalg.norm(basis, axis=1, keepdims=True)).astype(np.float32))
        x, y, z = weights
        field = rng.standard_normal((x.shape[1], y.shape[1], z.shape[1]), dtype=np.float32)
        with threadpool_limits(1, "blas"):  # the products are small: threads would wait for one another
            return (y @ np.tensordot(x, field, axes=1)) @ z.T  # type: ignore[no-any-return]

    def around(self, low: Point | np.ndarray, high: Point | np.ndarray) -> Slices:
        """Voxels that may hold the patient's box from `low` to `high` (warp and rotation allowed for)."""
        corners = np.array([[(low, high)[i][0], (low, high)[j][1]] for i in (0, 1) for j in (0, 1)])
        plane = corners * self.stretch[:2] @ self.world.T + self.shift
        bottom = [*plane.min(0), low[2] * self.stretch[2]]
        top = [*plane.max(0), high[2] * self.stretch[2]]
        return self.between(np.array(bottom) - 9, np.array(top) + 9)

    def to_scanner(self, points: Float[np.ndarray, "points 3"]) -> Float[np.ndarray, "points 3"]:
        """Points of the average patient in the scanner's mm (RAS+ world), but for the warp."""
        placed = points * self.stretch
        placed[:, :2] = placed[:, :2] @ self.world.T + self.shift
        return placed

    def label_at(self, point_mm: Float[np.ndarray, "3"]) -> int:
        """Label of the voxel at a point of the scanner; 0 outside the scan."""
        index = np.rint((point_mm - self.origin_mm) / self.spacing_mm).astype(int)
        if (index < 0).any() or (index >= self.labels.shape).any():
            return 0
        return int(self.labels[tuple(index)])

    def between(self, low: np.ndarray, high: np.ndarray) -> Slices:
        """Voxels between two points of the scanner, in mm."""
        first = np.floor((low - self.origin_mm) / self.spacing_mm).astype(int)
        last = np.ceil((high - self.origin_mm) / self.spacing_mm).astype(int) + 1
        x, y, z = (
            slice(int(np.clip(start, 0, size)), int(np.clip(stop, 0, size)))
            for start, stop, size in zip(first, last, self.hu.shape, strict=True)
        )
        return x, y, z

    def at(self, box: Slices) -> tuple[Field, Field, Field]:
        """Patient coordinates (x, y, z) of the voxels in `box`, in mm."""
        x, y, z = (axis[box] for axis in self.patient)
        return x, y, z

    def paint(
        self, box: Slices, distance: Field, hu: Number | Float[np.ndarray, "#x #y #z"], label: str | None = None
    ) -> None:
        """Fill where `distance` (mm, negative inside) is below zero; voxels on the edge are filled in part."""
        cover = np.clip(0.5 - distance / float(np.mean(self.spacing_mm)), 0, 1)
        self.hu[box] += cover * (hu - self.hu[box])
        if label is not None:
            self.labels[box][cover > 0.5] = LABELS[label]

    def ellipsoid(self, centre: Point, radii: Point, turn: Number = 0.0) -> tuple[Slices, Field]:
        """Voxels round an ellipsoid of the patient, turned by `turn` radians in its axial plane, and distances."""
        reach = np.array(
            [max(radii[0], radii[1]) if turn else radii[0], max(radii[:2]) if turn else radii[1], radii[2]]
        )
        box = self.around(np.array(centre) - reach, np.array(centre) + reach)
        return box, self.oval(box, centre, radii, turn)

    def oval(self, box: Slices, centre: Point, radii: Point, turn: Number) -> Field:
        """Rough distance in mm to an ellipsoid of the patient, at the voxels of `box`."""
        x, y, z = self.at(box)
        u, v, w = x - centre[0], y - centre[1], z - centre[2]
        cos, sin = float(np.cos(turn)), float(np.sin(turn))
        size = np.sqrt(
            ((cos * u + sin * v) / radii[0]) ** 2 + ((cos * v - sin * u) / radii[1]) ** 2 + (w / radii[2]) ** 2
        )
        return (size - 1) * min(radii)

    def tube(self, points: Sequence[Point], radii: Sequence[Number], hu: Number, label: str | None = None) -> None:
        """Paint a tube of the patient through `points`, its radius going linearly from point to point."""
        ends = np.array(points, np.float64)
        for first, last, r0, r1 in zip(ends[:-1], ends[1:], radii[:-1], radii[1:], strict=True):
            reach = max(r0, r1)
            box = self.around(np.minimum(first, last) - reach, np.maximum(first, last) + reach)
            self.paint(box, segment_distance(self.at(box), first, last, r0, r1), hu, label)


def segment_distance(
    point: "tuple[np.ndarray, np.ndarray, np.ndarray]", first: np.ndarray, last: np.ndarray, r0: Number, r1: Number
) -> np.ndarray:
    """Distance in mm to a round cone from `first` (radius `r0`) to `last` (radius `r1`), negative inside."""
    axis = (last - first).astype(np.float32)
    u, v, w = (coordinate - np.float32(start) for coordinate, start in zip(point, first, strict=True))
    share = np.clip((u * axis[0] + v * axis[1] + w * axis[2]) / max(float(axis @ axis), 1e-6), 0, 1)
    away = np.sqrt((u - share * axis[0]) ** 2 + (v - share * axis[1]) ** 2 + (w - share * axis[2]) ** 2)
    return away - (r0 + share * (r1 - r0))  # type: ignore[no-any-return]
