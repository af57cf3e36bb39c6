"""The command that follows runs: ``watch``."""

import signal
from pathlib import Path
from typing import Annotated

import typer


def watch(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run folders, whether they are there yet or not.")
    ],
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="8765, or the next that is free, unless given; 0 is any.")
    ] = None,
    host: Annotated[str, typer.Option(help="The address to listen at.")] = "127.0.0.1",
) -> None:
    """Serve the report of runs that go on; the page refreshes itself. Ctrl-C ends it, not the runs.

    \b
    distillm watch runs/mine
    distillm watch runs/kd runs/distillm --port 9000

    Only programs of this machine reach it. From elsewhere: ssh -L 8765:127.0.0.1:8765 MACHINE, then open
    http://127.0.0.1:8765/ there.
    """
    from ..report.live import is_loopback, serve

    server = serve(runs, host, 8765 if port is None else port, exactly=port is not None)
    if not is_loopback(host):
        typer.echo(
            f"warning: whoever reaches {host}:{server.server_port} over the network can read these runs", err=True
        )
    typer.echo(server.url)
    # A shell starts what it puts into the background deaf to SIGINT; it is to be ended all the same.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        typer.echo("")
    finally:
        server.server_close()
