"""``vpt rerun``: repeats a run from what it left behind, and says whether its numbers came out equal."""

from __future__ import annotations

from pathlib import Path

from vpt.cli.arguments import Parser
from vpt.errors import ConfigError, VPTError
from vpt.run_record import CONFIG_FILE


def run(args: list[str]) -> None:
    """Parses the command line, repeats the run, and prints both numbers; one that came out otherwise is an error."""
    epilog = "Values that are another on this machine: --data.root FOLDER --model.weights FILE"
    parser = Parser(prog="vpt rerun", description=__doc__, epilog=epilog)
    parser.add_argument("run", type=Path, help="folder with run.json and config.yaml")
    parser.add_argument("--out", type=Path, help="keep the repetition in this folder (default: it is removed)")
    options, rest = parser.parse_known_args(args[1:])
    config = options.run / CONFIG_FILE
    if not config.is_file():
        raise ConfigError(f"{options.run} is no run: it has no {CONFIG_FILE}.")

    from vpt.cli.commands.lightning_cli import resolve
    from vpt.experiments.trial import rerun

    found = rerun(options.run, resolve(["-c", str(config), *rest]), options.out)
    for key, (old, new) in found.numbers.items():
        print(f"{key:<22}{old:.8f}  {new:.8f}  {'equal' if old == new else f'{new - old:+.2e}'}")
    for key in found.alone:
        print(f"{key:<22}of one of them only")
    for text in found.differences:
        print(text)
    if not found.equal:
        reasons = "; ".join(found.differences) or "nothing that is recorded differs"
        raise VPTError(f"{options.run} did not come out equal ({reasons}).")
    print("equal, bit for bit")
