"""``dsft ckpt``: look at checkpoints, check them, compare them, gather them, import DeepSpeed's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from dsft.checkpoint.layout import Layout

_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


@click.group()
def command() -> None:
    """Look at checkpoints, check them, compare them. CHECKPOINT may be a run folder: its newest one is meant."""


@command.command()
@click.argument("run", type=_FOLDER)
def ls(run: Path) -> None:
    """List the checkpoints of RUN (or of its checkpoints folder), newest first. Does not read the weights."""
    from dsft.checkpoint.discover import checkpoints, load_state
    from dsft.checkpoint.opened import OpenCheckpoint
    from dsft.errors import CheckpointError

    folder = run / "checkpoints" if (run / "checkpoints").is_dir() else run
    found = checkpoints(folder)
    if not found:
        raise CheckpointError(f"{folder} holds no checkpoint (a folder named step-<number>). Name a run's folder.")
    for checkpoint in found:
        try:
            opened = OpenCheckpoint(checkpoint)
            train = load_state(checkpoint).get("train")
        except CheckpointError as error:
            click.echo(f"{checkpoint.name}  NOT WHOLE: {error}")
            continue
        size = sum(file.num_bytes for file in opened.files.values())
        position = "imported" if train is None else f"{train['tokens_trained']:,} tokens trained"
        ranks = opened.manifest.world_size
        others = len(opened.elsewhere())
        where = f"  {others} of {ranks} shards on disks of other hosts, not here" if others else ""
        click.echo(f"{checkpoint.name}  {size / 1e9:9.3f} GB  {ranks:4} ranks  {position}{where}")


@command.command()
@click.argument("checkpoint", type=_FOLDER)
def verify(checkpoint: Path) -> None:
    """Read all of CHECKPOINT and compare it with what was written."""
    from dsft.checkpoint.verify import find_damage
    from dsft.export.resolve import checkpoint_of

    source = checkpoint_of(checkpoint)
    damage = find_damage(source)
    if damage is not None:
        raise damage
    click.echo(f"{source}: whole, every block is what was written")


@command.command()
@click.argument("checkpoint", type=_FOLDER)
def gather(checkpoint: Path) -> None:
    """Copy the shards of CHECKPOINT that lie on this host's disk into its folder (checkpoint.local_dir).

    Once every host has done so, or as many as have all shards between them, any host can verify and export it.
    """
    from dsft.checkpoint.gather import gather as gather_shards
    from dsft.export.resolve import checkpoint_of

    source = checkpoint_of(checkpoint)
    num_copied, opened = gather_shards(source)
    missing = opened.elsewhere()
    click.echo(f"{source}: {num_copied} shards copied from this host's disk, {len(missing)} still missing")
    for file in missing:
        click.echo(f"  {file.name}: on {' and '.join(file.hosts)}")


@command.command()
@click.argument("checkpoint", type=_FOLDER)
@click.option("--tensors", is_flag=True, help="List every tensor.")
def show(checkpoint: Path, tensors: bool) -> None:
    """Say what CHECKPOINT holds: position, optimizer, parameter groups, tensors."""
    from dsft.checkpoint.discover import load_state
    from dsft.export.resolve import checkpoint_of

    source = checkpoint_of(checkpoint)
    layout = _layout(source)
    train = load_state(source).get("train", {})
    click.echo(f"{source}")
    for key in ("step", "tokens_trained", "supervised_trained", "num_skipped"):
        if key in train:
            click.echo(f"  {key}: {train[key]:,}")
    click.echo(f"  written by {layout.num_ranks} ranks, ZeRO stage {layout.zero_stage}; loads on any number and stage")
    click.echo(f"  optimizer: {layout.optimizer}, {layout.step:,} updates, states {', '.join(layout.states) or 'none'}")
    for number, group in enumerate(layout.groups):
        values = ", ".join(f"{key}={value}" for key, value in sorted(group["hyper_parameters"].items()))
        click.echo(f"  group {number}: {len(group['parameters'])} parameters; {values}")
    for kind in ("trained", "frozen", "buffer"):
        of_kind = [tensor for tensor in layout.tensors if tensor.kind == kind]
        click.echo(f"  {kind}: {len(of_kind)} tensors, {sum(tensor.num_elements for tensor in of_kind):,} elements")
    for tensor in layout.tensors if tensors else ():
        click.echo(f"  {tensor.name}  {list(tensor.shape)}  {tensor.dtype}  {tensor.kind}")


@command.command()
@click.argument("one", type=_FOLDER)
@click.argument("other", type=_FOLDER)
def diff(one: Path, other: Path) -> None:
    """Compare two checkpoints: position, settings, and each weight (largest difference). Exit code 1: they differ."""
    import torch

    from dsft.checkpoint.discover import load_state
    from dsft.export.resolve import checkpoint_of
    from dsft.export.weights import WeightReader

    sources = checkpoint_of(one), checkpoint_of(other)
    lines = [
        f"{key}: {old!r} -> {new!r}"
        for (key, old), (_, new) in zip(*(_facts(load_state(s), _layout(s)) for s in sources), strict=True)
        if old != new
    ]
    with WeightReader(sources[0], torch.float32) as ours, WeightReader(sources[1], torch.float32) as theirs:
        for name in sorted(ours.tensors.keys() | theirs.tensors.keys()):
            if name not in ours.tensors or name not in theirs.tensors:
                lines.append(f"{name}: only in {sources[0 if name in ours.tensors else 1]}")
            elif ours.tensors[name].shape != theirs.tensors[name].shape:
                lines.append(f"{name}: shape {ours.tensors[name].shape} -> {theirs.tensors[name].shape}")
            elif not torch.equal(mine := ours[name], its := theirs[name]):
                lines.append(f"{name}: largest difference {float((mine - its).abs().max()):.3g}")
    for line in lines:
        click.echo(line)
    click.echo(f"{len(lines)} differences" if lines else "same position, same optimizer settings, bit-equal weights")
    if lines:
        raise SystemExit(1)


@command.command(name="import")
@click.argument("source", type=_FOLDER)
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--model", type=_FOLDER, required=True, help="Hugging Face folder with the model's config and tokenizer.")
def import_(source: Path, out: Path, model: Path) -> None:
    """Rewrite a DeepSpeed checkpoint (ZeRO 1 to 3, or universal) as dsft's: weights, moments, parameter groups.

    SOURCE is the tag's folder. `dsft train --resume OUT` goes on with its weights and optimizer state, from the
    beginning of the data; `dsft export OUT` and `model.path: OUT` take the weights.
    """
    from dsft.checkpoint.deepspeed_import import import_checkpoint

    import_checkpoint(source, out, model)
    click.echo(f"{source} -> {out}")


def _layout(checkpoint: Path) -> Layout:
    from dsft.checkpoint.layout import read_layout
    from dsft.checkpoint.opened import OpenCheckpoint

    return read_layout(OpenCheckpoint(checkpoint))


def _facts(state: dict[str, Any], layout: Layout) -> list[tuple[str, Any]]:
    train = state.get("train", {})
    return [
        ("step", train.get("step")),
        ("tokens trained", train.get("tokens_trained")),
        ("optimizer updates", layout.step),
        ("hyper-parameters", [group["hyper_parameters"] for group in layout.groups]),
        ("configuration", state.get("config")),
        ("token stores", state.get("stores")),
    ]
