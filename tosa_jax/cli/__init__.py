"""Shared by the commands: parsing of flags, exit status, and the output of `predict`.
The commands themselves are `main`, `prepare`, `predict`, `bench` and `compile_check`.
"""
