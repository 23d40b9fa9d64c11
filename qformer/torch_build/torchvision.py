"""Imports of torchvision, and of timm, which needs it, with a CPU build of torch."""

import functools
from types import ModuleType
from typing import cast

import torch


def import_timm() -> ModuleType:
    """Import timm, also with a CPU build of torch (see `import_torchvision`)."""
    import_torchvision()
    import timm

    return cast(ModuleType, timm)


def import_torchvision() -> ModuleType:
    """Import torchvision even where its compiled operators cannot load.

    The registry's torchvision is compiled for CUDA. With a CPU-only torch its operator library does not load, and the
    import fails because two operators are not declared. We use neither, but timm imports torchvision; declaring the two
    signatures makes the import succeed.
    """
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        _declare_operators()
        import torchvision
    return cast(ModuleType, torchvision)


@functools.cache  # a declaration ends with its library object
def _declare_operators() -> torch.library.Library:
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library
