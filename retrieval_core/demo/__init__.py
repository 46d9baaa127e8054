"""The demo: references on the left, pictures without and with retrieval on the right."""
