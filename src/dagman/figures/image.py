"""Figures as files, and what several of them draw."""

import io
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def png(figure: Figure, **how: Any) -> bytes:
    """A figure as a PNG file.

    Args:
        figure: What is drawn.
        how: As matplotlib's `savefig` takes it.
    """
    stream = io.BytesIO()
    figure.savefig(stream, format="png", **how)
    return stream.getvalue()


def outline(axes: "Axes", region: Bool[np.ndarray, "rows columns"], across: float, down: float, **how: Any) -> None:
    """Draw the edge of a region, along the picture's border too where the region reaches it.

    Args:
        axes: Where.
        region: Rows from top to bottom.
        across: Width of the picture; 0 is on the left.
        down: Its height; 0 is at the bottom.
        how: As matplotlib's `contour` takes it.
    """
    rows, columns = region.shape
    x, y = (np.arange(-1, columns + 1) + 0.5) * across / columns, (rows - np.arange(-1, rows + 1) - 0.5) * down / rows
    x[[0, -1]], y[[0, -1]] = (0.0, across), (down, 0.0)  # inside the border, where a line is seen whole
    axes.contour(x, y, np.pad(region.astype(float), 1), levels=[0.5], **how)
