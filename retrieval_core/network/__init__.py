"""The networks: base U-Net, retrieval encoder, retrieval sites, and their file."""
