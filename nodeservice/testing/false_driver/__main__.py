"""`python -m nodeservice.testing.false_driver`: pretend GPUs by hand.

build DIR h200x8            then run the node with the environment that it prints
xid DIR UUID 79             while the node runs
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from nodeservice.testing.false_driver.driver import FalseDriver
from nodeservice.testing.false_driver.machines import MACHINES, MIG_PROFILES


def main() -> None:
    options = _parser().parse_args()
    try:
        _run(options, FalseDriver(options.directory))
    except KeyError as error:
        sys.exit(f"error: not there: {error.args[0]}")
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"error: {error}")


def _run(options: argparse.Namespace, driver: FalseDriver) -> None:
    match options.command:
        case "build":
            built = FalseDriver.build(options.directory, options.machine)
            _say(f"# {MACHINES[options.machine].about}", *_devices(built), *_exports(built))
        case "show":
            _say(*_devices(driver), *_exports(driver))
        case "set":
            driver.set(options.device, **dict(_fact(fact) for fact in options.facts))
        case "process":
            driver.add_process(
                options.device, options.pid, options.used_bytes, kind=options.kind, while_alive=options.while_alive
            )
        case "end":
            driver.remove_process(options.device, options.pid)
        case "mig":
            layout = None if options.layout == ["off"] else dict(_place(place) for place in options.layout)
            _say(*driver.set_mig(options.gpu, layout))
        case "xid":
            driver.xid(options.gpu, options.code, gpu_instance=options.gpu_instance)
        case "lose":
            driver.lose(options.gpu)
        case "restore":
            driver.restore(options.gpu)
        case "fail":
            driver.fail(options.call, options.code)
        case "heal":
            driver.heal(options.call)
        case "hang":
            driver.hang(options.seconds, options.calls)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m nodeservice.testing.false_driver", description="Pretend GPUs.")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, about: str, *positional: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=about, description=about)
        added.add_argument("directory", type=Path, metavar="DIR")
        for argument in positional:
            added.add_argument(argument, metavar=argument.upper())
        return added

    machines = "; ".join(f"{machine.name}: {machine.about}" for machine in MACHINES.values())
    build = command("build", f"compile the library and start from a machine. {machines}")
    build.add_argument("machine", choices=sorted(MACHINES), metavar="MACHINE")
    command("show", "list the devices, and the environment that makes a process use them")
    facts = command(
        "set", "set what a GPU tells, such as utilization_percent=37; an empty value: it does not tell it", "device"
    )
    facts.add_argument("facts", nargs="+", metavar="FACT=VALUE")
    process = command("process", "add a process, or give it other figures", "device")
    process.add_argument("pid", type=int)
    process.add_argument("used_bytes", type=int)
    process.add_argument("--kind", choices=["compute", "graphics", "mps"], default="compute")
    process.add_argument("--while-alive", action="store_true", help="forget it when that very process ends")
    command("end", "the process has ended", "device").add_argument("pid", type=int)
    profiles = ", ".join(MIG_PROFILES)
    mig = command("mig", f"split a GPU, or not: `0=3g.71gb 2=1g.18gb` or `off`. Profiles: {profiles}", "gpu")
    mig.add_argument("layout", nargs="+", metavar="INDEX=PROFILE")
    xid = command("xid", "report a critical error", "gpu")
    xid.add_argument("code", type=int)
    xid.add_argument("--gpu-instance", type=int)
    command("lose", "the GPU falls off the bus", "gpu")
    command("restore", "the GPU is back", "gpu")
    command("fail", "an NVML function answers with an error", "call").add_argument("code", type=int)
    command("heal", "take that back", "call")
    hang = command("hang", "calls block for that long; 0 lifts it")
    hang.add_argument("seconds", type=float)
    hang.add_argument("--calls", default="*", help="names with commas between; by default all")
    return parser


def _devices(driver: FalseDriver) -> list[str]:
    migs = driver.migs
    lines = []
    for gpu in driver.gpus:
        lines.append(f"# {gpu}  {driver.facts(gpu)['name']}")
        lines += [f"#   {mig}  {driver.facts(mig)['profile']}" for mig, parent in migs.items() if parent == gpu]
    return lines


def _exports(driver: FalseDriver) -> list[str]:
    return [f"export {name}={shlex.quote(value)}" for name, value in driver.environment.items()]


def _fact(text: str) -> tuple[str, str | None]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"{text} is not FACT=VALUE")
    return name, value or None


def _place(text: str) -> tuple[int, str]:
    index, _, profile = text.partition("=")
    if not index.isdigit() or profile not in MIG_PROFILES:
        raise ValueError(f"{text} is not INDEX=PROFILE; profiles: {', '.join(MIG_PROFILES)}")
    return int(index), profile


def _say(*lines: str) -> None:
    sys.stdout.write("".join(f"{line}\n" for line in lines))


if __name__ == "__main__":
    main()
