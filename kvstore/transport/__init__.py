"""How workers and operators reach the engine: the attach socket with its local RPC, and gRPC."""
