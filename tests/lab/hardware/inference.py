"""A rank that serves a small transformer, one request at a time, as PyTorch programs do: batch 1, half precision.

``inference.py RANKS MEETING SECONDS``: meets the others as load.py does, then answers requests for SECONDS. Prints
one line of JSON: requests answered within the window, and their latencies in microseconds.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from statistics import quantiles

from tests.lab.hardware.meeting import meet

LAYERS, WIDTH, HEADS, TOKENS, BATCH = 6, 512, 8, 64, 1


def main() -> int:
    ranks, place, seconds = int(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
    report: dict[str, object] = {"rank": int(os.environ.get("SLURM_PROCID", "0"))}
    try:
        import torch

        torch.set_num_threads(1)
        torch.manual_seed(0)
        layer = torch.nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, batch_first=True)
        model = torch.nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False).half().cuda().eval()
        request = torch.randn(BATCH, TOKENS, WIDTH, dtype=torch.float16, device="cuda")
        report |= {"sms": torch.cuda.get_device_properties(0).multi_processor_count, "torch": torch.__version__}
        with torch.inference_mode():
            for _ in range(20):
                model(request)
            torch.cuda.synchronize()
            opens = meet(place / "0", ranks)
            latencies = []
            while (now := time.time()) < opens + seconds:
                began = time.perf_counter()
                model(request)
                torch.cuda.synchronize()
                if now >= opens:
                    latencies.append(round((time.perf_counter() - began) * 1e6, 1))
        cuts = quantiles(latencies, n=1000, method="inclusive")
        report |= {"requests": len(latencies), "p50": cuts[499], "p90": cuts[899], "p99": cuts[989]}
    except (RuntimeError, OSError) as error:
        report["error"] = str(error).splitlines()[0]
    print(json.dumps(report), flush=True)
    return 1 if "error" in report else 0


if __name__ == "__main__":
    sys.exit(main())
