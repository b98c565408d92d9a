"""Lists the models, and converts checkpoints between layouts.

python -m natten.models [list] [PATTERN]
python -m natten.models convert IN OUT --to natten|original|huggingface
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from ._checkpoint import LAYOUTS, Move, convert, detect_layout, read_checkpoint
from ._count import count_macs

MODULES = ("nat", "dinat", "dinat_s", "isotropic", "video")


def listing(pattern: str) -> Table:
    """A row for every registered model and tag whose name holds `pattern`."""
    table = Table(title="natten.models")
    for name, justify in (
        ("model", "left"),
        ("parameters", "right"),
        ("MACs", "right"),
        ("input", "right"),
        ("ImageNet-1k top-1", "right"),
        ("weights", "left"),
    ):
        table.add_column(name, justify=justify)
    for module in MODULES:
        names = timm.list_models(module=module, include_tags=True)
        for i, name in enumerate(names):
            if pattern not in name:
                continue
            model = timm.create_model(name, device="meta").eval()
            cfg = timm.get_pretrained_cfg(name)
            published = [note.split()[-1] for note in cfg.notes or () if "top-1" in note]
            if cfg.file:
                weights = "in the package"
            elif cfg.url:
                weights = f"download: {cfg.url.rsplit('/', 1)[-1]}"
            else:
                weights = "-"
            table.add_row(
                name,
                f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M",
                f"{count_macs(model) / 1e9:.2f} G",
                "x".join(map(str, cfg.input_size)),
                published[0] if published else "-",
                weights,
                end_section=i == len(names) - 1,
            )
    return table


def report(moves: Sequence[Move], source: str, target: str) -> Table:
    """What became of every key."""
    table = Table(title=f"{source} to {target}")
    for name in (source, target, "what happened"):
        table.add_column(name, overflow="fold")
    for old, new in moves:
        if not new:
            what = "dropped: computed by the model"
        elif not old:
            what = "added: a constant of this layout"
        elif len(old) > 1 or len(new) > 1:
            what = "joined" if len(new) == 1 else "split"
        else:
            what = "kept" if old == new else "renamed"
        table.add_row("\n".join(old) or "-", "\n".join(new) or "-", what)
    return table


def convert_file(options: argparse.Namespace, console: Console) -> None:
    state = read_checkpoint(options.input)
    source = detect_layout(state)
    converted, moves = convert(state, options.to, prefix=options.prefix)
    console.print(report(moves, source, options.to))
    tensors = {name: tensor.contiguous().clone() for name, tensor in converted.items()}
    if options.output.suffix == ".safetensors":
        save_file(tensors, options.output, metadata={"layout": options.to})
    else:
        torch.save(tensors, options.output)
    console.print(f"{len(state)} tensors in, {len(tensors)} out: {options.output}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m natten.models",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command")
    lister = commands.add_parser("list", help="the registered models")
    lister.add_argument("pattern", nargs="?", default="", help="part of the names")
    converter = commands.add_parser("convert", help="a checkpoint to another layout")
    converter.add_argument("input", type=Path, help=".safetensors or .pth")
    converter.add_argument("output", type=Path, help=".safetensors or .pth")
    converter.add_argument("--to", choices=LAYOUTS, default="natten")
    converter.add_argument(
        "--prefix", choices=("dinat", "nat"), default="dinat", help="of the Hugging Face keys"
    )
    options = parser.parse_args(arguments)
    # Tables are cut to the width of a terminal, but not in a file.
    console = Console(width=None if sys.stdout.isatty() else 200)
    try:
        if options.command == "convert":
            convert_file(options, console)
        else:
            console.print(listing(getattr(options, "pattern", "")))
    except (ValueError, FileNotFoundError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
