#!/usr/bin/env python3
"""What proving the weights between the steps costs: decode throughput with the worker's guard and without it.

    python tools/bench_scrub.py                                          # an 8B model on a GPU, a small one on a CPU
    python tools/bench_scrub.py --model=8b,small --streams=1,8,64 --json=scrub.json
    python tools/bench_scrub.py --model=path/to/checkpoint --seal_max_age=5,1

The worker's own engine serves so many streams that every row is busy. It runs by turns without the guard and with it,
the same steps each time; what a turn with it loses is taken against those before and after it. A bound of a cost is
wrong in at most one of twenty runs of this tool. The claim, at the worker's default age on a GPU, is shown when the
upper bound is within the limit and the guard kept its pace; a cost whose bounds lie on both sides shows nothing.
The floor is the share of time that the proofs take at the goal's rate.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax

from orcd_jax.config import DEFAULT_PREFILL_TOKENS, WorkerConfig
from orcd_jax.engine.programs import Programs
from orcd_jax.residency import policy
from orcd_jax.residency.bounds import Sizes
from orcd_jax.residency.guard import LONGEST_AGE_S, PACE
from orcd_jax.residency.prover import WeightProver
from orcd_jax.worker.planner import engine_shape
from tools.bench_cost import HEADER, Cost, case_title
from tools.bench_figures import LEAST_ROUNDS, median_seconds
from tools.bench_model import SHAPES, load_model
from tools.bench_report import BenchError, Report, first_device, integers, is_gpu, json_file
from tools.bench_streams import BenchGuard, Scrub, Served, Streams, Unguarded, Window, check_residency

DEFAULT_AGE_S: float = WorkerConfig.model_fields["seal_max_age"].default
"""The age that the claim is about."""

SLICES_A_WINDOW = 4
"""A window is as long as so many of the largest slices are apart, or as a whole pass if that is shorter."""

PROOFS_ALONE = 5
CALIBRATION_S = 0.5


# -- one case: a model and a number of streams -------------------------------------------------------------------------


@dataclass(frozen=True)
class Turns:
    """Windows as they followed each other: one without, then in each round one with each guard and one without."""

    off: list[Window] = field(default_factory=list)
    on: dict[float, list[Window]] = field(default_factory=dict)

    @property
    def rounds(self) -> int:
        """Those that are whole."""
        return len(self.off) - 1


def take_turns(
    run: Callable[[BenchGuard], Window], scrubs: dict[float, Scrub], another: Callable[[int], bool]
) -> Iterator[Turns]:
    """Runs by turns without and with the guards; gives what there is after each round.

    Args:
      run: serves with a guard.
      scrubs: the guards, by age.
      another: whether there is to be one more round after so many.
    """
    unguarded = Unguarded()
    turns = Turns([run(unguarded)], {age: [] for age in scrubs})
    while another(turns.rounds):
        for age, scrub in scrubs.items():
            turns.on[age].append(run(scrub))
        turns.off.append(run(unguarded))
        yield turns


class Case:
    """Owns the programs for one number of streams, while it measures them."""

    def __init__(self, name: str, served: Served, streams: int, alone_s: float, flags: argparse.Namespace) -> None:
        """Compiles the programs.

        Raises:
          OrcdError: POLICY_VIOLATION, when one of them keeps anything in host memory.
        """
        sizes = Sizes(slots_total=streams, max_context=flags.context, prefill_tokens=flags.prefill_tokens)
        programs = Programs(served.manifest.config, engine_shape(sizes), served.device)
        policy.check_programs({**programs.compiled, **served.prover.programs})
        self._name, self._served, self._streams, self._flags = name, served, streams, flags
        self._alone_s, self._title = alone_s, case_title(name, streams)
        self._work = Streams(served, programs, prompt_tokens=flags.prompt_tokens)

    def measure(self, until_s: float, deadline_s: float, report: Report) -> list[Cost]:
        """What each age costs. Each round's figures are kept as soon as it is over.

        Args:
          until_s: monotonic time after which no more rounds begin than bounds need.
          deadline_s: monotonic time after which none begins.
          report: keeps the figures.

        Raises:
          BenchError: there was no time for a round.
          OrcdError: the engine ended.
        """
        calibrated = self._work.run(Unguarded(), lambda steps, seconds: steps >= 4 and seconds >= CALIBRATION_S)
        a_step_s = calibrated.seconds / (len(calibrated.stamps_s) - 1)
        steps = max(4, math.ceil(window_s(self._served.prover, self._flags) / a_step_s))
        report.say(f"{self._title}: {1e3 * a_step_s:.2f} ms a step, {steps} steps a window")
        scrubs = {age: Scrub(self._served, age) for age in self._flags.seal_max_age}
        found: list[Cost] = []
        round_began_s, round_s = time.monotonic(), 0.0

        def another(rounds: int) -> bool:
            nonlocal round_began_s, round_s
            now = time.monotonic()
            took_s, round_began_s = now - round_began_s, now
            round_s = took_s * (len(scrubs) + 1) if rounds == 0 else took_s  # before the first there was one window
            end_s = deadline_s if rounds < LEAST_ROUNDS else min(until_s, deadline_s)
            return rounds < self._flags.rounds and now + round_s <= end_s

        for turns in take_turns(functools.partial(self._run, steps), scrubs, another):
            found = self._costs(turns, scrubs)
            for cost in found:
                report.put(f"{self._title}, {cost.seal_max_age_s:g} s", cost.figure())
            told = ", ".join(f"{100 * cost.rounds[-1]:.2f} % at {cost.seal_max_age_s:g} s" for cost in found)
            report.say(f"{self._title}: round {turns.rounds} of at most {self._flags.rounds}: {told}")
        if not found:
            raise BenchError(f"there was no time for a round of {round_s:.0f} s: raise --seconds")
        return found

    def _run(self, steps: int, guard: BenchGuard) -> Window:
        return self._work.run(guard, lambda done, _: done >= steps)

    def _costs(self, turns: Turns, scrubs: dict[float, Scrub]) -> list[Cost]:
        gpu = is_gpu(self._served.device)
        return [
            Cost(
                model=self._name,
                streams=self._streams,
                seal_max_age_s=age,
                bound_s=scrub.detection_bound_s,
                weight_bytes=self._served.manifest.weight_bytes,
                off=tuple(turns.off),
                on=tuple(turns.on[age]),
                place=at / (len(scrubs) + 1),
                alone_s=self._alone_s,
                oldest_s=scrub.oldest_s,
                limit=self._flags.limit / 100 if gpu and age == DEFAULT_AGE_S else None,
            )
            for at, (age, scrub) in enumerate(scrubs.items(), 1)
        ]


def window_s(prover: WeightProver, flags: argparse.Namespace) -> float:
    """Seconds of a window: as asked for, but long enough to hold its share of the slices of every age."""
    sizes = [one.size_bytes for one in prover.slices]
    share = min(1.0, SLICES_A_WINDOW * max(sizes) / sum(sizes))
    return float(max(flags.window, share * PACE * max(flags.seal_max_age)))


# -- the command -------------------------------------------------------------------------------------------------------


def serve(name: str, flags: argparse.Namespace, device: jax.Device, report: Report) -> tuple[Served, float]:
    """A model, proved and ready to be served; and how long a whole proof takes alone, in seconds.

    Raises:
      BenchError: the model on the device is not the one of the manifest.
      OrcdError: likewise, naming the tensor; or it cannot be loaded, or is not in the device's own memory.
    """
    report.say(f"{name}: making or restoring the weights")
    manifest, params = load_model(name, flags.layers, device)
    report.say(f"{name}: {manifest.weight_bytes / 1e9:.2f} GB are there; compiling what proves them")
    slice_bytes = None if flags.slice_mb is None else flags.slice_mb * 2**20
    prover = WeightProver(manifest, params, device, slice_bytes=slice_bytes)
    if prover.prove_all() != manifest.digest:
        raise BenchError("the digest from the device is not the manifest's")
    served = Served(manifest=manifest, params=params, device=device, prover=prover)
    check_residency(served, None)
    alone_s = median_seconds(prover.prove_all, PROOFS_ALONE)
    gb_s = manifest.weight_bytes / alone_s / 1e9
    report.say(f"{name}: {len(prover.slices)} slices, proved alone in {1e3 * alone_s:.1f} ms, {gb_s:.1f} GB/s")
    return served, alone_s


def measure_model(
    name: str, flags: argparse.Namespace, device: jax.Device, report: Report, deadline_s: float, cases_after: int
) -> list[Cost]:
    """Every number of streams over one model, each in its share of the time that is left."""
    served, alone_s = serve(name, flags, device, report)
    found = []
    for at, streams in enumerate(flags.streams):
        with report.section(case_title(name, streams)):
            now = time.monotonic()
            share_s = (deadline_s - now) / (len(flags.streams) - at + cases_after)
            if share_s <= 0:
                raise BenchError("there was no time left: raise --seconds")
            report.say(f"{case_title(name, streams)}: compiling")
            for cost in Case(name, served, streams, alone_s, flags).measure(now + share_s, deadline_s, report):
                print(cost.row(), flush=True)
                found.append(cost)
    return found


def ages(text: str) -> list[float]:
    """Comma-separated ages in seconds, above 0 and at most what a worker allows; each once."""
    values = [float(part) for part in text.split(",")]
    if not all(0 < value <= LONGEST_AGE_S for value in values) or len(set(values)) != len(values):
        raise ValueError(text)
    return values


def models(text: str) -> list[str]:
    """Comma-separated names of shapes, or checkpoint directories."""
    names = text.split(",")
    for name in names:
        if name not in SHAPES and not (Path(name) / "manifest.json").is_file():
            raise argparse.ArgumentTypeError(f"{name} is neither of {', '.join(SHAPES)} nor a checkpoint directory")
    return names


def parse(arguments: Sequence[str] | None, gpu: bool) -> argparse.Namespace:
    """The flags, with the defaults of the platform."""
    platform = "cuda" if gpu else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=models, default=["8b" if gpu else "small"], help="shapes or checkpoints (GPU: 8b; CPU: small)")
    add("--layers", type=int, help="layers of a shape, instead of its own")
    add("--streams", type=integers, default=[1, 8, 64] if gpu else [2], help="jobs at once (GPU: 1,8,64; CPU: 2)")
    add("--seal_max_age", type=ages, default=[DEFAULT_AGE_S if gpu else 1.0], help="seconds (GPU: 5; CPU: 1)")
    add("--slice_mb", type=int, help="MiB of a slice, instead of the worker's own")
    add("--prompt_tokens", type=int, default=128, help="of each job")
    add("--context", type=int, default=1024, help="tokens of each job, prompt and answer")
    add("--prefill_tokens", type=int, default=DEFAULT_PREFILL_TOKENS[platform], help="prompt tokens of one call")
    add("--window", type=float, default=2.0 if gpu else 1.0, help="seconds of a turn, at least (GPU: 2; CPU: 1)")
    add("--rounds", type=int, default=8, help=f"turns with the guard, at most; bounds need {LEAST_ROUNDS}")
    add("--seconds", type=float, default=240.0 if gpu else 45.0, help="no round begins after (GPU: 240; CPU: 45)")
    add("--limit", type=float, default=2.0, help="percent of throughput that the default age may cost")
    add("--json", type=json_file, help="also write the figures to this file, from the first round on")
    flags = parser.parse_args(arguments)
    if not 0 < flags.prompt_tokens < flags.context:
        parser.error(f"--prompt_tokens: {flags.prompt_tokens} is not from 1 to --context less 1, {flags.context - 1}")
    for name in ("layers", "slice_mb", "prefill_tokens", "rounds"):
        if (value := getattr(flags, name)) is not None and value < 1:
            parser.error(f"--{name}: {value} is not 1 or more")
    return flags


def verdict_of(found: Sequence[Cost], limit: float, *, failed: bool) -> tuple[str, str]:
    """The word for all, and a sentence for people."""
    claims = [cost for cost in found if cost.limit is not None]
    if failed:
        return "fail", "a section failed: the errors are above"
    if not claims:
        return "no claim", "nothing is claimed of a CPU, or of another age than the worker's default"
    worst = max(claims, key=lambda cost: cost.bounds[1] if cost.bounds else cost.cost)
    word = next(word for word in ("fail", "unclear", "pass") if word in {cost.verdict for cost in claims})
    reach = f", at most {100 * worst.bounds[1]:.2f} %" if worst.bounds else f" in {len(worst.on)} rounds, too few"
    return word, f"proofs cost {100 * worst.cost:.2f} %{reach} ({worst.title}); {limit:g} % are allowed"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints the table, writes JSON. 1 when the claim is not shown or a section failed."""
    device = first_device()
    flags = parse(arguments, is_gpu(device))
    deadline_s = time.monotonic() + flags.seconds
    report = Report("bench_scrub", device, flags.json, arguments, limit_percent=flags.limit)
    print(f"{device.device_kind}, jax {jax.__version__}: at most {flags.limit:g} % at {DEFAULT_AGE_S:g} s\n{HEADER}")
    found: list[Cost] = []
    for at, name in enumerate(flags.model):
        after = len(flags.streams) * (len(flags.model) - at - 1)
        with report.section(name):
            found += measure_model(name, flags, device, report, deadline_s, after)
    word, sentence = verdict_of(found, flags.limit, failed=report.failed)
    report.finish(verdict=word)
    print(f"{word}: {sentence}")
    return 0 if word in ("pass", "no claim") else 1


if __name__ == "__main__":
    sys.exit(main())
