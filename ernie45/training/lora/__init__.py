"""Low-rank adapters: small matrices beside frozen ones, on every matrix of a layer, routed experts included."""
