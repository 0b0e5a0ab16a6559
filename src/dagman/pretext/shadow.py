"""A network that does not learn, with its matrices in the precision that it computes in."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


class Shadow:
    """Calls a frozen network; a CPU's autocast then casts its matrices once until they change, not at every pass.

    Autocast itself keeps what it cast for weights that need a gradient alone. The numbers are the same bits. On a GPU
    nothing is changed: a recorded pass has casts of its own.

    Args:
        network: Weights of linear layers end in `weight` and have two dimensions; none stands for two layers.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._matrices: dict[str, nn.Parameter] = {
            name: value for name, value in network.named_parameters() if value.ndim == 2 and name.endswith("weight")
        }
        self._cast: dict[str, Tensor] = {}
        self._made_of: tuple[object, ...] = ()

    @torch.inference_mode()
    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """What the network gives."""
        on_cpu = next(iter(self._matrices.values())).device.type == "cpu"
        if not on_cpu or not torch.is_autocast_enabled("cpu"):
            return self._network(*arguments, **options)
        dtype = torch.get_autocast_dtype("cpu")
        made_of = (dtype, *(value._version for value in self._matrices.values()))
        if made_of != self._made_of:
            self._cast = {name: value.to(dtype) for name, value in self._matrices.items()}
            self._made_of = made_of
        return functional_call(self._network, self._cast, arguments, options, tie_weights=False)
