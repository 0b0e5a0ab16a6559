"""What a run is doing to its crops: image, attention, what student and teacher see, and what the student fills in."""

from collections.abc import Sequence
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from jaxtyping import Bool, Float
from matplotlib.figure import Figure

from dagman.figures import image

UNSEEN = "#d9a520"
"""Amber, which no crop and no attention is drawn in."""
_GREY = mpl.colormaps["gray"].with_extremes(bad=UNSEEN)
OCTAVES = 2
"""Colours of attention run from 1/4 to 4 times uniform, on a logarithmic scale, the same in every picture."""
CAPTION = "One slice of each crop, {side} voxels wide, patient's left on the right. Amber: not seen.\n{hiding}"


class Scene(NamedTuple):
    """One crop and what was made of it; all on voxels."""

    image: Float[np.ndarray, "x y z"]
    """In [0, 1]."""
    attention: Float[np.ndarray, "x y z"] | None
    """Times uniform; None without attention."""
    hidden: Bool[np.ndarray, "x y z"]
    dropped: Bool[np.ndarray, "x y z"] | None
    """None for a clean teacher."""
    filled: Float[np.ndarray, "x y z"] | None
    """The student's prediction where voxels are hidden, the image elsewhere; None without an image term."""


def png(scenes: Sequence[Scene], title: str, hiding: str) -> bytes:
    """Draw a sheet: one row for each crop, its middle axial slice, patient's left on the right.

    Args:
        scenes: Crops of equal sides; a column that none of them fills is left out.
        title: Over the whole picture.
        hiding: A sentence under it: how what is hidden was chosen.

    Returns:
        A PNG file.
    """
    columns = [name for name, one in _pictures(scenes[0]).items() if one is not None]
    height = 2.7 * len(scenes) + 0.9
    figure = Figure(figsize=(2.6 * len(columns) + 0.7, height), dpi=80)
    figure.subplots_adjust(left=0.01, right=0.93, bottom=0.5 / height, top=1 - 0.75 / height, wspace=0.06)
    figure.suptitle(title, fontsize=11)
    caption = CAPTION.format(side=scenes[0].image.shape[0], hiding=hiding)
    figure.text(0.01, 0.08 / height, caption, fontsize=9, color="0.35", va="bottom")
    rows = figure.subplots(len(scenes), len(columns), squeeze=False)
    shown = None
    for axes, scene in zip(rows, scenes, strict=True):
        middle, pictures = scene.image.shape[2] // 2, _pictures(scene)
        for plot, name in zip(axes, columns, strict=True):
            plot.set_axis_off()
            values = pictures[name]
            assert values is not None, "scenes of one run have the same parts"
            if values is scene.attention:
                octaves = np.log2(np.maximum(_turned(values[:, :, middle]), 1e-6))
                shown = plot.imshow(octaves, cmap="coolwarm", vmin=-OCTAVES, vmax=OCTAVES)
            else:
                plot.imshow(_turned(values[:, :, middle]), cmap=_GREY, vmin=0, vmax=1)
    for plot, name in zip(rows[0], columns, strict=True):
        plot.set_title(name, fontsize=10)
    if shown is not None:
        bar = figure.colorbar(shown, cax=figure.add_axes((0.94, 0.1, 0.01, 0.75)), ticks=range(-OCTAVES, OCTAVES + 1))
        bar.ax.set_yticklabels(["\u2264 1/4", "1/2", "1", "2", "\u2265 4"])
        bar.ax.set_ylabel("attention / uniform", fontsize=9)
    return image.png(figure)


def _pictures(scene: Scene) -> dict[str, np.ndarray | None]:
    """Title of a column to what it shows; what is not seen is NaN. Attention comes last, beside its colours."""
    unseen = np.full_like(scene.image, np.nan)
    if scene.dropped is None:
        teacher = {"what the teacher sees, all of it": scene.image}
    else:
        teacher = {"what the teacher sees": np.where(scene.dropped, unseen, scene.image)}
    return {
        "crop": scene.image,
        "what the student sees": np.where(scene.hidden, unseen, scene.image),
        **teacher,
        "filled in by the student": scene.filled,
        "attention that guides": scene.attention,
    }


def _turned(plane: np.ndarray) -> np.ndarray:
    """X to the left, y up, as radiologists look at an axial slice of RAS+."""
    return plane.T[::-1, ::-1]
