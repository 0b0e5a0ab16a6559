"""Tensors to `Features`. No images, no losses."""
