"""A program that has a GPU together with those of other jobs: one that is cancelled while busy, or one that looks on.

``neighbour.py watch`` launches kernels of a millisecond, waits for each, and prints a line of JSON each tenth of a
second: the time, how many ended well, the longest in ms. It leaves at the first error, which it prints with the time.

``neighbour.py matmul SIZE``, ``training``, ``kernels MS`` or ``persistent`` makes itself ready off the GPU, prints
``ready``, waits for the file ~/go.JOB, warms up, and prints a line of JSON when it is busy, with the ms of a kernel or
training step. Then it stays busy until it is killed; two minutes at most.
"""

from __future__ import annotations

import json
import os
import sys
import time
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from tests.contract import cuda_client
from tests.lab.hardware.load import Gpu

if TYPE_CHECKING:
    from collections.abc import Callable

MILLISECOND = 200_000  # iterations of `burn`, about
BLOCKS = 16
_PATIENCE_SECONDS = 120.0
_AT_A_TIME = 5  # launches or steps between two waits for the GPU


def say(**what: object) -> None:
    print(json.dumps({**what, "time": time.time()}), flush=True)


def watch() -> int:
    """Look on; 1 when a kernel failed."""
    kernels, longest, said = 0, 0.0, time.monotonic()
    try:
        gpu = Gpu()
        arguments = gpu.prepare(b"burn", MILLISECOND)
        while True:
            began = time.monotonic()
            gpu.launch(BLOCKS, arguments)
            gpu.wait()
            now = time.monotonic()
            kernels, longest = kernels + 1, max(longest, now - began)
            if now > said + 0.1:
                say(kernels=kernels, longest_ms=round(longest * 1000, 1))
                longest, said = 0.0, now
    except RuntimeError as error:
        say(kernels=kernels, error=str(error))
        return 1


def let_go() -> None:
    """Wait for the file that lets this program go. Raises: TimeoutError."""
    file = Path.home() / f"go.{os.environ['SLURM_JOB_ID']}"
    print("ready", flush=True)
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not file.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(str(file))
        time.sleep(0.02)


def stay_busy(step: Callable[[], object], wait: Callable[[], object]) -> None:
    """Take steps until killed, some at a time; say how long one takes."""
    for warm in range(2):
        began = time.monotonic()
        for _ in range(_AT_A_TIME if warm else 1):
            step()
        wait()
    say(busy=True, ms=round((time.monotonic() - began) * 1000 / _AT_A_TIME, 2))
    ends = time.monotonic() + _PATIENCE_SECONDS
    for number in count(1):
        step()
        if number % _AT_A_TIME == 0:
            wait()
            if time.monotonic() > ends:
                return


def kernels(milliseconds: int) -> None:
    let_go()
    gpu = Gpu()
    arguments = gpu.prepare(b"burn", milliseconds * MILLISECOND)
    stay_busy(lambda: gpu.launch(BLOCKS, arguments), gpu.wait)


def persistent() -> None:
    let_go()
    cuda_client.look()
    cuda_client.misbehave("spin", json.dumps({"busy": True, "ms": None, "time": time.time()}))


def matmul(size: int) -> None:
    """The product of two matrices, by cuBLAS, in single precision."""
    import torch

    let_go()
    one, other, product = (torch.rand(size, size, device="cuda") for _ in range(3))
    stay_busy(lambda: torch.mm(one, other, out=product), torch.cuda.synchronize)


def training() -> None:
    """A small transformer; a step is forward, backward and the optimizer's."""
    import torch

    let_go()
    layer = torch.nn.TransformerEncoderLayer(512, 8, 2048, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 6).cuda()
    optimizer = torch.optim.AdamW(model.parameters())
    batch = torch.rand(32, 128, 512, device="cuda")

    def step() -> None:
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()

    stay_busy(step, torch.cuda.synchronize)


def main() -> int:
    what, *size = sys.argv[1:]
    if what == "watch":
        return watch()
    errands: dict[str, Callable[..., None]]
    errands = {"matmul": matmul, "training": training, "kernels": kernels, "persistent": persistent}
    errands[what](*map(int, size))
    return 0


if __name__ == "__main__":
    sys.exit(main())
