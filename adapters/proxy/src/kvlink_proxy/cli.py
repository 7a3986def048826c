"""The command line: ``kvlink-proxy``, and ``kvlink proxy``."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import Literal

from kvlink_proxy import __version__
from kvlink_proxy.config import ProxyConfig, Receiver, engine_url, pair, receivers


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Names defaults, but only where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def _ports(text: str) -> list[int]:
    try:
        ports = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port or a list of ports like 7300,7301") from None
    if bad := [port for port in ports if not 0 < port < 65536]:
        raise argparse.ArgumentTypeError(f"{bad[0]} is not between 1 and 65535")
    return ports


def _hosts(text: str) -> list[str]:
    hosts = [part.strip() for part in text.split(",")]
    if not all(hosts):
        raise argparse.ArgumentTypeError(f"{text!r} has an empty host name")
    return hosts


def _urls(text: str) -> list[str]:
    try:
        return [engine_url(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def make_parser() -> argparse.ArgumentParser:
    """Build the parser.

    Returns:
        It, with LMCache's example flags and the proxy's own.
    """
    parser = argparse.ArgumentParser(
        prog="kvlink-proxy",
        description="OpenAI-compatible proxy for disaggregated prefill. Example: "
        "kvlink-proxy --port 9100 --prefiller http://127.0.0.1:7100 --decoder http://127.0.0.1:7200",
        formatter_class=_Help,
    )
    defaults = ProxyConfig(("http://localhost",), ("http://localhost",))
    parser.add_argument("--version", action="version", version=f"kvlink-proxy {__version__}")
    parser.add_argument("--host", default=defaults.host, help="address to listen on")
    parser.add_argument("--port", type=int, default=defaults.port, help="port to listen on; 0 takes a free one")
    parser.add_argument("--flow", choices=("native", "lmcache"), help="native, unless --decoder-init-port is given")
    parser.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"), help="how much")

    engines = parser.add_argument_group("engines")
    engines.add_argument("--prefiller", type=_urls, action="extend", metavar="URL[,URL]", help="may be repeated")
    engines.add_argument("--decoder", type=_urls, action="extend", metavar="URL[,URL]", help="may be repeated")

    example = parser.add_argument_group("engines, as in LMCache's disagg_proxy_server.py")
    example.add_argument(
        "--prefiller-host", type=_hosts, default=None, metavar="HOST[,HOST]", help="localhost if absent"
    )
    example.add_argument("--prefiller-port", type=_ports, default=None, metavar="PORT[,PORT]", help="8100 if absent")
    example.add_argument("--num-prefillers", type=int, default=1, help="consecutive ports from one host and port")
    example.add_argument("--decoder-host", type=_hosts, default=None, metavar="HOST[,HOST]", help="localhost if absent")
    example.add_argument("--decoder-port", type=_ports, default=None, metavar="PORT[,PORT]", help="8200 if absent")
    example.add_argument("--num-decoders", type=int, default=1, help="consecutive ports from one host and port")
    for kind, port in (("init", 8300), ("alloc", 8400)):
        example.add_argument(
            f"--decoder-{kind}-port",
            type=_ports,
            action="append",
            metavar="PORT[,PORT]",
            help=f"--flow lmcache: pd_peer_{kind}_port of the decoders, one a tensor-parallel rank; {port} if absent; "
            "repeat it for several decoders on one host",
        )
    example.add_argument(
        "--proxy-host", default=defaults.proxy_host, help="--flow lmcache: where prefillers' messages arrive"
    )
    example.add_argument("--proxy-port", type=int, default=defaults.proxy_port, help="--flow lmcache: its port")

    limits = parser.add_argument_group("failures and limits (seconds unless said)")
    limits.add_argument(
        "--first-token",
        choices=("decoder", "prefiller"),
        default=defaults.first_token,
        help="--flow lmcache: who makes the first token; the prefiller's is sooner, for plain requests only",
    )
    limits.add_argument(
        "--on-prefill-failure", choices=("recompute", "fail"), default="recompute", help="if no prefiller could"
    )
    for name, text in (
        ("connect_timeout", "to connect to an engine"),
        ("prefill_timeout", "for a prefiller's answer"),
        ("first_byte_timeout", "for the first bytes of a decoder's stream"),
        ("chunk_timeout", "between two pieces of a stream"),
        ("answer_timeout", "for a decoder's answer that is not streamed"),
        ("client_timeout", "for a client to send its body or take a piece of an answer"),
        ("lease_seconds", "a hand-off may go to another decoder"),
        ("kv_ready_timeout", "--flow lmcache: from a prefiller's answer until its KV is at the decoder"),
        ("health_interval", "between two health checks"),
        ("health_timeout", "for an engine's answer to one"),
        ("cooldown", "an engine that failed is chosen last"),
        ("drain_seconds", "running requests may go on after SIGTERM"),
    ):
        flag = "--" + name.replace("_", "-")
        limits.add_argument(flag, type=float, default=getattr(defaults, name), metavar="S", help=text)
    limits.add_argument("--max-attempts", type=int, default=defaults.max_attempts, help="engines tried a hop")
    limits.add_argument("--max-concurrent", type=int, default=defaults.max_concurrent, help="requests, else 503")
    limits.add_argument("--max-body-bytes", type=int, default=defaults.max_body_bytes, help="of a request, else 413")
    return parser


def make_config(args: argparse.Namespace) -> ProxyConfig:
    """Make settings of parsed arguments.

    Args:
        args: What :func:`make_parser`'s parser returned.

    Returns:
        The settings.

    Raises:
        ValueError: The arguments do not fit together.
    """
    for role in ("prefiller", "decoder"):
        if getattr(args, role) and (getattr(args, f"{role}_host") or getattr(args, f"{role}_port")):
            raise ValueError(f"give either --{role} or --{role}-host and --{role}-port")
    prefillers = args.prefiller or pair(
        args.prefiller_host or ["localhost"], args.prefiller_port or [8100], args.num_prefillers
    )
    decoders = args.decoder or pair(args.decoder_host or ["localhost"], args.decoder_port or [8200], args.num_decoders)
    flow: Literal["native", "lmcache"] = args.flow or ("lmcache" if args.decoder_init_port else "native")
    counted = not args.decoder and len(args.decoder_host or "1") == 1 and len(args.decoder_port or "1") == 1
    places: tuple[Receiver, ...] = ()
    if flow == "lmcache":
        init, alloc = args.decoder_init_port or [[8300]], args.decoder_alloc_port or [[8400]]
        places = receivers(decoders, init, alloc, counted=counted)
    names = set(ProxyConfig.__dataclass_fields__) - {"prefillers", "decoders", "flow", "receivers"}
    rest = {name: getattr(args, name) for name in names}
    return ProxyConfig(tuple(prefillers), tuple(decoders), flow=flow, receivers=places, **rest)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the proxy.

    Args:
        argv: Arguments after the program's name; None takes the process's.

    Returns:
        Exit status: 0 after a clean end, 1 where it could not start, 2 for arguments that do not work.
    """
    parser = make_parser()
    args = parser.parse_args(argv)
    given = [f"--decoder-{kind}-port" for kind in ("init", "alloc") if getattr(args, f"decoder_{kind}_port")]
    try:
        config = make_config(args)
    except ValueError as error:
        parser.error(str(error))
    logging.basicConfig(
        level=args.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    for noisy in ("httpx", "httpcore", "uvicorn.error"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, logging.getLogger().level))
    if given and config.flow == "native":
        logging.getLogger(__name__).warning("%s has no meaning in --flow native and is ignored", " and ".join(given))

    from kvlink_proxy.server import run

    return run(config)


if __name__ == "__main__":
    sys.exit(main())
