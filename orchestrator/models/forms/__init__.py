"""Modules of compressed linears, and the config that names them."""
