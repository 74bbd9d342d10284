"""`rewarded-lines recipes` and `rewarded-lines recipes copy`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from rewarded_lines.cli.display import show_json, show_line
from rewarded_lines.cli.parameters import AsJson, Quiet

app = typer.Typer(name="recipes", rich_markup_mode="rich", add_completion=False, pretty_exceptions_enable=False)


def _names(incomplete: str) -> list[str]:
    from rewarded_lines.recipe_files import recipes as known

    return [name for name in known() if name.startswith(incomplete)]


def _tasks(incomplete: str) -> list[str]:
    from rewarded_lines.recipe_files import recipes as known

    return sorted({task for one in known().values() for task in one.configs if task.startswith(incomplete)})


@app.callback(invoke_without_command=True)
def recipes(ctx: typer.Context, as_json: AsJson = False, quiet: Quiet = False) -> None:
    """List the training scripts and their ready configs, or copy them to where you are.

    A recipe trains one model with TRL: the SFT model, a reward model, or a
    policy for one reward. It needs rewarded-lines\\[train].

    \b
    rewarded-lines recipes
    rewarded-lines recipes --json
    rewarded-lines recipes copy ppo
        ppo.py and a small config, to be run on your own project
    rewarded-lines recipes copy sft ppo --task summary
        with all that belongs to a task
    """
    if ctx.invoked_subcommand is not None:
        return
    from rewarded_lines.recipe_files import files_root
    from rewarded_lines.recipe_files import recipes as known

    found, pages = known().values(), files_root() / "recipes"
    if as_json:
        configs = [{task: str(path) for task, path in one.configs.items()} for one in found]
        rows = zip(found, configs, strict=True)
        show_json([vars(one) | {"script": str(one.script), "configs": paths} for one, paths in rows])
        return
    table = Table("recipe", "what it does", "configs for", box=None, padding=(0, 2, 1, 0), show_edge=False)
    for one in found:
        table.add_row(one.name, one.about, ", ".join(one.configs))
    Console(highlight=False).print(table)
    show_line(f"keys, data, machines: {pages / 'README.md'}")
    show_line(f"tasks: {pages / 'configs' / 'README.md'}")


@app.command()
def copy(
    names: Annotated[
        list[str],
        typer.Argument(metavar="NAME...", help="Recipes, such as ppo.", show_default=False, autocompletion=_names),
    ],
    task: Annotated[
        str | None,
        typer.Option(
            help="Copy the configs of this task, its row functions, and its rewards and prompts as "
            "rewarded-lines.yaml; without it, only the demo's config.",
            autocompletion=_tasks,
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace these scripts and their configs; nothing else.")
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Copy recipes with their configs into the current folder; print the commands that run them.

    Paths in the copies are right here. Files that come along, such as a
    task's rewarded-lines.yaml, are written only where there are none. If a
    script or config exists and differs, nothing is copied.

    \b
    rewarded-lines recipes copy ppo
    rewarded-lines recipes copy sft ppo --task summary
    """
    from rewarded_lines.extras import EXTRAS, install, is_installed
    from rewarded_lines.recipe_files import copy_recipes

    copied = copy_recipes(names, task, overwrite=overwrite)
    if as_json:
        show_json(asdict(copied))
        return
    titles = {"written": copied.written, "not written, since yours is there": copied.kept}
    for title, files in titles.items() if not quiet else ():
        if files:
            show_line(f"{title}:\n" + "\n".join(f"  {name}" for name in files) + "\n")
    if not all(map(is_installed, EXTRAS["train"].modules)):
        show_line(f"needed first: {install('train')}")
    for run in copied.runs:
        for lack in run.lacks:
            show_line(f"needed first: {lack}")
        show_line(run.command)
