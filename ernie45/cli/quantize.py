"""`ernie quantize`."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from ernie45.cli.output import ProgressBar, human_bytes, note, print_facts, print_json
from ernie45.store.quantize import PLOT_NAME, QuantizedModel, quantize


def run(options: argparse.Namespace) -> int:
    """Quantize, report sizes and errors, compare if a text was given."""
    with ProgressBar() as bar:
        done = quantize(
            options.model,
            options.scheme,
            dst=options.output,
            group_size=options.group_size,
            calibrate=options.calibrate,
            report=options.report,
            overwrite=options.force,
            progress=bar.stage,
        )
    if options.json:
        quality = None if done.quality is None else asdict(done.quality)
        print_json({"path": str(done.path), **asdict(done.report), "quality": quality})
        return 0
    print_facts(_facts(done))
    if done.quality is not None and not (done.path / PLOT_NAME).exists():
        note("no plot: matplotlib is not installed (pip install matplotlib)")
    return 0


def _facts(done: QuantizedModel) -> list[tuple[str, str]]:
    report = done.report
    sizes = f"{human_bytes(report.size_before_bytes)} -> {human_bytes(report.size_after_bytes)}"
    facts = [
        ("model", str(done.path)),
        ("scheme", report.scheme),
        ("size", f"{sizes} ({report.bits_per_weight:.2f} bits per weight)"),
    ]
    facts += [("worst errors" if i == 0 else "", f"{e:.4f}  {name}") for i, (name, e) in enumerate(report.worst(3))]
    on_layer = sum(int(tensor.get("experts_on_layer_statistics", 0)) for tensor in report.tensors.values())
    if on_layer:
        facts.append(("calibration", f"{on_layer} expert matrices saw few tokens and took their layer's statistics"))
    if done.quality is not None:
        q = done.quality
        change = f"{q.perplexity_reference:.3f} -> {q.perplexity:.3f} ({q.perplexity_change:+.2%})"
        facts += [
            ("perplexity", f"{change} on {q.tokens} tokens in chunks of {q.chunk_tokens}"),
            ("KL divergence", f"{q.kl_mean:.4f} nats per token, 99th percentile {q.kl_99:.4f}"),
            ("same first choice", f"{q.same_best_token:.1%}"),
        ]
    return facts
