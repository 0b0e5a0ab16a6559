"""A family of recipes trained on one prepared store, and one comparison of them beside the paper's.

Every run is a run folder like any other, named by its settings, so that axes share what they have in common. What is
finished is not done again, a member that fails is told of and does not stop the others, and the comparison is written
after every run.
"""

from dagman.ablation.axes import AXES, members_of
from dagman.ablation.loop import Left, Outputs, ablate, left
from dagman.ablation.scores import Organs

__all__ = ["AXES", "Left", "Organs", "Outputs", "ablate", "left", "members_of"]
