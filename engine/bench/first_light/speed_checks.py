"""Steps 5, 6 and the end of 10: what a node costs, what `fill` reaches, what a small card would make of the kernels."""
from __future__ import annotations

from collections.abc import Iterable, Iterator

from engine.bench import gpu_kernels
from engine.bench.first_light import kernel_checks
from engine.bench.first_light.findings import Finding
from engine.bench.gpu_kernels import FillCases, Time
from engine.bench.rows import Row
from engine.machine.pinned_memory import CudaDriver, Driver
from kernels.score import score

GIB = 2**30
CASES = FillCases((1152, 2304), (10, 100, 450, 4000), (16, 32, 64))
TOTAL = 12 * GIB
NODE_US = 2.0           # the plan's dearest
OF_COPY_ENGINE = 0.9    # wanted of a burst from a megabyte on
LARGE_BURST = 10**6


def nodes() -> Iterator[Row]:
    yield gpu_kernels.bandwidth_row(gpu_kernels.speeds())
    rows = []
    for row in gpu_kernels.nodes():
        rows.append(row)
        yield row
    yield from (finding.row() for finding in node_findings(rows))


def node_findings(rows: Iterable[Row]) -> Iterator[Finding]:
    """Of the longest chains; a fork stands beside every tenth node."""
    longest = max(row["nodes"] for row in rows)
    us = {(row["bytes"], row["fork"]): row["us_per_node"] for row in rows if row["nodes"] == longest}
    for n_bytes in sorted({n_bytes for n_bytes, _ in us}):
        alone, forked = us[n_bytes, False], us[n_bytes, True]
        case = f"{n_bytes} bytes"
        limit = NODE_US if n_bytes < 1 << 20 else None
        yield Finding("a node of a graph", True, alone, "us", at_most=limit, case=case)
        yield Finding("a fork and its join", True, 10 * (forked - alone), "us", case=case)


def fill(total_bytes: int = TOTAL, cases: FillCases = CASES, device: str = "cuda", driver: Driver | None = None,
         time: Time = gpu_kernels.milliseconds, shape: kernel_checks.KernelShape = kernel_checks.SHAPES[0],
         ) -> Iterator[Row]:
    """Beside `score`, which runs while records are on their way."""
    given, *_ = kernel_checks.Case(shape, 1, device).scored()
    rows, beside = [], lambda: score(*given)
    for row in gpu_kernels.fills(total_bytes, False, cases, beside, driver or CudaDriver(), device, time):
        rows.append(row)
        yield row
    yield from (finding.row() for finding in fill_findings(rows))


def fill_findings(rows: Iterable[Row]) -> Iterator[Finding]:
    """Of each record and burst the number of blocks that is best."""
    timed = [row for row in rows if "gb_per_second" in row]
    yield from (Finding("page-locked memory for fill", False, note=str(row["sentence"])) for row in rows
                if "sentence" in row)
    for record, burst in dict.fromkeys((row["record"], row["burst"]) for row in timed):
        best = max((row for row in timed if (row["record"], row["burst"]) == (record, burst)),
                   key=lambda row: row["gb_per_second"])
        wanted = OF_COPY_ENGINE if record * burst >= LARGE_BURST else None
        yield Finding("fill", True, best["of_copy_engine"], "of the copy engine", at_least=wanted,
                      case=f"{burst} records of {record} bytes",
                      note=f"{best['gb_per_second']:.1f} GB/s with {best['blocks']} warps, {best['overlap']:.0%} of it "
                           "beside score")


def small_chip() -> Iterator[Row]:
    """The last of all: a context of its own may take the whole one along."""
    from engine.bench import single_kernels
    from engine.bench.synthetic import shape_named
    for row in single_kernels.measured(shape_named("qwen3.6-35b-a3b")):
        yield row
        if row["sms"] != "all":
            works = "sentence" not in row
            yield Finding("28 multiprocessors alone", works, row.get("us"), "us", case=str(row.get("name", "")),
                          note=str(row.get("sentence", ""))).row()
