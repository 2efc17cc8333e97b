"""Look at checkpoints: list, view, compare, plot, report; on this machine or in the bucket.

NAME is a checkpoint's name, a step number, latest, best, the beginning or end of a name where only
one checkpoint fits (epoch0-step50), or a path. compare and plot take several runs: --run DIR --run
DIR, or paths. It only reads, and needs torch for --weights alone. A checkpoint that cannot be read
is listed with the reason. Exit codes: 0 done, 1 the bucket failed, 2 usage.
"""

from __future__ import annotations

import argparse
import gc
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs.config_files import TRAINING_CONFIG_FILE
from utils.base.console import new_parser, output_width, print_wrapped, run_command
from utils.base.errors import CheckpointError, UsageError
from utils.base.tables import print_table
from utils.base.text import format_bytes, number, printable, to_json_text, wrap_command
from utils.base.uri import require_path
from utils.checkpoints.layout import DATA_STATE_FILE, RunPaths
from utils.checkpoints.views import CheckpointView, describe_lack
from utils.command_line.arguments import (
    NAME_THE_RUN,
    add_price_argument,
    add_run_arguments,
    run_words,
)
from utils.command_line.run_config import read_run_config
from utils.costs.costs import describe_costs
from utils.tools.evaluation.log import of_weights, read_evaluations
from utils.tools.evaluation.text import evaluation_lines, evaluation_summary
from utils.tools.report.plot import plot_of_checkpoints, plot_of_evaluations
from utils.tools.viewer import report, text
from utils.tools.viewer.choice import FILTER_KEYS, SORT_KEYS, choose_rows, parse_condition
from utils.tools.viewer.chosen import choose_checkpoints, find_places, remote_hint
from utils.tools.viewer.shelf import Shelf
from utils.tracking.plots import picture_path

NAMES = "name, step number, latest, best, the unique beginning or end of a name, or a path"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    args = build_parser().parse_args(argv)
    return run_command(args.command, args)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    common = argparse.ArgumentParser(add_help=False)
    add_run_arguments(common)
    add_price_argument(common)
    common.add_argument(
        "--remote",
        action="store_true",
        help="read the bucket's sidecars instead (report: too); --run may then be a bucket's URI",
    )
    parser = new_parser("checkpoint_viewer.py", __doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Callable[..., None], summary: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, parents=[common], help=summary, description=summary)
        sub.set_defaults(command=command)
        return sub

    add_list_options(
        add(
            "list",
            run_list,
            "all checkpoints: losses, tokens, size, age, state in the bucket, why kept",
        )
    )
    view = add(
        "view", run_view, "one checkpoint: metrics, throughput, configuration, files with hashes"
    )
    view.add_argument(
        "name", metavar="NAME", nargs="?", default="latest", help=f"{NAMES} (default: latest)"
    )
    view.add_argument(
        "--all",
        action="store_true",
        help="also its configuration, files with hashes, position in the data and upload",
    )
    add_compare_options(
        add("compare", run_compare, "checkpoints side by side; --weights: how far each layer moved")
    )
    add_plot_options(
        add(
            "plot",
            run_plot,
            "curves, in the terminal or as a picture; --evaluation: of evaluate.py",
        )
    )
    page = add(
        "report",
        run_report,
        "all of a run on one HTML page: curves, configuration, checkpoints, texts",
    )
    page.add_argument("--output", default="run.html", metavar="F", help="(default: run.html)")
    return parser


def add_compare_options(compare: argparse.ArgumentParser) -> None:
    """Add what only `compare` takes."""
    compare.add_argument(
        "names",
        metavar="NAME",
        nargs="*",
        help=f"{NAMES} (default: the two newest; the newest of each --run)",
    )
    compare.add_argument(
        "--weights",
        action="store_true",
        help="also show how far each layer's weights moved; reads all weights",
    )


def add_plot_options(plot: argparse.ArgumentParser) -> None:
    """Add what only `plot` takes."""
    plot.add_argument("names", metavar="NAME", nargs="*", help=f"{NAMES} (default: latest)")
    plot.add_argument(
        "--evaluation",
        action="append",
        metavar="TASK.FIGURE",
        help="draw a figure of evaluate.py, such as validation.loss or hellaswag.acc_norm, over "
        "the steps of all checkpoints that have it; repeat it for several figures",
    )
    plot.add_argument(
        "--save",
        type=Path,
        metavar="F",
        help="write a picture: PNG, SVG, PDF or JPG by the suffix of F (default: none in a "
        "terminal or with --json, ./NAME.png in a pipe)",
    )
    plot.add_argument(
        "--terminal",
        action="store_true",
        help="draw as text (the default in a terminal without --save)",
    )


def add_list_options(listing: argparse.ArgumentParser) -> None:
    """Add what only `list` takes."""
    listing.add_argument(
        "--filter",
        action="append",
        default=[],
        metavar="CONDITION",
        help="show only checkpoints with, for example, 'step>=100', 'loss<3', 'size<2GiB', "
        "'age<2d', 'time>=2026-01-31' or 'state=verified'; if repeated, all must hold. Keys: those "
        "of --json, or " + ", ".join(FILTER_KEYS),
    )
    listing.add_argument("--last", type=int, metavar="N", help="only the N newest of these")
    listing.add_argument("--sort", choices=SORT_KEYS, default="step", help="(default: step)")
    listing.add_argument("--reverse", action="store_true", help="greatest first")


# list


def run_list(args: argparse.Namespace) -> None:
    """List checkpoints."""
    conditions = [parse_condition(word) for word in args.filter]
    if args.last is not None and args.last < 1:
        raise UsageError(f"--last must be at least 1, got {args.last}.")
    (place,) = find_places(args)
    with place.open() as shelf:
        every = shelf.rows(shelf.read(shelf.names, brief=True), args.hourly_price)
    rows = choose_rows(
        every, conditions, last=args.last, sort_key=args.sort, is_reversed=args.reverse
    )
    archives = [size for row in every if (size := number(row["archive_bytes"])) is not None]
    storage = {"archive_bytes": math.fsum(archives)} if args.remote else None
    hint, paths = remote_hint(args, place.config), RunPaths.of(place.config)
    if not (every or place.bucket or paths.checkpoints.exists()):
        raise UsageError(f"{describe_lack(printable(shelf.where))} {NAME_THE_RUN}{hint}")
    if args.json:
        values = {"where": shelf.where, "checkpoints": rows, "notes": shelf.notes}
        print(to_json_text({**values, "num_checkpoints": len(every), "storage": storage}))
        return
    if paths.run_file.exists():
        hint = f"python scripts/monitor_training.py{run_words(args)} shows where the run is.{hint}"
    print_list(rows, len(every), shelf, hint.strip())
    if storage is not None:
        print(f"Archives: {format_bytes(storage['archive_bytes'])} in all.")
    for note in shelf.notes:
        print_wrapped(f"Note: {printable(note)}", hanging=2)


def print_list(rows: Sequence[dict[str, Any]], num_all: int, shelf: Shelf, hint: str) -> None:
    """Print rows: a table in a terminal, the lines of the user's example in a pipe.

    `hint` says where there may be some, if here are none.
    """
    where = printable(shelf.where)
    if not num_all:
        print_wrapped(describe_lack(where))
        if hint:
            print_wrapped(hint)
        return
    count = f"{len(rows)} of {num_all}" if len(rows) < num_all else str(num_all)
    title = f"Found {count} checkpoint{'' if num_all == 1 else 's'} in {where} (times in UTC):"
    if rows and output_width() is not None:
        print_table(title, [text.list_cells(row) for row in rows], text.LIST_COLUMNS)
        for row in rows:
            if row["problem"]:
                print_wrapped(f"{row['name']}: {printable(row['problem'])}", hanging=2)
        return
    print(title)
    print("=" * 78)
    for index, row in enumerate(rows, start=1):
        print(f"{index:2d}. {text.list_line(row)}")
        if row["problem"]:
            print(f"      Problem: {printable(row['problem'])}")


# view


def run_view(args: argparse.Namespace) -> None:
    """Show one checkpoint."""
    (chosen,) = choose_checkpoints(args, [args.name], are_several=False)
    view, row = chosen.view, chosen.row
    files, problems = report.check_files(view)
    data_state, data_problem = report.read_part(view, DATA_STATE_FILE)
    config, config_problem = report.read_part(view, TRAINING_CONFIG_FILE)
    costs = report.measure_costs(view, args.hourly_price)
    evaluations = read_evaluations(RunPaths.of(chosen.config).evaluations)
    measured = of_weights(evaluations.evaluations, view.manifest)
    found = (view.problem, data_problem, config_problem, evaluations.problem)
    problems += [problem for problem in found if problem]
    if args.json:
        details = {
            "loss_statistics": report.loss_statistics(view.metadata),
            "metadata": view.metadata,
            "config": config,
            "data_position": report.data_position(data_state),
            "evaluations": [{"time": one.time, **one.to_json()} for one in measured],
            "files": files,
            "problems": problems,
        }
        print(to_json_text({**row, **details}))
        return
    print(f"Checkpoint Summary: {view.name}")
    print("=" * 60)
    spent = [] if costs is None else [describe_costs(costs)]
    bucket = chosen.where if args.remote else ""
    sections = text.example_sections(view, sys.stdout.encoding)
    if args.all:
        sections |= {
            "Evaluations": evaluation_lines(measured),
            "Progress": text.progress_lines(view.metadata, row),
            "Costs": spent,
            "Data Position": text.plain_lines(report.data_position(data_state)),
            "Run": text.run_lines(row, view),
            "Upload": text.upload_lines(row, bucket) + text.upload_details(row),
            "Configuration": text.config_lines(config),
            "Files": [] if files else ["  unknown: the manifest cannot be read"],
        }
    else:
        brief = text.brief_lines(row, view.metadata, len(files), bucket)
        more = [*brief, *spent, *evaluation_summary(measured)]
        sections = {**text.shorten_sections(sections), "Run": more}
    for title, lines in sections.items():
        print_section(title, lines)
    if args.all:
        print_table("\nFiles:", text.file_rows(files), text.FILE_COLUMNS)
    print_section("Problems", [f"  {printable(problem)}" for problem in problems])
    if not args.all:
        name = str(view.name.step) if args.name in ("latest", "best") else shlex.quote(args.name)
        words = f"{name}{run_words(args)}{' --remote' if args.remote else ''} --all"
        print("All of it, with configuration and files:")
        command = printable(f"python scripts/checkpoint_viewer.py view {words}", 2000)
        width = output_width()
        print("\n".join([command] if width is None else wrap_command(command, width)))


# compare


def run_compare(args: argparse.Namespace) -> None:
    """Show checkpoints side by side."""
    found = choose_checkpoints(args, args.names, num_newest=1 if len(args.run or []) > 1 else 2)
    chosen, rows = [one.view for one in found], [one.row for one in found]
    if len(found) < 2:
        count = f"{len(found)} {'named' if args.names else 'found'}"
        hint = remote_hint(args, found[0].config)
        raise UsageError(f"compare needs at least two checkpoints, {count}.{hint}")
    for row in rows:
        costs = row["costs"] or {}
        row.update(machine_seconds=costs.get("seconds"), dollars=costs.get("dollars"))
    pairs = list(zip(chosen, chosen[1:], strict=False))
    differences, notes = report.config_differences(chosen)
    drifts = [measure_weights(args, *pair) for pair in pairs] if args.weights else None
    if args.json:
        values = {"checkpoints": rows, "config_differences": differences, "notes": notes}
        print(to_json_text({**values, "weights": drifts}))
        return
    print(f"Comparing {len(rows)} checkpoints:")
    is_one_place = len({one.where for one in found}) == 1
    for index, one in enumerate(found, start=1):
        print(f"  [{index}] {one.view.name if is_one_place else printable(one.label)}")
    print_table("=" * 60, text.compare_rows(rows), text.compare_columns(len(rows)))
    print_section("Configuration Differences", text.difference_lines(differences, notes))
    for index, drift in enumerate(drifts or [], start=1):
        title = f"Weights, [{index}] to [{index + 1}]"
        print_table(f"\n{title}:", text.drift_rows(drift), text.DRIFT_COLUMNS)
        print_section(f"{title}: problems", [f"  {printable(one)}" for one in drift["problems"]])
    problems = [f"  {row['name']}: {printable(row['problem'])}" for row in rows if row["problem"]]
    print_section("Problems", problems)


def measure_weights(
    args: argparse.Namespace, older: CheckpointView, newer: CheckpointView
) -> dict[str, Any]:
    """Return the drift of the weights; where they cannot be read, only the problem.

    Raises:
        UsageError: The weights are in the bucket only.
    """
    from utils.tools.viewer.weight_drift import measure_drift

    if older.path is None or newer.path is None:
        missing = older if older.path is None else newer
        raise UsageError(
            "--weights reads checkpoints on this machine; first: "
            f"python scripts/upload_manager.py download {missing.name}{run_words(args)}"
        )
    found: dict[str, Any] = {"layers": {}, "total": None, "problems": []}
    try:
        found = measure_drift(older.path, newer.path)
    except CheckpointError as exc:
        found["problems"].append(str(exc))
    return {"from": str(older.name), "to": str(newer.name), **found}


# plot


def run_plot(args: argparse.Namespace) -> None:
    """Draw the curves of checkpoints, as text or into a file."""
    is_text = args.terminal or (args.save is None and sys.stdout.isatty() and not args.json)
    path = None if args.save is None else picture_path(args.save)
    plot = plot_of_evaluations(args) if args.evaluation else plot_of_checkpoints(args)
    if path is None and not is_text and not args.json:
        path = Path(f"{plot.name}.png".replace("/", "_"))
    saved = None if path is None else str(plot.draw(path))
    if args.json:
        print(to_json_text({**plot.values, "saved": saved, "notes": plot.notes}))
        return
    for note in plot.notes:
        print_wrapped(f"Note: {printable(note)}.", hanging=2)
    if is_text:
        print("\n".join(plot.charts()))
    if saved is not None:
        print(f"Plot saved to {printable(saved)}")


# report


def run_report(args: argparse.Namespace) -> None:
    """Write the page of a run."""
    from utils.tools.report.page import read_run, write_page

    require_path(args.output, "--output")
    config = read_run_config(args)
    files = read_run(config, is_remote=args.remote, hourly_price=args.hourly_price)
    num_bytes = write_page(files, Path(args.output))
    if args.json:
        print(to_json_text({"saved": args.output, "bytes": num_bytes}))
        return
    hint = "" if files.views else remote_hint(args, config)
    print(f"Report saved to {printable(args.output)} ({format_bytes(num_bytes)}).{hint}")


# all


def print_section(title: str, lines: Sequence[str]) -> None:
    """Print lines below a heading; nothing where there are none."""
    if not lines:
        return
    if title:
        print(f"\n{title}:")
        print("-" * 30)
    for line in lines:
        print_wrapped(line, hanging=4)


if __name__ == "__main__":
    gc.disable()  # a short process whose many small objects never become garbage
    sys.exit(main())
