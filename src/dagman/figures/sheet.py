"""What a run is doing to its crops: image, attention, what student and teacher see, and what the student fills in."""

from collections.abc import Sequence
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from jaxtyping import Bool, Float
from matplotlib.figure import Figure

from dagman.figures import image

COLUMNS = (
    "crop",
    "attention that guides",
    "what the student sees",
    "what the teacher sees",
    "filled in",
)

_GREY = mpl.colormaps["gray"].with_extremes(bad="#3b6ea5")
"""Blue where nothing is seen."""
OCTAVES = 2
"""Colours of attention run from 1/4 to 4 times uniform, on a logarithmic scale, the same in every picture."""
CAPTION = (
    "One slice of each crop, {side} voxels wide, patient's left on the right. Blue: not seen. What is attended to most "
    "may be left visible, as a hint."
)


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


def png(scenes: Sequence[Scene], title: str) -> bytes:
    """Draw a sheet: one row for each crop, its middle axial slice, patient's left on the right.

    Args:
        scenes: Crops of equal sides.
        title: Over the whole picture.

    Returns:
        A PNG file.
    """
    figure = Figure(figsize=(13.5, 2.7 * len(scenes) + 0.7), dpi=80)
    figure.subplots_adjust(left=0.01, right=0.94, bottom=0.035, top=1 - 0.75 / (2.7 * len(scenes) + 0.7), wspace=0.06)
    figure.suptitle(title, fontsize=11)
    figure.text(0.01, 0.005, CAPTION.format(side=scenes[0].image.shape[0]), fontsize=9, color="0.35", va="bottom")
    rows = figure.subplots(len(scenes), len(COLUMNS), squeeze=False)
    shown = None
    for axes, scene in zip(rows, scenes, strict=True):
        middle = scene.image.shape[2] // 2
        for plot in axes:
            plot.set_axis_off()
        for plot, values in zip(axes, _pictures(scene), strict=True):
            if values is None:
                plot.text(0.5, 0.5, "nothing to show", ha="center", va="center", color="grey", fontsize=9)
            elif values is scene.attention:
                octaves = np.log2(np.maximum(_turned(values[:, :, middle]), 1e-6))
                shown = plot.imshow(octaves, cmap="coolwarm", vmin=-OCTAVES, vmax=OCTAVES)
            else:
                plot.imshow(_turned(values[:, :, middle]), cmap=_GREY, vmin=0, vmax=1)
    for plot, name in zip(rows[0], COLUMNS, strict=True):
        plot.set_title(name, fontsize=10)
    if shown is not None:
        bar = figure.colorbar(shown, cax=figure.add_axes((0.95, 0.1, 0.01, 0.75)), ticks=range(-OCTAVES, OCTAVES + 1))
        bar.ax.set_yticklabels(["\u2264 1/4", "1/2", "1", "2", "\u2265 4"])
        bar.ax.set_title("attention /\nuniform", fontsize=7)
    return image.png(figure)


def _pictures(scene: Scene) -> tuple[np.ndarray | None, ...]:
    """One for each of `COLUMNS`; what is not seen is NaN."""
    unseen = np.full_like(scene.image, np.nan)
    return (
        scene.image,
        scene.attention,
        np.where(scene.hidden, unseen, scene.image),
        None if scene.dropped is None else np.where(scene.dropped, unseen, scene.image),
        scene.filled,
    )


def _turned(plane: np.ndarray) -> np.ndarray:
    """X to the left, y up, as radiologists look at an axial slice of RAS+."""
    return plane.T[::-1, ::-1]
