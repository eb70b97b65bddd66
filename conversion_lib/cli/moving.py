"""Commands for downloaded and published checkpoints: download, publish, verify, prune."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from conversion_lib.cli.command import command
from conversion_lib.cli.options import Dst, local_destination, plain
from conversion_lib.program import Outcome
from conversion_lib.progress import Reporter, format_bytes

app = typer.Typer()


@command(app, "download")
def download(
    reporter: Reporter,
    repo: Annotated[str, typer.Argument(metavar="REPO", help="A Hub id such as Qwen/Qwen3-0.6B.")],
    dst: Dst,
    revision: Annotated[str, typer.Option("--revision", help="A branch, a tag or a commit.")] = "main",
) -> Outcome:
    """Downloads the files that a conversion needs, verifies them and records their origin."""
    from conversion_lib import hub

    result = hub.download(repo, local_destination(dst), revision=revision, reporter=reporter)
    data = plain(result) | {"bytes_in": result.bytes_downloaded, "bytes_out": result.bytes_downloaded}
    return Outcome(data, [f"{result.repo} at {result.commit}: {result.files} files in {result.path}"])


@command(app, "publish")
def publish(
    reporter: Reporter,
    ckpt: Annotated[
        str, typer.Argument(metavar="CKPT", help="A MaxText checkpoint: DST, DST/0 or DST/0/items; also gs://.")
    ],
    url: Annotated[str, typer.Argument(metavar="URL", help="gs://bucket/prefix or a directory.")],
    report: Annotated[
        Path | None, typer.Option("--report", help="Directory of the check's report. Default: CKPT's report/.")
    ] = None,
    unchecked: Annotated[
        bool, typer.Option("--unchecked", help="Publish without a passed check. The manifest records it.")
    ] = False,
) -> Outcome:
    """Publishes a checked checkpoint at URL/<model>/<commit>/<target>/."""
    from conversion_lib.publish.publish import publish as publish_checkpoint

    result = publish_checkpoint(ckpt, url, report=report, unchecked=unchecked, reporter=reporter)
    data = plain(result)
    return Outcome(
        data | {"bytes_in": data["bytes_copied"], "bytes_out": data["bytes_copied"]}, [f"published: {data['url']}"]
    )


@command(app, "verify")
def verify(
    reporter: Reporter, url: Annotated[str, typer.Argument(metavar="URL", help="A published checkpoint.")]
) -> Outcome:
    """Checks a published checkpoint against its manifest."""
    from conversion_lib.publish.verify import verify as verify_published

    result = verify_published(url, reporter=reporter)
    problems = list(result.problems)
    message = f"{url} does not match its manifest: {problems[0] if problems else ''} ({len(problems)} problems)"
    return Outcome(plain(result), [f"{url}: {result.files} files as published"], failed=bool(problems), message=message)


@command(app, "prune")
def prune(
    reporter: Reporter,
    url: Annotated[
        str, typer.Argument(metavar="URL", help="The URL given to `ferry publish`: gs://bucket/prefix or a directory.")
    ],
    keep: Annotated[
        int, typer.Option("--keep", help="How many of the newest versions of each model and target to keep.")
    ] = 3,
    older_than: Annotated[
        float, typer.Option("--older-than", metavar="DAYS", help="Also keep versions published in the last DAYS.")
    ] = 0.0,
    yes: Annotated[bool, typer.Option("--yes", help="Remove them. Without it, they are only listed.")] = False,
) -> Outcome:
    """Lists superseded versions and leftovers of failed publishes; removes them with --yes."""
    from conversion_lib.publish.prune import prune as prune_published

    result = prune_published(url, keep=keep, older_than_days=older_than, remove=yes, reporter=reporter)
    lines = [f"{v.path}  {v.why}  {v.published or ''}  {format_bytes(v.bytes)}" for v in result.versions]
    done = "removed" if yes else "to remove, with --yes"
    total = f"{len(result.versions)} of {len(result.versions) + len(result.kept)}, {format_bytes(result.bytes)}: {done}"
    return Outcome(plain(result), [*lines, f"{url}: {total}"])
