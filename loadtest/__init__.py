"""An open-loop load generator for a running server: `prefixd bench`. Extra `[bench]`.

It knows the server by its HTTP API alone; from `server` it takes how a client command finds and addresses one.
"""
