import os
import socket
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from contracts import parallel
from families import FAMILIES

from methods import dsp, fora, tome
from methods._core.patch import Patch
from methods._core.processes import Processes

THREE = 3                                      # processes: they share neither two heads, nor four frames, nor 64 places evenly


@pytest.mark.parametrize("check, case", parallel.cases(dsp), ids=parallel.name)
def test_contract(check, case):
    check(case)


def test_volumes_by_hand():
    """Two switches of one element each, of four in two processes; and the shares of eight processes."""
    assert dsp.volumes(4, 2) == {"dsp": 2, "ulysses": 4, "ring": 4, "megatron": 16}
    found = dsp.volumes(1.0, 8)
    assert found == {"dsp": 2 * 7 / 64, "ulysses": 0.4375, "ring": 1.75, "megatron": 7.0}
    assert found["dsp"] / found["ulysses"] == 0.5 and 2 * found["dsp"] / (2 * found["ulysses"] * 2) == 0.25


@pytest.mark.parametrize("name", ["flux", "unet", "cosmos", "kandinsky5", "ltx2", "sana", "z-image"])
def test_others_are_refused_in_words(name):
    with pytest.raises(ValueError, match="no chain of blocks that work token by token"):
        dsp.apply(FAMILIES[name].pipe())


# ---- three real processes ---------------------------------------------------------------------------------------------

def launch(what, folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, __file__, what, folder]
    where = dict(WORLD_SIZE=str(THREE), MASTER_PORT=port, MASTER_ADDR="127.0.0.1")
    return [subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=parallel._environment(RANK=str(rank), **where))
            for rank in range(THREE)]


@cache
def together():
    """What each of three processes found."""
    with tempfile.TemporaryDirectory() as folder:
        workers = launch("work", folder)
        errors = [worker.communicate(timeout=300)[1] for worker in workers]
        assert not any(worker.returncode for worker in workers), errors[0][-4000:]
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(THREE)]


def work():
    processes, found = Processes(None, "test"), {}
    for name in ("latte", "cogvideox", "wan", "wan22", "ltx"):
        family, setting = FAMILIES[name], dict(steps=2, batch=2)
        pipe = family.pipe()
        plain = family.run(pipe, **setting)
        with dsp.apply(pipe, None, dsp.Config(compare=True)) as patch:
            out = family.run(pipe, **setting)
            found[name] = {"apart": float((out - plain).abs().max() / plain.abs().max()), "report": patch.report()}
    found["by hand"] = by_hand(processes)
    found["gradients"] = gradients(processes)
    found["company"] = company(processes)
    return found


def by_hand(processes):
    """Pads never show: what was cut off and filled up again may be anything."""
    x = torch.arange(2 * 5 * 7.0).view(10, 7)
    part = processes.padded(x, 1).chunk(THREE, 1)[processes.rank]
    turned = processes.switch(part, 0, 1, 7)
    own = processes.padded(x, 0).chunk(THREE, 0)[processes.rank]
    return {"turned": torch.equal(turned, own), "back": torch.equal(processes.switch(turned, 1, 0, 10), part),
            "whole": torch.equal(processes.join(part, 1, 7), x)}


def gradients(processes):
    """Mean over processes of the gradients of weights and input, beside those of one process."""
    found = []
    for shared in (False, True):
        model = FAMILIES["latte"].pipe().transformer.double().requires_grad_(True)
        random = torch.Generator().manual_seed(0)
        x, text = (torch.randn(shape, generator=random, dtype=torch.float64, requires_grad=True)
                   for shape in ((2, 4, 4, 16, 16), (2, 5, 16)))
        patch = dsp.apply(model) if shared else None
        model(x, timestep=torch.tensor([500, 300]), encoder_hidden_states=text).sample.square().mean().backward()
        grads = [x.grad, text.grad, *(weight.grad for weight in model.parameters() if weight.grad is not None)]
        if shared:
            patch.remove()
            for grad in grads:
                dist.all_reduce(grad)
                grad /= THREE
        found.append(grads)
    scale = max(float(each.abs().max()) for each in found[0])
    return {"count": len(found[0]), "apart": max(float((a - b).abs().max()) for a, b in zip(*found, strict=True)) / scale}


def company(processes):
    """A cache by the step beside it, in either order; a reducer; and a patch that skips in one process alone."""
    latte, found = FAMILIES["latte"], {}
    pipe = latte.pipe()
    pipe.transformer.double()
    config = fora.Config(interval=2)
    with fora.apply(pipe, config):
        alone = latte.run(pipe)
    for first, second in ((lambda: fora.apply(pipe, config), lambda: dsp.apply(pipe)),
                          (lambda: dsp.apply(pipe), lambda: fora.apply(pipe, config))):
        with first() as a, second() as b:
            out = latte.run(pipe)
            apart = float((out - alone).abs().max() / alone.abs().max())
            found["cache", a.name] = apart, a.report()["state"], b.report()["state"]
    with dsp.apply(pipe):
        try:
            tome.apply(pipe, tome.Config(ratio=0.5))
        except ValueError as error:
            found["reducer"] = str(error)
        odd = Patch(pipe, "odd")
        odd.around(odd.denoiser.blocks[0].attn, lambda forward, *args, **kwargs: forward(*args, **kwargs))
        odd.each_call(lambda context: odd.skips([odd.denoiser.blocks[0].attn] if processes.rank == 0 else []))
        with odd.on():
            try:
                latte.run(pipe)
            except RuntimeError as error:
                found["odd"] = str(error)
    return found


def die():
    """The last of three ends in the middle of a run. -> what the others were told, and after how many seconds"""
    family, calls, told = FAMILIES["latte"], [], "no error"
    pipe = family.pipe()

    def ends(*_):
        calls.append(time.time())
        if dist.get_rank() == THREE - 1 and len(calls) == 3:
            os._exit(1)
    with dsp.apply(pipe):
        pipe.transformer.register_forward_pre_hook(ends)
        try:
            family.run(pipe)
        except RuntimeError as error:
            told = str(error)
    return {"told": told, "after": time.time() - calls[-1]}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["latte", "cogvideox", "wan", "wan22", "ltx"])
def test_three_processes_give_what_one_gives_in_single_precision(name):
    for process in together():
        assert process[name]["apart"] < 1e-5 and process[name]["report"]["state"] == "engaged"


@pytest.mark.slow
def test_bytes_are_those_of_the_closed_form():
    """Latte: two layers, two steps, four samples with guidance, of four frames with 64 places of 32 channels."""
    frames, places = 18, 66                                         # 16 and 64, filled up
    whole = frames * places * 32 * 4
    gather = 16 * places // THREE * 32 * 4 * 2
    for process in together():
        report = process["latte"]["report"]
        assert report["switches"] == 2 * 2 * 2
        assert report["bytes sent"] == 2 * (2 * dsp.volumes(whole, THREE)["dsp"] + gather)
        assert report["bytes switched"] == 4 * round(dsp.volumes(whole, THREE)["dsp"])
        assert report["bytes ulysses"] == 4 * round(dsp.volumes(whole, THREE)["ulysses"])
        assert report["bytes ring"] == 4 * round(dsp.volumes(whole, THREE)["ring"])
        assert process["by hand"] == {"turned": True, "back": True, "whole": True}


@pytest.mark.slow
def test_both_experts_are_shared_out():
    """Of two steps each takes one, of three layers, with guidance in two calls."""
    assert all(process["wan22"]["report"]["switches"] == 2 * 3 * 2 * 2 for process in together())


@pytest.mark.slow
def test_the_mean_of_gradients_is_that_of_one_process():
    for process in together():
        assert process["gradients"]["count"] > 50 and process["gradients"]["apart"] < 1e-12


@pytest.mark.slow
def test_company():
    for process in together():
        found = process["company"]
        for first in ("fora", "dsp"):
            apart, *states = found["cache", first]
            assert apart < 1e-9 and states == ["engaged"] * 2
        assert "tome and dsp cannot stack" in found["reducer"]
        assert "does not skip the same layers in all processes" in found["odd"]


@pytest.mark.slow
def test_a_lost_process_ends_the_others_in_time():
    with tempfile.TemporaryDirectory() as folder:
        workers = launch("die", folder)
        errors = [worker.communicate(timeout=300)[1] for worker in workers]
        assert [worker.returncode for worker in workers] == [0, 0, 1], errors
        for rank in (0, 1):
            found = torch.load(Path(folder) / f"{rank}.pt")
            assert found["told"].startswith(f"dsp: process {rank} of 3 ") and found["after"] < 30


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.save({"work": work, "die": die}[sys.argv[1]](), Path(sys.argv[2]) / f"{dist.get_rank()}.pt")
    os._exit(0)                                                      # a group that lost a process cannot be taken apart
