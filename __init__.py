"""Retrieval ControlNet, a ComfyUI node pack; ComfyUI imports this file under the folder's name.

It stays free of imports so that it costs the host nothing and the core runs without the host.
"""

WEB_DIRECTORY = "./web"

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]


async def comfy_entrypoint():
    """The pack's nodes, imported when the host asks for them."""
    from .nodes import comfy_entrypoint as entrypoint

    return await entrypoint()
