"""Figures as files."""

import io
from typing import Any

from matplotlib.figure import Figure


def png(figure: Figure, **how: Any) -> bytes:
    """A figure as a PNG file.

    Args:
        figure: What is drawn.
        how: As matplotlib's `savefig` takes it.
    """
    stream = io.BytesIO()
    figure.savefig(stream, format="png", **how)
    return stream.getvalue()
