"""The pack's own types on ComfyUI's wires."""

from __future__ import annotations

from comfy_api.latest import io

CATEGORY = "retrieval"

RetrievalControlNetType = io.Custom("RETRIEVAL_CONTROLNET")
ReferencesType = io.Custom("REFERENCES")
RetrievalControlsType = io.Custom("RETRIEVAL_CONTROLS")
RetrievalMapType = io.Custom("RETRIEVAL_MAP")
# Of `retrieval_core.metrics.ImageScore`: a value an image, in percent.
ImageScoresType = io.Custom("IMAGE_SCORES")
