"""Where Horovod's workers find each other, as ADDRESS PORT HOST:WORKERS[,...]; tools/launch.py starts it."""

from __future__ import annotations

import sys

from horovod.runner.common.util.hosts import get_host_assignments, parse_hosts
from horovod.runner.http.http_server import RendezvousHandler, RendezvousHTTPServer

if __name__ == "__main__":
    address, port, hosts = sys.argv[1:]
    # Not Horovod's own RendezvousServer, which listens to all addresses, at a port of its choice.
    server = RendezvousHTTPServer((address, int(port)), RendezvousHandler, 0)
    server.init(get_host_assignments(parse_hosts(hosts), 1))
    server.serve_forever()
