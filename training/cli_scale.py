"""Commands about training at scale: `crossmodal plan`."""

from typing import Annotated

import typer

from .console import JSON, note, print_json, print_table, quiet


app = typer.Typer()


@app.command()
def plan(
    presets: Annotated[
        list[str] | None, typer.Argument(help="tiny, small, base, large (ViT-L/16 and BERT-large); all, if left out.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of each device.")] = 32,
    devices: Annotated[int, typer.Option(min=1, help="Number of devices.")] = 8,
    tokens: Annotated[int, typer.Option(min=1, max=512, help="Words of each text.")] = 32,
    bf16: Annotated[bool, typer.Option(help="Autocast to bfloat16.")] = True,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Activations of layers are computed again in the backward.")
    ] = False,
    as_json: JSON = False,
):
    """Plan the memory of each device in training, without any: parameters, activations, and what DDP, ZeRO and FSDP make of them."""
    quiet()
    from ..configs import accelerate_config
    from .memory import PRESETS, config_of
    from .memory import plan as run
    from .recipes import nearest

    for name in presets or ():
        if name not in PRESETS:
            raise ValueError(f"{name!r} is no preset that can be planned. Expected any of {nearest(name, PRESETS)}.")
    rows = {}
    for name in presets or PRESETS:
        found = run(config_of(name), batch_size, tokens, bf16, checkpointing)
        rows[name] = {
            "parameters, M": found.parameters / 1e6,
            "activations of a row, MiB": found.activations / batch_size / 2**20,
            **{f"{key}, GiB": size / 2**30 for key, size in found.of_device(devices).items()},
        }
    kind = ("bfloat16" if bf16 else "float32") + (", checkpointed" if checkpointing else "")
    print_table(f"A device of {devices}, {batch_size} rows of {tokens} words each, AdamW, {kind}", rows)
    note(f"to launch: accelerate launch --config_file {accelerate_config('fsdp2').parent}/<strategy>.yaml ...")
    if as_json:
        print_json(rows)
