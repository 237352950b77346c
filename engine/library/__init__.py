"""Models by name: catalogue, download, compression, import, publishing."""
