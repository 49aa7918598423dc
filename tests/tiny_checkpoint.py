"""A tiny loud model as a checkpoint, converted from GGUF by the converter's own code: it loads in seconds."""

from __future__ import annotations

from pathlib import Path

import pytest

from orcd_jax.checkpoint.convert.gguf import open_gguf
from orcd_jax.checkpoint.convert.write import write_checkpoint
from tests.checkpoint.convert.tiny_gguf import write_model


def make_tiny_checkpoint(folder: Path) -> Path:
    """Writes ``tiny.gguf`` below ``folder`` and converts it; returns the checkpoint directory."""
    source = open_gguf(write_model(folder / "tiny.gguf"), "auto")
    write_checkpoint(source, folder / "tiny", lambda _: None, chat_template=source.chat_template)
    return folder / "tiny"


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's checkpoint, shared by every test: nobody writes into it."""
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny_model"))
