"""godwit policy: the least that agents, retention and recovery need, as a bucket policy."""

from __future__ import annotations

import json

import click

from cli.output import Output, output_options
from cli.session import Session, store_options
from replica import policy as policies
from replica.catalog import read_store
from replica.policy import Role
from replica.stores.address import bucket_of


@click.command()
@click.option(
    "--role",
    "roles",
    multiple=True,
    required=True,
    type=click.Choice([role.value for role in Role]),
    help="Whom it is for: agents replicate, retention prunes and collects, recovery reads. May be repeated.",
)
@click.option(
    "--user",
    "users",
    multiple=True,
    required=True,
    metavar="ARN",
    help="Who has the role: an ARN, or the name of a SeaweedFS identity. One for each --role.",
)
@click.option(
    "--format",
    "format_",
    type=click.Choice(["s3", "seaweedfs"]),
    default="s3",
    show_default=True,
    help="Whose policies: seaweedfs leaves out the conditions that it does not know.",
)
@store_options
@output_options
def policy(
    output: Output, roles: tuple[str, ...], users: tuple[str, ...], format_: policies.Format, *, session: Session
) -> None:
    """Print a bucket policy for the store's bucket, with the least that each role needs.

    A bucket has one policy: name all who work on it, as in --role agent --user ARN --role recovery --user ARN.
    """
    if len(roles) != len(users):
        raise click.UsageError("give one --user for each --role")
    store = session.store()
    bucket, prefix = bucket_of(store.url)
    made = policies.policy(
        [(Role(role), user) for role, user in zip(roles, users, strict=True)],
        bucket,
        prefix,
        format_=format_,
        terms=read_store(store).terms,
    )
    output.show(made, lambda: output.line(json.dumps(made, indent=2)))
