"""Compiles every Triton kernel ahead of time, without a GPU, and judges what came out.

    python tools/compile_kernels.py [--kernel NAME] [--dtype fp16] [--target sm_90] [--tile BS=64 BD=64] [--json PATH]

For each kernel, dtype and target: the tile, registers a thread, bytes spilled, shared memory, and the global memory
traffic of the tiling (nothing cached) against the least possible, on one reference problem. Exits 1 on a spill, on
more shared memory than the target has, or on a tile below the kernel's floor (a tiny tile never spills). `--tile`
tries other block sizes than the launcher's. Runs in a process of its own: it turns Triton's interpreter off.
"""

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from math import ceil
from pathlib import Path

import accel_tools  # noqa: F401  (so that the kernels are those of this tree)

os.environ.pop("TRITON_INTERPRET", None)  # an interpreted kernel has nothing to compile
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9's own default, which it warns about when unset

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from accel_kernels._triton import (
    agent_attention,
    attention_graph,
    attention_mass,
    cosine_match,
    distance_match,
    facility_location,
    merge,
    rows,
    similarity_sum,
    topk,
)

KIB = 1024
TARGETS = {  # name: (target, shared memory a program may use)
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * KIB),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * KIB),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * KIB),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * KIB),
}
DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
B, N, C = 2, 4096, 320  # the reference problem: a batch of two, 64 x 64 tokens
S, D, K, L, H, A = 3072, 1024, 2048, 2048, 8, 256  # sources, destinations, chosen rows, merged length, heads, agents


@dataclasses.dataclass(frozen=True)
class Case:
    """One kernel on the reference problem; `moved` and `least` are bytes."""

    name: str
    dtype: str
    kernel: triton.JITFunction
    arguments: dict[str, str | int]  # pointers and floats by type, integers by value
    tile: dict[str, int]
    floor: dict[str, int]
    moved: int
    least: int


@dataclasses.dataclass(frozen=True)
class Compiled:
    kernel: str
    dtype: str
    target: str
    tile: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    bytes_moved: int
    bytes_least: int
    problems: list[str]


def cases(override: dict[str, int]) -> Iterator[Case]:
    """Every kernel in every dtype, with the launchers' tiles unless `override` says otherwise."""
    for dtype, short in DTYPES.items():
        size, p = dtype.itemsize, f"*{short}"

        def tiled(tile: dict[str, int]) -> dict[str, int]:
            return tile | {key: value for key, value in override.items() if key in tile}

        t = tiled({"BR": 16, "BC": 128, "num_warps": 4})
        arguments = dict(p_x=p, p_norm="*fp32", rows=B * N, C=C)
        least = B * N * (C * size + 4)
        yield Case("row_norm", short, cosine_match._row_norm_fwd_kernel, arguments, t, {"BC": 128}, least, least)

        t = tiled(cosine_match.tile(dtype))
        arguments = dict(p_x=p, p_norm="*fp32", p_src="*i64", p_dst="*i64", p_score="*fp32", p_index="*i64")
        arguments |= dict(N=N, C=C, S=S, D=D, d_span=D)
        tiles = B * ceil(S / t["BS"]) * ceil(D / t["BD"])
        least = B * ((S + D) * (C * size + 12) + S * 12)
        moved = tiles * (t["BS"] + t["BD"]) * C * size + tiles * t["BD"] * 12 + B * S * 24
        floor = {"BS": 64, "BD": 64} if dtype == torch.float32 else {"BS": 128, "BD": 64}
        yield Case("cosine_match", short, cosine_match._cosine_match_fwd_kernel, arguments, t, floor, moved, least)

        arguments = {"p_distance" if key == "p_score" else key: v for key, v in arguments.items() if key != "p_norm"}
        moved, least = tiles * (t["BS"] + t["BD"]) * C * size + B * S * 24, B * ((S + D) * (C * size + 8) + S * 12)
        yield Case("distance_match", short, distance_match._distance_match_fwd_kernel, arguments, t, floor, moved, least)

        t = tiled(rows.tile(C))
        arguments = dict(p_x=p, p_index="*i64", p_out=p, N=N, K=K, C=C, rows=B * K)
        least = B * K * (2 * C * size + 8)
        moved = least + B * K * 8 * (ceil(C / t["BC"]) - 1)
        floor = {"BR": 8, "BC": 256}
        yield Case("gather_rows", short, rows._gather_rows_fwd_kernel, arguments, t, floor, moved, least)
        arguments = {"p_rows" if key == "p_x" else key: value for key, value in arguments.items()}
        yield Case("scatter_rows", short, rows._scatter_rows_fwd_kernel, arguments, t, floor, moved, least)

        t = tiled(merge.tile(C))
        arguments = dict(p_x=p, p_order="*i64", p_starts="*i64", p_out=p, segments=B * L, rows=B * N, C=C)
        least = B * (N * (C * size + 8) + L * (C * size + 8))
        moved = least + B * (N + L) * 8 * (ceil(C / t["BC"]) - 1) + B * L * 8
        yield Case("merge", short, merge._merge_fwd_kernel, arguments, t, {"BC": 256}, moved, least)

        for channels in (C, 4096):  # the most that mlerp takes
            t = tiled(merge.whole(channels))
            arguments = arguments | dict(C=channels, SHORT="fp32")
            least = B * (N * (channels * size + 8) + L * (channels * size + 8))
            kernel, floor = merge._mlerp_fwd_kernel, {"BC": channels}
            yield Case(f"mlerp_{channels}", short, kernel, arguments, t, floor, least + B * L * 8, least)

        t = tiled(similarity_sum.SUM | {"STRIP": similarity_sum.STRIP})
        arguments = dict(p_x=p, p_norm="*fp32", p_part="*fp32", N=N, C=C)
        least = B * (N * (C * size + 4) + ceil(N / t["STRIP"]) * C * 4)
        moved = least + B * N * 4 * (ceil(C / t["BC"]) - 1)
        kernel, floor = similarity_sum._unit_sum_fwd_kernel, {"BN": 16, "BC": 32, "STRIP": 128}
        yield Case("unit_sum", short, kernel, arguments, t, floor, moved, least)
        t = tiled(similarity_sum.DOT)
        arguments = dict(p_x=p, p_norm="*fp32", p_sum="*fp32", p_score="*fp32", N=N, C=C)
        least = B * (N * (C * size + 8) + C * 4)
        moved = least + B * C * 4 * (ceil(N / t["BN"]) - 1)
        kernel = similarity_sum._unit_dot_fwd_kernel
        yield Case("unit_dot", short, kernel, arguments, t, {"BN": 16, "BC": 64}, moved, least)

        t = tiled(topk.TILE)
        arguments = dict(p_score=p, p_chosen="*i64", p_rest="*i64", N=N, K=K)
        least = B * N * (size + 8)
        moved = B * N * (34 * size + 8)  # 32 counts to find the cut, one above it, one to place; a row stays in cache
        yield Case("topk_partition", short, topk._topk_partition_fwd_kernel, arguments, t, {"BN": 1024}, moved, least)

        for region in (16, 64, 128):  # tiles of 4 x 4 and 8 x 8, a row of 128
            t = tiled(facility_location.tile(region))
            regions, picks = B * N // region, region // 2
            arguments = dict(p_x=p, p_picks="*i64", N=region, C=C, K=picks, TIE="fp32")
            least = regions * (region * C * size + picks * 8)
            kernel, floor = facility_location._facility_location_fwd_kernel, {"BN": region, "BC": 32}
            yield Case(f"facility_{region}", short, kernel, arguments, t, floor, least, least)

        for width in (64, 72, 128, 160):  # SDXL, DiT-XL, Flux, the coarse levels of SD 1.5
            t = tiled(attention_mass.tile(dtype, width))
            floor = {"BN": 32, "BM": 16} if dtype == torch.float32 else {"BN": 64, "BM": 32}
            integers = dict(N=N, M=N, scale="fp32")
            token = B * H * N * width * size  # bytes of q, and of k, v and out
            arguments = dict(p_q=p, p_k=p, p_v=p, p_out=p, p_lse="*fp32") | integers
            least, scalars = 4 * token, B * H * N * 4
            moved = 2 * token + 2 * token * ceil(N / t["BN"])
            kernel = attention_mass._attention_mass_fwd_kernel
            yield Case(f"attention_{width}", short, kernel, arguments, t, floor, moved + scalars, least + scalars)
            arguments = dict(p_q=p, p_k=p, p_lse="*fp32", p_mass="*fp32") | integers
            moved = token + (token + scalars) * ceil(N / t["BM"])
            kernel, least = attention_mass._column_mass_fwd_kernel, 2 * token + scalars
            yield Case(f"column_mass_{width}", short, kernel, arguments, t, floor, moved + scalars, least + scalars)
            t, few = tiled(agent_attention.tile(dtype, width)), B * H * A * width  # values of all agents
            low = floor | {"BN": 32}
            (_, runs, _), span = cosine_match.launch(B * H, A, N, {"BS": t["BN"], "BD": t["BM"]})
            arguments = dict(p_a=p, p_k=p, p_v=p, p_part="*fp32", p_lse="*fp32") | integers | dict(N=A, m_span=span)
            kernel, least = agent_attention._agents_read_fwd_kernel, few * size + 2 * token + few * 4
            moved = few * size * runs + 2 * token * ceil(A / t["BN"]) + few * 4 * runs
            yield Case(f"agents_read_{width}", short, kernel, arguments, t, low, moved, least)
            arguments = dict(p_q=p, p_a=p, p_g=p, p_v=p, p_out=p) | integers | dict(M=A, shortcut="fp32")
            kernel, least = agent_attention._queries_read_fwd_kernel, 3 * token + 2 * few * size
            moved = 3 * token + 2 * few * size * ceil(N / t["BN"])
            yield Case(f"queries_read_{width}", short, kernel, arguments, t, low, moved, least)
            t = tiled(attention_graph.tile(dtype, width))
            arguments = dict(p_q=p, p_k=p, p_lse="*fp32") | integers
            moved, least = token + token * ceil(N / t["BN"]) + scalars, 2 * token + scalars
            yield Case(f"log_sums_{width}", short, attention_graph._log_sums_fwd_kernel, arguments, t, floor, moved, least)
            arguments = dict(p_q=p, p_k=p, p_lse="*fp32", p_s="*fp32", p_out="*fp32") | integers
            moved, least = token + (token + 2 * scalars) * ceil(N / t["BM"]) + scalars, 2 * token + 3 * scalars
            yield Case(f"flow_{width}", short, attention_graph._flow_fwd_kernel, arguments, t, floor, moved, least)
            t = tiled(attention_graph.tile(dtype, width, pairs=True))
            arguments = dict(p_q=p, p_k=p, p_lse="*fp32", p_out="*i64", H=H) | integers
            tiles = ceil(N / t["BN"])
            moved, least = (token + scalars) * ceil(N / t["BM"]) + token * tiles + B * N * 8, 2 * token + scalars + B * N * 8
            floor = floor | {"BN": 16 if dtype == torch.float32 else 64}
            yield Case(f"partner_{width}", short, attention_graph._partner_fwd_kernel, arguments, t, floor, moved, least)


def compile_case(case: Case, target: str) -> Compiled:
    """The worse of the two builds a launch can pick: integer arguments divisible by 16, and not."""
    gpu, shared_limit = TARGETS[target]
    options = {key: value for key, value in case.tile.items() if key.startswith("num_")}
    blocks = {key: value for key, value in case.tile.items() if key not in options}
    signature = {key: "i32" if isinstance(value, int) else value for key, value in case.arguments.items()}
    pointers = [i for i, kind in enumerate(signature.values()) if kind.startswith("*")]
    integers = [i for i, kind in enumerate(signature.values()) if kind == "i32"]
    problems, registers, spilled, shared = [], 0, 0, 0
    for divisible in (pointers + integers, pointers):
        attributes = {(i,): [["tt.divisibility", 16]] for i in divisible}
        source = ASTSource(case.kernel, signature | dict.fromkeys(blocks, "constexpr"), blocks, attributes)
        binary = triton.compile(source, target=gpu, options=options)
        build = (*usage(binary.asm), binary.metadata.shared)
        registers, spilled, shared = map(max, (registers, spilled, shared), build)
    if spilled:
        problems.append(f"spills {spilled} bytes")
    if shared > shared_limit:
        problems.append(f"wants {shared} bytes of shared memory, {target} has {shared_limit}")
    for key, least in case.floor.items():
        if case.tile[key] < least:
            problems.append(f"{key}={case.tile[key]} is below the floor of {least}")
    tile = " ".join(f"{key.removeprefix('num_')}={value}" for key, value in case.tile.items())
    measured = (registers, spilled, shared, case.moved, case.least)
    return Compiled(case.name, case.dtype, target, tile, *measured, problems)


def usage(asm: dict) -> tuple[int, int]:
    """(registers a thread, bytes a thread spilled to memory) of a compiled kernel."""
    if "amdgcn" in asm:
        read = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)", asm["amdgcn"])}
        return read["vgpr_count"], max(4 * read["vgpr_spill_count"], read["private_segment_fixed_size"])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text).groups()
    return int(registers), int(stack) + int(local)


def report(row: Compiled) -> str:
    ratio = row.bytes_moved / row.bytes_least
    verdict = "; ".join(row.problems) or "ok"
    return (
        f"{row.kernel:<16} {row.dtype:<5} {row.target:<7} {row.tile:<45} {row.registers:>4} {row.spill_bytes:>6} "
        f"{row.shared_bytes / KIB:>8.1f} {row.bytes_moved / 2**20:>9.1f} {ratio:>6.1f}x  {verdict}"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", action="append", help="only kernels whose name starts with this")
    parser.add_argument("--dtype", action="append", choices=DTYPES.values())
    parser.add_argument("--target", action="append", choices=TARGETS)
    parser.add_argument("--tile", nargs="+", default=[], metavar="BLOCK=SIZE")
    parser.add_argument("--json", type=Path, metavar="PATH")
    options = parser.parse_args(argv)
    override = {key: int(value) for key, _, value in (item.partition("=") for item in options.tile)}
    names, dtypes = tuple(options.kernel or [""]), options.dtype or DTYPES.values()
    wanted = [case for case in cases(override) if case.name.startswith(names) and case.dtype in dtypes]
    if not wanted:
        parser.error(f"no kernel's name starts with {options.kernel}")
    print(
        f"{'kernel':<16} {'dtype':<5} {'target':<7} {'tile':<45} {'regs':>4} {'spill':>6} {'shared K':>8} "
        f"{'moved MiB':>9} {'/ least':>7}"
    )
    table = []
    for case in wanted:
        for target in options.target or TARGETS:
            table.append(compile_case(case, target))
            print(report(table[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps([dataclasses.asdict(row) for row in table], indent=1) + "\n")
    failed = sum(bool(row.problems) for row in table)
    print(f"{len(table)} compiled, {failed} refused")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
