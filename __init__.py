"""Retrieval ControlNet, a ComfyUI node pack; ComfyUI imports this file under the folder's name.

It stays free of imports so that it costs the host nothing and the core runs without the host.
The nodes are not written yet: `comfy_entrypoint`, which imports them when the host asks, comes
with them, and until then ComfyUI reports that the pack offers no nodes.
"""

WEB_DIRECTORY = "./web"

__all__ = ["WEB_DIRECTORY"]
