"""`rewarded-lines rounds`."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rewarded_lines.cli.display import progress_bar, show_json, show_line
from rewarded_lines.cli.merge_command import MethodOptions, parse_alpha
from rewarded_lines.cli.parameters import AsJson, Config, Quiet, as_option
from rewarded_lines.merger.merge_options import MergeOptions
from rewarded_lines.options import takes_fields
from rewarded_lines.pipelines.round_options import DECIDED, RoundOptions

if TYPE_CHECKING:
    from rewarded_lines.pipelines.rounds import Round


@takes_fields(RoundOptions, "each", annotate=as_option)
@takes_fields(MergeOptions, "how", (*DECIDED, "options"), as_option)
@takes_fields(MethodOptions, "options", annotate=as_option)
def rounds(
    *,
    train: Annotated[
        list[str],
        typer.Option(
            metavar="COMMAND",
            help="Trains a policy: accelerate launch ppo.py --config ppo.yaml; NAME=COMMAND for one of them.",
            show_default=False,
        ),
    ],
    config: Config = Path("rewarded-lines.yaml"),
    lam: Annotated[
        str | None, typer.Option(help="λ of the first of two policies, or 0.2,0.3,0.5; default all equal.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the rounds.")] = Path("rounds"),
    each: RoundOptions,
    how: MergeOptions,
    options: Any,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Train, merge, and train on from the merge (WARP, MapReduce LoRA).

    Each round trains one policy per reward from the model of the round
    before, the first from the SFT model, and merges them there. A killed
    command goes on where it stopped. Each round's folder is a project.

    \b
    rewarded-lines recipes copy ppo
    rewarded-lines rounds --dry-run \\
        --train "accelerate launch ppo.py --config configs/demo/ppo.yaml"
        the commands of three rounds; without --dry-run they are run
    rewarded-lines rounds --score data/validation.jsonl --engine hf \\
        --train "accelerate launch ppo.py --config configs/demo/ppo.yaml"
        with a table of rewards and KL by round
    rewarded-lines rounds --method slerp --beta 0 --eta 0.5 --ema 0.01 \\
        --train "accelerate launch ppo.py --config configs/demo/ppo.yaml"
        as WARP does it
    """
    from rewarded_lines.pipelines.rounds import rounds as run

    given = {name: value for name, value in vars(options).items() if value is not None}
    how = replace(how, alpha=parse_alpha(how.alpha), options=given)
    with progress_bar("Rounds", quiet=quiet or as_json) as bar:
        found = run(train, config, lam=lam, out=out, each=each, how=how, progress=bar)
    if as_json:
        show_json([asdict(one) for one in found])
    elif how.dry_run:
        for one in found:
            time = f"about {one.seconds:.0f} s" if one.seconds is not None else "its time is not known yet"
            show_line(f"# round {one.number}, from {one.start}: {'finished' if one.finished else time}")
            show_line("\n".join(one.commands))
    else:
        Console().print(_table(found))
        show_line(f"rewarded-lines sweep --config {out}/round-{found[-1].number}/rewarded-lines.yaml --out {out}/sweep")


def _table(found: list[Round]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    names = list(found[-1].scores)
    for heading in ("round", *(name if name != "kl_to_sft" else "KL to SFT" for name in names), "seconds", "model"):
        table.add_column(Text(heading), justify="left" if heading == "model" else "right", overflow="fold")
    for one in found:
        values = [one.scores[name] for name in names]
        cells = [f"{value['value']:.3f} ({value['low']:.3f} to {value['high']:.3f})" for value in values]
        table.add_row(str(one.number), *cells, f"{one.seconds or 0:.0f}", Text(one.merged))
    return table
