"""Everything that knows ComfyUI; the nodes call it, and it calls `retrieval_core`."""
