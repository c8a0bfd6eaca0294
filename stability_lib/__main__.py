"""The command line: `stability-lib COMMAND`, or `python -m stability_lib COMMAND`."""

import argparse
import ast
import os
import sys
from pathlib import Path

from . import batch, cluster, data, runs, studies
from .train import DEVICES, resolve_device


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 where something failed or disagreed, 2 for a wrong argument, 130
    after Ctrl-C."""
    options = _parser().parse_args(arguments)
    try:
        command = {"reproduce": _reproduce, "reference": _reference, "promote": _promote, "audit": _audit,
                   "profile": _profile, "remedies-page": _remedies_page, "figures": _figures, "findings": _findings}
        return command[options.command](options)
    except (ValueError, TypeError, runs.StoreError, runs.MissingRuns, cluster.ClusterError, data.DataError,
            OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: runs that are in the store are kept", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="stability-lib", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)

    reproduce = commands.add_parser("reproduce", help="execute notebooks and write one HTML report")
    reproduce.add_argument("notebooks", nargs="*", help="names or numbers; default all")
    reproduce.add_argument("--scale", default="cpu", help=f"one of {', '.join(studies.SCALES)} (default cpu)")
    reproduce.add_argument("--recompute", default="missing", help="missing (default), all, or none")
    reproduce.add_argument("--output", type=Path, help="folder for the results (default reports/<scale>)")
    reproduce.add_argument("--cell-timeout", type=int, metavar="SECONDS", help="fail a cell that takes longer")
    reproduce.add_argument("--kernel", metavar="NAME", help="Jupyter kernel to run in (default the notebooks' own)")
    reproduce.add_argument("--set", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"),
                           help="another notebook parameter, its value written as in Python")
    reproduce.add_argument("--dry-run", action="store_true",
                           help="only say what would be trained and how long it takes")

    reference = commands.add_parser("reference", help="train the committed reference again")
    reference.add_argument("studies", nargs="*", help="names; default all")
    reference.add_argument("--scale", default="cpu", help="whose reference (default cpu)")

    promote = commands.add_parser("promote", help="make local runs of a study the committed reference")
    promote.add_argument("study")
    promote.add_argument("--scale", default="cpu", help="the grid to promote (default cpu)")

    audit = commands.add_parser("audit", help="train random reference runs again and compare")
    audit.add_argument("--n", type=int, default=5, help="how many (default 5)")
    audit.add_argument("--tolerance", type=float, default=0.02,
                       help="on the final loss of stable runs, in nats (default 0.02)")
    audit.add_argument("--seed", type=int, help="choose the same runs again")
    audit.add_argument("--scale", default="cpu", help="whose reference (default cpu)")

    profile = commands.add_parser("profile", help="spectral profile of a model: a folder, a GGUF file, or a Hugging "
                                  "Face id, which is fetched; writes an HTML page and JSON")
    profile.add_argument("model", nargs="?", help="folder, .gguf, owner/name, or a profile's .json")
    profile.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two models on one page")
    profile.add_argument("--prompts", type=Path, metavar="FILE", help="a prompt a line (default 32 of the library's)")
    profile.add_argument("--revision", help="of a Hugging Face id: branch, tag or commit")
    profile.add_argument("--layers", metavar="NAME", help="the stack of layers, where the model has several")
    profile.add_argument("--rank", type=int, help="profile the RANK largest directions of the states")
    profile.add_argument("--snapshots", type=int, default=2048, metavar="N", help="token states (default 2048)")
    profile.add_argument("--output", type=Path, default=Path("reports/profiles"), metavar="DIR",
                         help="folder for page and JSON (default reports/profiles)")

    commands.add_parser("remedies-page", help="render docs/which_remedy.md from its template, the notebooks' boards "
                        "and the committed runs")
    commands.add_parser("figures", help="draw the pictures of README, site and chapters into docs/figures")
    commands.add_parser("findings", help="write what was found into README.md, from the notebooks' boards")

    for command in (reproduce, reference, audit, profile):
        command.add_argument("--device", default="auto", help=f"one of {', '.join(DEVICES)} (default auto)")
        command.add_argument("--cluster", metavar="ADDRESS", default=os.environ.get(cluster.CLUSTER, ""),
                             help="train on a Dask cluster: tcp://HOST:8786, or local:4 for four processes here")
    return parser


def _reproduce(options) -> int:
    paths = batch.notebooks(options.notebooks)
    parameters = _parameters(options)
    output = (options.output or runs.project_root() / "reports" / options.scale).expanduser()
    settings = dict(cell_timeout=options.cell_timeout, kernel=options.kernel, cluster=options.cluster)
    batch.check_batch(paths, output, parameters, **settings)
    if options.dry_run:
        print(batch.dry_run(paths, options.scale, options.device, options.recompute).to_string(index=False))
        return 0
    summary = batch.reproduce(paths, output, parameters, **settings)
    print("\n" + summary.assign(result=summary["error"].replace("", "ok")).drop(columns="error").to_string(index=False))
    facts = parameters | ({"cluster": options.cluster} if options.cluster else {})
    print(f"\nreport: {batch.write_report(summary, output, facts, options.kernel)}")
    if summary["error"].eq(batch.INTERRUPTED).any():
        raise KeyboardInterrupt
    return int(summary["error"].ne("").any())


def _parameters(options) -> dict:
    parameters = {"scale": options.scale, "device": options.device, "recompute": options.recompute}
    own = set(parameters)
    for name, text in options.set:
        if name in parameters:
            raise ValueError(f"--set {name}: use --{name}" if name in own else f"--set {name} is given twice")
        parameters[name] = _value(text)
    return parameters


def _value(text: str):
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _reference(options) -> int:
    for study in options.studies:
        studies.configs(study, options.scale)
    batch.recompute_reference(options.studies, options.device, options.scale, options.cluster)
    return 0


def _promote(options) -> int:
    batch.checkout()
    configs = studies.configs(options.study, options.scale)
    rows = runs.load(runs.locate(options.study, options.scale))
    count = runs.promote(options.study, configs, rows, options.scale)
    print(f"{options.study}: {count} runs are the reference of scale {options.scale} now")
    return 0


def _audit(options) -> int:
    table = batch.audit(options.n, options.tolerance, options.device, options.seed, options.scale, options.cluster)
    print(table.to_string(index=False))
    print(f"{int(table['agrees'].sum())} of {len(table)} agree (stable runs within {options.tolerance:g} nats)")
    return int(not table["agrees"].all())


def _profile(options) -> int:
    if bool(options.model) == bool(options.compare):
        raise ValueError("profile takes one model, or two after --compare")
    from . import pages  # drawing libraries take seconds to import

    device = resolve_device(options.device)
    found, page = pages.report(options.compare or [options.model], options.output.expanduser(), prompts=options.prompts,
                               revision=options.revision, layers=options.layers, rank=options.rank,
                               snapshots=options.snapshots, device=device)
    for name, profile in found.items():
        print(f"{name}\n{pages.shown(profile).round(3).to_string()}\n{profile.verdict()}\n")
    print(f"page: {page}")
    return 0


def _remedies_page(options) -> int:
    from . import advice  # drawing libraries take seconds to import

    print(f"page: {advice.write()}")
    return 0


def _figures(options) -> int:
    from . import pictures  # drawing libraries take seconds to import

    print("\n".join(f"picture: {path}" for path in pictures.write()))
    return 0


def _findings(options) -> int:
    from . import scorecard

    print(f"findings: {scorecard.write_findings()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
