"""`gmsa mcp`: memories as tools of an agent."""

import argparse

from gmsa.cli.common import DTYPES, Add, add_merge_size, count, load, packages, size
from gmsa.cli.serve import add_address, keys_of
from gmsa.cli.store import add_place, store_path


def add_commands(add: Add) -> None:
    """Hang the command on the command line."""
    made = add("mcp", mcp, "Give an agent tools to remember, ask, restore and forget long texts (MCP).")
    made.add_argument("model", nargs="?", default="default", metavar="MODEL", help="folder or hub id (bundled model)")
    made.add_argument("--http", action="store_true", help="serve at http://HOST:PORT/mcp; default: standard streams")
    add_address(made)
    add_place(made)
    made.add_argument("--max-store", type=size, metavar="SIZE", help="least recently used memories go beyond it")
    add_merge_size(made)
    made.add_argument("--max-new-tokens", type=count, default=128, metavar="N", help="of an answer (128)")
    made.add_argument("--max-body", type=size, default=8 * 10**6, metavar="SIZE", help="of a request (8M)")
    made.add_argument("--dtype", choices=DTYPES, help="of weights and compute")


def mcp(options: argparse.Namespace) -> None:
    """Run `gmsa mcp`."""
    with packages("an agent's tools need", "mcp"):
        import uvicorn
        from mcp.server import MCPServer  # noqa: F401
    key, file = keys_of(options)
    from gmsa.serve.mcp import http_app, make_server
    from gmsa.serve.server import Announced, listen
    from gmsa.serve.settings import Settings
    from gmsa.serve.tenants import Keys, Stores

    stores = Stores(store_path(options), options.max_store)
    try:
        server = make_server(lambda: load(options), stores, options.merge_size, options.max_new_tokens)
        if options.http:
            app = http_app(server, Settings(max_body=options.max_body), Keys(key, file), options.host)
            config = uvicorn.Config(app, options.host, options.port, log_level="warning", ws="none", access_log=False)
            listen(Announced(config, "/mcp"))
        else:
            server.run("stdio")
    finally:
        stores.close()
