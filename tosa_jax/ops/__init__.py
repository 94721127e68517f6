"""The idea in pure functions of arrays: attention, selecting tokens, matching tokens.
Nothing here knows a model, a task or a device mesh.
"""
