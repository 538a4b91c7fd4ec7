"""From the start of a process to the first token of a packed model, and the memory that it took.

    python benchmarks/first_token.py FOLDER [--prompt 16] [--repeats 3] [--llama-cpp DIR --peer-file GGUF]

Every run is a fresh Python process that imports the package, opens the folder, reads a prompt of random ids and chooses
one token. The peer is llama.cpp's server, with and without repacked weights, without its run to warm up: it has no smaller program
that starts, answers and ends. Run it twice: the first run may bring the file into the page cache.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

# Run as a script, Python looks for modules beside this file only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import usable_cores
from benchmarks.serve_servers import KEY, Sizes, llama_cpp_server, started
from ernie45.errors import Ernie45Error

_CONTEXT = 4096
_LEAST_IDS = 256
"""Every vocabulary has more: random ids below are known to all."""

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
    parser.add_argument("--llama-cpp", type=Path, metavar="DIR", help="folder with llama-server")
    parser.add_argument("--peer-file", type=Path, metavar="GGUF", help="the same model for llama.cpp")
    options = parser.parse_args()
    if (options.llama_cpp is None) != (options.peer_file is None):
        parser.error("--llama-cpp and --peer-file go together")
    try:
        _report("ernie45", lambda: _ours(options.folder, options.prompt), options)
        if options.llama_cpp is not None:
            for setting in ("--repack", "--no-repack"):
                _report(f"llama.cpp {setting}", lambda setting=setting: _peer(options, setting), options)  # type: ignore[misc]
    except Ernie45Error as error:
        sys.exit(str(error))


def _report(name: str, run: Callable[[], tuple[float, int]], options: argparse.Namespace) -> None:
    found = [run() for _ in range(options.repeats)]
    seconds = [each[0] for each in found]
    print(
        f"{name}: first token of a {options.prompt}-token prompt after {statistics.median(seconds):.2f} s "
        f"({min(seconds):.2f}-{max(seconds):.2f}), peak memory {max(each[1] for each in found) / 1e9:.2f} GB",
        flush=True,
    )


def _ours(folder: str, prompt: int) -> tuple[float, int]:
    """Seconds and bytes."""
    start = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, folder, str(prompt)], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None, "asked for"
        line = child.stdout.readline()
        seconds = time.perf_counter() - start
    if child.returncode or not line:
        raise Ernie45Error(f"the process ended with status {child.returncode}")
    return seconds, int(line.split()[1])


def _peer(options: argparse.Namespace, setting: str) -> tuple[float, int]:
    """Seconds and bytes; mapped pages of the file count."""
    sizes = Sizes(threads=usable_cores(), max_model_len=_CONTEXT, max_num_seqs=1)
    facts = {"tied": False, "kv_values_per_token": 0}
    server = llama_cpp_server(options.llama_cpp, options.peer_file, "", sizes, facts)
    with started(server.with_arguments(f"{setting} --no-warmup")) as running:
        ids = random.Random(0).choices(range(_LEAST_IDS), k=options.prompt)
        endpoint = running.endpoint(chat=False)
        connection = http.client.HTTPConnection(endpoint.host, endpoint.port, timeout=60)
        body = json.dumps({"prompt": ids, "max_tokens": 1, "temperature": 0})
        connection.request(
            "POST", endpoint.path, body, {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        )
        answer = connection.getresponse()
        answer.read()
        if answer.status != http.client.OK:
            raise Ernie45Error(f"llama-server answered with status {answer.status}")
        return time.perf_counter() - running.begin_s, running.resident_bytes()


if __name__ == "__main__":
    main()
