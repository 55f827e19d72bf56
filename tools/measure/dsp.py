"""DSP on the bundled video transformer: what two and four processes send, and how far their clips are from those of one."""
from __future__ import annotations

import os
import socket
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from accel_tools.measure.tasks import TASKS
from methods import dsp

TASK = TASKS["video_dit"]
STEPS, CLIPS = 4, 2


def work(rank: int, size: int, port: int, folder: str) -> None:
    """What one process does: its part of a run, beside a run alone."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=size)
    pipe, prompts = TASK.load(), TASK.prompts(CLIPS)
    plain = TASK.sample(pipe, STEPS, prompts)
    with dsp.apply(pipe, None, dsp.Config(compare=True)) as patch:
        found = {"apart": float((TASK.sample(pipe, STEPS, prompts) - plain).abs().max()), **patch.report()}
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def together(size: int) -> list[dict[str, Any]]:
    """What each of `size` processes found."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        mp.spawn(work, (size, port, folder), size)
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(size)]


def study(folder: Path) -> dict[str, Any]:
    """Bytes that each process sends, and the largest difference of a pixel."""
    rows = []
    for size in (2, 4):
        found = together(size)
        sent = {key: found[0][key] for key in ("bytes switched", "bytes ulysses", "bytes ring", "bytes sent")}
        rows.append([size, found[0]["switches"], *sent.values(), max(each["apart"] for each in found)])
    return {"model": TASK.model, "title": "Bytes by the number of processes",
            "note": f"{CLIPS} clips with guidance in {STEPS} steps, {2 * CLIPS} samples of which take the place of frames. "
                    "Bytes that each process sends: in its switches, what Ulysses and a ring would send instead by the "
                    "closed form, and in all, with the last gather and the text. The difference is that of pixels in [0, 1] "
                    "from clips of one process. Processes shared one core, so nothing is said of time.",
            "columns": ["Processes", "Switches", "Bytes switched", "Ulysses", "Ring", "Bytes sent", "Difference"], "rows": rows}
