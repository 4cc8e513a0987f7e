"""What the disk commands take alike: paths, folders of parents, formats, consent."""

from __future__ import annotations

from pathlib import Path

import click

# Whether it can be read is found out by reading it: the error then says what to do.
IMAGE = click.Path(path_type=Path, readable=False)

parent_folder_option = click.option(
    "--parent-folder",
    type=IMAGE,
    multiple=True,
    help="A folder from which parents may be opened, beside the image's own.",
)
dry_run_option = click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
yes_option = click.option("--yes", "-y", is_flag=True, help="Do not ask.")
