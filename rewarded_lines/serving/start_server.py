"""The verb `serve`: a project's policies behind vLLM's own server, in a process that ends with this one."""

from __future__ import annotations

import os
import ssl
import subprocess
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from rewarded_lines.errors import fail
from rewarded_lines.processes import DIE_WITH_PARENT
from rewarded_lines.progress import SILENT, Progress
from rewarded_lines.serving.keep_server import keeping
from rewarded_lines.serving.serve_options import ServeOptions, takes_serve_options
from rewarded_lines.serving.server_plan import WHERE, ServerPlan, plan_server

# Seconds until vLLM answers.
_START = 900.0


class Server:
    """A server that runs in a process of its own. It ends with `close`, with a `with` block, or with this process.

    On Linux it ends with the thread that started it, too.

    Attributes:
        url: without /v1.
        default: the canonical name of the merge for requests that name none, at the start.
        admin_key: for POST /preference; None on a server of adapters.
        told: what the user should know, such as choices that are not served.
    """

    def __init__(self, plan: ServerPlan) -> None:
        """Start the process; `wait_until_ready` waits for it."""
        self.url, self.default, self.admin_key, self.told = plan.url, plan.default, plan.admin_key, plan.told
        environment = {**plan.environment, DIE_WITH_PARENT: str(os.getpid())}
        # Standard output is the caller's.
        self.process = subprocess.Popen(keeping(plan.command), env=environment, start_new_session=True, stdout=2)

    def wait_until_ready(self, seconds: float = _START) -> None:
        """Return once the server answers.

        Raises:
            UserError: it ended, or does not answer in time.
        """
        # No proxy, and no authority for a certificate: the process is this one's own.
        ours = urllib.request.HTTPSHandler(context=ssl._create_unverified_context())
        opener, end = urllib.request.build_opener(urllib.request.ProxyHandler({}), ours), time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            with suppress(OSError), opener.open(f"{self.url}/health", timeout=5) as answer:
                if answer.status == 200:
                    return
            time.sleep(0.2)
        code = self.process.poll()
        got = f"no answer in {seconds:g} s" if code is None else f"exit code {code}"
        raise fail("the server did not start", where=WHERE, got=got, remedy="see what vLLM wrote above")

    def close(self) -> None:
        """End the server and its workers."""
        self.process.terminate()
        self.process.wait()

    def __enter__(self) -> Server:
        """Return the server."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """End the server."""
        self.close()


@takes_serve_options()
def serve(
    run: Path | str | None = None,
    *,
    config: Path | str | None = None,
    options: ServeOptions,
    progress: Progress = SILENT,
) -> Server:
    """Serve a project's policies over vLLM's OpenAI-compatible server; return once it answers.

    Each request says what it prefers: by `preference` in its body, or by the model's name, such as `lines@0.35`. LoRA
    policies are merged by request. Whole policies are one merge for all requests, which POST /preference changes; with
    `rank` they become adapters.

    Args:
        run: the run folder that `sweep` wrote: its chosen points get names, and its front is shown.
        config: the project file; by default the run's, or the one in this folder.
        options: the fields of `ServeOptions`, each by its name.
        progress: receives the steps.

    Raises:
        UserError: any fault of the project, the run or the options, before vLLM starts; or the server ends.
    """
    server = Server(plan_server(run, config, options, progress))
    progress.start("starting vLLM")
    try:
        server.wait_until_ready()
    except BaseException:
        server.close()
        raise
    return server
