"""Lays out a folder like a host with CANN on it, around the simulated libraries.

The folder is a sysroot: it has ``usr/local/Ascend`` (toolkit and driver), ``etc/hccn.conf`` and
``etc/ascend_install.info``. kvlink finds the toolkit by ``ASCEND_HOME_PATH`` and the rest through
``KVLINK_ASCEND_SYSROOT``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

FLAVOURS = ("8.3", "8.5.0", "9.0", "9.1", "devlib")
RELEASES = {"8.3": "8.3.RC1", "8.5.0": "8.5.0", "9.0": "9.0.0", "9.1": "9.1.0", "devlib": "9.1.0"}
# What the libraries of the package say of themselves. Before 8.5 that is an internal number; later it can lag.
RUNTIME_VERSIONS = {"8.3": "7.8.T30.0.B231", "8.5.0": "8.5.0", "9.0": "9.0.0", "9.1": "9.1.0", "devlib": "9.1.0"}
LAGGING = {"8.5.0": "8.5.0-beta.1", "9.1": "9.0.0", "devlib": "9.0.0"}
SOC_NAMES = ("A2", "A3", "950")
# The sides of a link choose RoCE or HCCS by these; both are always set, so that nothing of the caller's leaks in.
LINKS = {
    "roce": {"HCCL_INTRA_ROCE_ENABLE": "1", "HCCL_INTRA_PCIE_ENABLE": "0"},
    "hccs": {"HCCL_INTRA_ROCE_ENABLE": "0", "HCCL_INTRA_PCIE_ENABLE": "1"},
}
DRIVER = Path("usr/local/Ascend/driver")
HAL = "libascend_hal.so"
HCCN_TOOL = """#!/bin/sh
# hccn_tool -i N -ip -g | -tls -g | -link -g, as far as anyone here asks it.
device=$2
address=$(sed -n "s/^address_$device=//p" "{conf}")
case "$3" in
  -ip) [ -n "$address" ] || {{ echo "hccn_tool: no address for device $device" >&2; exit 1; }}
       echo "ipaddr:$address"; echo "netmask:255.255.255.0" ;;
  -tls) echo "dev_id:$device, tls switch[{tls}](0:disable, 1:enable)" ;;
  -link) echo "link status: UP" ;;
  *) echo "usage: hccn_tool -i N -ip|-tls|-link -g" >&2; exit 2 ;;
esac
"""


@dataclass(frozen=True)
class Host:
    """One simulated host.

    Attributes:
        flavour: One of ``FLAVOURS``.
        soc: ``A2``, ``A3``, ``950`` or a full name.
        link: ``roce`` or ``hccs``.
        devices: Number of NPUs.
        physical_ids: Physical id of each logic id; 0, 1, ... when empty.
        number: Of the host; part of the device addresses.
        hdk: Driver version.
        tls: Whether the NICs ask for TLS.
    """

    flavour: str
    soc: str = "A2"
    link: str = "roce"
    devices: int = 1
    physical_ids: tuple[int, ...] = ()
    number: int = 0
    hdk: str = "25.5.0"
    tls: bool = False

    @property
    def physical(self) -> tuple[int, ...]:
        """Physical ids by logic id."""
        return self.physical_ids or tuple(range(self.devices))

    def address(self, physical: int) -> str:
        """The RoCE address of an NPU (the same as settings.cc: device_ip)."""
        return f"192.168.{100 + self.number}.{100 + physical}"


def _write(path: Path, text: str, *, executable: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    if executable:
        path.chmod(0o755)


def _link(path: Path, target: str | Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


def _libraries(source: Path, target: Path) -> None:
    """Links the built libraries of one flavour into a folder of the toolkit."""
    libraries = sorted(source.glob("lib*.so"))
    if not any(library.name == "libascendcl.so" for library in libraries):
        raise FileNotFoundError(
            f"{source} has no libascendcl.so: build the target cann_sim (cmake -DKVLINK_TESTS=ON) and name "
            "<build>/lib/cann_sim"
        )
    target.mkdir(parents=True, exist_ok=True)
    for library in libraries:
        if library.name == HAL and target.name != "devlib":
            continue  # the driver's, not the toolkit's
        _link(target / library.name, library.resolve())


def _set_env(home: Path, driver: Path, fallback: Path) -> str:
    return f"""# Environment of the simulated toolkit, in the shape of the vendor's set_env.sh.
export ASCEND_HOME_PATH={shlex.quote(str(home))}
export ASCEND_TOOLKIT_HOME=$ASCEND_HOME_PATH
export ASCEND_OPP_PATH=$ASCEND_HOME_PATH/opp
export ASCEND_AICPU_PATH=$ASCEND_HOME_PATH
export TOOLCHAIN_HOME=$ASCEND_HOME_PATH/toolkit
driver={shlex.quote(str(driver))}
export LD_LIBRARY_PATH=$ASCEND_HOME_PATH/lib64:$driver/lib64:$driver/lib64/common:$driver/lib64/driver:$LD_LIBRARY_PATH
[ -e $driver/lib64/driver/libascend_hal.so ] || export LD_LIBRARY_PATH=$LD_LIBRARY_PATH:{shlex.quote(str(fallback))}
"""


def _version_files(home: Path, arch: Path, host: Host, *, install_info: bool) -> None:
    flavour = host.flavour
    release, runtime = RELEASES[flavour], RUNTIME_VERSIONS[flavour]
    if install_info:
        lines = ["package_name=Ascend-cann-toolkit", f"version={release}"]
        if flavour == "8.3":
            lines += ["innerversion=V100R001C23SPC001B231", "compatible_version=[V100R001C21],[V100R001C23]"]
        lines += [f"arch={platform.machine()}", "os=linux", f"path={arch}"]
        _write(arch / "ascend_toolkit_install.info", "\n".join(lines) + "\n")
    packages = (
        ["runtime", "hccl", "compiler"]
        if flavour == "8.3"
        else ["runtime", "hccl", "compiler", "hcomm", "hixl", "metadef"]
    )
    for package in packages:
        version = LAGGING.get(flavour, runtime) if package in ("hcomm", "hixl", "metadef") else runtime
        text = f"Version={version}\n"
        if flavour != "8.3":
            text += f'version_dir=cann\nrequired_package_runtime_version=">={version}"\ntimestamp=20260101_000000000\n'
        _write(home / "share" / "info" / package / "version.info", text)
    running = "".join(
        f"{package}_running_version=[{runtime}:{release}]\n" for package in ("runtime", "hccl", "toolkit")
    )
    _write(home / "version.cfg", "# version: 1.0\n" + running)


def _driver(root: Path, host: Host, built: Path, *, mounted: bool) -> None:
    driver = root / DRIVER
    conf = root / "etc" / "hccn.conf"
    lines = [f"address_{p}={host.address(p)}\nnetmask_{p}=255.255.255.0\n" for p in host.physical]
    _write(conf, "".join(lines))
    _write(root / "etc" / "ascend_install.info", "UserName=HwHiAiUser\nDriver_Install_Path_Param=/usr/local/Ascend\n")
    if not mounted:
        return
    _write(
        driver / "version.info",
        f"Version={host.hdk}\nascendhal_version=7.35.23\nInnerversion=V100R001C25SPC001B100\n"
        f"compatible_version=[V100R001C23],[V100R001C25]\npackage_version={host.hdk}\n",
    )
    for folder in ("lib64/common", "lib64/driver"):
        (driver / folder).mkdir(parents=True, exist_ok=True)
    _link(driver / "lib64" / "driver" / HAL, built / host.flavour / HAL)
    _write(driver / "tools" / "hccn_tool", HCCN_TOOL.format(conf=conf, tls=int(host.tls)), executable=True)


def install(
    flavour: str,
    soc: str = "A2",
    link: str = "roce",
    devices: int = 1,
    *,
    libs: str | os.PathLike[str],
    out: str | os.PathLike[str],
    physical_ids: tuple[int, ...] = (),
    host: int = 0,
    net: str | None = None,
    hdk: str = "25.5.0",
    tls: bool = False,
    driver: bool = True,
    install_info: bool = True,
    prepare: bool = True,
) -> dict[str, str]:
    """Lays out one simulated host.

    Args:
        flavour: CANN flavour, one of ``FLAVOURS``; ``devlib`` resolves to link-time stubs.
        soc: ``A2``, ``A3``, ``950`` or a full name such as ``Ascend910_9382``.
        link: ``roce`` or ``hccs``; becomes the HCCL_INTRA_* variables.
        devices: Number of NPUs.
        libs: Folder with the built flavours, ``<build>/lib/cann_sim``.
        out: Folder to make; what is there is replaced when it was made by this function.
        physical_ids: Physical id of each logic id; 0, 1, ... when empty.
        host: Number of the host, part of its device addresses; two hosts of a test differ in it.
        net: Name of the network; processes reach each other's NICs when it is equal. A fresh one by default.
        hdk: Driver version; below 25.5 the NIC registers at most 20 GB of host memory.
        tls: Whether the NICs ask for TLS.
        driver: False leaves the driver out, as in a build container.
        install_info: False leaves ascend_toolkit_install.info out, as in an image of single packages.
        prepare: False takes a libhccl.so without HcclCommPrepare, as an older 8.x may have it; flavour 8.3 only.

    Returns:
        The environment to add to a process's own.

    Raises:
        ValueError: For an unknown flavour, link, or count of physical ids, or ``prepare=False`` of another flavour.
        FileNotFoundError: When ``libs`` has no such build.
    """
    if flavour not in FLAVOURS:
        raise ValueError(f"flavour is {flavour!r}; expected one of {', '.join(FLAVOURS)}")
    if link not in LINKS:
        raise ValueError(f"link is {link!r}; expected roce or hccs")
    if physical_ids and len(physical_ids) != devices:
        raise ValueError(f"{len(physical_ids)} physical ids for {devices} devices; give one each")
    if not prepare and flavour != "8.3":
        raise ValueError(f"prepare=False is an older 8.3, the flavour is {flavour}")
    made = Host(flavour, soc, link, devices, tuple(physical_ids), host, hdk, tls)
    root = Path(out).resolve()
    marker = root / ".cann_sim"
    if root.exists():
        if any(root.iterdir()) and not marker.exists():
            raise ValueError(f"{root} exists and is no simulated host; give another --out")
        shutil.rmtree(root)
    root.mkdir(parents=True)
    marker.write_text(f"{flavour} {soc} {link} {devices}\n")

    ascend = root / "usr" / "local" / "Ascend"
    release = RELEASES[flavour]
    if flavour == "8.3":
        real, home = ascend / "ascend-toolkit" / release, ascend / "ascend-toolkit" / "latest"
        set_env = home.parent / "set_env.sh"  # one level above ASCEND_HOME_PATH
    else:
        real, home = ascend / f"cann-{release}", ascend / "cann"
        set_env = real / "set_env.sh"
    arch = real / f"{platform.machine()}-linux"
    built = Path(libs).resolve()
    # The driver stubs of flavour devlib stand where a process without a driver would find them.
    _libraries(built / flavour, arch / "lib64")
    if not prepare:
        (arch / "lib64" / "libhccl.so").unlink()
        _link(arch / "lib64" / "libhccl.so", built / "no_prepare" / "libhccl.so")
    if flavour != "devlib" and (built / "devlib").is_dir():
        _libraries(built / "devlib", real / "devlib")
    (arch / "include").mkdir()
    for name in ("include", "lib64"):
        _link(real / name, Path(arch.name) / name)
    _link(home, real.name)
    _write(set_env, _set_env(home, root / DRIVER, real / "devlib"))
    _version_files(real, arch, made, install_info=install_info)
    _driver(root, made, built, mounted=driver)

    inherited = os.environ.get("LD_LIBRARY_PATH", "")
    drivers = [root / DRIVER / part for part in ("lib64", "lib64/common", "lib64/driver")]
    return {
        "ASCEND_HOME_PATH": str(home),
        "ASCEND_TOOLKIT_HOME": str(home),
        "LD_LIBRARY_PATH": ":".join([str(home / "lib64"), *map(str, drivers), *filter(None, [inherited])]),
        "KVLINK_ASCEND_SYSROOT": str(root),
        "CANN_SIM_ROOT": str(root),
        "CANN_SIM_NET": net or uuid.uuid4().hex[:12],
        "CANN_SIM_HOST": str(host),
        "CANN_SIM_SOC": soc,
        "CANN_SIM_DEVICES": str(devices),
        "CANN_SIM_PHYSICAL_IDS": ",".join(map(str, made.physical)),
        "CANN_SIM_HDK": hdk,
        "CANN_SIM_TLS": str(int(tls)),
        **LINKS[link],
    }


def main(arguments: list[str] | None = None) -> None:
    """Command line of ``install``; prints the environment."""
    parser = argparse.ArgumentParser(prog="python -m tests.cann_sim.install", description=__doc__)
    parser.add_argument("--flavour", required=True, choices=FLAVOURS)
    parser.add_argument("--soc", default="A2")
    parser.add_argument("--link", default="roce", choices=sorted(LINKS))
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--libs", required=True, help="<build>/lib/cann_sim")
    parser.add_argument("--out", required=True)
    parser.add_argument("--physical-ids", default="", help="6,7: physical id of each device")
    parser.add_argument("--host", type=int, default=0)
    parser.add_argument("--net")
    parser.add_argument("--hdk", default="25.5.0")
    parser.add_argument("--tls", action="store_true")
    parser.add_argument("--no-driver", action="store_true")
    parser.add_argument("--no-install-info", action="store_true")
    parser.add_argument("--shell", action="store_true", help="print export lines instead of JSON")
    options = parser.parse_args(arguments)
    environment = install(
        options.flavour,
        options.soc,
        options.link,
        options.devices,
        libs=options.libs,
        out=options.out,
        physical_ids=tuple(int(p) for p in options.physical_ids.split(",") if p),
        host=options.host,
        net=options.net,
        hdk=options.hdk,
        tls=options.tls,
        driver=not options.no_driver,
        install_info=not options.no_install_info,
    )
    if options.shell:
        print("\n".join(f"export {name}={shlex.quote(value)}" for name, value in environment.items()))
    else:
        print(json.dumps(environment, indent=2))


if __name__ == "__main__":
    main()
