"""``vpt push``: a run onto the Hugging Face Hub, where ``vpt.load("hf://user/name")`` finds it."""

from __future__ import annotations

from pathlib import Path

from vpt.cli.arguments import Parser


def run(args: list[str]) -> None:
    """Parses the command line and uploads."""
    parser = Parser(prog="vpt push", description=__doc__)
    parser.add_argument("--delta", type=Path, required=True, help="delta.safetensors of a run")
    parser.add_argument("--repo", required=True, help="user/name; made if it is not there")
    parser.add_argument("--private", action="store_true", help="nobody else sees it; refused where it is public")
    parser.add_argument("--endpoint", help="URL of the hub (default: HF_ENDPOINT, or the public one)")
    options = parser.parse_args(args[1:])

    from vpt.hub.client import push

    print(f"pushed to {push(options.delta, options.repo, options.private, options.endpoint)}")
    print(f'load it with vpt.load("hf://{options.repo}")')
