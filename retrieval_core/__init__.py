"""The retrieval method as a plain torch library; it never imports comfy."""
