"""From the start of a process to the first token of a packed model, and the memory that it took.

    python benchmarks/first_token.py FOLDER [--prompt 16] [--repeats 3]

Every run is a fresh Python process that imports the package, opens the folder, reads a prompt of random ids and chooses
one token. Run it twice: the first run may bring the file into the page cache.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

CHILD = """
import sys
import torch
import ernie45
from ernie45.bench.measure import peak_memory_bytes
from ernie45.layers.cache import AttentionView

with torch.inference_mode():
    model = ernie45.load_model(sys.argv[1])
    ids = torch.randint(model.config.vocab_size, (int(sys.argv[2]),), generator=torch.Generator().manual_seed(0))
    cache = model.new_cache(len(ids))
    hidden = model.hidden(ids, AttentionView(lengths=(len(ids),), caches=(cache,)))
    print(int(model.logits(hidden[-1:]).argmax()), peak_memory_bytes(), flush=True)
"""


def main() -> None:
    """Measure and print one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="packed checkpoint, such as `ernie bench --shape NAME --folder FOLDER` leaves")
    parser.add_argument("--prompt", type=int, default=16, help="tokens of the prompt (default 16)")
    parser.add_argument("--repeats", type=int, default=3, help="processes (default 3)")
    options = parser.parse_args()
    seconds, peak = [], 0
    for _ in range(options.repeats):
        start = time.perf_counter()
        with subprocess.Popen(
            [sys.executable, "-c", CHILD, options.folder, str(options.prompt)], stdout=subprocess.PIPE, text=True
        ) as child:
            assert child.stdout is not None, "asked for"
            line = child.stdout.readline()
            seconds.append(time.perf_counter() - start)
        if child.returncode or not line:
            sys.exit(f"the process ended with status {child.returncode}")
        peak = max(peak, int(line.split()[1]))
    print(
        f"first token of a {options.prompt}-token prompt after {statistics.median(seconds):.2f} s "
        f"({min(seconds):.2f}-{max(seconds):.2f}), peak memory {peak / 1e9:.2f} GB"
    )


if __name__ == "__main__":
    main()
