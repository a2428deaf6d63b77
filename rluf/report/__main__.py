"""Write the report of a run folder from its files; --wandb saves a W&B Report, --push-to-hub uploads the policy.

python -m rluf.report runs/quickstart/latest
python -m rluf.report runs/quickstart/latest --wandb --dry-run
python -m rluf.report runs/quickstart/latest --push-to-hub owner/name
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from rluf.config.cli import CommandParser, run_command

logger = logging.getLogger("rluf.report")

WANDB_SPEC_FILE = "wandb-report.json"


def write_html_report(run_folder: Path) -> None:
    """Write report.html into the run folder."""
    # Imported here, so that --help and argument errors do not wait for Jinja and Plotly.
    from rluf.report.html import write_report

    logger.info("report: %s", write_report(run_folder))


def write_wandb_report(run_folder: Path, *, dry_run: bool) -> None:
    """Save a W&B Report; a dry run writes its specification into the folder instead and contacts no server."""
    from rluf.report.wandb_report import build_report, check_report, read_default_entity
    from rluf.utils.files import write_json

    report = build_report(run_folder, entity="" if dry_run else read_default_entity(run_folder))
    spec = check_report(report)
    if dry_run:
        write_json(run_folder / WANDB_SPEC_FILE, spec)
        logger.info(
            "%s: W&B Report not sent title=%r blocks=%d",
            run_folder / WANDB_SPEC_FILE,
            report.title,
            len(spec["blocks"]),
        )
        return
    logger.info("%s: W&B Report saved url=%s", run_folder, report.save().url)


def upload_to_hub(run_folder: Path, repo_id: str, *, is_public: bool) -> None:
    """Upload the policy to a model repository of the Hugging Face hub."""
    from rluf.report.hub_upload import upload_policy

    url = upload_policy(run_folder, repo_id, private=not is_public)
    logger.info("%s: policy uploaded url=%s private=%s", run_folder, url, not is_public)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; user errors are one message on stderr."""
    parser = CommandParser(
        "rluf.report",
        usage="python -m rluf.report FOLDER [--wandb [--dry-run] | --push-to-hub OWNER/NAME [--public]]",
        description=__doc__,
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="run folder, such as runs/quickstart/latest")
    parser.add_argument("--wandb", action="store_true", help="save a W&B Report instead (needs wandb-workspaces)")
    parser.add_argument("--dry-run", action="store_true", help=f"with --wandb: write {WANDB_SPEC_FILE}, send nothing")
    parser.add_argument("--push-to-hub", metavar="OWNER/NAME", help="upload policy/ to the Hugging Face hub instead")
    parser.add_argument("--public", action="store_true", help="with --push-to-hub: create a public repository")
    options = parser.parse_args(arguments)
    run_folder: Path = options.folder.expanduser()
    if options.dry_run and not options.wandb:
        parser.error("--dry-run requires --wandb; the HTML report is only a file")
    if options.push_to_hub and options.wandb:
        parser.error("--wandb and --push-to-hub are two commands; give one of them")
    if options.public and not options.push_to_hub:
        parser.error("--public requires --push-to-hub")

    def write_selected_report() -> int:
        from rluf.tracking.console import setup_logging

        setup_logging()
        if options.push_to_hub:
            upload_to_hub(run_folder, options.push_to_hub, is_public=options.public)
        elif options.wandb:
            write_wandb_report(run_folder, dry_run=options.dry_run)
        else:
            write_html_report(run_folder)
        return 0

    return run_command(write_selected_report)


if __name__ == "__main__":
    raise SystemExit(main())
