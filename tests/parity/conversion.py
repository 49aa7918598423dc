"""Conversion and restore, through the tools' own code, for the parity tests."""

from __future__ import annotations

from pathlib import Path

import jax

from orcd_jax.checkpoint.convert.huggingface import open_huggingface
from orcd_jax.checkpoint.convert.write import write_checkpoint
from orcd_jax.checkpoint.manifest import Manifest, read_manifest
from orcd_jax.checkpoint.restore import restore
from orcd_jax.checkpoint.verify import verify_files
from orcd_jax.models.registry import Params
from tests.checkpoint.proof import proved


def restored(checkpoint: Path, device: jax.Device) -> tuple[Manifest, Params]:
    """A checkpoint's manifest and its arrays on the device, everything verified."""
    manifest = read_manifest(checkpoint)
    verify_files(checkpoint, manifest, lambda _: None)
    params = restore(checkpoint, manifest, device)
    assert proved(manifest, params) == manifest.digest
    return manifest, params


def convert_and_restore(source: Path, checkpoint: Path, device: jax.Device) -> tuple[Manifest, Params]:
    """Converts a Hugging Face directory without rounding, and restores it."""
    write_checkpoint(open_huggingface(source, "auto"), checkpoint, lambda _: None, chat_template=None)
    return restored(checkpoint, device)
