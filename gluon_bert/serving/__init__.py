"""Serves an exported network over HTTP: the requests, the server's handler, and the server itself."""
