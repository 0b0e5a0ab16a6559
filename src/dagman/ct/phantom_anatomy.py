"""The normal anatomy of the phantom: organs painted one over the other, each from a rough signed distance in mm.

Organs are written in the coordinates of an average patient (x right, y front, z head, in mm; the origin lies in the
middle of the chest at the height of the diaphragm). A patient is that anatomy stretched, turned, shifted and gently
warped, so no two agree and no surface is an ellipsoid. Edges are blended by the share of the voxel that is covered:
partial volume.
"""

from dataclasses import dataclass

import numpy as np

from dagman.ct.phantom_canvas import LABELS, Canvas, Field, Number, Point, Slices, segment_distance

FAT_HU, MUSCLE_HU = -105.0, 55.0
CAGE_X_MM, CAGE_Y_MM = 126.0, 88.0
SPINE_Y_MM = -62.0


@dataclass(frozen=True, kw_only=True)
class Patient:
    """What makes one patient differ from another, and one contrast phase from another."""

    stretch: Point
    """Size along (x, y, z), relative to the average patient."""
    fat_mm: float
    muscle_mm: float
    breast_mm: float
    """Height of the breasts; 0 for none."""
    dome_mm: float
    """Height of the right diaphragm (breath-hold)."""
    emphysema_hu: float
    """Added to the lungs."""
    heart: float
    """Size of the heart, 1 on average."""
    blood_hu: float
    venous_hu: float
    parenchyma_hu: float
    """Enhancement of liver, spleen and kidneys."""


def draw_patient(rng: np.random.Generator, scan: np.random.Generator) -> Patient:
    """Draw a patient from `rng` and the day's breath-hold and contrast phase from `scan`."""
    phase = scan.choice(["native", "arterial", "venous"], p=[0.45, 0.2, 0.35])
    blood, venous, parenchyma = {
        "native": (42.0, 42.0, 0.0),
        "arterial": (240.0, 110.0, 12.0),
        "venous": (150.0, 145.0, 45.0),
    }[str(phase)]
    size = rng.uniform(0.94, 1.05)
    return Patient(
        stretch=(size * rng.uniform(0.96, 1.03), size * rng.uniform(0.93, 1.03), size * rng.uniform(0.93, 1.07)),
        fat_mm=rng.uniform(6, 20),
        muscle_mm=rng.uniform(8, 13),
        breast_mm=rng.uniform(14, 30) if rng.random() < 0.45 else 0.0,
        dome_mm=rng.uniform(-4, 8) + scan.uniform(-6, 6),
        emphysema_hu=rng.uniform(-35, 35),
        heart=rng.uniform(0.9, 1.12),
        blood_hu=blood + scan.uniform(-12, 12),
        venous_hu=venous + scan.uniform(-12, 12),
        parenchyma_hu=parenchyma * scan.uniform(0.7, 1.2),
    )


def _oval(x: np.ndarray, y: np.ndarray, a: "float | np.ndarray", b: "float | np.ndarray") -> np.ndarray:
    """Rough distance in mm to the superellipse |x/a|^2.5 + |y/b|^2.5 = 1."""
    u, v = np.abs(x / a), np.abs(y / b)
    size = (u * u * np.sqrt(u) + v * v * np.sqrt(v) + 1e-9) ** np.float32(0.4)
    return np.sqrt(x * x + y * y) * (1 - 1 / size)  # type: ignore[no-any-return]


def _bump(value: np.ndarray, middle: Number, width: Number) -> np.ndarray:
    return np.exp(-(((value - middle) / width) ** 2))


@dataclass(frozen=True, eq=False)
class Chest:
    """Distances that several organs share, over the whole scan, in mm."""

    cage: Field
    """To the outside of the rib cage."""
    body: Field
    """To the skin."""
    above: Field
    """Height above the diaphragm."""


def paint_body(canvas: Canvas, patient: Patient, rng: np.random.Generator) -> Chest:
    """Skin, subcutaneous fat, muscle and chest wall, and the fat that fills the inside."""
    x, y, z = canvas.patient
    height = canvas.axes[2] / patient.stretch[2]
    taper = np.sqrt(np.clip(1 - (np.clip(height - 35, 0, None) / 130) ** 2, 0.05, 1)).astype(np.float32)
    cage = _oval(x, y, CAGE_X_MM * taper, CAGE_Y_MM * (0.35 + 0.65 * taper))
    wall = _oval(x, y, CAGE_X_MM, CAGE_Y_MM)
    angle = np.arctan2(np.abs(x[:, :, :1]), y[:, :, :1])  # 0 in front, pi behind
    thick = patient.muscle_mm * (0.7 + 0.9 * _bump(angle, 2.75, 0.45))
    chest = 1 / (1 + np.exp(-(height - 45) / 15))
    thick = (thick + 0.9 * patient.muscle_mm * _bump(angle, 0.65, 0.4) * chest).astype(np.float32)
    fat = patient.fat_mm * (0.75 + 0.5 * _bump(angle, 1.5, 0.6) + 0.5 * _bump(angle, 0.2, 0.5) * (1 - chest))
    body = wall - (thick + fat).astype(np.float32)
    whole: Slices = (slice(None), slice(None), slice(None))
    if patient.breast_mm:
        for side in (-1.0, 1.0):
            box, breast = canvas.ellipsoid((side * 66, 84, 55), (50, 22 + patient.breast_mm, 48))
            body[box] = np.minimum(body[box], breast)
    texture = canvas.smooth(rng, 9.0)
    canvas.paint(whole, body - 1.5, 15.0, "body")
    canvas.paint(whole, body, FAT_HU + 8 * texture)
    if patient.breast_mm:
        _paint_glands(canvas, patient, texture)
    strands = np.clip(1.1 * canvas.smooth(rng, 12.0) - 0.9, 0, 1)
    canvas.paint(whole, wall - thick, MUSCLE_HU - 110 * strands + 4 * texture)
    planes = np.abs(wall - 0.5 * thick) - 0.8
    canvas.paint(whole, np.maximum(planes, cage + 3), -60.0)
    canvas.paint(whole, cage + 11, FAT_HU + 10 * texture)
    return Chest(cage, body, z - _diaphragm(x, y, patient))


def _paint_glands(canvas: Canvas, patient: Patient, texture: Field) -> None:
    for side in (-1.0, 1.0):
        box, gland = canvas.ellipsoid((side * 66, 92, 52), (30, 6 + patient.breast_mm, 28))
        canvas.paint(box, np.maximum(gland, -9 * texture[box] - 3), 20.0)


def _diaphragm(x: np.ndarray, y: np.ndarray, patient: Patient) -> np.ndarray:
    right = patient.dome_mm - 38 * ((x - 62) / 62) ** 2 - 42 * ((y - 8) / 80) ** 2
    left = patient.dome_mm - 11 - 38 * ((x + 62) / 62) ** 2 - 42 * ((y - 8) / 80) ** 2
    middle = patient.dome_mm - 16 - 35 * ((y - 20) / 80) ** 2 - 20 * (x / 60) ** 2
    return np.clip(np.maximum(np.maximum(right, left), middle), -62, None)


def paint_lungs(canvas: Canvas, chest: Chest, patient: Patient, rng: np.random.Generator) -> Field:
    """Both lungs over the mediastinum, with their gradient, texture and fissures; the depth inside a lung in mm."""
    x, y, z = canvas.patient
    whole: Slices = (slice(None), slice(None), slice(None))
    canvas.paint(whole, np.maximum(chest.cage + 11, np.abs(chest.above - 1.5) - 2), 45.0)  # the diaphragm
    middle = 13 + 17 * _bump(y, -18, 42) + 3 * _bump(y, SPINE_Y_MM, 25)
    inside = np.maximum(chest.cage + 12.5, 4 - chest.above)
    inside = np.maximum(inside, z - 158)
    depth = np.full_like(x, 99.0)
    base = -858 + patient.emphysema_hu - 0.45 * y + 14 * canvas.smooth(rng, 18.0) + 9 * canvas.smooth(rng, 6.0)
    for name, side, inset in (("lung_left", -1.0, 5.0), ("lung_right", 1.0, -1.0)):
        lung = np.maximum(inside, middle - side * x + inset)
        depth = np.minimum(depth, lung)
        oblique = np.abs(0.72 * (y + 8) - 0.69 * (z - 62) + 6 * np.sin(x / 30)) - 0.35
        hu = base + 150 * np.exp(-(np.clip(oblique, 0, 9) ** 2))
        canvas.paint(whole, lung, hu, name)
    return depth


def paint_bones(canvas: Canvas, chest: Chest, rng: np.random.Generator) -> None:
    """Ribs, sternum, shoulder blades, collar bones and the spine, cortex round marrow."""
    dense = float(rng.uniform(0.8, 1.2))
    x, y, z = canvas.patient
    angle = np.arctan2(np.abs(x[:, :, :1]), -y[:, :, :1])  # 0 behind, pi in front
    slope = (52 * (1 - np.cos(np.clip(angle, 0, 2.3))) - 30 * np.clip(angle - 2.3, 0, None)).astype(np.float32)
    turn = z + slope
    ribs = np.hypot((chest.cage + 5.5) / 3.6, (turn - 27 * np.round(turn / 27)) / 6.2)
    ribs = (ribs - 1) * 3.6
    ribs = np.maximum(ribs, -turn - 52 * (angle < 2.3) - 20)
    whole: Slices = (slice(None), slice(None), slice(None))
    bony = 1 / (1 + np.exp((angle - 2.55) / 0.04))  # cartilage near the sternum
    canvas.paint(whole, ribs, (90 + bony * (650 * dense - 90)).astype(np.float32), "bone")
    canvas.paint(whole, ribs + 2.0, (80 + bony * (190 * dense - 80)).astype(np.float32))
    blade = np.abs(chest.cage - 11 - 0.1 * (z - 100)) - 2.6
    blade = np.maximum(blade, np.maximum(np.abs(angle - 0.95) * 85 - 32, np.abs(z - 110) - 55))
    canvas.paint(whole, blade, 480.0 * dense, "bone")
    box = canvas.around((-24, 60, 25), (24, 110, 150))
    u, _, w = canvas.at(box)
    sternum = np.maximum(np.hypot(u / 17, (chest.cage[box] + 5) / 5.5) * 5.5 - 5.5, np.abs(w - 88) - 56)
    canvas.paint(box, sternum, 420 * dense, "bone")
    canvas.paint(box, sternum + 2, 160 * dense)
    for side in (-1.0, 1.0):
        canvas.tube([(side * 14, 48, 150), (side * 60, 50, 162), (side * 110, 8, 172)], [8, 6, 7], 520 * dense, "bone")
    _paint_spine(canvas, dense)


def _paint_spine(canvas: Canvas, dense: float) -> None:
    box = canvas.around((-42, SPINE_Y_MM - 62, -400), (42, SPINE_Y_MM + 26, 400))
    x, y, z = canvas.at(box)
    v = y - SPINE_Y_MM
    level = z - 27 * np.round(z / 27)
    outline = np.maximum(np.hypot(x / 20, v / 16) * 18 - 18, -v - 12 - 0.012 * x * x)
    body = np.maximum(outline + 0.008 * (13 - np.abs(level)) ** 2, np.abs(level) - 11)
    canvas.paint(box, outline, 85.0, "bone")  # discs
    canvas.paint(box, body, 380 * dense, "bone")
    canvas.paint(box, body + 2.2, 175 * dense)
    arch = np.abs(np.hypot(x / 1.2, v + 25) - 11.5) - 3
    arch = np.maximum(arch, np.maximum(v + 16, np.abs(level + 2) - 9))
    spinous = np.maximum(np.abs(x) - 3.6, np.maximum(np.abs(v + 50 + 0.5 * level) - 12, np.abs(level + 4) - 8))
    wings = np.hypot(v + 26 + 0.15 * np.abs(x), level - 2) - 5.5
    wings = np.maximum(wings, np.maximum(np.abs(x) - 34, 12 - np.abs(x)))
    posterior = np.minimum(np.minimum(arch, spinous), wings)
    canvas.paint(box, posterior, 480 * dense, "bone")
    canvas.paint(box, posterior + 2.4, 230 * dense)
    canvas.paint(box, np.hypot(x / 1.2, v + 25) - 8, 12.0)
    canvas.paint(box, np.hypot(x / 1.3, v + 25) - 5, 38.0)


def paint_chest_organs(canvas: Canvas, chest: Chest, patient: Patient) -> None:
    """Heart and its chambers, great vessels, gullet, windpipe and main bronchi."""
    blood, venous, size = patient.blood_hu, patient.venous_hu, patient.heart
    middle = (-22.0, 22.0, 36.0 + 0.5 * patient.dome_mm)
    radii = (58 * size, 44 * size, 46 * size)
    low = 2 - chest.above
    box, heart = canvas.ellipsoid(middle, radii, -0.55)
    canvas.paint(box, np.maximum(np.maximum(heart - 4, low[box]), chest.cage[box] + 14), FAT_HU)
    canvas.paint(
        box, np.maximum(np.maximum(heart, low[box] + 2), chest.cage[box] + 16), 55 + 0.3 * (blood - 40), "heart"
    )
    chambers: list[tuple[Point, Point, float]]
    chambers = [((-44, 20, 30), (27, 17, 25), blood), ((-14, 42, 36), (26, 13, 25), venous)]
    chambers += [((14, 14, 44), (17, 19, 24), venous), ((-14, -8, 50), (25, 13, 18), blood)]
    for centre, extent, hu in chambers:
        moved = (centre[0], centre[1], centre[2] + 0.5 * patient.dome_mm)
        canvas.paint(box, np.maximum(canvas.oval(box, moved, extent, -0.5), heart + 5), hu)
    canvas.tube([(24, 2, 155), (25, 4, 110), (22, 8, 58)], [8, 9, 10], venous, "vessel")
    canvas.tube([(-18, 28, 68), (-20, 18, 86), (-12, -6, 90)], [13, 13, 11], venous, "vessel")
    for side in (-1.0, 1.0):
        canvas.tube([(-12, -6, 90), (side * 30, -12, 88), (side * 48, -16, 76)], [11, 9, 6], venous, "vessel")
        canvas.tube([(-12, -8, 54), (side * 38, -14, 62)], [8, 5], blood, "vessel")
    canvas.tube([(-5, -38, 170), (-6, -40, 60), (-16, -28, 0), (-30, -6, -22)], [6, 6.5, 7, 8], 40.0)
    arch: list[Point] = [(2, 16, 62), (12, 22, 86), (10, 18, 108), (0, 2, 121), (-12, -20, 119), (-20, -40, 104)]
    canvas.tube(
        [*arch, (-20, -42, 20), (-10, -36, -60), (-6, -36, -130)], [15, 15, 15, 14, 13, 13, 12, 10, 9], blood, "aorta"
    )
    for x in (9.0, -6.0, -17.0):
        canvas.tube([(x, 0.4 * x, 116), (1.5 * x, 4, 172)], [5, 4.5], blood, "vessel")
    _paint_airways(canvas)


def _paint_airways(canvas: Canvas) -> None:
    main: list[Point] = [(3, -10, 180), (2, -18, 130), (0, -22, 97)]
    sides: list[tuple[list[Point], list[Number]]] = [(main, [9, 8.5, 8.5])]
    for side, drop in ((1.0, 26.0), (-1.0, 22.0)):
        hilum: Point = (side * 40, -26, 97 - drop)
        sides.append(([main[-1], hilum], [7.5, 5.5]))
        sides.append(([hilum, (side * 56, -36, 50)], [5.0, 3.5]))
        sides.append(([hilum, (side * 62, 4, 72)], [4.0, 2.5]))
        sides.append(([(side * 30, -24, 80), (side * 56, -14, 112)], [4.5, 2.5]))
    for points, radii in sides:
        canvas.tube(points, [radius + 1.6 for radius in radii], 20.0)
    for points, radii in sides:
        canvas.tube(points, radii, -990.0, "trachea")


def paint_abdomen(canvas: Canvas, chest: Chest, patient: Patient, rng: np.random.Generator) -> None:
    """Liver, spleen, stomach with its air, kidneys, bowel and the muscles beside the spine."""
    plus = patient.parenchyma_hu
    _paint_bowel(canvas, rng)
    box = canvas.around((-75, -90, -140), (125, 90, 30))
    x, y, z = canvas.at(box)
    ceiling = np.maximum(chest.cage[box] + 13, chest.above[box] + 2)
    texture, uneven = canvas.smooth(rng, 7.0), 5 * canvas.smooth(rng, 24.0)[box]
    lower = 4 - 104 / (1 + np.exp(-(x - 4 + 0.75 * y) / 15)) + 0.2 * y + uneven
    liver = np.maximum(np.maximum(ceiling, 0.8 * (lower - z)), 0.8 * (-58 - x + 0.35 * y))
    liver = np.maximum(liver, 0.8 * (-(y + 34) - 1.1 * np.clip(x - 28, 0, None)) + 0.4 * uneven)
    canvas.paint(box, liver, rng.uniform(52, 64) + 0.95 * plus + 3 * texture[box], "liver")
    veins = patient.venous_hu if plus > 20 else 45.0
    for end in ((92, -8, -18), (70, 40, -12), (60, -30, -50), (25, 48, -14), (98, 10, -48)):
        canvas.tube([(20, -22, -8), (0.5 * end[0] + 8, 0.5 * end[1], end[2]), end], [4.5, 3.2, 1.2], veins)
    canvas.tube([(20, -26, 24), (21, -28, -40), (16, -30, -130)], [10, 10, 10], patient.venous_hu, "vessel")
    low, left = rng.uniform(-8, 8), rng.uniform(-6, 4)
    box, spleen = canvas.ellipsoid((-82 + left, -36, -38 + low), (27, 42, 46), 0.45)
    cover = np.maximum(chest.cage[box] + 13, chest.above[box] + 2)
    canvas.paint(box, np.maximum(spleen, cover), 50 + 1.5 * plus + 2 * texture[box], "spleen")
    _paint_stomach(canvas, chest, texture, rng)
    for side, name in ((-1.0, "kidney_left"), (1.0, "kidney_right")):
        centre: Point = (side * 54, SPINE_Y_MM + 14, -78 - 8 * (side > 0) + float(rng.uniform(-8, 8)))
        box, kidney = canvas.ellipsoid(centre, (27, 24, 46), 0.5 * side)
        canvas.paint(box, kidney - 7, FAT_HU)
        canvas.paint(box, kidney, 34 + 3.2 * plus, name)
        canvas.paint(box, np.maximum(kidney + 8, -2.5 * texture[box] - 0.5), 30 + 2.2 * plus)
        hilum: Point = (centre[0] - side * 9, centre[1] + 6, centre[2])
        box, sinus = canvas.ellipsoid(hilum, (11, 7, 19), 0.5 * side)
        canvas.paint(box, sinus, -70.0)
        canvas.tube([(side * 22, SPINE_Y_MM + 4, -50), (side * 34, SPINE_Y_MM + 4, -140)], [11, 17], MUSCLE_HU)


def _paint_stomach(canvas: Canvas, chest: Chest, texture: Field, rng: np.random.Generator) -> None:
    size = rng.uniform(0.85, 1.1)
    box, stomach = canvas.ellipsoid((-52, 26, -36), (36 * size, 32 * size, 36 * size), 0.5)
    stomach = np.maximum(stomach, np.maximum(chest.cage[box] + 15, chest.above[box] + 4))
    canvas.paint(box, stomach, 45.0, "stomach")
    filling = float(rng.uniform(5, 35))
    canvas.paint(box, stomach + 4, filling + 12 * texture[box])
    surface = float(rng.uniform(24, 44)) - canvas.at(box)[1]  # the patient lies on the back: air rises to the front
    canvas.paint(box, np.maximum(stomach + 4, surface), -960.0)


def _paint_bowel(canvas: Canvas, rng: np.random.Generator) -> None:
    for _ in range(12):
        point = np.array([rng.uniform(-70, 70), rng.uniform(15, 55), rng.uniform(-135, -70)])
        path = [point]
        for _ in range(4):
            path.append(np.clip(path[-1] + rng.uniform(-30, 30, 3), [-90, 5, -150], [85, 62, -68]))
        points: list[Point] = [(float(p[0]), float(p[1]), float(p[2])) for p in path]
        radius = float(rng.uniform(9, 14))
        content = -900.0 if rng.random() < 0.3 else float(rng.uniform(5, 60))
        canvas.tube(points, [radius] * 5, 45.0)
        canvas.tube(points, [radius - 3] * 5, content)
    canvas.tube([(34, -4, -70), (0, 4, -62), (-50, -22, -48)], [11, 9, 8], 45.0)


def paint_lung_trees(canvas: Canvas, patient: Patient, rng: np.random.Generator) -> None:
    """Vessels that branch from each hilum to random points of its lung."""
    for side, name in ((-1.0, "lung_left"), (1.0, "lung_right")):
        hilum, *ends = canvas.to_scanner(
            np.concatenate([[[side * 44, -16, 76]], rng.uniform((-125, -90, -60), (125, 90, 175), (3600, 3))])
        )
        place = np.array([end for end in ends if canvas.label_at(end) == LABELS[name]][:430])
        _paint_tree(canvas, hilum, place, patient.venous_hu)


def _paint_tree(canvas: Canvas, root: np.ndarray, ends: np.ndarray, hu: float) -> None:
    """Join each end to the nearest branch; by Murray's law a parent's cubed radius is the sum of its children's."""
    place = np.concatenate([root[None], ends])
    length = np.linalg.norm(place - root, axis=1)
    order = np.argsort(length, kind="stable")
    place, length = place[order], length[order]
    parent = np.zeros(len(place), int)
    for node in range(1, len(place)):
        away = np.linalg.norm(place[:node] - place[node], axis=1)
        parent[node] = int(np.argmin(away + 0.25 * length[:node]))
    volume = np.full(len(place), 0.85**3)
    for node in range(len(place) - 1, 0, -1):
        volume[parent[node]] += 0.8 * volume[node]
    for node, radius in enumerate(np.cbrt(volume)):
        if node:
            _paint_branch(canvas, place[parent[node]], place[node], float(radius), hu)


def _paint_branch(canvas: Canvas, first: np.ndarray, last: np.ndarray, radius: float, hu: float) -> None:
    margin = radius + float(np.mean(canvas.spacing_mm))
    box = canvas.between(np.minimum(first, last) - margin, np.maximum(first, last) + margin)
    x, y, z = (axis[part] for axis, part in zip(canvas.axes, box, strict=True))
    point = (x[:, None, None], y[None, :, None], z[None, None, :])
    away = segment_distance(point, first, last, radius, radius)
    voxel = float(np.mean(canvas.spacing_mm))
    cover = np.clip(0.5 - away / voxel, 0, 1) * min(1.0, 2 * radius / voxel)
    soft = np.isin(canvas.labels[box], (LABELS["lung_left"], LABELS["lung_right"], LABELS["vessel"]))
    cover = cover * soft
    canvas.hu[box] = np.maximum(canvas.hu[box], canvas.hu[box] + cover * (hu - canvas.hu[box]))
    canvas.labels[box][cover > 0.6] = LABELS["vessel"]
