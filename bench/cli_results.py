"""`ettin-bench compare`, `report`, `tables`: what results say."""

from pathlib import Path

import click

from ettin.artifacts.errors import EttinError, InputError, MissingDependency
from ettin.artifacts.writing import write_file
from ettin.bench.tables import filled
from ettin.runtimes.commands import console


@click.command("compare", epilog=console.example_epilog("ettin-bench compare before.json after.json"))
@click.argument("old", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.argument("new", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--baseline", help="Contestant that the others are divided by.  [default: sentence-transformers fp32]")
@click.option("--check", is_flag=True, help="Fail if something is slower or worse.")
def compare_results(old: Path, new: Path, baseline: str | None, check: bool) -> None:
    """What changed between two results of a kind, as far as it can be told from noise.

    Of cpu, throughput, peers and load: pairs per second; of quality: nDCG@10.
    """
    try:
        from ettin.bench.compare import compare as verdicts_on
    except ModuleNotFoundError as error:
        raise MissingDependency("ettin-bench compare", str(error.name), "bench") from None
    verdicts, basis = verdicts_on(old, new, baseline)
    form = "{:+.4f}" if basis.startswith("nDCG") else "{:+.1%}"
    rows = [
        [each.name, form.format(each.change), f"{form.format(each.low)} … {form.format(each.high)}", each.word]
        for each in verdicts
    ]
    console.table(rows, ["what", "change", "95 %", "verdict"])
    console.note(basis)
    lost = [each.name for each in verdicts if each.word in ("slower", "worse")]
    if check and lost:
        raise EttinError(f"{', '.join(lost)}: {new} is slower or worse than {old}")


@click.command(epilog=console.example_epilog("ettin-bench report bench/results --output report.html"))
@click.argument("results", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--output", type=click.Path(path_type=Path), default=Path("report.html"), show_default=True)
@click.option("--pictures", type=click.Path(path_type=Path), help="Also write the plots as SVG files into this folder.")
def report(results: tuple[Path, ...], output: Path, pictures: Path | None) -> None:
    """One self-contained HTML page of RESULTS: files, or folders of them."""
    try:
        from ettin.bench.report import page, read_results, write_pictures
    except ModuleNotFoundError as error:
        raise MissingDependency("ettin-bench report", str(error.name), "bench") from None
    records = read_results(results)
    write_file(output, page(records).encode())
    if pictures:
        write_pictures(records, pictures)
    click.echo(output)


@click.command(epilog=console.example_epilog("ettin-bench tables README.md"))
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--check", is_flag=True, help="Change nothing; fail if a table is stale.")
def tables(files: tuple[Path, ...], check: bool) -> None:
    """Make the marked tables of Markdown FILES again from the results that they name."""
    for file in files:
        before = file.read_text(encoding="utf-8")
        after = filled(before, file.parent)
        if check and after != before:
            raise InputError(f"{file}: a table is not what its results say. Run: ettin-bench tables {file}")
        if after != before:
            write_file(file, after.encode())
