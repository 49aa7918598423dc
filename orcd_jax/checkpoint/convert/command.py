"""The command behind the convert tools: SOURCE and DESTINATION, a progress bar, one clear error, an exit code."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TaskID, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as Bars

from orcd_jax.checkpoint.convert.source import Dtype, WeightSource
from orcd_jax.checkpoint.convert.write import write_checkpoint
from orcd_jax.checkpoint.manifest import Manifest
from orcd_jax.checkpoint.progress import Progress
from orcd_jax.errors import ErrorCode, ExitCode, OrcdError
from orcd_jax.telemetry import narration
from orcd_jax.telemetry.log import neutral
from orcd_jax.tokenizer.chat_template import ChatTemplate
from orcd_jax.tokenizer.tokenizer import Tokenizer

Open = Callable[[Path, Dtype], WeightSource]

_STAGES = {"hash_source": "hashing the source", "convert": "converting", "hash_files": "hashing the result"}
_DTYPES: tuple[Dtype, ...] = ("auto", "float32", "bfloat16")


def run(argv: Sequence[str], *, open_source: Open, source: str, example: str) -> ExitCode:
    """Converts what ``open_source`` opens.

    Args:
      argv: program name, then arguments.
      open_source: opens the source in the dtype asked for.
      source: what SOURCE is, for the help.
      example: a whole command line, for the help.

    Returns:
      OK; MODEL when the source cannot be converted; USAGE for bad arguments or a destination that cannot be used;
      INTERRUPTED after Ctrl-C.
    """
    parser = argparse.ArgumentParser(
        prog=Path(argv[0]).name,
        description=f"Converts {source} into a checkpoint directory that orcd-worker loads. All or nothing: an "
        "interrupted conversion leaves nothing that looks finished.",
        epilog=f"example: {example}",
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SOURCE", type=Path, help=source)
    parser.add_argument("destination", metavar="DESTINATION", type=Path, help="a directory that does not exist yet")
    parser.add_argument(
        "--dtype",
        choices=_DTYPES,
        default="auto",
        help="of the weights; auto (the default) never rounds: bfloat16 when the source is, else float32. "
        "bfloat16 halves the memory: the usual choice on a GPU",
    )
    parser.add_argument(
        "--no_chat_template",
        action="store_true",
        help="leave the chat template out: the model takes plain prompts only",
    )
    try:
        given = parser.parse_args(argv[1:])
    except SystemExit as asked:  # argparse has said why
        return ExitCode.USAGE if asked.code else ExitCode.OK
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax's remarks, and a traceback of each error it raises
    out = Console(stderr=True, highlight=False)
    began = time.monotonic()
    try:
        opened = open_source(given.source, given.dtype)
        template = None if given.no_chat_template else opened.chat_template
        _check_text(opened, template)
        with _Reporter(out) as reporter:
            manifest = write_checkpoint(opened, given.destination, reporter.on_progress, chat_template=template)
    except OrcdError as error:
        out.print(f"error: {neutral(error.message)}", markup=False, soft_wrap=True)
        return ExitCode.USAGE if error.code is ErrorCode.INVALID_PARAMS else ExitCode.MODEL
    except KeyboardInterrupt:
        out.print("interrupted: nothing that looks finished was left behind", markup=False)
        return ExitCode.INTERRUPTED
    _summarise(out, manifest, given.destination, time.monotonic() - began)
    return ExitCode.OK


def _check_text(source: WeightSource, template: str | None) -> None:
    """Loads tokenizer and template as the worker will, so that a conversion is not in vain."""
    entry = source.tokenizer
    tokenizer = Tokenizer(
        source.tokenizer_json,
        vocab_size=source.config.vocab_size,
        bos_id=entry.bos_id,
        eos_ids=entry.eos_ids,
        add_bos=entry.add_bos,
    )
    if template is None:
        return
    try:
        ChatTemplate(template, bos_token=tokenizer.token(entry.bos_id), eos_token=tokenizer.token(entry.eos_ids[0]))
    except OrcdError as error:
        raise OrcdError(
            error.code, f"{error.message}; --no_chat_template converts the model without it", field=error.field
        ) from None


def _summarise(out: Console, manifest: Manifest, destination: Path, seconds: float) -> None:
    model, config = manifest.model, manifest.config
    parameters = sum(_elements(entry.shape) for entry in manifest.tensors)
    rows = (
        ("model", f"{model.model_id} ({model.architecture}, {parameters / 1e6:.0f} M parameters)"),
        ("weights", f"{config.dtype}, {narration.size(manifest.weight_bytes)} in {len(manifest.tensors)} arrays"),
        ("tokenizer", f"{model.tokenizer}, {model.vocab_size} tokens"),
        ("context", f"{model.context_max} tokens"),
        ("digest", manifest.digest),
        ("written to", str(destination)),
    )
    out.print(f"converted in {narration.duration(seconds)}", markup=False)
    for name, value in rows:
        out.print(f"  {name:<11}{neutral(value)}", markup=False, soft_wrap=True)


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


class _Reporter:
    """Shows stages as they go: bars on a terminal, else a line for every quarter of a stage."""

    def __init__(self, out: Console) -> None:
        self._out = out
        self._bars = Bars(
            TextColumn("{task.description:<20}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=out,
            disable=not out.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._said: dict[str, int] = {}

    def __enter__(self) -> _Reporter:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def on_progress(self, progress: Progress) -> None:
        """Shows one point."""
        stage = _STAGES.get(progress.stage, progress.stage)
        if self._out.is_terminal:
            if stage not in self._tasks:
                self._tasks[stage] = self._bars.add_task(stage, total=progress.total)
            self._bars.update(self._tasks[stage], completed=progress.done)
            return
        quarter = progress.percent // 25 * 25
        if self._said.get(stage) != quarter:
            self._said[stage] = quarter
            print(f"{stage}: {quarter} %", file=sys.stderr, flush=True)  # noqa: T201 - a command's own output
