"""The sheet of what a run does to its crops: what is not seen, and where it lies."""

import io

import matplotlib.image
import numpy as np
from matplotlib.colors import to_rgb

from dagman import recipes
from dagman.figures import sheet

SIDE = 16


def scene(x: int, y: int, *, attention: float = 1.0) -> sheet.Scene:
    """A grey crop whose cell at (x, y) of four by four is hidden, attended to, and filled in with white."""
    image = np.full((SIDE,) * 3, 0.5, np.float32)
    hidden = np.zeros((SIDE,) * 3, bool)
    hidden[4 * x : 4 * x + 4, 4 * y : 4 * y + 4] = True
    attended = np.where(hidden, attention, 1.0).astype(np.float32)
    return sheet.Scene(image, attended, hidden, None, np.where(hidden, 1.0, image))


def cells(scenes: list[sheet.Scene], row: int) -> list[np.ndarray]:
    """The colours of the four by four cells of each picture of a row, seen from above: [down][across]."""
    drawn = matplotlib.image.imread(io.BytesIO(sheet.png(scenes, "title", "hidden")))[..., :3]
    found = []
    for axes in layout(scenes)[row]:
        left, bottom, width, height = axes.get_position().bounds
        shown = min(width * drawn.shape[1], height * drawn.shape[0])
        middle = ((left + width / 2) * drawn.shape[1], (1 - bottom - height / 2) * drawn.shape[0])
        places = (np.arange(4) - 1.5) / 4 * shown
        found.append(np.array([[drawn[int(middle[1] + v), int(middle[0] + u)] for u in places] for v in places]))
    return found


def layout(scenes: list[sheet.Scene]) -> np.ndarray:
    """Axes as `sheet.png` lays them out."""
    kept = []

    def keep(figure: sheet.Figure, **_: object) -> bytes:
        kept.append(figure)
        return b""

    draw, sheet.image.png = sheet.image.png, keep
    try:
        sheet.png(scenes, "title", "hidden")
    finally:
        sheet.image.png = draw
    columns = (len(kept[0].axes) - 1) // len(scenes)  # the last are the colours of attention
    return np.array(kept[0].axes[: len(scenes) * columns]).reshape(len(scenes), columns)


def test_a_hidden_cell_lies_where_a_radiologist_looks_for_it() -> None:
    one = scene(0, 3, attention=4.0)  # the patient's left, front: right and up
    crop, student, teacher, filled, attention = cells([scene(1, 1), one], 1)
    assert np.ptp(crop) < 0.02
    unseen = np.abs(student - to_rgb(sheet.UNSEEN)).max(axis=-1) < 0.05
    assert unseen.sum() == 1
    assert unseen[0, 3]
    assert filled[0, 3].min() > 0.95
    red = attention[..., 0] - attention[..., 2]
    assert red[0, 3] > 0.4
    assert (np.delete(red.ravel(), 3) < 0.1).all()
    assert np.ptp(teacher) < 0.02, "a clean teacher sees all of it"


def test_columns_of_what_a_run_does_not_have_are_left_out() -> None:
    plain = scene(0, 0)._replace(attention=None, filled=None)
    kept: list[str] = []
    draw = sheet.image.png

    def keep(figure: sheet.Figure, **_: object) -> bytes:
        kept.extend(axes.get_title() for axes in figure.axes)
        kept.extend(text.get_text() for text in figure.texts)
        return draw(figure)

    sheet.image.png = keep
    try:
        sheet.png([plain], "title", recipes.get("mst-swin").method.hidden.sentence)
    finally:
        sheet.image.png = draw
    assert kept[:3] == ["crop", "what the student sees", "what the teacher sees, all of it"]
    assert len(kept) == 5, "and the title"
    assert kept[4].endswith("Hidden from the student: what is attended to least.")
