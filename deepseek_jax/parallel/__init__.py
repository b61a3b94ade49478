"""The mesh, the sharding rules and the token exchange between devices."""
