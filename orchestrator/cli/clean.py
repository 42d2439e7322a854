"""Command `clean`, with the list of the removed and the remaining files."""

import argparse


def clean_run(options: argparse.Namespace) -> None:
    """Clean a run directory; single files are listed in a dry run only."""
    from orchestrator import api

    found = api.clean(options.run, dry_run=options.dry_run)
    if options.dry_run:
        for place in found.removed:
            print(f"would remove {place}")
    elif found.left:
        print(f"removed the files of the run in {options.run}")
    else:
        print(f"removed {options.run}")
    for place in found.left:
        print(f"{'would leave' if options.dry_run else 'left'} {place}, not written by this run")
