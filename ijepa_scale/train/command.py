"""The command line that all training scripts share."""

from __future__ import annotations

import argparse

from ijepa_scale.config import read_config, to_yaml
from ijepa_scale.config.manual import help_text
from ijepa_scale.registry import load_plugin
from ijepa_scale.train import processes


def launch_from_command_line(description: str, kind: type, main: processes.Main) -> None:
    """Reads flags and configuration (a `kind`), and runs `main` in each process of the run, or prints and stops."""
    flags = _parse(description)
    with processes.user_errors(0):
        for module in flags.plugin:
            load_plugin(module)
        if flags.help_config is not None:
            print(help_text(kind, flags.help_config))
            return
        loaded = read_config(flags.config, flags.overrides, kind=kind)
    if flags.print_config:
        print("\n".join([*(f"# {note}" for note in loaded.notes), to_yaml(loaded.config)]))
    else:
        processes.run(main, loaded.config, loaded.config.engine, devices=flags.devices, processes=flags.processes)


def _parse(description: str) -> argparse.Namespace:
    """Returns the command line's flags."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", "--fname", help="YAML file, ours or a published one")
    parser.add_argument("--help-config", nargs="?", const="", metavar="SECTION", help="explain the settings and stop")
    parser.add_argument(
        "--plugin",
        action="append",
        default=[],
        metavar="MODULE",
        help="module that registers components; can be repeated",
    )
    parser.add_argument("--devices", nargs="+", help="start one process per device, e.g. cuda:0 cuda:1")
    parser.add_argument("--processes", type=int, help="start that many processes on this host")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # appended by the deepspeed launcher
    parser.add_argument("overrides", nargs="*", help="dotted settings, e.g. optimizer.lr=1e-3 data.workers=8")
    flags = parser.parse_intermixed_args()
    if flags.config is None and flags.help_config is None:
        parser.error("--config is missing; name a YAML file, such as configs/demo.yaml")
    flags.overrides += [word for word in flags.devices or () if "=" in word]  # --devices takes all that follows
    flags.devices = [word for word in flags.devices or () if "=" not in word] or None
    return flags
