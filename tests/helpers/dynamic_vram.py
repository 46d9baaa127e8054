"""Dynamic VRAM, as the newer host's main.py turns it on for NVIDIA cards."""

from __future__ import annotations


def enable_dynamic_vram() -> bool:
    """Turns it on, after the host's arguments are set and before its models are imported.

    False where host or torch lack it.
    """
    try:
        import comfy_aimdo.control
    except ImportError:  # an older host
        return False
    loaded = comfy_aimdo.control.init()  # before the modules below, which take its library over
    import comfy.memory_management
    import comfy.model_management as management
    import comfy.model_patcher

    if management.torch_version_numeric < (2, 8) or not loaded:
        return False
    if not comfy_aimdo.control.init_devices(d.index for d in management.get_all_torch_devices()):
        return False
    comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
    comfy.memory_management.aimdo_enabled = True
    return True
