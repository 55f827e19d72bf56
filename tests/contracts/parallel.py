"""What every method of kind `parallel` must show under two processes, on each of the first families that it serves. Each check
takes a `Case`.

A test file runs them all:

    @pytest.mark.parametrize("check, case", parallel.cases(dsp), ids=parallel.name)
    def test_contract(check, case):
        check(case)

The method offers `apply(target, group, config)`, which every process of a group calls on its own copy of the pipeline; with
`group=None` it is the default group, or the process alone, which changes nothing. What one process gave to others in a run
stands in the report as "bytes sent". A module whose defaults do nothing on small models names a Config that does in `TINY`.

Two processes are started by torchrun with the backend gloo, once for a method; this file is what they run.
"""
from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from contracts.patch import engaging, refusals
from families import FAMILIES, Family
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from accel_tools.measure.macs import count_macs

ROOT = Path(__file__).parents[2]
PROCESSES = 2
SECONDS = 300                       # for all families; within them a hang is found


@dataclass(frozen=True)
class Case:
    """A method on one family."""

    method: ModuleType
    family: Family

    def __str__(self) -> str:
        return self.family.name

    def pipe(self) -> Any:
        """In double precision, where what is added in another order still differs by far less than by a fault."""
        pipe = self.family.pipe()
        self.family.model(pipe).double()
        return pipe

    def found(self) -> list[dict[str, Any]]:
        """What each process found on this family."""
        return [found[self.family.name] for found in together(self.method)]


def settings(family: Family) -> list[dict[str, Any]]:
    """The runs that are compared, also of a number of tokens that two processes do not share evenly."""
    return [{}, {"seed": 1, "batch": 2, "steps": 2}, *([{"size": family.sizes[1], "steps": 2}] if family.sizes[1] else [])]


@cache
def served(method: ModuleType) -> dict[str, str | None]:
    """Of each of the first families the words in which it is refused, None where it is not. One process refuses what several
    would."""
    return refusals(lambda family: method.apply(family.pipe(), None, engaging(method)).remove())


def cases(method: ModuleType) -> list[tuple]:
    found = [Case(method, FAMILIES[name]) for name, refusal in served(method).items() if refusal is None]
    return [(check, case) for check in CHECKS for case in found] + [
        (a_worker_that_dies_ends_the_others_with_one_clear_error, found[0])]


def name(value: Any) -> str:
    return value.__name__ if callable(value) else str(value)


# ---- the processes -----------------------------------------------------------------------------------------------------

@cache
def together(method: ModuleType) -> list[dict[str, Any]]:
    """What each of the processes found, by family."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}",
                   "-m", "contracts.parallel", method.__name__, method.__file__, folder, "work",
                   *(name for name, refusal in served(method).items() if refusal is None)]
        done = subprocess.run(command, env=_environment(), capture_output=True, text=True, timeout=SECONDS)
        assert done.returncode == 0, done.stderr[-4000:]
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(PROCESSES)]


def _environment(**more: str) -> dict[str, str]:
    paths = os.pathsep.join(map(str, (ROOT / "tests", ROOT, ROOT / "tools")))
    return os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"} | more


class Sent(TorchDispatchMode):
    """Counts the bytes that this process gives to others, by what each collective call of torch.distributed does."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = op(*args, **kwargs or {})
        if op.namespace == "c10d":
            self.bytes += self.given(op.__name__.split(".")[0].strip("_"), args)
        elif op.namespace in ("_c10d_functional", "_c10d_functional_autograd") and "wait" not in op.__name__:
            raise NotImplementedError(f"count what {op} sends")
        return out

    @staticmethod
    def given(op: str, args: tuple) -> int:
        """A process keeps its own share of what it sends round."""
        def size(value: Any) -> int:
            if isinstance(value, Tensor):
                return value.numel() * value.element_size()
            return sum(map(size, value)) if isinstance(value, list | tuple) else 0

        others = PROCESSES - 1
        if op in ("allgather", "allgather_base"):
            return size(args[1]) * others
        if op in ("alltoall", "alltoall_base"):
            return size(args[1]) * others // PROCESSES
        if op in ("allreduce", "reduce_scatter", "reduce_scatter_base"):          # in a ring
            return size(args[0 if op == "allreduce" else 1]) * others // PROCESSES * (2 if op == "allreduce" else 1)
        if op == "send":
            return size(args[0])
        if op in ("barrier", "recv", "recv_any_source"):
            return 0
        raise NotImplementedError(f"count what {op} sends")


def work(method: ModuleType, folder: Path, *families: str) -> None:
    """What one process does: every family alone, together with the others, and once more alone."""
    dist.init_process_group("gloo")
    rank, config, found = dist.get_rank(), engaging(method), {}
    groups = [dist.new_group([each]) for each in range(PROCESSES)]
    for family in families:
        case, runs = Case(method, FAMILIES[family]), []
        pipe = case.pipe()
        plain = [case.family.run(pipe, **setting) for setting in settings(case.family)]
        cost = count_macs(lambda pipe=pipe, case=case: case.family.run(pipe))
        with method.apply(pipe, None, config) as patch:
            for setting, expected in zip(settings(case.family), plain, strict=True):
                with Sent() as sent:
                    out = case.family.run(pipe, **setting)
                runs.append({"out": out, "plain": expected, "sent": sent.bytes, "report": patch.report()})
            shared = count_macs(lambda pipe=pipe, case=case: case.family.run(pipe))
        off = case.family.run(pipe)
        with method.apply(pipe, groups[rank], config) as patch, Sent() as sent:
            single = case.family.run(pipe)
        found[family] = {"runs": runs, "macs": (shared, cost), "off": torch.equal(off, plain[0]),
                         "single": torch.equal(single, plain[0]), "sent": sent.bytes}
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def die(method: ModuleType, folder: Path, family: str) -> None:
    """The last process ends in the middle of a run; what the others then do is written down."""
    dist.init_process_group("gloo")
    rank, calls = dist.get_rank(), []
    case = Case(method, FAMILIES[family])
    pipe = case.pipe()
    plain = case.family.run(pipe)
    patch = method.apply(pipe, None, engaging(method))

    def ends(*_):
        calls.append(1)
        if rank == PROCESSES - 1 and len(calls) == 3:
            os._exit(1)

    handle = case.family.model(pipe).register_forward_pre_hook(ends)
    told = "no error"
    try:
        case.family.run(pipe)
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
    patch.remove()
    handle.remove()
    torch.save({"told": told, "usable": torch.equal(case.family.run(pipe), plain)}, folder / f"{rank}.pt")
    os._exit(0)                                              # a group that lost a process cannot be taken apart


# ---- the checks --------------------------------------------------------------------------------------------------------

def all_give_what_one_gives(case: Case) -> None:
    for process in case.found():
        for run in process["runs"]:
            scale = float(run["plain"].abs().max())
            torch.testing.assert_close(run["out"] / scale, run["plain"] / scale, rtol=0, atol=1e-9)
            assert run["report"]["state"] == "engaged"


def each_does_a_part_of_the_work(case: Case) -> None:
    shares = [process["macs"] for process in case.found()]
    assert all(shared < cost for shared, cost in shares), shares


def bytes_sent_are_those_stated(case: Case) -> None:
    for process in case.found():
        for run in process["runs"]:
            assert run["report"]["bytes sent"] == run["sent"] > 0


def removal_restores_every_bit(case: Case) -> None:
    assert all(process["off"] for process in case.found())


def a_group_of_one_is_the_plain_model(case: Case) -> None:
    assert all(process["single"] and process["sent"] == 0 for process in case.found())
    pipe = case.family.pipe()
    plain = case.family.run(pipe)
    with case.method.apply(pipe, None, engaging(case.method)) as patch:
        assert torch.equal(case.family.run(pipe), plain) and patch.report()["state"] == "off"


def a_worker_that_dies_ends_the_others_with_one_clear_error(case: Case) -> None:
    """In time, with the method's name and what to do; the model is as it was without the patch."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
        free.close()
        command = [sys.executable, "-m", "contracts.parallel", case.method.__name__, case.method.__file__, folder, "die",
                   case.family.name]
        workers = [subprocess.Popen(command, env=_environment(RANK=str(rank), WORLD_SIZE=str(PROCESSES), MASTER_PORT=port,
                                                              MASTER_ADDR="127.0.0.1"), stderr=subprocess.PIPE, text=True)
                   for rank in range(PROCESSES)]
        try:
            errors = [worker.communicate(timeout=SECONDS)[1] for worker in workers]
        finally:
            for worker in workers:
                worker.kill()
        assert [worker.returncode for worker in workers] == [0] * (PROCESSES - 1) + [1], errors
        found = torch.load(Path(folder) / "0.pt")
    slug = case.method.__name__.removeprefix("methods.")
    assert found["told"].startswith(f"RuntimeError: {slug}: process 0 of {PROCESSES} "), found["told"]
    assert len(found["told"].splitlines()) == 1 and found["usable"]


CHECKS = [all_give_what_one_gives, each_does_a_part_of_the_work, bytes_sent_are_those_stated, removal_restores_every_bit,
          a_group_of_one_is_the_plain_model]


def main(qualified: str, file: str, folder: str, what: str, *families: str) -> None:
    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location(qualified, file)
    method = sys.modules[qualified] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(method)
    {"work": work, "die": die}[what](method, Path(folder), *families)


if __name__ == "__main__":
    main(*sys.argv[1:])
