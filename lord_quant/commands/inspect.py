# SPDX-License-Identifier: Apache-2.0
"""`optimum-cli lord inspect`: what a checkpoint folder really holds."""

from __future__ import annotations

import argparse
import sys


HELP = "Show what a checkpoint holds, summed over the tensors in its files: forms, ranks, bytes, bits per weight."
EXAMPLES = """examples:
  optimum-cli lord inspect starcoder-lord
  optimum-cli lord inspect ./dense-model --json
  optimum-cli lord inspect starcoder-lord --verify      # hashes of all files, every tensor, logits on fixed tokens
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    parser.add_argument("folder", metavar="DIR", help="checkpoint folder, dense or compressed")
    parser.add_argument("--json", action="store_true", help="print as JSON")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="hold files against the hashes recorded when they were written, look at every tensor, load and run the model",
    )


def run(args: argparse.Namespace) -> int:
    """Prints the folder's layers and totals."""
    from tabulate import tabulate

    from lord_quant.artifact.stored import measure
    from lord_quant.artifact.verification import verify
    from lord_quant.report import both_text, form_text, human_bytes, to_json
    from lord_quant.silence import import_hosts

    import_hosts()
    verified = verify(args.folder) if args.verify else None
    stored = measure(args.folder)
    rows = [
        {
            "name": layer.site.name,
            "form": layer.form,
            "leader": layer.leader,
            "out_features": layer.site.out_features,
            "in_features": layer.site.in_features,
            "rank": layer.rank,
            "bits": layer.bits,
            "up_bits": layer.up_bits,
            "group_size": layer.group_size,
            "up_group_size": layer.up_group_size,
            "bytes": layer.weight_bytes + layer.bias_bytes,
            "bpw": round(layer.bpw, 4),
        }
        for layer in stored.layers
    ]
    if args.json:
        totals = {"bpw": stored.bpw, "tensor_bytes": stored.tensor_bytes, "file_bytes": stored.file_bytes}
        found = {} if verified is None else {"verified": verified._asdict()}
        sys.stdout.write(to_json({**totals, **found, "quantization_config": stored.quantization_config, "layers": rows}))
        return 0
    pairs = ((layer.bits, layer.group_size, layer.up_bits, layer.up_group_size) for layer in stored.layers)
    mixed = len({packing for pair in pairs for packing in (pair[:2], pair[2:])}) > 1
    table = [
        [
            layer.site.name,
            form_text(layer.form, layer.site.name, layer.leader),
            f"{layer.site.out_features}x{layer.site.in_features}",
            layer.rank or "-",
            *([both_text(layer.bits, layer.up_bits), both_text(layer.group_size, layer.up_group_size)] if mixed else []),
            human_bytes(layer.weight_bytes + layer.bias_bytes),
            f"{layer.bpw:.2f}",
        ]
        for layer in stored.layers
    ]
    headers = ["layer", "form", "out x in", "rank", *(["bits", "group"] if mixed else []), "bytes", "bpw"]
    method = stored.quantization_config.get("quant_method", "none (dense)")
    sides = ("left", "left", *["right"] * (len(headers) - 2))
    sys.stdout.write(tabulate(table, headers, disable_numparse=True, colalign=sides) + "\n\n")
    method += ", mixed" if mixed else ""
    for key in ("bits", "group_size", "sym", "desc_act", "format_version", "lord_quant_version"):
        if key in stored.quantization_config and not (mixed and key in ("bits", "group_size")):
            method += f", {key} {stored.quantization_config[key]}"
    sys.stdout.write(
        f"method        {method}\n"
        f"linear layers {stored.bpw:.3f} bits per weight all in\n"
        f"tensors       {human_bytes(stored.tensor_bytes)} ({human_bytes(stored.file_bytes)} of safetensors files)\n"
    )
    if verified is not None:
        unhashed = "" if verified.files else "; no lord_manifest.json says what the files were, so none was compared"
        sys.stdout.write(f"verified      {verified.tell()}{unhashed}\n")
    return 0
