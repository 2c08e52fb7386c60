"""Run by `test_initialization_checkpoint`: initialize into a checkpoint in children that are killed at random times.

Prints a line a child: how it ended. The last one runs to its end.
"""

import os
import random
import select
import shutil
import signal
import sys
import time
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np

import varscale as vs
from varscale.initialization import orbax_sessions

KILLS = 10
LIMIT = 2048


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(6):
            x = nn.Dense(16)(x)
        return nn.BatchNorm(use_running_average=False)(x)


def run(path: Path, started: int) -> None:
    """Initializes into the checkpoint, telling when the draw begins ("d") and when it is finalized ("f")."""
    finalize = orbax_sessions.finalize

    def told(where: Path) -> None:
        os.write(started, b"f")
        finalize(where)

    orbax_sessions.finalize = told
    os.write(started, b"d")
    vs.initialize_to_checkpoint(path, Net(), jax.random.key(0), np.ones((2, 16), np.float32), memory_limit=LIMIT)


def child(path: Path, wait_for: bytes, seconds: float | None) -> str:
    """One child, killed so many seconds after it told that it is so far; never if seconds is None."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            run(path, write)
            os._exit(0)
        except BaseException as error:
            print(f"raised {error!r}", flush=True)
            os._exit(1)
    os.close(write)
    if seconds is not None:
        seen = b""
        while wait_for not in seen and select.select([read], [], [], 60)[0]:
            news = os.read(read, 1)
            if not news:
                break
            seen += news
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    os.close(read)
    status = os.waitpid(pid, 0)[1]
    return "killed" if os.WIFSIGNALED(status) else f"ended {os.WEXITSTATUS(status)}"


def main(folder: Path) -> None:
    dice = random.Random(0)
    begin = time.monotonic()
    print("whole", child(folder / "whole", b"d", None), flush=True)
    whole = time.monotonic() - begin
    for i in range(KILLS):
        inside = i % 3 == 2
        ended = child(folder / "killed", b"f" if inside else b"d", dice.uniform(0, 0.15 if inside else whole))
        print(i, "finalize" if inside else "draw", ended, flush=True)
        if ended == "ended 0":  # done before it was killed: the next one begins anew
            shutil.rmtree(folder / "killed")
    print("last", child(folder / "killed", b"d", None), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
