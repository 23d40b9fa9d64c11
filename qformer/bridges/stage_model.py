"""A bridge with the heads of a stage: what one stage trains."""

import itertools
from typing import Self

from torch import nn

from qformer.bridges.protocol import Bridge


class StageModel(nn.Module):
    """Holds a bridge's submodules under their own names, together with the heads of the stage.

    The bridge itself is no submodule, so that the names of its weights have no prefix, whichever stage trains it.

    Args:
        bridge: Built for this stage.

    Raises:
        ValueError: If the stage cannot train the bridge, or parameters lie on the bridge itself.
    """

    bridge: Bridge

    def __init__(self, bridge: Bridge, stage: int) -> None:
        super().__init__()
        if stage not in bridge.config.stages:
            able = " and ".join(map(str, sorted(bridge.config.stages)))
            raise ValueError(f"model.bridge.kind={bridge.config.kind}: stage {stage} cannot train it, stage {able} can")
        own = itertools.chain(bridge.named_parameters(recurse=False), bridge.named_buffers(recurse=False))
        if (first := next(own, None)) is not None:
            raise ValueError(f"{type(bridge).__name__}.{first[0]} lies on the bridge itself; put it into a submodule")
        self.__dict__["bridge"] = bridge
        for name, module in bridge.named_children():
            self.add_module(name, module)

    def add_head(self, name: str, head: nn.Module) -> None:
        """Add a module of the stage's own.

        Raises:
            ValueError: If the bridge has one of that name.
        """
        if name in self._modules:
            raise ValueError(f"{type(self.bridge).__name__}.{name} has the name of a stage's head; rename it")
        self.add_module(name, head)

    def train(self, mode: bool = True) -> Self:
        """Switch dropout; a bridge may keep frozen parts in eval mode."""
        super().train(mode)
        self.bridge.train(mode)
        return self
