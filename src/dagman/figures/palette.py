"""Colours that people with any colour vision tell apart, in the order they are used."""

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000", "#999999")
"""Okabe and Ito's, yellow replaced by grey, which is seen on white."""
ON_BLACK = ("#E69F00", "#56B4E9", "#F0E442", "#CC79A7", "#009E73", "#D55E00", "#0072B2")
"""The same with yellow, the brightest first, without what is not seen on a CT."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
