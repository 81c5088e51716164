"""Runs the rendezvous server of Horovod's workers. Arguments: ADDRESS PORT HOST:WORKERS[,...]."""

from __future__ import annotations

import sys

from horovod.runner.common.util.hosts import get_host_assignments, parse_hosts
from horovod.runner.http.http_server import RendezvousHandler, RendezvousHTTPServer

if __name__ == "__main__":
    address, port, hosts = sys.argv[1:]
    # Horovod's own RendezvousServer would listen on all addresses, at a random port.
    server = RendezvousHTTPServer((address, int(port)), RendezvousHandler, 0)
    server.init(get_host_assignments(parse_hosts(hosts), 1))
    server.serve_forever()
