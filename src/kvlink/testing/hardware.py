"""``python -m kvlink.testing.hardware --channel NAME --devices 0,1``: what a provider does on real devices.

It makes a report, for someone who has the hardware to send to somebody who has not. Versions, the symbols that the
vendor's libraries export, the probe, the conformance kit and a benchmark run one after the other, each in a process of
its own with a time limit, so that a hang or a crash costs one step. The report is on disk after every step, with the
end of what the vendor's own logs gained meanwhile.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError, KvlinkError
from ..registry import find, kvlink_version
from .cli import parse_pairs
from .hardware_report import Report, StepResult, run_step
from .hardware_stream import DEVICE_VARIABLE

FACTS = "kvlink.testing.hardware_facts"
STREAM = "kvlink.testing.hardware_stream:make"
HOST_ALIGNMENT = 4096
"""Of host memory that a device may reach, in bytes."""


@dataclass(frozen=True)
class Step:
    """One child process.

    Attributes:
        name: One word.
        limit: Seconds after which it is ended.
        arguments: Of the Python interpreter, after its own options.
        vital: The steps after it make no sense when it fails.
    """

    name: str
    limit: float
    arguments: tuple[str, ...]
    vital: bool = False


@dataclass(frozen=True)
class Plan:
    """What is tested.

    Attributes:
        channel: The provider.
        devices: Kvlink's names of at least two devices: "npu:0".
        options: Of the provider, as KEY=VALUE.
        profile: Of the conformance kit, after "load".
    """

    channel: str
    devices: tuple[str, ...]
    options: tuple[str, ...] = ()
    profile: str = "quick"

    def steps(self) -> list[Step]:
        """Returns the steps in their order: what can go wrong least comes first."""
        devices = ",".join(self.devices)
        options = [part for option in self.options for part in ("--option", option)]
        conform = ["-m", "kvlink.cli", "conform", self.channel, "--devices", devices, *options]
        conform += ["--stream", STREAM, "--plain-alignment", str(HOST_ALIGNMENT)]
        opens = [
            Step(
                f"open-{device.replace(':', '-')}",
                180,
                ("-m", FACTS, "open", "--channel", self.channel, "--device", device, *options),
            )
            for device in self.devices
        ]
        return [
            Step("host", 60, ("-m", FACTS, "host", "--devices", devices)),
            Step("versions", 60, ("-m", FACTS, "versions", "--channel", self.channel)),
            Step("symbols", 120, ("-m", FACTS, "symbols")),
            Step("probe", 90, ("-m", "kvlink.cli", "probe", self.channel), vital=True),
            *opens,
            Step("conform-load", 900, (*conform, "--profile", "load")),
            Step(f"conform-{self.profile}", 5400, (*conform, "--profile", self.profile)),
            Step(
                "bench",
                900,
                ("-m", "kvlink.testing.hardware_bench", "--channel", self.channel, "--devices", devices, *options),
            ),
        ]


def device_names(text: str) -> tuple[str, ...]:
    """Returns kvlink's names of the devices in "0,1" or "npu:0,npu:1".

    Raises:
        ConfigError: There are fewer than two, or one is no device.
    """
    names = tuple(f"npu:{part}" if part.isdigit() else part for part in text.split(",") if part)
    if len(set(names)) < 2:
        raise ConfigError(f"--devices is {text!r}; expected at least two different devices, such as 0,1")
    for name in names:
        kind, colon, number = name.partition(":")
        if not (kind and colon and number.isdigit()):
            raise ConfigError(f"--devices names {name!r}; expected 0 or npu:0")
    return names


def _limits(values: Sequence[str]) -> dict[str, float]:
    limits = {}
    for name, value in parse_pairs(list(values)).items():
        try:
            limits[name] = float(str(value))
        except ValueError:
            raise ConfigError(f"--limit {name}={value}: expected seconds") from None
    return limits


def run_plan(plan: Plan, report: Report, only: Sequence[str] = (), limits: Mapping[str, float] | None = None) -> bool:
    """Runs the steps; returns whether all of them ended well.

    Args:
        plan: What is tested.
        report: Written after every step.
        only: Names of the steps to run; empty = all.
        limits: Seconds by step, instead of the plan's own.

    Raises:
        ConfigError: ``only`` or ``limits`` names no step.
    """
    steps = plan.steps()
    known = [step.name for step in steps]
    for name in (*only, *(limits or {})):
        if name not in known:
            raise ConfigError(f"there is no step {name!r}; the steps are {', '.join(known)}")
    chosen = [step for step in steps if not only or step.name in only]
    reason = ""
    for number, step in enumerate(chosen, 1):
        title = f"{number}/{len(chosen)} {step.name}"
        if reason:
            report.add(title, StepResult(step.name, "skipped", 0.0, reason))
            continue
        limit = (limits or {}).get(step.name, step.limit)
        report.begin(title, limit)
        result = run_step(step.name, [sys.executable, "-X", "faulthandler", *step.arguments], limit, report.folder)
        report.add(title, result)
        if step.vital and result.status != "ok":
            reason = f"the step {step.name!r} failed"
    return report.finish()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs everything.

    Returns:
        0 when every step ended well, 1 when one did not, 2 for wrong input.
    """
    parser = argparse.ArgumentParser(
        prog="python -m kvlink.testing.hardware", description=(__doc__ or "").split(":")[0]
    )
    parser.add_argument("--channel", required=True, metavar="NAME", help="as `kvlink channels` lists it")
    parser.add_argument("--devices", required=True, metavar="0,1", help="at least two, as aclrtSetDevice counts them")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="an option of the provider")
    parser.add_argument("--profile", choices=("quick", "full"), default="quick", help="of the kit (%(default)s)")
    parser.add_argument("--report", metavar="FOLDER", help="default: kvlink-hardware-NAME-TIME here")
    parser.add_argument("--only", action="append", default=[], metavar="STEP", help="only this step; may be repeated")
    parser.add_argument("--limit", action="append", default=[], metavar="STEP=SECONDS", help="another time limit")
    parsed = parser.parse_args(arguments)
    try:
        find(parsed.channel)
        parse_pairs(parsed.option)
        plan = Plan(parsed.channel, device_names(parsed.devices), tuple(parsed.option), parsed.profile)
        limits = _limits(parsed.limit)
        folder = parsed.report or f"kvlink-hardware-{parsed.channel}-{time.strftime('%Y%m%d-%H%M%S')}"
        report = Report(
            Path(folder),
            {
                "channel": plan.channel,
                "devices": list(plan.devices),
                "options": list(plan.options),
                "kvlink": kvlink_version(),
                "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                "process": os.getpid(),
            },
        )
        os.environ[DEVICE_VARIABLE] = plan.devices[0].partition(":")[2]  # the process that runs the kit's cases
        good = run_plan(plan, report, parsed.only, limits)
    except (KvlinkError, OSError) as error:
        print(f"kvlink.testing.hardware: {error}", file=sys.stderr)
        return 2
    print(f"\nThe report is in {report.folder}; please send the whole folder.")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
