"""The boundary: the only package that asks a device about itself or interprets its errors."""
