"""What the commands share: flags, exit status, and what `predict` prints.
The commands themselves are `main`, `prepare`, `predict`, `bench` and `compile_check`.
"""
