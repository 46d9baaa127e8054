"""Dynamic VRAM, as the newer host's main.py turns it on for NVIDIA cards."""

from __future__ import annotations

import sys
from contextlib import suppress


def load_library() -> None:
    """Loads the library that dynamic VRAM is made with; it must be there before torch is."""
    with suppress(ImportError):  # an older host
        import comfy_aimdo.control

        if "torch" not in sys.modules:
            comfy_aimdo.control.init()


def enable_dynamic_vram() -> bool:
    """Turns it on, after the host's arguments are set; False where host, library or torch lack it.

    `load_library` must have been called.
    """
    try:
        import comfy_aimdo.control
    except ImportError:
        return False
    import comfy.memory_management
    import comfy.model_management as management
    import comfy.model_patcher

    if management.torch_version_numeric < (2, 8) or comfy_aimdo.control.lib is None:
        return False
    if not comfy_aimdo.control.init_devices(d.index for d in management.get_all_torch_devices()):
        return False
    comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
    comfy.memory_management.aimdo_enabled = True
    return True
