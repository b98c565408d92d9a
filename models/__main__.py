"""Lists the models, and converts checkpoints between layouts.

python -m natten.models [list] [PATTERN]
python -m natten.models convert IN OUT --to natten|original|huggingface
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file

from natten.command import Parser, guarded
from natten.tables import Table, console, show

from ._checkpoint import LAYOUTS, Move, convert, detect_layout, read_checkpoint
from ._count import count_macs

PROG = "python -m natten.models"
MODULES = ("nat", "dinat", "dinat_s", "isotropic", "video", "denoiser")


def listing(pattern: str) -> Table:
    """A row for every registered model and tag whose name holds `pattern`."""
    columns = ("model", "weights", "parameters", "MACs", "input", "ImageNet-1k top-1")
    table = Table("natten.models", columns, 2)
    for module in MODULES:
        first = len(table.rows)
        for name in timm.list_models(module=module, include_tags=True):
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
            if len(table.rows) == first > 0:
                table.add_section()
            table.add(
                name,
                weights,
                f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M",
                f"{count_macs(model) / 1e9:.2f} G",
                "x".join(map(str, cfg.input_size)),
                published[0] if published else "-",
            )
    if not table.rows:
        raise ValueError(f"no model's name holds {pattern!r}: python -m natten.models lists all")
    return table


def report(moves: Sequence[Move], source: str, target: str) -> Table:
    """What became of every key."""
    table = Table(f"{source} to {target}", (source, target, "what happened"), 3)
    for old, new in moves:
        if not new:
            what = "dropped: computed by the model, or no part of it"
        elif not old:
            what = "added: a constant of this layout"
        elif len(old) > 1 or len(new) > 1:
            what = "joined" if len(new) == 1 else "split"
        else:
            what = "kept" if old == new else "renamed"
        for n in range(max(len(old), len(new))):
            here, there = ("".join(keys[n : n + 1]) for keys in (old, new))
            table.add(here or ("" if n else "-"), there or ("" if n else "-"), "" if n else what)
    return table


def convert_file(options: argparse.Namespace) -> tuple[Table, str]:
    """What became of every key, and of the file."""
    if not options.output.absolute().parent.is_dir() or options.output.is_dir():
        raise ValueError(f"{options.output} cannot be written: it must be a file in a folder")
    state = read_checkpoint(options.input)
    source = detect_layout(state)
    converted, moves = convert(state, options.to, prefix=options.prefix)
    tensors = {name: tensor.contiguous().clone() for name, tensor in converted.items()}
    if options.output.suffix == ".safetensors":
        save_file(tensors, options.output, metadata={"layout": options.to})
    else:
        torch.save(tensors, options.output)
    text = f"{len(state)} tensors in, {len(tensors)} out: {options.output}"
    return report(moves, source, options.to), text


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog=PROG,
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
    # Wide enough for the longest keys, where no terminal sets the width.
    out = console(width=200)

    def run() -> int:
        if options.command == "convert":
            for thing in convert_file(options):
                show(thing, out)
        else:
            show(listing(getattr(options, "pattern", "")), out)
        return 0

    return guarded(PROG, run)


if __name__ == "__main__":
    raise SystemExit(main())
