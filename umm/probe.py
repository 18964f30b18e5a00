"""The commands of understanding: probes, questions, and paired comparisons of what they found.

python -m umm.probe classify dinov2 --config configs/tiny/und.yaml --features latent,cls --methods linear,knn
"""

from __future__ import annotations

import click

from umm.cli import CONTEXT, Group, config_option, overrides_argument

COUNT = click.IntRange(min=1)
limit_option = click.option("--limit", type=COUNT, metavar="N", help="Use only the first N pictures of each split.")
dry_run_option = click.option("--dry-run", is_flag=True, help="Print shapes, cost and the first row read, and stop.")


@click.group(cls=Group, context_settings=CONTEXT)
@click.option("--debug", is_flag=True, help="Show the whole trace of an error.")
def probe(debug: bool) -> None:
    """What a latent space, an encoder or a trained trunk knows: classes, segments, answers.

    \b
    python -m umm.probe classify dinov2 --config configs/tiny/und.yaml --features latent,cls --methods linear,knn
    python -m umm.probe vqa dinov2 --config configs/tiny/und_vqa.yaml --limit 400
    """


@probe.command()
@click.argument("targets", nargs=-1, metavar="[RUN_OR_LATENT]... [KEY=VALUE]...")
@click.option("--features", default="latent,cls", show_default=True, help="Addresses, separated by commas.")
@click.option("--methods", default="linear,knn", show_default=True, help="Of linear, knn, attentive, segmentation.")
@config_option
@click.option("--out", default="runs/probe", show_default=True, help="Folder for results.json and samples.jsonl.")
@limit_option
@dry_run_option
def classify(targets, features: str, methods: str, config_file: str | None, out: str, limit, dry_run: bool) -> None:
    """Classify and segment pictures from features that are extracted once and kept.

    \b
    Targets are run folders, or latent spaces as NAME or NAME:WEIGHTS (default: the one of --config).
    Addresses: latent, cls, patches, patch-mean, cls+patch-mean, published, with @BLOCK for another block of the
    encoder (cls@10), trunk:BLOCK@T of a trained DiT (trunk:8@0.1), pixels, random:ADDRESS, or the import path of an
    object with encode(images) -> (B, N, D).

    \b
    python -m umm.probe classify dinov2 --config configs/tiny/und.yaml --features latent,cls --methods linear,knn
    """
    from umm.probing import probe_classes

    names = [target for target in targets if "=" not in target]
    overrides = [target for target in targets if "=" in target]
    click.echo(probe_classes(names, features, methods, config_file, overrides, out, limit, dry_run))


@probe.command()
@click.argument("target")
@config_option
@click.option("--out", default="runs/vqa", show_default=True, help="Folder for results.json, samples.jsonl, the run.")
@limit_option
@dry_run_option
@overrides_argument
def vqa(target: str, config_file: str | None, out: str, limit: int | None, dry_run: bool, overrides) -> None:
    """Answer questions about pictures, beside a blind baseline that sees the questions only.

    \b
    python -m umm.probe vqa dinov2 --config configs/tiny/und_vqa.yaml
    """
    from umm.questions import probe_vqa

    click.echo(probe_vqa(target, config_file, overrides, out, limit, dry_run))


@probe.command()
@click.argument("first")
@click.argument("second")
@click.option("--margin", default=0.01, show_default=True, help="Differences below this count as equivalent.")
@click.option("--resamples", default=10_000, type=COUNT, show_default=True, help="Of the bootstrap over pictures.")
@click.option("--seed", default=0, show_default=True)
def compare(first: str, second: str, margin: float, resamples: int, seed: int) -> None:
    """Paired tests of two results on the same items: RUN, or RUN#TASK for one line of its table.

    \b
    python -m umm.probe compare runs/probe#latent/linear runs/probe#pixels/linear --margin 0.005
    """
    from umm.samples import compare_runs

    click.echo(compare_runs(first, second, margin, resamples, seed))


if __name__ == "__main__":
    probe(prog_name="python -m umm.probe")
